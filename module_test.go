package inkitwebhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Where the holes of peers are closed, that is, which test fails if one opens:
//
//  1. an unset {env.X} is the empty key: TestSecretsThatAreRefused
//  2. the text {env.X} is the key: TestSecretsThatAreRefused ("in part"), TestSecretsThatAreResolved
//  3. the path of an unreadable file is the key: TestSecretsThatAreRefused
//  4. a literal secret with braces is mangled: TestSecretsThatAreResolved
//  5. a missing header passes: TestRoad
//  6. a default secret: TestSecretsThatAreRefused ("no secret at all")
//  7. == on signatures: TestComparesInConstantTime
//  8. a panic on a short header: TestVerify, TestRoad, FuzzParseSignature
//  9. one good signature among several passes: TestRoad
//  10. the sender picks the hash: TestRoad ("a prefix"), TestVerify
//  11. a kind of body that is not hashed: TestRoad (the kinds of body)
//  12. no limit, or the body is read before the header: TestRoad, TestRejectsBeforeReading, TestReadBodyPaysForWhatArrived
//  13. a truncated body is verified: TestRoad, TestReadBody
//  14. secrets, signatures or bodies in logs and responses: TestLogs, TestSecretsThatAreRefused, TestCaddyfileErrorsShowNoInput
//  15. 413 hidden behind another status: TestRoad
//  16. handle_errors bypassed: TestRoad (nothing is written), and internal/e2e TestHandleErrors
//  17. replay state: there is none
//  18. bodies that are not UTF-8: TestRoad
//  19. a valid empty body: TestRoad, TestVerify
//  20. chunked bodies and FastCGI: TestVerifiedRequestHasItsLength, and internal/e2e TestBodiesArriveWhole

// The tests that docs/security.md and the list above name are there.
func TestDocumentedTestsExist(t *testing.T) {
	var sources []byte
	for _, pattern := range []string{"*_test.go", "internal/e2e/*_test.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			source, err := os.ReadFile(file)
			require.NoError(t, err)
			sources = append(sources, source...)
		}
	}
	for _, file := range []string{"docs/security.md", "module_test.go"} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		names := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(string(text), -1)
		require.NotEmpty(t, names)
		for _, name := range names {
			assert.True(t, bytes.Contains(sources, []byte("\nfunc "+name+"(")), "%s: %s", file, name)
		}
	}
}

// TestMain keeps what Caddy writes out of the user's folders.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "inkit-webhook")
	if err != nil {
		panic(err)
	}
	for _, name := range []string{"HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"} {
		os.Setenv(name, dir)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// provision loads h as a configuration would, and returns what it logs from then on.
func provision(tb testing.TB, h *Handler) (*Handler, *observer.ObservedLogs) {
	tb.Helper()
	require.NoError(tb, load(tb, h))
	core, logs := observer.New(zapcore.DebugLevel)
	h.logger = zap.New(core)
	h.keyring.logger = h.logger
	return h, logs
}

func load(tb testing.TB, h *Handler) error {
	tb.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	tb.Cleanup(cancel)
	if err := h.Provision(ctx); err != nil {
		return err
	}
	return h.Validate()
}

// result is what a request came to.
type result struct {
	status     int // of the error, or 200
	outcome    string
	nextCalled bool
	body       string // that next read
	err        error
	header     http.Header // of the response
	repl       *caddy.Replacer
	request    *http.Request // that next saw
}

func serve(tb testing.TB, h *Handler, r *http.Request) (res result) {
	tb.Helper()
	w := httptest.NewRecorder()
	res.repl = caddy.NewReplacer()
	r = caddyhttp.PrepareRequest(r, res.repl, w, &caddyhttp.Server{})
	next := caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		res.nextCalled = true
		res.request = r
		body, err := io.ReadAll(r.Body)
		res.body = string(body)
		return err
	})
	res.err = h.ServeHTTP(w, r, next)
	res.status = http.StatusOK
	if res.err != nil {
		var handlerErr caddyhttp.HandlerError
		require.ErrorAs(tb, res.err, &handlerErr)
		res.status = handlerErr.StatusCode
		assert.Zero(tb, w.Body.Len(), "the handler writes no body")
		assert.Equal(tb, http.StatusOK, w.Code, "the handler writes no status")
	}
	res.header = w.Header()
	res.outcome, _ = res.repl.GetString("http.inkit_webhook.outcome")
	return res
}

