// Package request is the stored form of a request: what an attempt is made from, and what
// an operator is shown of it.
package request

import (
	"bytes"
	"encoding/gob"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Request is what an attempt needs of the request that brought an event. Every
// attempt is made from it, the first one too, so that all of them are the same.
//
// What does not come back is what only lived in the request: regular expressions that
// matched, certificates of clients, and what a map directive in front of the queue has
// set. Directives in the deliver block are not concerned. It is stored by encoding/gob,
// in which texts that are not UTF-8 and the types of variables come back.
type Request struct {
	Method     string      `json:"method"`
	Target     Target      `json:"target"`   // as it is, rewrites included
	Original   Target      `json:"original"` // as it arrived
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	Header     http.Header `json:"header"`
	RemoteAddr string      `json:"remote_addr"`
	Local      *Address    `json:"local,omitempty"`
	TLS        *Connection `json:"tls,omitempty"`

	// Vars are the variables of the request that are plain values. The address of the
	// client is one of them, as Caddy saw it then.
	Vars map[string]any `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	Body []byte `json:"-"`
}

// Target is what a URL holds in a request to a server. Its text alone would not do: a
// path may start with two slashes.
type Target struct {
	URI      string `json:"uri"`
	Path     string `json:"path"`
	RawPath  string `json:"raw_path,omitempty"`
	RawQuery string `json:"raw_query,omitempty"`

	// ForceQuery says that there is a question mark and nothing behind it.
	ForceQuery bool `json:"force_query,omitempty"`
}

// NewTarget returns the target of a URL.
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

// Connection is what placeholders and matchers ask of a TLS connection.
type Connection struct {
	Version     uint16 `json:"version"`
	CipherSuite uint16 `json:"cipher_suite"`
	ServerName  string `json:"server_name,omitempty"`
	Protocol    string `json:"protocol,omitempty"`
	Early       bool   `json:"early,omitempty"` // it was early data, which can be replayed
}

// Encode returns the stored form: the request, then its body.
func (r *Request) Encode() ([]byte, error) {
	head, body := *r, r.Body
	head.Body = nil
	var encoded bytes.Buffer
	if err := gob.NewEncoder(&encoded).Encode(head); err != nil {
		return nil, err
	}
	return append(encoded.Bytes(), body...), nil
}

// Decode returns the request of a record, if it is the one that was stored.
func Decode(rec *store.Record) (*Request, error) {
	if !bytes.Equal(rec.Checksum, rec.Sum()) {
		return nil, errors.New("the checksum does not match")
	}
	rest := bytes.NewReader(rec.Request) // gob reads no more of it than it needs
	r := &Request{Header: make(http.Header)}
	if err := gob.NewDecoder(rest).Decode(r); err != nil {
		return nil, errors.New("the stored request cannot be read") // whose error may show a part of it
	}
	r.Body = rec.Request[len(rec.Request)-rest.Len():]
	return r, nil
}

// Redact takes out what a replay would need: the signature, and credentials.
func (r *Request) Redact() {
	for _, field := range []string{"Inkit-Signature", "Authorization", "Proxy-Authorization", "Cookie"} {
		if _, ok := r.Header[field]; ok {
			r.Header[field] = []string{"REDACTED"}
		}
	}
}

// Printable replaces what would have a terminal do something, except for the characters
// in keep.
func Printable(s string, keep ...rune) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || slices.Contains(keep, r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
