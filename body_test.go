package inkitwebhook

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// deadlines is a response writer with read deadlines, like the writer of net/http.
type deadlines struct {
	*httptest.ResponseRecorder
	set []time.Time
}

func (d *deadlines) SetReadDeadline(deadline time.Time) error {
	d.set = append(d.set, deadline)
	return nil
}

// The guard reads the rest of a rejected body without storing it, so that the sender sees
// the response. If the guard does not read the whole body, it closes the connection or stream.
func TestRejectedBodyIsDiscarded(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	for _, tt := range []struct {
		name   string
		r      *http.Request
		bytes  int // the size of the body
		read   int // the minimum that is read
		atMost int
		close  string
	}{
		{"a method other than POST", httptest.NewRequest(http.MethodPut, "/", nil), 900_000, 900_000, 900_000, ""},
		{"no signature", post(""), 900_000, 900_000, 900_000, ""},
		{"a malformed signature", post("", "f"), 100, 100, 100, ""},
		{"a length above max_size", post("", compactSignature), 900_000, 900_000, 900_000, ""},
		{"more than 1 MiB", post(""), 10 << 20, maxDiscard, maxDiscard + firstRead, "close"},
		{"more than 1 MiB over HTTP/2, which ends only the stream", with(post(""), func(r *http.Request) { r.ProtoMajor = 2 }), 10 << 20, maxDiscard, maxDiscard + firstRead, ""},
		{"a sender that waits for 100 Continue", with(post(""), func(r *http.Request) { r.Header.Set("Expect", "100-continue") }), 100, 0, 0, "close"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read, closed := 0, false
			tt.r.ContentLength = int64(tt.bytes)
			tt.r.Body = struct {
				io.Reader
				io.Closer
			}{
				readerFunc(func(p []byte) (int, error) {
					n := min(len(p), tt.bytes-read)
					read += n
					if n == 0 {
						return 0, io.EOF
					}
					return n, nil
				}),
				closerFunc(func() error { closed = true; return nil }),
			}
			w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
			r := caddyhttp.PrepareRequest(tt.r, caddy.NewReplacer(), w, &caddyhttp.Server{})
			began := time.Now()
			require.Error(t, h.ServeHTTP(w, r, nil))
			assert.GreaterOrEqual(t, read, tt.read)
			assert.LessOrEqual(t, read, tt.atMost)
			assert.True(t, closed, "otherwise a copy of the request could read it")
			assert.Equal(t, tt.close, w.Header().Get("Connection"))
			assert.WithinDuration(t, began.Add(discardTime), w.set[0], discardTime)
			assert.Zero(t, w.set[len(w.set)-1], "the next request has its own deadline")
		})
	}
	t.Run("for at most 5 s", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
			dribble := readerFunc(func(p []byte) (int, error) { time.Sleep(time.Second); return 1, nil })
			w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
			r := caddyhttp.PrepareRequest(with(post(""), withBody(dribble, 1000)), caddy.NewReplacer(), w, &caddyhttp.Server{})
			began := time.Now()
			require.ErrorIs(t, h.ServeHTTP(w, r, nil), ErrSignatureMissing)
			assert.Equal(t, discardTime, time.Since(began))
			assert.Equal(t, "close", w.Header().Get("Connection"))
		})
	})
	t.Run("not without a time limit", func(t *testing.T) {
		res := serve(t, h, with(post(""), withBody(iotest.ErrReader(errors.New("the body was read")), 10)))
		assert.Equal(t, 401, res.status)
		assert.Equal(t, "close", res.header.Get("Connection"))
	})
	t.Run("not a broken body", func(t *testing.T) {
		w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		reads := 0
		broken := readerFunc(func([]byte) (int, error) { reads++; return 0, timeoutError{errors.New("slow")} })
		r := caddyhttp.PrepareRequest(with(signed("x"), withBody(broken, 1)), caddy.NewReplacer(), w, &caddyhttp.Server{})
		require.ErrorIs(t, h.ServeHTTP(w, r, nil), errBodyTimeout)
		assert.Equal(t, 1, reads)
		assert.Equal(t, "close", w.Header().Get("Connection"))
	})
	t.Run("not a body that was read completely, and not a missing body", func(t *testing.T) {
		for _, r := range []*http.Request{post("x", compactSignature), httptest.NewRequest(http.MethodGet, "/", nil)} {
			res := serve(t, h, r)
			require.Error(t, res.err)
			assert.Empty(t, res.header.Get("Connection"))
		}
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// For each outcome, the guard removes the body, the trailers and the upgrade from the rejected
// request, so that a proxy in an error route cannot forward them.
func TestRejectedRequestHasNoBody(t *testing.T) {
	large := strings.Repeat("a", 70_000)
	for outcome, r := range map[string]*http.Request{
		"method_not_allowed":  with(signed(compactBody), func(r *http.Request) { r.Method = http.MethodPut }),
		"signature_missing":   post(compactBody),
		"signature_malformed": post(compactBody, "x"),
		"signature_mismatch":  post(compactBody, spacedSignature),
		"body_too_large":      signed(large),
		"body_unreadable":     with(signed(compactBody), withBody(strings.NewReader(compactBody), 1000)),
	} {
		t.Run(outcome, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
			r.TransferEncoding, r.Trailer = []string{"chunked"}, http.Header{"X-Unsigned": {"1"}}
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
			w := httptest.NewRecorder()
			r := caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
			require.Error(t, h.ServeHTTP(w, r, nil))
			assert.Equal(t, http.NoBody, r.Body)
			assert.Zero(t, r.ContentLength)
			assert.Equal(t, []string{"0"}, r.Header["Content-Length"], "php_fastcgi uses this field")
			assert.Nil(t, r.GetBody)
			assert.Empty(t, r.TransferEncoding)
			assert.Empty(t, r.Trailer)
			assert.NotContains(t, r.Header, "Connection")
			assert.NotContains(t, r.Header, "Upgrade")
		})
	}
}

// The guard removes the sender's fields about the connection: the fields of HTTP/1.1, and
// fields that only some proxies know.
func TestSenderDoesNotSteer(t *testing.T) {
	fields := http.Header{
		"Connection": {"Idempotency-Key, Inkit-Signature", "Upgrade"}, "Upgrade": {"websocket"}, "Expect": {"100-continue"}, "Te": {"trailers"},
		"Keep-Alive": {"timeout=5"}, "Proxy-Connection": {"close"}, "Incremental": {"?1"}, "X-Idempotency-Key": {"mine"}, "Idempotency-Key": {"mine", "too"},
	}
	for name, off := range map[string]*bool{"with an idempotency key": nil, "without": new(bool)} {
		t.Run(name, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}, IdempotencyKey: off})
			res := serve(t, h, with(signed("x"), func(r *http.Request) {
				r.Header.Set("Content-Type", "application/json")
				maps.Copy(r.Header, fields)
			}))
			require.NoError(t, res.err)
			for field := range fields {
				if field != "Idempotency-Key" || off != nil {
					assert.NotContains(t, res.request.Header, field)
				}
			}
			assert.Equal(t, "application/json", res.request.Header.Get("Content-Type"), "other fields stay")
			assert.Len(t, res.request.Header["Inkit-Signature"], 1)
		})
	}
}