func post(body string, signatures ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/webhook", strings.NewReader(body))
	for _, signature := range signatures {
		r.Header.Add("Inkit-Signature", signature)
	}
	return r
}

func signed(body string) *http.Request {
	return post(body, Sign([]byte(testSecret), []byte(body)))
}

func with(r *http.Request, change func(r *http.Request)) *http.Request {
	change(r)
	return r
}

func withBody(r io.Reader, length int64) func(*http.Request) {
	return func(req *http.Request) { req.Body, req.ContentLength = io.NopCloser(r), length }
}

type timeoutError struct{ error }

func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return false }

func TestRoad(t *testing.T) {
	const maxSize = 200
	atLimit, aboveLimit := strings.Repeat("a", maxSize), strings.Repeat("a", maxSize+1)
	upper := strings.ToUpper(compactSignature)
	broken := errors.New("broken")
	limited := func(r *http.Request) {
		r.Body = io.NopCloser(iotest.ErrReader(caddyhttp.Error(http.StatusRequestEntityTooLarge, &http.MaxBytesError{Limit: 10})))
	}
	method := func(method string) *http.Request {
		return with(signed(compactBody), func(r *http.Request) { r.Method = method })
	}

	for _, tt := range []struct {
		group, name string
		r           *http.Request
		status      int
		outcome     string
		err         error
	}{
		{"accepted", "Inkit's event, compact", post(compactBody, compactSignature), 200, "verified", nil},
		{"accepted", "Inkit's event, with spaces", post(spacedBody, spacedSignature), 200, "verified", nil},
		{"accepted", "signed with the older secret", post("x", Sign([]byte("an older secret"), []byte("x"))), 200, "verified", nil},
		{"accepted", "an empty body", signed(""), 200, "verified", nil},
		{"accepted", "no body at all", with(signed(""), func(r *http.Request) { r.Body = nil }), 200, "verified", nil},
		{"accepted", "a body that is not JSON", signed("event=1&x=%00"), 200, "verified", nil},
		{"accepted", "a body that is not UTF-8", signed("\xff\xfe\x00\x80"), 200, "verified", nil},
		{"accepted", "a body of max_size", signed(atLimit), 200, "verified", nil},
		{"accepted", "a body of unknown length", with(signed(atLimit), withBody(strings.NewReader(atLimit), -1)), 200, "verified", nil},
		{"accepted", "a form", with(signed("a=b"), func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") }), 200, "verified", nil},
		{"accepted", "a multipart form", with(signed("--x--"), func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") }), 200, "verified", nil},
		{"accepted", "a compressed body, whose bytes are not looked into", with(signed("\x1f\x8b\x08"), func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }), 200, "verified", nil},

		{"method", "GET", method(http.MethodGet), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "HEAD", method(http.MethodHead), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "PUT", method(http.MethodPut), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "OPTIONS", method(http.MethodOptions), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "post in lower case", method("post"), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "GET without a signature", httptest.NewRequest(http.MethodGet, "/", nil), 405, "method_not_allowed", errMethodNotAllowed},

		{"missing", "no signature", post(compactBody), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "an empty one", post(compactBody, ""), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "in another field", with(post(compactBody), func(r *http.Request) { r.Header.Set("X-Inkit-Signature", compactSignature) }), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "in the query", with(post(compactBody), func(r *http.Request) { r.URL.RawQuery = "Inkit-Signature=" + compactSignature }), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "in a trailer", with(post(compactBody), func(r *http.Request) { r.Trailer = http.Header{"Inkit-Signature": {compactSignature}} }), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "no signature and a body that is too large", post(aboveLimit), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "a multipart form that is not signed", with(post("--x--", ""), func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") }), 401, "signature_missing", ErrSignatureMissing},

		{"malformed", "upper case", post(compactBody, upper), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "a prefix", post(compactBody, "sha256="+compactSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "another hash", post(compactBody, "sha1=de7c9b85b8b78aa6bc8a7a36f70a90701c9db4d9"), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "one digit", post(compactBody, "f"), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "one digit too few", post(compactBody, compactSignature[:63]), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "one digit too many", post(compactBody, compactSignature+"0"), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "no hex", post(compactBody, strings.Repeat("z", 64)), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "a list with a good one", post(compactBody, compactSignature+","+spacedSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, both good", post(compactBody, compactSignature, compactSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, the first good", post(compactBody, compactSignature, spacedSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, the second good", post(compactBody, "", compactSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two empty lines", post(compactBody, "", ""), 401, "signature_malformed", ErrSignatureMalformed},

		{"too large", "by its length", signed(aboveLimit), 413, "body_too_large", errBodyTooLarge},
		{"too large", "by its length alone", with(signed(atLimit), withBody(iotest.ErrReader(broken), maxSize+1)), 413, "body_too_large", errBodyTooLarge},
		{"too large", "by count", with(signed(aboveLimit), withBody(strings.NewReader(aboveLimit), -1)), 413, "body_too_large", errBodyTooLarge},
		{"too large", "for request_body", with(signed(atLimit), limited), 413, "body_too_large", &http.MaxBytesError{Limit: 10}},
		{"too large", "by a signature that is wrong as well", post(aboveLimit, compactSignature), 413, "body_too_large", errBodyTooLarge},

		{"unreadable", "the client is gone", with(signed(atLimit), withBody(iotest.ErrReader(io.ErrUnexpectedEOF), 10)), 400, "body_unreadable", errBodyUnreadable},
		{"unreadable", "broken after all of the signed bytes", with(signed("abc"), withBody(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), -1)), 400, "body_unreadable", broken},
		{"unreadable", "a timeout", with(signed(atLimit), withBody(iotest.ErrReader(timeoutError{broken}), 10)), 408, "body_unreadable", errBodyUnreadable},
		{"unreadable", "a deadline", with(signed(atLimit), withBody(iotest.ErrReader(fmt.Errorf("read: %w", os.ErrDeadlineExceeded)), 10)), 408, "body_unreadable", os.ErrDeadlineExceeded},

		{"mismatch", "another body", post(spacedBody, compactSignature), 401, "signature_mismatch", ErrSignatureMismatch},
		{"mismatch", "one digit changed", post(compactBody, compactSignature[:63]+"c"), 401, "signature_mismatch", ErrSignatureMismatch},
		{"mismatch", "the empty secret", post(compactBody, Sign(nil, []byte(compactBody))), 401, "signature_mismatch", ErrSignatureMismatch},
		{"mismatch", "the placeholder as the secret", post(compactBody, Sign([]byte("{env.TEST_INKIT_SECRET}"), []byte(compactBody))), 401, "signature_mismatch", ErrSignatureMismatch},
		{"mismatch", "an empty body with a signature of another", post("", compactSignature), 401, "signature_mismatch", ErrSignatureMismatch},
		{"mismatch", "a multipart form", with(post("--x--", compactSignature), func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") }), 401, "signature_mismatch", ErrSignatureMismatch},
	} {
		t.Run(tt.group+"/"+tt.name, func(t *testing.T) {
			t.Setenv("TEST_INKIT_SECRET", testSecret)
			h, _ := provision(t, &Handler{
				Secrets: []Secret{{Value: "an older secret"}, {Value: "{env.TEST_INKIT_SECRET}"}},
				MaxSize: maxSize,
			})
			sent := compactBody
			if tt.r.Body != nil && tt.status == http.StatusOK {
				data, err := io.ReadAll(tt.r.Body)
				require.NoError(t, err)
				sent = string(data)
				tt.r.Body = io.NopCloser(bytes.NewReader(data))
			}
			counter := requestsTotal.WithLabelValues(tt.outcome, "")
			before := testutil.ToFloat64(counter)

			res := serve(t, h, tt.r)

			assert.Equal(t, tt.status, res.status)
			assert.Equal(t, tt.outcome, res.outcome)
			if tt.status == http.StatusOK {
				require.NoError(t, res.err)
				require.True(t, res.nextCalled, "next must be called")
				if tt.r.Body == nil {
					sent = ""
				}
				assert.Equal(t, sent, res.body)
				return
			}
			if maxBytes, ok := tt.err.(*http.MaxBytesError); ok {
				require.ErrorAs(t, res.err, &maxBytes)
			} else {
				require.ErrorIs(t, res.err, tt.err)
			}
			assert.False(t, res.nextCalled, "next must not be called")
			assert.InDelta(t, before+1, testutil.ToFloat64(counter), 0)
			assert.Equal(t, tt.status == 401, res.header.Get("WWW-Authenticate") == "Inkit-Signature")
			assert.Equal(t, tt.status == 405, res.header.Get("Allow") == "POST")
		})
	}
}

func TestHandlerErrorPassesUnchanged(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	for _, status := range []int{413, 418} {
		want := caddyhttp.Error(status, errors.New("of another handler"))
		res := serve(t, h, with(signed("x"), withBody(iotest.ErrReader(want), -1)))
		assert.Equal(t, want, res.err)
	}
	want := caddyhttp.Error(502, errors.New("of the next handler"))
	w := httptest.NewRecorder()
	r := caddyhttp.PrepareRequest(signed("x"), caddy.NewReplacer(), w, &caddyhttp.Server{})
	err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return want }))
	assert.Equal(t, want, err)
	assert.Empty(t, w.Header())
}

// What is rejected before the body is read is answered at once, which net/http
// does for HTTP/1 if the connection closes.
func TestRejectsBeforeReading(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	unread := withBody(iotest.ErrReader(errors.New("the body was read")), 64<<20)
	for _, tt := range []struct {
		name   string
		r      *http.Request
		status int
		close  string
	}{
		{"another method", with(httptest.NewRequest(http.MethodPut, "/", nil), unread), 405, "close"},
		{"another method, without a body", httptest.NewRequest(http.MethodGet, "/", nil), 405, ""},
		{"no signature", with(post(""), unread), 401, "close"},
		{"no signature, and no body", post(""), 401, ""},
		{"a malformed signature", with(post("", "f"), unread), 401, "close"},
		{"a length above max_size", with(post("", compactSignature), unread), 413, "close"},
		{"HTTP/2, where a stream ends alone", with(with(post(""), unread), func(r *http.Request) { r.ProtoMajor = 2 }), 401, ""},
		{"a body that was read", post("x", compactSignature), 401, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res := serve(t, h, tt.r)
			assert.Equal(t, tt.status, res.status)
			assert.NotContains(t, res.err.Error(), "the body was read")
			assert.Equal(t, tt.close, res.header.Get("Connection"))
		})
	}
}

func TestVerifiedRequestHasItsLength(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	large := strings.Repeat("a", 5000)
	chunked := func(r *http.Request) {
		r.ContentLength = -1
		r.TransferEncoding = []string{"chunked"}
		r.Trailer = http.Header{"X-Unsigned": nil}
	}
	for _, tt := range []struct {
		name string
		r    *http.Request
		want string
	}{
		{"with a length", with(signed("abc"), func(r *http.Request) { r.Header.Set("Content-Length", "3") }), "3"},
		{"without the field", signed("abc"), "3"},
		{"chunked", with(signed(large), chunked), "5000"},
		{"chunked and empty", with(signed(""), chunked), "0"},
		{"a field that another handler made wrong", with(signed("abc"), func(r *http.Request) { r.Header["Content-Length"] = []string{"4", "5"} }), "3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res := serve(t, h, tt.r)
			require.NoError(t, res.err)
			assert.Equal(t, []string{tt.want}, res.request.Header["Content-Length"])
			assert.Equal(t, tt.want, fmt.Sprint(res.request.ContentLength))
			assert.Empty(t, res.request.TransferEncoding)
			assert.Empty(t, res.request.Trailer)
		})
	}
}

func TestVerifiedBodyCanBeReadAgain(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	for _, size := range []int{0, 1, 85, 5000, 60_000} {
		res := serve(t, h, signed(strings.Repeat("a", size)))
		require.NoError(t, res.err)
		for range 3 {
			again, err := res.request.GetBody()
			require.NoError(t, err)
			data, err := io.ReadAll(again)
			require.NoError(t, err)
			assert.Equal(t, res.body, string(data))
		}
	}
}

func TestVerifiedRequestOutlivesItsSender(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	type key struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
	res := serve(t, h, signed("x").WithContext(ctx))
	require.NoError(t, res.err)
	cancel()
	require.NoError(t, res.request.Context().Err())
	assert.Equal(t, "kept", res.request.Context().Value(key{}))
}

// What failed may be sent elsewhere by an error route, which sees the same request.
func TestErrorRoutesGetTheBody(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	for _, body := range []string{"", "abc", strings.Repeat("a", 50_000)} {
		w := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(signed(body), caddy.NewReplacer(), w, &caddyhttp.Server{})
		want := caddyhttp.Error(502, errors.New("of the next handler"))
		var reader io.Reader
		err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
			reader = r.Body
			_, _ = reader.Read(make([]byte, 2))
			return want
		}))
		require.Equal(t, want, err)
		all, err := io.ReadAll(r.Body)
		require.NoError(t, err)
		assert.Equal(t, body, string(all))
		rest, err := io.ReadAll(reader)
		require.NoError(t, err)
		assert.Len(t, rest, max(0, len(body)-2), "the reader so far is where it was")
	}
}

func TestIdempotencyKey(t *testing.T) {
	fromClient := func(r *http.Request) { r.Header["Idempotency-Key"] = []string{"client", "twice"} }
	t.Run("is new for every delivery of the same event", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		seen := make(map[string]bool)
		for range 1000 {
			key := serve(t, h, signed("x")).request.Header["Idempotency-Key"]
			require.Len(t, key, 1)
			assert.Regexp(t, `^[A-Z2-7]{26}-[0-9]+$`, key[0])
			seen[key[0]] = true
		}
		assert.Len(t, seen, 1000)

		other, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		assert.NotContains(t, seen, serve(t, other, signed("x")).request.Header.Get("Idempotency-Key"), "nor after a reload")
	})
	t.Run("replaces what the client sent", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		key := serve(t, h, with(signed("x"), fromClient)).request.Header["Idempotency-Key"]
		require.Len(t, key, 1)
		assert.NotContains(t, []string{"client", "twice"}, key[0])
	})
	t.Run("off leaves the request alone", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: "off"})
		assert.NotContains(t, serve(t, h, signed("x")).request.Header, "Idempotency-Key")
		res := serve(t, h, with(signed("x"), fromClient))
		assert.Equal(t, []string{"client", "twice"}, res.request.Header["Idempotency-Key"])
	})
}

