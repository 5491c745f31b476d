package queue

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/gob"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"time"

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
// set. Directives in the deliver block are not concerned. It is stored by encoding/gob,
// in which texts that are not UTF-8 and the types of variables come back; caddy
// inkit-queue show shows it as JSON.
type request struct {
	Method     string       `json:"method"`
	Target     target       `json:"target"`   // as it is, rewrites included
	Original   target       `json:"original"` // as it arrived
	Proto      string       `json:"proto"`
	Host       string       `json:"host"`
	Header     http.Header  `json:"header"`
	RemoteAddr string       `json:"remote_addr"`
	Local      net.UnixAddr `json:"local,omitzero"` // of any network, empty if it is not known
	TLS        *connection  `json:"tls,omitempty"`

	// Vars are the variables of the request that are plain values. The address of the
	// client is one of them, as Caddy saw it then.
	Vars map[string]any `json:"vars,omitempty"`

	SecretName     string `json:"secret_name,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	body []byte
}

// target is what a URL holds in a request to a server. Its text alone would not do: a
// path may start with two slashes.
type target struct {
	URI      string `json:"uri"`
	Path     string `json:"path"`
	RawPath  string `json:"raw_path,omitempty"`
	RawQuery string `json:"raw_query,omitempty"`

	// ForceQuery says that there is a question mark and nothing behind it.
	ForceQuery bool `json:"force_query,omitempty"`
}

func newTarget(uri string, u *url.URL) target {
	return target{uri, u.Path, u.RawPath, u.RawQuery, u.ForceQuery}
}

func (t target) url() *url.URL {
	return &url.URL{Path: t.Path, RawPath: t.RawPath, RawQuery: t.RawQuery, ForceQuery: t.ForceQuery}
}

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
		Header:         r.Header.Clone(),
		RemoteAddr:     r.RemoteAddr,
		Vars:           make(map[string]any),
		SecretName:     e.SecretName,
		IdempotencyKey: e.IdempotencyKey,
		body:           e.Body,
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		stored.Local = net.UnixAddr{Net: local.Network(), Name: local.String()}
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
			if !math.IsNaN(value) && !math.IsInf(value, 0) { // which JSON cannot show
				stored.Vars[name] = value
			}
		}
	}
	delete(stored.Vars, "unhandled") // which is of one run of the handlers
	return stored
}

// encode returns the stored form: the request, then its body.
func (r *request) encode() ([]byte, error) {
	var encoded bytes.Buffer
	if err := gob.NewEncoder(&encoded).Encode(r); err != nil {
		return nil, err
	}
	return append(encoded.Bytes(), r.body...), nil
}

// decodeRequest returns the request of a record, if it is the one that was stored.
func decodeRequest(rec *store.Record) (*request, error) {
	if !bytes.Equal(rec.Checksum, rec.Sum()) {
		return nil, errors.New("the checksum does not match")
	}
	rest := bytes.NewReader(rec.Request) // of which gob reads no more than it needs
	r := &request{Header: make(http.Header)}
	if err := gob.NewDecoder(rest).Decode(r); err != nil {
		return nil, errors.New("the stored request cannot be read") // whose error may show a part of it
	}
	r.body = rec.Request[len(rec.Request)-rest.Len():]
	return r, nil
}

// prepare makes the request of one attempt. Nothing of it is shared with another.
func (r *request) prepare(ctx context.Context, server *caddyhttp.Server, w http.ResponseWriter, rec *store.Record) *http.Request {
	ctx = context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(&r.Local)) // Caddy's placeholders panic without
	req := (&http.Request{
		Method: r.Method, URL: r.Original.url(), RequestURI: r.Original.URI, Host: r.Host,
		Proto: r.Proto, Header: r.Header.Clone(), RemoteAddr: r.RemoteAddr,
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
	req.URL, req.RequestURI = r.Target.url(), r.Target.URI
	for name, value := range r.Vars {
		caddyhttp.SetVar(req.Context(), name, value)
	}
	(&event.Event{Outcome: event.Verified, Body: r.body, SecretName: r.SecretName, IdempotencyKey: r.IdempotencyKey}).Attach(req.Context())
	repl.Set("http.inkit_queue.id", rec.ID)
	repl.Set("http.inkit_queue.attempt", rec.Attempts)
	repl.Set("http.inkit_queue.received", rec.Received.UTC().Format(time.RFC3339))
	return req
}
