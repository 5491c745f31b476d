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
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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

// Known holes in similar programs, and the tests that would fail if we had them:
//
//  1. an unset {env.X} is the empty key: TestSecretsThatAreRefused
//  2. the text {env.X} is the key: TestSecretsThatAreRefused ("in part"), TestSecretsThatAreResolved
//  3. if a file is unreadable, its path is the key: TestSecretsThatAreRefused
//  4. a literal secret with braces is mangled: TestSecretsThatAreResolved
//  5. a missing header passes: TestRoad
//  6. a default secret: TestSecretsThatAreRefused ("no secret at all")
//  7. == on signatures: TestComparesInConstantTime
//  8. a panic on a short header: TestVerify, TestRoad, FuzzParseSignature
//  9. a request with several signatures passes, because one of them is good: TestRoad
//  10. the sender chooses the hash function: TestRoad ("a prefix"), TestVerify
//  11. a kind of body that is not hashed: TestRoad (the kinds of body)
//  12. no limit, or the body is read before the header is checked: TestRoad, TestRejectedBodyIsDiscarded, TestReadBodyPaysForWhatArrived
//  13. a truncated body is verified: TestRoad, TestReadBody
//  14. secrets, signatures or bodies in logs and responses: TestLogs, TestSecretsThatAreRefused, TestCaddyfileErrorsShowNoInput
//  15. 413 hidden behind another status: TestRoad
//  16. handle_errors bypassed: TestRoad (nothing is written), and internal/e2e TestHandleErrors
//  17. faulty replay detection: the guard does not detect replays
//  18. bodies that are not UTF-8: TestRoad
//  19. a valid empty body: TestRoad, TestVerify
//  20. chunked bodies and FastCGI: TestVerifiedRequestHasItsLength, and internal/e2e TestBodiesArriveWhole
//  21. if a variable is unset, the next word becomes the secret: TestUnsetVariableMakesNoSecret
//  22. a secret of NULs: TestTextThatIsNoSecret, TestNewVerifierRefusesTheEmptySecret
//  23. a rejected body that reaches an error route: TestRejectedRequestHasNoBody, and internal/e2e TestErrorRouteGetsNothingForged
//  24. fields that remove the guard's fields, or open a tunnel: TestSenderDoesNotSteer, and internal/e2e TestSenderDoesNotSteerTheProxy
//  25. a secret on the line of the directive becomes a path matcher: TestCaddyfileErrorsShowNoInput
//  26. genuine events refused while another request reads the secrets: TestNoGenuineEventIsRefusedAfterARotation, and internal/e2e TestRotationsUnderLoad
//  27. a running state that the next load refuses: TestEqualSecretsLoadWithOneWarning
//  28. a verified event looks delivered, but no handler took it: TestDeliveries, and internal/e2e TestUnhandledEvent
//  29. a retry sends the signed body, although a handler has replaced it: TestReplacedBodyIsNotUndone, and internal/e2e TestReplacedBodyIsNotUndoneByARetry
//  30. unlimited deliveries after their senders have disconnected: TestVerifiedRequestEndsWithItsSender, and internal/e2e TestSenderThatHangsUp
//  31. a command that a hostile body or server can attack: TestExplainIsBounded, and internal/e2e TestCommandSend
//  32. an alert that cannot fire: internal/e2e TestAlertRules
//  33. a refusal that looks like a dead upstream: internal/e2e TestNginxInFront
//  34. a half-written secret replaces the good secret at once: TestSecretsAreReloaded, and internal/e2e TestRotationsUnderLoad
//  35. a hanging file system blocks requests: TestFileSystemThatHangs, and internal/e2e TestHungFileSystem