func TestPlaceholders(t *testing.T) {
	names := []string{"outcome", "event_type", "resource_id", "secret_name"}
	get := func(repl *caddy.Replacer) (values []string) {
		for _, name := range names {
			value, known := repl.Get("http.inkit_webhook." + name)
			require.True(t, known, name)
			require.IsType(t, "", value)
			values = append(values, value.(string))
		}
		return values
	}
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret, Name: "current"}}})

	t.Run("of a verified event", func(t *testing.T) {
		res := serve(t, h, signed(compactBody))
		assert.Equal(t, []string{"verified", "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", "current"}, get(res.repl))
		_, known := res.repl.Get("http.inkit_webhook.other")
		assert.False(t, known)
	})
	t.Run("of a verified body that is something else", func(t *testing.T) {
		res := serve(t, h, signed("not JSON"))
		assert.Equal(t, []string{"verified", "", "", "current"}, get(res.repl))
	})
	t.Run("of a rejected request are empty, whatever it holds", func(t *testing.T) {
		for outcome, r := range map[string]*http.Request{
			"signature_missing":   post(compactBody),
			"signature_malformed": post(compactBody, "x"),
			"signature_mismatch":  post(compactBody, spacedSignature),
			"body_too_large":      with(signed(compactBody), withBody(strings.NewReader(compactBody), 1<<20)),
			"body_unreadable":     with(signed(compactBody), withBody(iotest.ErrReader(io.ErrUnexpectedEOF), -1)),
			"method_not_allowed":  with(signed(compactBody), func(r *http.Request) { r.Method = "PUT" }),
		} {
			assert.Equal(t, []string{outcome, "", "", ""}, get(serve(t, h, r).repl))
		}
	})
	t.Run("of two handlers in a row, the second of which rejects", func(t *testing.T) {
		other, _ := provision(t, &Handler{Secrets: []Secret{{Value: "another secret"}}})
		repl := caddy.NewReplacer()
		w := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(signed(compactBody), repl, w, &caddyhttp.Server{})
		err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			assert.Equal(t, []string{"verified", "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", "current"}, get(repl))
			return other.ServeHTTP(w, r, nil)
		}))
		require.ErrorIs(t, err, ErrSignatureMismatch)
		assert.Equal(t, []string{"signature_mismatch", "", "", ""}, get(repl))
	})
	t.Run("of two handlers, the second of which verifies what was too large for the first, in its error route", func(t *testing.T) {
		small, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, MaxSize: 10})
		repl := caddy.NewReplacer()
		w := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(signed(compactBody), repl, w, &caddyhttp.Server{})
		err := small.ServeHTTP(w, r, nil)
		require.ErrorIs(t, err, errBodyTooLarge)
		r = r.WithContext(context.WithValue(r.Context(), caddyhttp.ErrorCtxKey, err)) // as the server does it
		require.NoError(t, h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })))
		assert.Equal(t, []string{"verified", "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", "current"}, get(repl))
	})
}