// A proxy in an error route turns an extended CONNECT (RFC 8441 and 9220) into a request
// for a tunnel. The proxy recognizes an extended CONNECT by its method and :protocol.
func TestRejectedConnectOpensNoTunnel(t *testing.T) {
	http3 := func(r *http.Request) { r.Proto, r.ProtoMajor, r.ProtoMinor = "websocket", 3, 0 }
	for _, tt := range []struct {
		name   string
		change func(r *http.Request)
		status int
	}{
		{"HTTP/2", func(r *http.Request) {
			r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
			r.Header[":protocol"] = []string{"websocket"}
		}, http.StatusMethodNotAllowed},
		{"HTTP/3", http3, http.StatusMethodNotAllowed},
		{"HTTP/3, with another method until the error routes", func(r *http.Request) {
			http3(r)
			r.Method = http.MethodPost
			r.Header.Del("Inkit-Signature")
		}, http.StatusUnauthorized},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
			r := with(signed("x"), func(r *http.Request) {
				r.Method = http.MethodConnect
				tt.change(r)
			})
			w := httptest.NewRecorder()
			r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), w, &caddyhttp.Server{})
			var handlerErr caddyhttp.HandlerError
			require.ErrorAs(t, h.ServeHTTP(w, r, nil), &handlerErr)
			assert.Equal(t, tt.status, handlerErr.StatusCode)
			assert.NotContains(t, r.Header, ":protocol")
			assert.Equal(t, fmt.Sprintf("HTTP/%d.0", r.ProtoMajor), r.Proto)
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
		{"a wrong field from an earlier handler", with(signed("abc"), func(r *http.Request) { r.Header["Content-Length"] = []string{"4", "5"} }), "3"},
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