// The tests named in docs/security.md and in the list above exist.
func TestDocumentedTestsExist(t *testing.T) {
	var sources []byte
	for _, pattern := range []string{"*_test.go", "internal/*/*_test.go", "queue/*_test.go", "queue/page/*_test.go"} {
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

// TestMain moves Caddy's files from the user's folders to a temporary folder.
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

// provision loads h as a configuration would, and returns h and its later log lines.
func provision(tb testing.TB, h *Handler) (*Handler, *observer.ObservedLogs) {
	tb.Helper()
	require.NoError(tb, load(tb, h))
	core, logs := observer.New(zapcore.DebugLevel)
	h.logger = h.logger.WithOptions(zap.WrapCore(func(zapcore.Core) zapcore.Core { return core })).With(zap.String("webhook", h.Name))
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

type result struct {
	status     int // of the error, or 200
	outcome    string
	nextCalled bool
	body       string // the body that the next handler has read
	err        error
	header     http.Header // of the response
	repl       *caddy.Replacer
	request    *http.Request // the request of the next handler
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
		{"accepted", "a compressed body, which is not decompressed", with(signed("\x1f\x8b\x08"), func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }), 200, "verified", nil},

		{"method", "GET", method(http.MethodGet), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "HEAD", method(http.MethodHead), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "PUT", method(http.MethodPut), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "OPTIONS", method(http.MethodOptions), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "post in lower case", method("post"), 405, "method_not_allowed", errMethodNotAllowed},
		{"method", "GET without a signature", httptest.NewRequest(http.MethodGet, "/", nil), 405, "method_not_allowed", errMethodNotAllowed},

		{"missing", "no signature", post(compactBody), 401, "signature_missing", ErrSignatureMissing},
		{"missing", "an empty signature", post(compactBody, ""), 401, "signature_missing", ErrSignatureMissing},
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
		{"malformed", "a list with a good signature", post(compactBody, compactSignature+","+spacedSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, both good", post(compactBody, compactSignature, compactSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, the first good", post(compactBody, compactSignature, spacedSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two lines, the second good", post(compactBody, "", compactSignature), 401, "signature_malformed", ErrSignatureMalformed},
		{"malformed", "two empty lines", post(compactBody, "", ""), 401, "signature_malformed", ErrSignatureMalformed},

		{"too large", "declared and sent", signed(aboveLimit), 413, "body_too_large", errBodyTooLarge},
		{"too large", "declared, but not sent", with(signed(atLimit), withBody(iotest.ErrReader(broken), maxSize+1)), 413, "body_too_large", errBodyTooLarge},
		{"too large", "undeclared, but sent", with(signed(aboveLimit), withBody(strings.NewReader(aboveLimit), -1)), 413, "body_too_large", errBodyTooLarge},
		{"too large", "for request_body", with(signed(atLimit), limited), 413, "body_too_large", &http.MaxBytesError{Limit: 10}},
		{"too large", "and wrongly signed", post(aboveLimit, compactSignature), 413, "body_too_large", errBodyTooLarge},

		{"unreadable", "the client has disconnected", with(signed(atLimit), withBody(iotest.ErrReader(io.ErrUnexpectedEOF), 10)), 400, "body_unreadable", errBodyUnreadable},
		{"unreadable", "broken after all of the signed bytes", with(signed("abc"), withBody(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), -1)), 400, "body_unreadable", broken},
		{"unreadable", "63 bytes of 150, and an earlier handler hid the error", with(signed(strings.Repeat("a", 63)), withBody(strings.NewReader(strings.Repeat("a", 63)), 150)), 400, "body_unreadable", io.ErrUnexpectedEOF},
		{"unreadable", "no body, although its length was declared", with(signed(""), withBody(strings.NewReader(""), 1)), 400, "body_unreadable", errBodyUnreadable},
		{"unreadable", "a timeout", with(signed(atLimit), withBody(iotest.ErrReader(timeoutError{broken}), 10)), 408, "body_unreadable", errBodyTimeout},
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
			counter := requestsTotal.WithLabelValues("", tt.outcome, "")
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
			assert.NotEmpty(t, res.err.(caddyhttp.HandlerError).ID, "an error page can show the ID")
			assert.InDelta(t, before+1, testutil.ToFloat64(counter), 0)
			assert.Equal(t, tt.status == 401, res.header.Get("WWW-Authenticate") == "Inkit-Signature")
			assert.Equal(t, tt.status == 405, res.header.Get("Allow") == "POST")
		})
	}
}

// Each error in rejections gets its own row, even if another error wraps it. An error that
// is not in rejections gets the last row.
func TestEveryErrorIsRejected(t *testing.T) {
	for i, row := range rejections {
		assert.Equal(t, i, rejectionOf(row.err))
		assert.Equal(t, i, rejectionOf(fmt.Errorf("%w: further", row.err)))
	}
	h, logs := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	missing := errors.New("an error of a check that is not in the table")
	r := caddyhttp.PrepareRequest(signed(compactBody), caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
	var handlerErr caddyhttp.HandlerError
	require.ErrorAs(t, h.reject(httptest.NewRecorder(), r, nil, missing), &handlerErr)
	assert.Equal(t, http.StatusBadRequest, handlerErr.StatusCode)
	require.ErrorIs(t, handlerErr, missing)
	assert.Equal(t, http.NoBody, r.Body)
	require.Equal(t, 1, logs.Len())
	assert.Equal(t, missing.Error(), logs.All()[0].ContextMap()["cause"])
	assert.Equal(t, "body_unreadable", logs.All()[0].ContextMap()["outcome"])
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

func TestVerifiedRequestEndsWithItsSender(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	ctx, cancel := context.WithCancel(t.Context())
	res := serve(t, h, signed("x").WithContext(ctx))
	require.NoError(t, res.err)
	require.NoError(t, res.request.Context().Err())
	cancel()
	require.ErrorIs(t, res.request.Context().Err(), context.Canceled)
}

func TestIdempotencyKey(t *testing.T) {
	fromClient := func(r *http.Request) { r.Header["Idempotency-Key"] = []string{"client", "twice"} }
	t.Run("is new for every delivery of the same event", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		seen := make(map[string]bool)
		for range 1000 {
			key := serve(t, h, signed("x")).request.Header["Idempotency-Key"]
			require.Len(t, key, 1)
			assert.Regexp(t, `^"[A-Z2-7]{26}-[0-9]+"$`, key[0], "a string in quotes, as the draft requires")
			seen[key[0]] = true
		}
		assert.Len(t, seen, 1000)

		other, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		assert.NotContains(t, seen, serve(t, other, signed("x")).request.Header.Get("Idempotency-Key"), "a handler after a reload uses other keys")
	})
	t.Run("replaces the key of the client", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		key := serve(t, h, with(signed("x"), fromClient)).request.Header["Idempotency-Key"]
		require.Len(t, key, 1)
		assert.NotContains(t, []string{"client", "twice"}, key[0])
	})
	t.Run("off leaves the request without a key", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: new(bool)})
		assert.NotContains(t, serve(t, h, signed("x")).request.Header, "Idempotency-Key")
		assert.NotContains(t, serve(t, h, with(signed("x"), fromClient)).request.Header, "Idempotency-Key", "also without the key of the client")
	})
	t.Run("true is the default", func(t *testing.T) {
		yes := true
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: &yes})
		assert.Contains(t, serve(t, h, signed("x")).request.Header, "Idempotency-Key")
	})
	t.Run("of two handlers in a row is the key of the first", func(t *testing.T) {
		site, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		tenant, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		off, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: new(bool)})
		keys := func(handlers ...*Handler) (keys []string) {
			w := httptest.NewRecorder()
			var next caddyhttp.HandlerFunc = func(http.ResponseWriter, *http.Request) error { return nil }
			for _, h := range slices.Backward(handlers) {
				behind := next
				next = func(w http.ResponseWriter, r *http.Request) error {
					return h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
						keys = append(keys, r.Header.Get("Idempotency-Key"))
						return behind(w, r)
					}))
				}
			}
			require.NoError(t, next(w, caddyhttp.PrepareRequest(signed("x"), caddy.NewReplacer(), w, &caddyhttp.Server{})))
			return keys
		}
		got := keys(site, tenant)
		assert.NotEmpty(t, got[0])
		assert.Equal(t, got[0], got[1])
		got = keys(off, tenant)
		assert.Empty(t, got[0])
		assert.NotEmpty(t, got[1])
		got = keys(site, off)
		assert.NotEmpty(t, got[0])
		assert.Empty(t, got[1])
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
	t.Run("of a verified body that is not an event", func(t *testing.T) {
		res := serve(t, h, signed("not JSON"))
		assert.Equal(t, []string{"verified", "", "", "current"}, get(res.repl))
	})
	t.Run("of a rejected request are empty, with any body", func(t *testing.T) {
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
	t.Run("of two handlers that verify, from the last", func(t *testing.T) {
		tenant, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret, Name: "tenant"}}})
		repl := caddy.NewReplacer()
		w := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(signed(compactBody), repl, w, &caddyhttp.Server{})
		next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return errors.New("failed") })
		require.Error(t, h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
			assert.Equal(t, "current", get(repl)[3])
			return tenant.ServeHTTP(w, r, next)
		})))
		assert.Equal(t, []string{"verified", "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", "tenant"}, get(repl))

		r = r.WithContext(context.WithValue(r.Context(), caddyhttp.ErrorCtxKey, errors.New("failed"))) // in an error route
		require.Error(t, h.ServeHTTP(w, r, next))
		assert.Equal(t, "current", get(repl)[3])
	})
}

