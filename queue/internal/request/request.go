// Package request is the stored form of a request: what an attempt is made from, and what
// an operator is shown of it.
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

// Request is what an attempt needs of the request that brought an event. Every
// attempt is made from it, the first one too, so that all of them are the same.
//
// What does not come back is what only lived in the request: regular expressions that
// matched, certificates of clients, and what a map directive in front of the queue has
// set. Directives in the deliver block are not concerned.
type Request struct {
	Method     string      `json:"method"`
	Target     Target      `json:"target"`   // as it is, rewrites included
	Original   Target      `json:"original"` // as it arrived
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	Header     Fields      `json:"header"`
	RemoteAddr string      `json:"remote_addr"`
	Local      *Address    `json:"local,omitempty"`
	TLS        *Connection `json:"tls,omitempty"`

	// Vars are the variables of the request that are plain values. The address of the
	// client is one of them, as Caddy saw it then.
	Vars Vars `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	Body []byte `json:"-"`
}

// Target is what a URL holds in a request to a server. Its Text alone would not do: a
// path may start with two slashes.
type Target struct {
	URI      Text `json:"uri"`
	Path     Text `json:"path"`
	RawPath  Text `json:"raw_path,omitempty"`
	RawQuery Text `json:"raw_query,omitempty"`

	// ForceQuery says that there is a question mark and nothing behind it.
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

// Text is a string that comes back as it was, though it may not be UTF-8, as a path
// with %FF in it and header fields of old programs are not. JSON would change it.
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

// Fields is a header of which each line is a text.
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

// Vars are plain values of which each comes back with its type: a placeholder shows
// 1000000 and not 1e+06.
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

// Connection is what placeholders and matchers ask of a TLS connection.
type Connection struct {
	Version     uint16 `json:"version"`
	CipherSuite uint16 `json:"cipher_suite"`
	ServerName  string `json:"server_name,omitempty"`
	Protocol    string `json:"protocol,omitempty"`
	Early       bool   `json:"early,omitempty"` // it was early data, which can be replayed
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

// Decode returns the request of a record, if it is the one that was stored.
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
		return nil, errors.New("the stored request is not the JSON that it was") // whose error shows a part of it
	}
	if r.Header == nil {
		r.Header = make(Fields)
	}
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