// If a later handler replaces the body, Caddy sends the new body: neither GetBody nor the
// error routes bring back the signed body.
func TestReplacedBodyIsNotUndone(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: testSecret}}})
	w := httptest.NewRecorder()
	r := caddyhttp.PrepareRequest(signed(compactBody), caddy.NewReplacer(), w, &caddyhttp.Server{})
	other := io.NopCloser(strings.NewReader("another body"))
	err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		r.Body, r.ContentLength = other, 12 // as request_body does with "set"
		_, err := r.GetBody()
		assert.EqualError(t, err, "the body was replaced after it was verified")
		return caddyhttp.Error(502, errors.New("of the next handler"))
	}))
	require.Error(t, err)
	assert.Equal(t, other, r.Body)
	assert.EqualValues(t, 12, r.ContentLength)
	_, err = r.GetBody()
	require.Error(t, err)
}

// An error route gets the whole verified body, so it can send the event to another backend.
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
		assert.Len(t, rest, max(0, len(body)-2), "the first reader has not moved")
		again, err := r.GetBody()
		require.NoError(t, err)
		all, err = io.ReadAll(again)
		require.NoError(t, err)
		assert.Equal(t, body, string(all))
		assert.Len(t, r.Header["Idempotency-Key"], 1)
	}
}