func TestLogs(t *testing.T) {
	const clientIP = "192.0.2.1" // of httptest.NewRequest
	large := strings.Repeat("a", 70_000)
	for _, tt := range []struct {
		name  string
		r     *http.Request
		level zapcore.Level
		msg   string
		want  map[string]any
	}{
		{"a verified event", signed(compactBody), zapcore.DebugLevel, "verified webhook", map[string]any{
			"secret_name": "current", "body_bytes": int64(84),
		}},
		{"a method", with(signed(compactBody), func(r *http.Request) { r.Method = "PUT" }), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "method_not_allowed", "client_ip": clientIP, "body_bytes": int64(0),
		}},
		{"a missing signature", post(compactBody), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "signature_missing", "client_ip": clientIP, "body_bytes": int64(0),
		}},
		{"a malformed signature", post(compactBody, "sha256="+compactSignature), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "signature_malformed", "client_ip": clientIP, "body_bytes": int64(0),
		}},
		{"a body too large by count", with(signed(large), withBody(strings.NewReader(large), -1)), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "body_too_large", "client_ip": clientIP, "body_bytes": int64(65537),
		}},
		{"a body cut short", with(signed(compactBody), withBody(io.MultiReader(strings.NewReader(compactBody[:10]), iotest.ErrReader(io.ErrUnexpectedEOF)), 84)), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "body_unreadable", "client_ip": clientIP, "body_bytes": int64(10),
		}},
		{"a mismatch", post(compactBody, spacedSignature), zapcore.WarnLevel, "rejected webhook", map[string]any{
			"outcome": "signature_mismatch", "client_ip": clientIP, "body_bytes": int64(84), "secrets_tried": int64(2),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, logs := provision(t, &Handler{Secrets: []Secret{{Value: "an older secret", Name: "old"}, {Value: testSecret, Name: "current"}}})
			res := serve(t, h, tt.r)
			require.Equal(t, 1, logs.Len(), "one line")
			line := logs.All()[0]
			assert.Equal(t, tt.level, line.Level)
			assert.Equal(t, tt.msg, line.Message)
			assert.Equal(t, tt.want, line.ContextMap())

			all := fmt.Sprint(line.Message, line.ContextMap(), res.err, res.header)
			for _, confidential := range []string{testSecret, "an older secret", compactSignature, spacedSignature, "resource_id", "aaaa"} {
				assert.NotContains(t, all, confidential)
			}
		})
	}
}

