package queue

import (
	"context"
	"crypto/tls"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func contextWithLocal(r *http.Request, local net.Addr) context.Context {
	return context.WithValue(r.Context(), http.LocalAddrContextKey, local)
}

// The function arrived returns a request as a Caddy server passes it to the queue.
func arrived(tb testing.TB, uri, text string, change func(r *http.Request)) (*http.Request, *event.Event) {
	tb.Helper()
	r := httptest.NewRequest(http.MethodPost, uri, strings.NewReader(text))
	if change != nil {
		change(r)
	}
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, new(caddyhttp.Server))
	e := &event.Event{Outcome: event.Verified, Body: []byte(text), SecretName: "current", IdempotencyKey: "the key"}
	e.Attach(r.Context())
	return r, e
}

// The function stored encodes a request, decodes it, and returns the request of attempt 3.
func stored(tb testing.TB, r *http.Request, e *event.Event) *http.Request {
	tb.Helper()
	a := &addition{rec: &store.Record{ID: "id", Received: time.Unix(1_795_592_263, 0), Attempts: 3}, request: newRequest(r, e)}
	require.NoError(tb, a.seal())
	decoded, err := request.Decode(a.rec)
	require.NoError(tb, err)
	return prepare(tb.Context(), decoded, new(caddyhttp.Server), newAnswer(), a.rec)
}

func TestStoredRequestIsTheOneThatArrived(t *testing.T) {
	for _, tt := range []struct {
		name, uri, body string
		change          func(r *http.Request)
	}{
		{"plain", "http://example.com/webhook", body, nil},
		{"with a query", "http://example.com/webhook?a=1&b=%20+&&c", body, nil},
		{"a question mark at the end", "http://example.com/webhook?", body, nil},
		{"an escaped path", "http://example.com/a%2Fb/%C3%A4", body, nil},
		{"a path that starts with two slashes", "http://example.com//webhook", body, nil},
		{"a binary body", "http://example.com/", "\x00\xff\r\n\xc3(", nil},
		{"no body", "http://example.com/", "", nil},
		{"a long body", "http://example.com/", strings.Repeat("a", 3<<20), nil},
		{"a port in the host", "http://example.com:8443/", body, nil},
		{"a path and a query that are not UTF-8", "http://example.com/%FF%C3?a=%FF\xe4", body, nil},
		{"fields that are not UTF-8", "http://example.com/", body, func(r *http.Request) { r.Header = http.Header{"X-Old": {"J\xf6rg", "plain"}} }},
		{"an IPv6 address", "http://[::1]:80/", body, func(r *http.Request) { r.RemoteAddr = "[2001:db8::1]:50000" }},
		{"HTTP/2 over TLS", "https://example.com/", body, func(r *http.Request) {
			r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
			r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256, ServerName: "example.com", NegotiatedProtocol: "h2", HandshakeComplete: true}
		}},
		{"early data", "https://example.com/", body, func(r *http.Request) { r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13} }},
		{"a field with two values, and an empty field", "http://example.com/", body, func(r *http.Request) {
			r.Header = http.Header{"X-Two": {"1", "2"}, "X-Empty": {""}, "Idempotency-Key": {"the key"}, "X-Umlaut": {"ä"}}
		}},
		{"no header fields", "http://example.com/", body, func(r *http.Request) { r.Header = http.Header{} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, e := arrived(t, tt.uri, tt.body, tt.change)
			want := r.Clone(r.Context())
			r.URL.Path, r.URL.RawPath, r.RequestURI = "/rewritten", "", "/rewritten?x" // like a rewrite in front of the queue
			got := stored(t, r, e)

			assert.Equal(t, []string{want.Method, want.Host, want.Proto, want.RemoteAddr, "/rewritten", want.URL.RawQuery, "/rewritten?x"},
				[]string{got.Method, got.Host, got.Proto, got.RemoteAddr, got.URL.Path, got.URL.RawQuery, got.RequestURI})
			assert.Equal(t, []int{want.ProtoMajor, want.ProtoMinor}, []int{got.ProtoMajor, got.ProtoMinor})
			assert.Equal(t, want.Header, got.Header)
			original := got.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
			assert.Equal(t, []string{want.RequestURI, want.URL.Path, want.URL.RawPath, want.URL.RawQuery},
				[]string{original.RequestURI, original.URL.Path, original.URL.RawPath, original.URL.RawQuery})
			assert.Equal(t, []bool{want.URL.ForceQuery, want.URL.ForceQuery}, []bool{got.URL.ForceQuery, original.URL.ForceQuery})
			assert.Equal(t, want.TLS, got.TLS)
			assert.Equal(t, int64(len(tt.body)), got.ContentLength)
			for range 2 { // like a proxy that sends the body again
				all, err := io.ReadAll(got.Body)
				require.NoError(t, err)
				assert.Equal(t, tt.body, string(all))
				got.Body, err = got.GetBody()
				require.NoError(t, err)
			}
			verified := event.FromContext(got.Context())
			require.NotNil(t, verified)
			assert.Equal(t, []string{tt.body, "current", "the key"}, []string{string(verified.Body), verified.SecretName, verified.IdempotencyKey})
		})
	}
}

