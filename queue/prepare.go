package queue

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"io"
	"math"
	"net"
	"net/http"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// newRequest returns the data that the queue stores from a request and its event.
func newRequest(r *http.Request, e *event.Event) *request.Request {
	original := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	stored := &request.Request{
		Method:         r.Method,
		Target:         request.NewTarget(r.RequestURI, r.URL),
		Original:       request.NewTarget(original.RequestURI, original.URL),
		Proto:          r.Proto,
		Host:           r.Host,
		Header:         r.Header.Clone(),
		RemoteAddr:     r.RemoteAddr,
		Vars:           make(map[string]any),
		SecretName:     e.SecretName,
		IdempotencyKey: e.IdempotencyKey,
		Body:           e.Body,
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		stored.Local = &request.Address{Net: local.Network(), Addr: local.String()}
	}
	if r.TLS != nil {
		stored.TLS = &request.Connection{
			Version: r.TLS.Version, CipherSuite: r.TLS.CipherSuite, ServerName: r.TLS.ServerName,
			Protocol: r.TLS.NegotiatedProtocol, Early: !r.TLS.HandshakeComplete,
		}
	}
	all, _ := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	for name, value := range all {
		switch value := value.(type) {
		case string, bool, int64:
			stored.Vars[name] = value
		case int:
			stored.Vars[name] = int64(value) // the type that Decode returns
		case float64:
			if !math.IsNaN(value) && !math.IsInf(value, 0) { // the command `show` prints JSON, which cannot contain NaN or infinity
				stored.Vars[name] = value
			}
		}
	}
	delete(stored.Vars, "unhandled") // this variable belongs to one run of the handlers
	return stored
}

// prepare makes the request of one attempt. A change of this request does not affect other
// attempts.
func prepare(ctx context.Context, r *request.Request, server *caddyhttp.Server, w http.ResponseWriter, rec *store.Record) *http.Request {
	local := cmp.Or(r.Local, &request.Address{Net: "tcp"}) // without an address, Caddy's placeholders panic
	req := (&http.Request{
		Method: r.Method, URL: r.Original.URL(), RequestURI: r.Original.URI, Host: r.Host,
		Proto: r.Proto, Header: r.Header.Clone(), RemoteAddr: r.RemoteAddr,
		ContentLength: int64(len(r.Body)),
		Body:          io.NopCloser(bytes.NewReader(r.Body)),
		GetBody:       func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(r.Body)), nil },
	}).WithContext(context.WithValue(ctx, http.LocalAddrContextKey, net.Addr(local)))
	req.ProtoMajor, req.ProtoMinor, _ = http.ParseHTTPVersion(r.Proto)
	if r.TLS != nil {
		req.TLS = &tls.ConnectionState{
			Version: r.TLS.Version, CipherSuite: r.TLS.CipherSuite, ServerName: r.TLS.ServerName,
			NegotiatedProtocol: r.TLS.Protocol, HandshakeComplete: !r.TLS.Early,
		}
	}
	repl := caddy.NewReplacer()
	req = caddyhttp.PrepareRequest(req, repl, w, server)
	req.URL, req.RequestURI = r.Target.URL(), r.Target.URI
	for name, value := range r.Vars {
		caddyhttp.SetVar(req.Context(), name, value)
	}
	(&event.Event{Outcome: event.Verified, Body: r.Body, SecretName: r.SecretName, IdempotencyKey: r.IdempotencyKey}).Attach(req.Context())
	repl.Set("http.inkit_queue.id", rec.ID)
	repl.Set("http.inkit_queue.attempt", rec.Attempts)
	repl.Set("http.inkit_queue.received", rec.Received.UTC().Format(time.RFC3339))
	return req
}