// For each result of the next handlers, the test checks the metric, the log line and the
// response.
func TestDeliveries(t *testing.T) {
	status := func(status int) caddyhttp.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) error { w.WriteHeader(status); return nil }
	}
	failure := errors.New("connection refused")
	for _, tt := range []struct {
		name   string
		next   caddyhttp.HandlerFunc
		result int
		level  zapcore.Level
		status any // in the log line
		err    error
	}{
		{"a status of 200", status(200), deliveryAccepted, 0, nil, nil},
		{"a status of 299", status(299), deliveryAccepted, 0, nil, nil},
		{"an early status and a final status of 204", func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(103)
			w.WriteHeader(204)
			return nil
		}, deliveryAccepted, 0, nil, nil},
		{"an early status and a final status of 500", func(w http.ResponseWriter, _ *http.Request) error {
			w.WriteHeader(103)
			w.WriteHeader(500)
			return nil
		}, deliveryFailed, zapcore.ErrorLevel, int64(500), nil},
		{"a body without a status, which net/http answers 200", func(w http.ResponseWriter, _ *http.Request) error {
			_, err := w.Write([]byte("x"))
			return err
		}, deliveryAccepted, 0, nil, nil},
		{"a redirect", status(302), deliveryRefused, zapcore.WarnLevel, int64(302), nil},
		{"a status of 404", status(404), deliveryRefused, zapcore.WarnLevel, int64(404), nil},
		{"a status of 499", status(499), deliveryRefused, zapcore.WarnLevel, int64(499), nil},
		{"a status of 500", status(500), deliveryFailed, zapcore.ErrorLevel, int64(500), nil},
		{"an error", func(http.ResponseWriter, *http.Request) error { return caddyhttp.Error(502, failure) }, deliveryFailed, zapcore.ErrorLevel, int64(502), failure},
		{"an error with a status below 500", func(http.ResponseWriter, *http.Request) error { return caddyhttp.Error(404, failure) }, deliveryFailed, zapcore.ErrorLevel, int64(404), failure},
		{"the end of the handlers", func(_ http.ResponseWriter, r *http.Request) error {
			caddyhttp.SetVar(r.Context(), "unhandled", true) // as Caddy's last handler does
			return nil
		}, deliveryUnhandled, zapcore.WarnLevel, int64(404), nil},
		{"the end of the handlers, after a handler wrote a status", func(w http.ResponseWriter, r *http.Request) error {
			w.WriteHeader(202)
			caddyhttp.SetVar(r.Context(), "unhandled", true)
			return nil
		}, deliveryAccepted, 0, nil, nil},
		{"the end of the handlers, where templates then writes 200", func(w http.ResponseWriter, r *http.Request) error {
			caddyhttp.SetVar(r.Context(), "unhandled", true)
			w.WriteHeader(200)
			return nil
		}, deliveryUnhandled, zapcore.WarnLevel, int64(404), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, logs := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, Name: "hook"})
			before := make([]float64, len(deliveryResults))
			for i, counter := range h.counters.deliveries {
				before[i] = testutil.ToFloat64(counter)
			}
			w := httptest.NewRecorder()
			r := caddyhttp.PrepareRequest(signed(compactBody), caddy.NewReplacer(), w, &caddyhttp.Server{})
			err := h.ServeHTTP(w, r, tt.next)
			for i, counter := range h.counters.deliveries {
				want := before[i]
				if i == tt.result {
					want++
				}
				assert.InDelta(t, want, testutil.ToFloat64(counter), 0, deliveryResults[i])
			}
			lines := logs.FilterMessage("verified webhook was not accepted").All()
			if tt.result == deliveryAccepted {
				require.NoError(t, err)
				assert.Empty(t, lines)
				return
			}
			require.Len(t, lines, 1, "one line")
			assert.Equal(t, tt.level, lines[0].Level)
			fields := lines[0].ContextMap()
			assert.Equal(t, deliveryResults[tt.result], fields["result"])
			assert.Equal(t, tt.status, fields["status"])
			assert.Equal(t, "hook", fields["webhook"])
			assert.Equal(t, "DOCUMENT_CREATE_FINISHED", fields["event_type"])
			assert.Equal(t, "doc_2N0X2g4f3b1JJU75fqzDZs", fields["resource_id"])
			assert.Equal(t, r.Header.Get("Idempotency-Key"), fields["idempotency_key"])
			if tt.err != nil {
				require.ErrorIs(t, err, tt.err)
				assert.Contains(t, fields["error"], tt.err.Error())
			}
			if tt.result == deliveryUnhandled && err == nil {
				assert.Equal(t, 404, w.Code)
			} else if tt.result == deliveryUnhandled {
				var handlerErr caddyhttp.HandlerError
				require.ErrorAs(t, err, &handlerErr)
				assert.Equal(t, 404, handlerErr.StatusCode)
				require.EqualError(t, handlerErr.Err, "no handler takes this verified event: add a backend after inkit_webhook")
			}
		})
	}
	t.Run("a panic counts as failed", func(t *testing.T) {
		h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
		before := testutil.ToFloat64(h.counters.deliveries[deliveryFailed])
		w := httptest.NewRecorder()
		r := caddyhttp.PrepareRequest(signed("x"), caddy.NewReplacer(), w, &caddyhttp.Server{})
		assert.PanicsWithValue(t, http.ErrAbortHandler, func() {
			_ = h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) }))
		})
		assert.InDelta(t, before+1, testutil.ToFloat64(h.counters.deliveries[deliveryFailed]), 0)
	})
}