func TestMaxSize(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	assert.EqualValues(t, 65536, h.MaxSize, "the default")
	assert.Equal(t, 200, serve(t, h, signed(strings.Repeat("a", 65536))).status)
	assert.Equal(t, 413, serve(t, h, signed(strings.Repeat("a", 65537))).status)

	require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: testSecret}}, MaxSize: -1}), "max_size: must not be negative")
}

func TestIdempotencyKeyIsOffOrLeftOut(t *testing.T) {
	require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: "on"}), "idempotency_key: must be off or left out")
}

// FuzzServeHTTP feeds the handler, by way of net/http's server, what a client may
// write to a socket. SIGNATURE stands for that of body, and BODY for body, so that
// some of it is genuine. Nothing is forwarded unless an oracle agrees: crypto/hmac
// used plainly on what the next handler got.
func FuzzServeHTTP(f *testing.F) {
	seed := func(head, body string) { f.Add([]byte(head), []byte(body)) }
	const post = "POST / HTTP/1.1\r\nHost: x\r\nInkit-Signature: SIGNATURE\r\n"
	seed(post+"Content-Length: 84\r\n\r\nBODY", compactBody)
	seed(post+"Content-Length: 3\r\n\r\nBODY", "a\x00\xff")
	seed(post+"\r\n", "")
	seed(post+"Transfer-Encoding: chunked\r\n\r\n3\r\nBODY\r\n0\r\n\r\n", "abc")
	seed(post+"Transfer-Encoding: chunked\r\nTrailer: A\r\n\r\n3;a=b\r\nBODY\r\n0\r\nA: b\r\n\r\n", "abc")
	seed(post+"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n3\r\nBODY\r\n0\r\n\r\n", "abc")
	seed(post+"Inkit-Signature: SIGNATURE\r\nContent-Length: 3\r\n\r\nBODY", "abc")
	seed(post+"Content-Length: 3\r\n\r\nBODY"+post+"Content-Length: 3\r\n\r\nBODY", "abc")
	seed(strings.Replace(post, "SIGNATURE", "sha256=SIGNATURE", 1)+"Content-Length: 3\r\n\r\nBODY", "abc")
	seed(strings.Replace(post, "POST", "GET", 1)+"Content-Length: 3\r\n\r\nBODY", "abc")
	seed(post+"Content-Length: 300\r\n\r\nBODY", "abc")
	seed(post+"Content-Length: 99999999999\r\n\r\nBODY", "abc")
	seed("\x16\x03\x01", "")

	h := &Handler{Secrets: []Secret{{Value: "an older secret"}, {Value: testSecret}}, MaxSize: 1000}
	require.NoError(f, load(f, h))
	h.logger = zap.NewNop()
	forged := make(chan string, 100)
	next := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		body, err := io.ReadAll(r.Body)
		m := hmac.New(sha256.New, []byte(testSecret))
		m.Write(body)
		lines := r.Header.Values("Inkit-Signature")
		if err != nil || r.Method != "POST" || len(lines) != 1 || lines[0] != hex.EncodeToString(m.Sum(nil)) ||
			len(body) > 1000 || r.ContentLength != int64(len(body)) || len(r.Trailer) > 0 {
			forged <- fmt.Sprintf("%s %q %q: %v", r.Method, lines, body, err)
		}
		return nil
	})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := h.ServeHTTP(w, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{}), next)
		if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok {
			w.WriteHeader(handlerErr.StatusCode)
		}
	}))
	f.Cleanup(server.Close)
	f.Fuzz(func(t *testing.T, head, body []byte) {
		raw := bytes.ReplaceAll(head, []byte("SIGNATURE"), []byte(Sign([]byte(testSecret), body)))
		raw = bytes.ReplaceAll(raw, []byte("BODY"), body)
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		require.NoError(t, err)
		defer conn.Close()
		// a reset is a way to answer what is sent after the end
		_, _ = conn.Write(raw)
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
		select {
		case request := <-forged:
			t.Fatalf("%q is forwarded as %s", raw, request)
		default:
		}
	})
}
