// Package request defines the stored form of a request. Attempts use the stored form, and
// operators can print it.
package request

import (
	"bytes"
	"errors"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"github.com/fxamacker/cbor/v2"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Request has the data of the sender's request that an attempt needs. Even the first attempt
// uses a Request, so that all attempts get the same data.
//
// Some data is not stored: the captures of regular expressions, the certificates of
// clients, and the placeholders of a map directive in front of the queue. Directives in
// the deliver block run in each attempt, so they can set such data.
type Request struct {
	Method     string      `json:"method"`
	Target     Target      `json:"target"`   // after rewrites
	Original   Target      `json:"original"` // as the sender sent it
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	Header     http.Header `json:"header"`
	RemoteAddr string      `json:"remote_addr"`
	Local      *Address    `json:"local,omitempty"`
	TLS        *Connection `json:"tls,omitempty"`

	// Vars has the variables of the request with plain values, for example the address of
	// the client.
	Vars map[string]any `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	Body []byte `json:"-"`
}

// Target has the parts of the URL of a request. One string is not enough, because
// the path may start with two slashes.
type Target struct {
	URI      string `json:"uri"`
	Path     string `json:"path"`
	RawPath  string `json:"raw_path,omitempty"`
	RawQuery string `json:"raw_query,omitempty"`

	// ForceQuery is true for a URL that ends in a question mark.
	ForceQuery bool `json:"force_query,omitempty"`
}

// NewTarget returns the target of a request with this URI and this URL.
func NewTarget(uri string, u *url.URL) Target {
	return Target{uri, u.Path, u.RawPath, u.RawQuery, u.ForceQuery}
}

// URL returns the target as a URL.
func (t Target) URL() *url.URL {
	return &url.URL{Path: t.Path, RawPath: t.RawPath, RawQuery: t.RawQuery, ForceQuery: t.ForceQuery}
}

// Address is a net.Addr that can be stored.
type Address struct {
	Net  string `json:"network"`
	Addr string `json:"address"`
}

func (a *Address) Network() string { return a.Net }
func (a *Address) String() string  { return a.Addr }

// Connection has the data of a TLS connection that placeholders and matchers use.
type Connection struct {
	Version     uint16 `json:"version"`
	CipherSuite uint16 `json:"cipher_suite"`
	ServerName  string `json:"server_name,omitempty"`
	Protocol    string `json:"protocol,omitempty"`
	Early       bool   `json:"early,omitempty"` // whether the request came in TLS early data, which an attacker can replay
}

// decoding reads the stored form. Unlike JSON, CBOR keeps strings that are not UTF-8, such
// as a path with %FF. It also keeps the type of a number, so a placeholder shows 1000000 and
// not 1e+06.
var decoding, _ = cbor.DecOptions{
	UTF8: cbor.UTF8DecodeInvalid, IntDec: cbor.IntDecConvertSignedOrFail,
	MaxArrayElements: math.MaxInt32, MaxMapPairs: math.MaxInt32, // net/http limits the number of fields
}.DecMode()

// Encode returns the stored form: the request as CBOR (RFC 8949), then the body.
func (r *Request) Encode() ([]byte, error) {
	head, err := cbor.Marshal(r)
	return append(head, r.Body...), err
}

// Decode returns the request of a record, or an error if the record is damaged.
func Decode(rec *store.Record) (*Request, error) {
	if !bytes.Equal(rec.Checksum, rec.Sum()) {
		return nil, errors.New("the checksum does not match")
	}
	r := &Request{Header: make(http.Header)}
	body, err := decoding.UnmarshalFirst(rec.Request, r)
	if err != nil {
		return nil, errors.New("the stored request is not valid CBOR") // err would show a part of the request
	}
	r.Body = body
	return r, nil
}

// Redact removes the signature and credentials, because they allow a replay.
func (r *Request) Redact() {
	for _, field := range []string{"Inkit-Signature", "Authorization", "Proxy-Authorization", "Cookie"} {
		if _, ok := r.Header[field]; ok {
			r.Header[field] = []string{"REDACTED"}
		}
	}
}

// Printable replaces control characters and invisible characters, because they can control
// a terminal. It keeps the characters in the argument keep.
func Printable(s string, keep ...rune) string {
	return strings.Map(func(r rune) rune {
		invisible := unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) || r == '\u2800'
		if unicode.IsPrint(r) && !invisible || slices.Contains(keep, r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
