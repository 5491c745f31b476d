package queue

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"time"
	"unicode/utf8"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// request is what an attempt needs of the request that brought an event. Every
// attempt is made from it, the first one too, so that all of them are the same.
//
// What does not come back is what only lived in the request: regular expressions that
// matched, certificates of clients, and what a map directive in front of the queue has
// set. Directives in the deliver block are not concerned.
type request struct {
	Method     string      `json:"method"`
	Target     target      `json:"target"`   // as it is, rewrites included
	Original   target      `json:"original"` // as it arrived
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	Header     fields      `json:"header"`
	RemoteAddr string      `json:"remote_addr"`
	Local      *address    `json:"local,omitempty"`
	TLS        *connection `json:"tls,omitempty"`

	// Vars are the variables of the request that are plain values. The address of the
	// client is one of them, as Caddy saw it then.
	Vars vars `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	body []byte
}

// target is what a URL holds in a request to a server. Its text alone would not do: a
// path may start with two slashes.
type target struct {
	URI      text `json:"uri"`
	Path     text `json:"path"`
	RawPath  text `json:"raw_path,omitempty"`
	RawQuery text `json:"raw_query,omitempty"`

	// ForceQuery says that there is a question mark and nothing behind it.
	ForceQuery bool `json:"force_query,omitempty"`
}

func newTarget(uri string, u *url.URL) target {
	return target{text(uri), text(u.Path), text(u.RawPath), text(u.RawQuery), u.ForceQuery}
}

func (t target) url() *url.URL {
	return &url.URL{Path: string(t.Path), RawPath: string(t.RawPath), RawQuery: string(t.RawQuery), ForceQuery: t.ForceQuery}
}

// text is a string that comes back as it was, though it may not be UTF-8, as a path
// with %FF in it and header fields of old programs are not. JSON would change it.
type text string

func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(map[string][]byte{"base64": []byte(t)})
}

func (t *text) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '{' {
		var encoded struct {
			Bytes []byte `json:"base64"`
		}
		err := json.Unmarshal(b, &encoded)
		*t = text(encoded.Bytes)
		return err
	}
	return json.Unmarshal(b, (*string)(t))
}

// fields is a header of which each line is a text.
type fields http.Header

func (f fields) MarshalJSON() ([]byte, error) {
	lines := make(map[string][]text, len(f))
	for field, values := range f {
		for _, value := range values {
			lines[field] = append(lines[field], text(value))
		}
	}
	return json.Marshal(lines)
}

func (f *fields) UnmarshalJSON(b []byte) error {
	var lines map[string][]text
	err := json.Unmarshal(b, &lines)
	*f = make(fields, len(lines))
	for field, values := range lines {
		for _, value := range values {
			(*f)[field] = append((*f)[field], string(value))
		}
	}
	return err
}

// vars are plain values of which each comes back with its type: a placeholder shows
// 1000000 and not 1e+06.
type vars map[string]any

func (v vars) MarshalJSON() ([]byte, error) {
	values := maps.Clone(v)
	for name, value := range values {
		if value, ok := value.(string); ok {
			values[name] = text(value)
		}
	}
	return json.Marshal(map[string]any(values))
}

func (v *vars) UnmarshalJSON(b []byte) error {
	var values map[string]json.RawMessage
	err := json.Unmarshal(b, &values)
	*v = make(vars, len(values))
	for name, encoded := range values {
		var number int
		var str text
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

// address is a net.Addr that can be stored.
type address struct {
	Net  string `json:"network"`
	Addr string `json:"address"`
}

func (a *address) Network() string { return a.Net }
func (a *address) String() string  { return a.Addr }

// connection is what placeholders and matchers ask of a TLS connection.
type connection struct {
	Version     uint16 `json:"version"`
	CipherSuite uint16 `json:"cipher_suite"`
	ServerName  string `json:"server_name,omitempty"`
	Protocol    string `json:"protocol,omitempty"`
	Early       bool   `json:"early,omitempty"` // it was early data, which can be replayed
}

// newRequest takes what is needed of a request, and of the event in it.
func newRequest(r *http.Request, e *event.Event) *request {
	original := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	stored := &request{
		Method:         r.Method,
		Target:         newTarget(r.RequestURI, r.URL),
		Original:       newTarget(original.RequestURI, original.URL),
		Proto:          r.Proto,
		Host:           r.Host,
		Header:         fields(r.Header.Clone()),
		RemoteAddr:     r.RemoteAddr,
		Vars:           make(vars),
		SecretName:     e.SecretName,
		IdempotencyKey: e.IdempotencyKey,
		body:           e.Body,
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		stored.Local = &address{local.Network(), local.String()}
	}
	if r.TLS != nil {
		stored.TLS = &connection{r.TLS.Version, r.TLS.CipherSuite, r.TLS.ServerName, r.TLS.NegotiatedProtocol, !r.TLS.HandshakeComplete}
	}
	all, _ := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	for name, value := range all {
		switch value := value.(type) {
		case string, bool, int, int64:
			stored.Vars[name] = value
		case float64:
			if !math.IsNaN(value) && !math.IsInf(value, 0) { // JSON has none of these
				stored.Vars[name] = value
			}
		}
	}
	delete(stored.Vars, "unhandled") // which is of one run of the handlers
	return stored
}

// encode returns the stored form: the length of the head, the head as JSON, the body.
func (r *request) encode() ([]byte, error) {
	head, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	encoded := binary.AppendUvarint(make([]byte, 0, binary.MaxVarintLen64+len(head)+len(r.body)), uint64(len(head)))
	encoded = append(encoded, head...)
	return append(encoded, r.body...), nil
}

// decodeRequest returns the request of a record, if it is the one that was stored.
func decodeRequest(rec *store.Record) (*request, error) {
	if !bytes.Equal(rec.Checksum, rec.Sum()) {
		return nil, errors.New("the checksum does not match")
	}
	length, n := binary.Uvarint(rec.Request)
	if n <= 0 || length > uint64(len(rec.Request)-n) {
		return nil, errors.New("the stored request is cut short")
	}
	r := &request{body: rec.Request[n+int(length):]}
	if err := json.Unmarshal(rec.Request[n:n+int(length)], r); err != nil {
		return nil, errors.New("the stored request is not the JSON that it was") // whose error shows a part of it
	}
	if r.Header == nil {
		r.Header = make(fields)
	}
	return r, nil
}

// prepare makes the request of one attempt. Nothing of it is shared with another.
func (r *request) prepare(ctx context.Context, server *caddyhttp.Server, w http.ResponseWriter, rec *store.Record) *http.Request {
	if r.Local != nil {
		ctx = context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(r.Local))
	} else {
		ctx = context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(&address{"tcp", ""})) // Caddy's placeholders panic without
	}
	req := (&http.Request{
		Method: r.Method, URL: r.Original.url(), RequestURI: string(r.Original.URI), Host: r.Host,
		Proto: r.Proto, Header: http.Header(r.Header).Clone(), RemoteAddr: r.RemoteAddr,
		ContentLength: int64(len(r.body)),
		Body:          io.NopCloser(bytes.NewReader(r.body)),
		GetBody:       func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(r.body)), nil },
	}).WithContext(ctx)
	req.ProtoMajor, req.ProtoMinor, _ = http.ParseHTTPVersion(r.Proto)
	if r.TLS != nil {
		req.TLS = &tls.ConnectionState{
			Version: r.TLS.Version, CipherSuite: r.TLS.CipherSuite, ServerName: r.TLS.ServerName,
			NegotiatedProtocol: r.TLS.Protocol, HandshakeComplete: !r.TLS.Early,
		}
	}
	repl := caddy.NewReplacer()
	req = caddyhttp.PrepareRequest(req, repl, w, server)
	req.URL, req.RequestURI = r.Target.url(), string(r.Target.URI)
	for name, value := range r.Vars {
		caddyhttp.SetVar(req.Context(), name, value)
	}
	(&event.Event{Outcome: event.Verified, Body: r.body, SecretName: r.SecretName, IdempotencyKey: r.IdempotencyKey}).Attach(req.Context())
	repl.Set("http.inkit_queue.id", rec.ID)
	repl.Set("http.inkit_queue.attempt", rec.Attempts)
	repl.Set("http.inkit_queue.received", rec.Received.UTC().Format(time.RFC3339))
	return req
}