func TestReadBody(t *testing.T) {
	broken := errors.New("broken")
	const large = 300_000
	data := bytes.Repeat([]byte("0123456789abcdef"), large/16)
	for _, tt := range []struct {
		name   string
		r      io.Reader
		length int64
		max    int64
		want   int
		err    error
	}{
		{"nothing, declared", bytes.NewReader(nil), 0, 10, 0, nil},
		{"nothing, undeclared", bytes.NewReader(nil), -1, 10, 0, nil},
		{"a short body, declared", bytes.NewReader(data[:85]), 85, 100, 85, nil},
		{"a short body, undeclared", bytes.NewReader(data[:85]), -1, 100, 85, nil},
		{"exactly max_size, declared", bytes.NewReader(data[:100]), 100, 100, 100, nil},
		{"exactly max_size, undeclared", bytes.NewReader(data[:100]), -1, 100, 100, nil},
		{"exactly the first buffer, undeclared", bytes.NewReader(data[:firstRead]), -1, large, firstRead, nil},
		{"exactly the first buffer, declared", bytes.NewReader(data[:firstRead]), firstRead, large, firstRead, nil},
		{"a large body, declared", bytes.NewReader(data), large, large, large, nil},
		{"a large body, undeclared", bytes.NewReader(data), -1, large, large, nil},
		{"without a limit", bytes.NewReader(data), -1, math.MaxInt64, large, nil},
		{"one byte at a time", iotest.OneByteReader(bytes.NewReader(data[:5000])), -1, large, 5000, nil},
		{"the end together with the data", iotest.DataErrReader(bytes.NewReader(data[:5000])), 5000, large, 5000, nil},
		{"more than declared", bytes.NewReader(data[:5000]), 10, large, 5000, nil},

		{"less than declared", bytes.NewReader(data[:10]), 5000, large, 10, errBodyUnreadable},
		{"nothing, although more was declared", bytes.NewReader(nil), 1, large, 0, errBodyUnreadable},
		{"one byte above max_size", bytes.NewReader(data[:101]), -1, 100, 101, errBodyTooLarge},
		{"far above max_size", bytes.NewReader(data), -1, 100, 101, errBodyTooLarge},
		{"above max_size, although less was declared", bytes.NewReader(data), 50, 100, 101, errBodyTooLarge},
		{"above a large max_size", bytes.NewReader(data), -1, large - 1, large, errBodyTooLarge},
		{"broken at the start", iotest.ErrReader(broken), 10, 100, 0, broken},
		{"broken later", io.MultiReader(bytes.NewReader(data[:5000]), iotest.ErrReader(broken)), -1, large, 5000, broken},
		{"cut short", io.MultiReader(bytes.NewReader(data[:50]), iotest.ErrReader(io.ErrUnexpectedEOF)), 80, 100, 50, io.ErrUnexpectedEOF},
		{
			"cut short together with data",
			iotest.DataErrReader(io.MultiReader(bytes.NewReader(data[:50]), iotest.ErrReader(io.ErrUnexpectedEOF))),
			80, 100, 50, io.ErrUnexpectedEOF,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			body, err := readBody(tt.r, tt.length, tt.max)
			require.ErrorIs(t, err, tt.err)
			require.Len(t, body, tt.want)
			assert.True(t, bytes.Equal(data[:tt.want], body), "the bytes differ")
		})
	}
}

// readBody takes memory for the bytes that arrive, not for the declared length. The limit is the
// larger of two sizes: the first buffer, and four times the bytes that have arrived.
func TestReadBodyPaysForWhatArrived(t *testing.T) {
	const declared = 64 << 20
	for _, arrived := range []int{0, 1, 64, firstRead, firstRead + 1, 100_000, 1 << 20} {
		for _, length := range []int64{declared, -1} {
			r := io.MultiReader(bytes.NewReader(make([]byte, arrived)), iotest.ErrReader(io.ErrUnexpectedEOF))
			body, err := readBody(r, length, declared)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			assert.LessOrEqual(t, cap(body), max(firstRead, 4*arrived), "%d bytes arrived", arrived)
		}
	}
	small, err := readBody(strings.NewReader(compactBody), int64(len(compactBody)), declared)
	require.NoError(t, err)
	assert.Equal(t, len(compactBody)+1, cap(small), "an event takes memory only for its own length")
}

func FuzzReadBody(f *testing.F) {
	f.Add([]byte("abc"), int64(3), int64(10), 2)
	f.Add([]byte(strings.Repeat("x", 5000)), int64(-1), int64(4096), 100)
	f.Fuzz(func(t *testing.T, data []byte, length, maxSize int64, step int) {
		if length < -1 || maxSize < 0 || step < 1 || length > maxSize {
			return // impossible input
		}
		rest := data
		body, err := readBody(readerFunc(func(p []byte) (int, error) {
			if len(rest) == 0 {
				return 0, io.EOF
			}
			n := copy(p, rest[:min(step, len(rest))])
			rest = rest[n:]
			return n, nil
		}), length, maxSize)
		switch {
		case int64(len(data)) > maxSize:
			require.ErrorIs(t, err, errBodyTooLarge)
		case int64(len(data)) < length:
			require.ErrorIs(t, err, errBodyUnreadable)
		default:
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, body))
		}
	})
}
