// Package request is the stored form of a request: attempts use it, and operators can
// print it.
package request

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Request has the data of the sender's request that an attempt needs. Every attempt uses
// it, even the first one, so that all attempts are the same.
//
// Some data is not stored: the captures of regular expressions, the certificates of
// clients, and the placeholders of a map directive in front of the queue. Directives in
// the deliver block work in each attempt.
type Request struct {
	Method     string      `json:"method"`
	Target     Target      `json:"target"`   // after rewrites
	Original   Target      `json:"original"` // as the sender sent it
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	Header     Fields      `json:"header"`
	RemoteAddr string      `json:"remote_addr"`
	Local      *Address    `json:"local,omitempty"`
	TLS        *Connection `json:"tls,omitempty"`

	// Vars are the variables of the request with plain values. One of them is the address
	// of the client.
	Vars Vars `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	Body []byte `json:"-"`
}

// Target has the parts of the URL of a request. A single Text would not be enough: the path
// may start with two slashes.
type Target struct {
	URI      Text `json:"uri"`
	Path     Text `json:"path"`
	RawPath  Text `json:"raw_path,omitempty"`
	RawQuery Text `json:"raw_query,omitempty"`

	// ForceQuery is true for a URL that ends in a question mark.
	ForceQuery bool `json:"force_query,omitempty"`
}

// NewTarget returns the target of a URL.
func NewTarget(uri string, u *url.URL) Target {
	return Target{Text(uri), Text(u.Path), Text(u.RawPath), Text(u.RawQuery), u.ForceQuery}
}

// URL returns the target as a URL.
func (t Target) URL() *url.URL {
	return &url.URL{Path: string(t.Path), RawPath: string(t.RawPath), RawQuery: string(t.RawQuery), ForceQuery: t.ForceQuery}
}

// Text is a string that is stored unchanged even if it is not UTF-8, such as a path with
// %FF or a header field of an old program. JSON would change it.
type Text string

func (t Text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(map[string][]byte{"base64": []byte(t)})
}

func (t *Text) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var encoded struct {
			Bytes []byte `json:"base64"`
		}
		err := json.Unmarshal(b, &encoded)
		*t = Text(encoded.Bytes)
		return err
	}
	return json.Unmarshal(b, (*string)(t))
}

// Fields is a header whose values are stored as Text.
type Fields http.Header

func (f Fields) MarshalJSON() ([]byte, error) {
	lines := make(map[string][]Text, len(f))
	for field, values := range f {
		for _, value := range values {
			lines[field] = append(lines[field], Text(value))
		}
	}
	return json.Marshal(lines)
}

func (f *Fields) UnmarshalJSON(b []byte) error {
	var lines map[string][]Text
	err := json.Unmarshal(b, &lines)
	*f = make(Fields, len(lines))
	for field, values := range lines {
		for _, value := range values {
			(*f)[field] = append((*f)[field], string(value))
		}
	}
	return err
}

// Vars are plain values that are stored with their types: a placeholder shows 1000000
// and not 1e+06.
type Vars map[string]any

func (v Vars) MarshalJSON() ([]byte, error) {
	values := maps.Clone(v)
	for name, value := range values {
		if value, ok := value.(string); ok {
			values[name] = Text(value)
		}
	}
	return json.Marshal(map[string]any(values))
}

func (v *Vars) UnmarshalJSON(b []byte) error {
	var values map[string]json.RawMessage
	err := json.Unmarshal(b, &values)
	*v = make(Vars, len(values))
	for name, encoded := range values {
		var number int
		var str Text
		var other any
		switch {
		case json.Unmarshal(encoded, &number) == nil:
			(*v)[name] = number
		case json.Unmarshal(encoded, &str) == nil:
			(*v)[name] = string(str)
		case json.Unmarshal(encoded, &other) == nil:
			(*v)[name] = other
		}
	}
	return err
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
	Early       bool   `json:"early,omitempty"` // early data, which can be replayed
}

// Encode returns the stored form: the length of the head, the head as JSON, the body.
func (r *Request) Encode() ([]byte, error) {
	head, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	encoded := binary.AppendUvarint(make([]byte, 0, binary.MaxVarintLen64+len(head)+len(r.Body)), uint64(len(head)))
	encoded = append(encoded, head...)
	return append(encoded, r.Body...), nil
}

// Decode returns the request of a record. A damaged one is an error.
func Decode(rec *store.Record) (*Request, error) {
	if !bytes.Equal(rec.Checksum, rec.Sum()) {
		return nil, errors.New("the checksum does not match")
	}
	length, n := binary.Uvarint(rec.Request)
	if n <= 0 || length > uint64(len(rec.Request)-n) {
		return nil, errors.New("the stored request is cut short")
	}
	r := &Request{Body: rec.Request[n+int(length):]}
	if err := json.Unmarshal(rec.Request[n:n+int(length)], r); err != nil {
		return nil, errors.New("the stored request is not valid JSON") // err would show a part of it
	}
	if r.Header == nil {
		r.Header = make(Fields)
	}
	return r, nil
}

// Redact removes the signature and credentials, which a replay would need.
func (r *Request) Redact() {
	for _, field := range []string{"Inkit-Signature", "Authorization", "Proxy-Authorization", "Cookie"} {
		if _, ok := r.Header[field]; ok {
			r.Header[field] = []string{"REDACTED"}
		}
	}
}

// Printable replaces control characters, which a terminal would obey, except for those in
// keep.
func Printable(s string, keep ...rune) string {
	return strings.Map(func(r rune) rune {
		invisible := unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) || r == '\u2800'
		if unicode.IsPrint(r) && !invisible || slices.Contains(keep, r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
