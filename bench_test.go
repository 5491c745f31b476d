// With the race detector, times and allocations are meaningless.

//go:build !race

package inkitwebhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

var benchmarkSizes = []struct {
	name  string
	bytes int
}{{"85B", 85}, {"1KiB", 1 << 10}, {"64KiB", 64 << 10}, {"1MiB", 1 << 20}}

// BenchmarkHMAC measures the minimum cost: it reuses a hash that has processed the secret.
func BenchmarkHMAC(b *testing.B) {
	for _, size := range benchmarkSizes {
		b.Run(size.name, func(b *testing.B) {
			m := hmac.New(sha256.New, []byte(testSecret))
			data := make([]byte, size.bytes)
			var sum [sha256.Size]byte
			b.SetBytes(int64(size.bytes))
			b.ReportAllocs()
			for b.Loop() {
				m.Reset()
				m.Write(data)
				m.Sum(sum[:0])
			}
		})
	}
}

// BenchmarkHMACOfNewMemory measures the minimum cost of a program that stores each body in
// new memory: the program allocates memory, copies the bytes, and hashes them.
func BenchmarkHMACOfNewMemory(b *testing.B) {
	for _, size := range benchmarkSizes {
		b.Run(size.name, func(b *testing.B) {
			m := hmac.New(sha256.New, []byte(testSecret))
			data := make([]byte, size.bytes)
			var sum [sha256.Size]byte
			b.SetBytes(int64(size.bytes))
			b.ReportAllocs()
			for b.Loop() {
				m.Reset()
				kept := make([]byte, len(data))
				copy(kept, data)
				m.Write(kept)
				m.Sum(sum[:0])
				runtime.KeepAlive(kept)
			}
		})
	}
}

// BenchmarkServeHTTP measures a request through the handler, with an upstream that reads
// the body. The "pass-through" rows run without the handler: subtract their figures. The
// "naive" rows use a minimal middleware without limit, placeholders, logs or metrics.
func BenchmarkServeHTTP(b *testing.B) {
	one := Secret{Value: testSecret}
	older := Secret{Value: "an older secret"}
	for _, bb := range []struct {
		name    string
		handler serveFunc
		bytes   int
		status  int
		sign    func(body []byte) string
	}{
		{"pass-through-85B", passThrough, 85, 200, genuine},
		{"pass-through-1KiB", passThrough, 1 << 10, 200, genuine},
		{"pass-through-64KiB", passThrough, 64 << 10, 200, genuine},
		{"pass-through-1MiB", passThrough, 1 << 20, 200, genuine},
		{"pass-through-unread", passThrough, 0, 200, genuine},
		{"verified-85B", guard(b, one), 85, 200, genuine},
		{"verified-1KiB", guard(b, one), 1 << 10, 200, genuine},
		{"verified-64KiB", guard(b, one), 64 << 10, 200, genuine},
		{"verified-1MiB", guard(b, one), 1 << 20, 200, genuine},
		{"two-secrets-85B", guard(b, older, one), 85, 200, genuine},
		{"two-secrets-64KiB", guard(b, older, one), 64 << 10, 200, genuine},
		{"forged-85B", guard(b, one), 85, 401, func([]byte) string { return compactSignature }},
		{"malformed", guard(b, one), 85, 401, func([]byte) string { return "sha256=" + compactSignature }},
		{"naive-85B", naive, 85, 200, genuine},
		{"naive-1KiB", naive, 1 << 10, 200, genuine},
		{"naive-64KiB", naive, 64 << 10, 200, genuine},
		{"naive-1MiB", naive, 1 << 20, 200, genuine},
	} {
		b.Run(bb.name, func(b *testing.B) {
			request := exchange(bb.handler, bb.bytes, bb.sign)
			b.SetBytes(int64(bb.bytes))
			b.ReportAllocs()
			for b.Loop() {
				if status := request(); status != bb.status {
					b.Fatalf("status %d", status)
				}
			}
		})
	}
}

// docs/performance.md explains the allocations.
func TestAllocationsOfAVerifiedRequest(t *testing.T) {
	allocations := func(handler serveFunc) float64 {
		request := exchange(handler, 85, genuine)
		require.Equal(t, http.StatusOK, request())
		return testing.AllocsPerRun(1000, func() { request() })
	}
	assert.LessOrEqual(t, allocations(guard(t, Secret{Value: testSecret}))-allocations(passThrough), 6.)
}

type serveFunc = func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error

func passThrough(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

func guard(tb testing.TB, secrets ...Secret) serveFunc {
	tb.Helper()
	h := &Handler{Secrets: secrets, MaxSize: 1 << 20}
	require.NoError(tb, load(tb, h))
	h.logger = zap.NewNop()
	return h.ServeHTTP
}

// exchange returns a function. Each call of that function sends the same request through
// `handler` to an upstream that reads the body, and returns the status of the response.
func exchange(handler serveFunc, bodyBytes int, sign func(body []byte) string) func() (status int) {
	body := make([]byte, bodyBytes)
	header := http.Header{
		"Content-Length":  {strconv.Itoa(len(body))},
		"Content-Type":    {"application/json"},
		"Inkit-Signature": {sign(body)},
	}
	w := httptest.NewRecorder()
	received := caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodPost, "/webhook", nil), caddy.NewReplacer(), w, new(caddyhttp.Server))
	received.Header, received.ContentLength = header, int64(len(body))
	vars := received.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	noPlaceholder := func(string) (any, bool) { return nil, false }
	sent := bytes.NewReader(body)
	buf := make([]byte, 32<<10)
	next := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		for {
			if _, err := r.Body.Read(buf); err != nil {
				w.WriteHeader(http.StatusOK)
				return nil
			}
		}
	})
	return func() (status int) {
		sent.Reset(body)
		received.Body = io.NopCloser(sent)
		clear(w.Header())
		delete(header, idempotencyKeyField)
		delete(vars, "inkit_webhook")
		repl := caddy.NewReplacer()
		repl.Map(noPlaceholder) // instead of Caddy's placeholders of a request
		request := received.WithContext(context.WithValue(received.Context(), caddy.ReplacerCtxKey, repl))
		if err := handler(w, request, next); err != nil {
			return err.(caddyhttp.HandlerError).StatusCode
		}
		return http.StatusOK
	}
}

func genuine(body []byte) string { return Sign([]byte(testSecret), body) }

func naive(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return caddyhttp.Error(http.StatusBadRequest, err)
	}
	m := hmac.New(sha256.New, []byte(testSecret))
	m.Write(body)
	signature, err := hex.DecodeString(r.Header.Get("Inkit-Signature"))
	if err != nil || subtle.ConstantTimeCompare(m.Sum(nil), signature) != 1 {
		return caddyhttp.Error(http.StatusUnauthorized, err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return next.ServeHTTP(w, r)
}