func TestLogs(t *testing.T) {
	large := strings.Repeat("a", 70_000)
	upper := strings.ToUpper(compactSignature)
	rejected := func(outcome, cause string, more map[string]any) map[string]any {
		fields := map[string]any{
			"webhook": "hook", "outcome": outcome, "cause": cause, "client_ip": "192.0.2.1", "host": "example.com", "path": "/webhook",
			"content_length": int64(84), "body_bytes": int64(0), "max_size": int64(65536),
		}
		maps.Copy(fields, more)
		return fields
	}
	malformed := func(how string) map[string]any {
		return rejected("signature_malformed", ErrSignatureMalformed.Error(), map[string]any{"malformed": how})
	}
	cut := withBody(io.MultiReader(strings.NewReader(compactBody[:10]), iotest.ErrReader(io.ErrUnexpectedEOF)), 84)
	for _, tt := range []struct {
		name  string
		r     *http.Request
		level zapcore.Level
		msg   string
		want  map[string]any
	}{
		{"a verified event", signed(compactBody), zapcore.DebugLevel, "verified webhook", map[string]any{
			"webhook": "hook", "secret_name": "current", "body_bytes": int64(84),
		}},
		{
			"a method", with(signed(compactBody), func(r *http.Request) { r.Method = "PUT" }), zapcore.InfoLevel, "rejected webhook",
			rejected("method_not_allowed", "method is not POST", nil),
		},
		{
			"a missing signature", post(compactBody), zapcore.WarnLevel, "rejected webhook",
			rejected("signature_missing", "signature is missing", nil),
		},
		{"a signature of another length", post(compactBody, "abc"), zapcore.WarnLevel, "rejected webhook", malformed("length")},
		{"a signature in upper case", post(compactBody, upper), zapcore.WarnLevel, "rejected webhook", malformed("upper_case")},
		{"a signature with a prefix", post(compactBody, "sha256="+compactSignature), zapcore.WarnLevel, "rejected webhook", malformed("prefix")},
		{"a signature of other characters", post(compactBody, strings.Repeat("z", 64)), zapcore.WarnLevel, "rejected webhook", malformed("characters")},
		{"two signatures", post(compactBody, compactSignature, compactSignature), zapcore.WarnLevel, "rejected webhook", malformed("several_lines")},
		{
			"a body too large by count", with(signed(large), withBody(strings.NewReader(large), -1)), zapcore.WarnLevel, "rejected webhook",
			rejected("body_too_large", "body is larger than max_size", map[string]any{"content_length": int64(-1), "body_bytes": int64(65537)}),
		},
		{
			"a body too large by its length", signed(large), zapcore.WarnLevel, "rejected webhook",
			rejected("body_too_large", "body is larger than max_size", map[string]any{"content_length": int64(70_000)}),
		},
		{
			"a body cut short", with(signed(compactBody), cut), zapcore.WarnLevel, "rejected webhook",
			rejected("body_unreadable", "body did not arrive whole: unexpected EOF", map[string]any{"body_bytes": int64(10)}),
		},
		{
			"a mismatch", post(compactBody, spacedSignature), zapcore.WarnLevel, "rejected webhook",
			rejected("signature_mismatch", "signature does not match the body under any secret", map[string]any{"body_bytes": int64(84)}),
		},
		{
			"a host and a path without end", with(post(compactBody), func(r *http.Request) { r.Host, r.URL.Path = large, "/"+large }), zapcore.WarnLevel, "rejected webhook",
			rejected("signature_missing", "signature is missing", map[string]any{"host": large[:256], "path": "/" + large[:255]}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, logs := provision(t, &Handler{Name: "hook", Secrets: []Secret{{Value: "an older secret", Name: "old"}, {Value: testSecret, Name: "current"}}})
			res := serve(t, h, tt.r)
			require.Equal(t, 1, logs.Len(), "one line")
			line := logs.All()[0]
			assert.Equal(t, tt.level, line.Level)
			assert.Equal(t, tt.msg, line.Message)
			fields := line.ContextMap()
			if res.err != nil {
				assert.Equal(t, res.err.(caddyhttp.HandlerError).ID, fields["err_id"], "the ID that {http.error.id} shows")
				delete(fields, "err_id")
			}
			assert.Equal(t, tt.want, fields)

			all := fmt.Sprint(line.Message, fields, res.err, res.header)
			for _, confidential := range []string{testSecret, "an older secret", compactSignature, upper, spacedSignature, "resource_id"} {
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

func TestNameOfTheWebhook(t *testing.T) {
	for _, name := range []string{"a", "Documents-2_x.y", strings.Repeat("a", 64)} {
		require.NoError(t, load(t, &Handler{Secrets: []Secret{{Value: testSecret}}, Name: name}))
	}
	for _, name := range []string{" ", "a b", "{env.NAME}", "a\xff", "ä", strings.Repeat("a", 65), "a\n"} {
		require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: testSecret}}, Name: name}), "name must have 1 to 64 characters: letters, digits, '.', '_' or '-'")
	}
}

// FuzzServeHTTP writes any bytes to a server of net/http that runs the handler. The test
// replaces SIGNATURE by the signature of `body`, and BODY by `body`, so that some requests are
// genuine. A plain use of crypto/hmac checks each body that the next handler gets.
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
		// the server may reset the connection if data arrives after the request
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