// Only variables with plain values are stored.
func TestStoredVariables(t *testing.T) {
	for _, tt := range []struct {
		name        string
		value, want any // want is nil if the value is not stored
	}{
		{"a text", "green", "green"},
		{"an empty text", "", ""},
		{"a text that is not UTF-8", "a\xffb", "a\xffb"},
		{"a text with NUL", "a\x00b", "a\x00b"},
		{"a boolean", true, true},
		{"a number", 42, int64(42)},
		{"a long number", int64(1 << 40), int64(1 << 40)},
		{"a negative number", -1, int64(-1)},
		{"a fraction", 0.5, 0.5},
		{"a large number", 1_000_000, int64(1_000_000)},
		{"a text that looks like a number", "42", "42"},
		{"not a number", math.NaN(), nil},
		{"infinity", math.Inf(-1), nil},
		{"an object", struct{ A string }{"x"}, nil},
		{"a function", func() {}, nil},
		{"an error", io.EOF, nil},
		{"a channel", make(chan int), nil},
		{"nothing", nil, nil},
		{"one letter", "x", "x"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, e := arrived(t, "http://example.com/", body, nil)
			caddyhttp.SetVar(r.Context(), "mine", tt.value)
			caddyhttp.SetVar(r.Context(), "other", "stays")
			caddyhttp.SetVar(r.Context(), "unhandled", true)
			got := stored(t, r, e)
			assert.Equal(t, tt.want, caddyhttp.GetVar(got.Context(), "mine"))
			assert.Equal(t, "stays", caddyhttp.GetVar(got.Context(), "other"))
			assert.Nil(t, caddyhttp.GetVar(got.Context(), "unhandled"))
		})
	}
}

func TestStoredRequestHasItsAddresses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		local net.Addr
		want  string
	}{
		{"over TCP", &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}, "192.0.2.1:443"},
		{"over a socket", &net.UnixAddr{Net: "unix", Name: "/run/caddy.sock"}, "/run/caddy.sock"},
		{"unknown", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, e := arrived(t, "http://example.com/", body, func(r *http.Request) {
				if tt.local != nil {
					*r = *r.WithContext(contextWithLocal(r, tt.local))
				}
			})
			got := stored(t, r, e)
			repl := got.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			assert.Equal(t, tt.want, repl.ReplaceAll("{http.request.local}", ""))
			assert.Equal(t, "3", repl.ReplaceAll("{http.inkit_queue.attempt}", ""))
			assert.Equal(t, "id", repl.ReplaceAll("{http.inkit_queue.id}", ""))
			assert.Equal(t, "2026-11-25T07:37:43Z", repl.ReplaceAll("{http.inkit_queue.received}", ""))
			assert.Equal(t, "192.0.2.1", repl.ReplaceAll("{http.request.remote.host}", ""))
		})
	}
}

// A damaged request is not delivered, and no error shows any part of the request.
func TestStoredRequestThatIsSpoilt(t *testing.T) {
	r, e := arrived(t, "http://example.com/c0nf1d3nt1al", body, nil)
	whole := &addition{rec: &store.Record{ID: "id"}, request: newRequest(r, e)}
	require.NoError(t, whole.seal())
	resealed := func(request []byte) *store.Record {
		rec := &store.Record{ID: "id", Request: request}
		rec.Checksum = rec.Sum()
		return rec
	}
	head := func(value any) *store.Record {
		encoded, err := cbor.Marshal(value)
		require.NoError(t, err)
		return resealed(encoded)
	}
	const sum, notCBOR = "the checksum does not match", "the stored request is not valid CBOR"
	for _, tt := range []struct {
		name, message string
		rec           *store.Record
	}{
		{"another byte in the body", sum, &store.Record{ID: "id", Request: append(whole.rec.Request[:len(whole.rec.Request)-1:len(whole.rec.Request)-1], 'x'), Checksum: whole.rec.Checksum}},
		{"one more byte", sum, &store.Record{ID: "id", Request: append(slices.Clip(whole.rec.Request), 0), Checksum: whole.rec.Checksum}},
		{"one byte less", sum, &store.Record{ID: "id", Request: whole.rec.Request[:len(whole.rec.Request)-1], Checksum: whole.rec.Checksum}},
		{"the request of another event", sum, &store.Record{ID: "other", Request: whole.rec.Request, Checksum: whole.rec.Checksum}},
		{"no checksum", sum, &store.Record{ID: "id", Request: whole.rec.Request}},
		{"a truncated checksum", sum, &store.Record{ID: "id", Request: whole.rec.Request, Checksum: whole.rec.Checksum[:31]}},
		{"an empty request with a correct checksum", notCBOR, resealed(nil)},
		{"a truncated head", notCBOR, resealed(whole.rec.Request[:40])},
		{"a string that is longer than the data", notCBOR, resealed(append([]byte{0x7b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, "c0nf1d3nt1al"...))},
		{"a header field with more values than the data", notCBOR, resealed(append([]byte("\xa1\x66header\xa1\x61a\x9b"), 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff))},
		{"not CBOR", notCBOR, resealed([]byte{0xff})},
		{"a text", notCBOR, head("c0nf1d3nt1al")},
		{"an array", notCBOR, head([]string{"c0nf1d3nt1al"})},
		{"a field with the wrong type", notCBOR, head(map[string]any{"method": []string{"c0nf1d3nt1al"}})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := request.Decode(tt.rec)
			require.EqualError(t, err, tt.message)
		})
	}
}

// The stored form of a request must not change, because later versions must read it.
func TestStoredForm(t *testing.T) {
	r, e := arrived(t, "https://example.com/webhook?x=1", "the body", func(r *http.Request) {
		r.Header = http.Header{"X-A": {"1"}}
		r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13, HandshakeComplete: true}
	})
	encoded, err := newRequest(r, e).Encode()
	require.NoError(t, err)
	var object map[string]any
	rest, err := cbor.UnmarshalFirst(encoded, &object)
	require.NoError(t, err)
	assert.Equal(t, "the body", string(rest))
	delete(object, "vars") // the variables depend on the version of Caddy
	assert.Equal(t, map[string]any{
		"method": "POST", "proto": "HTTP/1.1", "host": "example.com", "remote_addr": "192.0.2.1:1234",
		"target":   map[any]any{"uri": "https://example.com/webhook?x=1", "path": "/webhook", "raw_query": "x=1"},
		"original": map[any]any{"uri": "https://example.com/webhook?x=1", "path": "/webhook", "raw_query": "x=1"},
		"header":   map[any]any{"X-A": []any{"1"}}, "tls": object["tls"],
		"secret_name": "current", "idempotency_key": "the key",
	}, object)
}

func FuzzStoredRequest(f *testing.F) {
	r, e := arrived(f, "http://example.com/a?b", body, nil)
	whole := &addition{rec: &store.Record{ID: "id"}, request: newRequest(r, e)}
	require.NoError(f, whole.seal())
	f.Add("id", whole.rec.Request, whole.rec.Checksum, false)
	f.Add("id", whole.rec.Request, whole.rec.Checksum, true)
	f.Add("other", whole.rec.Request, whole.rec.Checksum, false)
	f.Add("id", []byte("\xa0the body"), []byte{}, true)
	f.Add("id", []byte("\xf6"), []byte{}, true) // CBOR null
	f.Add("", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, []byte(nil), true)
	f.Fuzz(func(t *testing.T, id string, encoded, checksum []byte, seal bool) {
		rec := &store.Record{ID: id, Request: encoded, Checksum: checksum, Attempts: 1}
		if seal { // otherwise the checksum fails, and no later check runs
			rec.Checksum = rec.Sum()
		}
		decoded, err := request.Decode(rec)
		if err != nil {
			return
		}
		require.Equal(t, rec.Sum(), rec.Checksum, "a wrong checksum is an error")
		got := prepare(t.Context(), decoded, new(caddyhttp.Server), newAnswer(), rec)
		all, err := io.ReadAll(got.Body)
		require.NoError(t, err)
		require.True(t, strings.HasSuffix(string(encoded), string(all)))
		require.NotNil(t, event.FromContext(got.Context()))
		_ = got.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).ReplaceAll("{http.request.local}{http.request.uri}{http.request.remote.host}", "")
		again, err := decoded.Encode() // like the command "move"
		require.NoError(t, err)
		moved := &store.Record{ID: id, Request: again}
		moved.Checksum = moved.Sum()
		_, err = request.Decode(moved)
		require.NoError(t, err)
	})
}
