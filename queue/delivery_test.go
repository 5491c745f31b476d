package queue

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func TestBackoff(t *testing.T) {
	for _, tt := range []struct {
		name            string
		age, least, all time.Duration
	}{
		{"an event that has just arrived", 0, time.Second, 1200 * time.Millisecond},
		{"the clock was set back", -time.Hour, time.Second, 1200 * time.Millisecond},
		{"half a second", 500 * time.Millisecond, time.Second, 1200 * time.Millisecond},
		{"a second", time.Second, time.Second, 1200 * time.Millisecond},
		{"ten seconds", 10 * time.Second, 10 * time.Second, 12 * time.Second},
		{"five minutes", 5 * time.Minute, 5 * time.Minute, 6 * time.Minute},
		{"an hour", time.Hour, 5 * time.Minute, 6 * time.Minute},
		{"the longest duration", math.MaxInt64, 5 * time.Minute, 6 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			shortest, longest := time.Duration(math.MaxInt64), time.Duration(0)
			for range 2000 {
				wait := delivery.Backoff(tt.age, rand.Float64())
				shortest, longest = min(shortest, wait), max(longest, wait)
			}
			assert.GreaterOrEqual(t, shortest, tt.least)
			assert.LessOrEqual(t, longest, tt.all)
			assert.Less(t, float64(shortest), 1.02*float64(tt.least), "the smallest jitter is near 0")
			assert.Greater(t, float64(longest), 1.18*float64(tt.least), "the largest jitter is near a fifth")
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name, value string
		want        time.Duration
	}{
		{"no field", "", 0},
		{"seconds", "120", 2 * time.Minute},
		{"0 seconds", "0", 0},
		{"an hour", "3600", time.Hour},
		{"more than an hour", "3601", time.Hour},
		{"a day", "86400", time.Hour},
		{"the largest number of 32 bits", "4294967295", time.Hour},
		{"a number of more than 64 bits", "99999999999999999999999", time.Hour},
		{"a date", "Wed, 25 Nov 2026 12:01:30 GMT", 90 * time.Second},
		{"a date in the old format", "Wednesday, 25-Nov-26 12:01:30 GMT", 90 * time.Second},
		{"a date in the past", "Wed, 25 Nov 2026 11:59:00 GMT", 0},
		{"a date a year from now", "Thu, 25 Nov 2027 12:00:00 GMT", time.Hour},
		{"a negative number", "-5", 0},
		{"a fraction", "1.5", 0},
		{"a sign", "+5", 0},
		{"a space", " 5", 0},
		{"garbage", "soon", 0},
		{"a date in another format", "2026-11-25T12:01:30Z", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			assert.Equal(t, tt.want, retryAfter(tt.value, now))
		})
	}
}

// The last error of an event is one short line.
func TestLastError(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"an unchanged text", "status 500: connection refused", "status 500: connection refused"},
		{"letters outside ASCII", "Fehler: größer als 5 €", "Fehler: größer als 5 €"},
		{"lines", "one\r\ntwo\tthree", "one\uFFFD\uFFFDtwo\uFFFDthree"},
		{"an escape sequence", "\x1b[31mred\x1b[0m", "\uFFFD[31mred\uFFFD[0m"},
		{"NUL", "a\x00b", "a\uFFFDb"},
		{"invalid UTF-8", "a\xff\xc3(", "a\uFFFD\uFFFD("},
		{"a character that reverses the text direction", "a\u202eb", "a\uFFFDb"},
		{"300 bytes", strings.Repeat("a", 300), strings.Repeat("a", 300)},
		{"301 bytes", strings.Repeat("a", 301), strings.Repeat("a", 300) + "..."},
		{"10 kB", strings.Repeat("\x1b", 10_000), strings.Repeat("\uFFFD", 100) + "..."},
		{"cut inside a letter", strings.Repeat("a", 299) + "ä" + strings.Repeat("a", 10_000), strings.Repeat("a", 299) + "..."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := lastError(errors.New(tt.text))
			assert.Equal(t, tt.want, got)
			assert.LessOrEqual(t, len(got), maxError+3)
			assert.True(t, utf8.ValidString(got))
			assert.False(t, strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) && r != unicode.ReplacementChar }))
		})
	}
}

// After each attempt, the last error is one short line, even if the error of a handler is long.
func TestLastErrorOfABackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return caddyhttp.Error(500, errors.New("\x1b[2Jno\x00\n\xff"+strings.Repeat("long ", 2000)))
		})})
		defer c.stop(t)
		synctest.Wait()
		serve(t, c.handlers[0], post(body))
		for attempt := 1; attempt <= 2; attempt++ {
			synctest.Wait()
			seen := 0
			storetest.Select(t, c.queue().db.opened(t), store.Filter{}, func(r *store.Record) {
				seen++
				assert.Equal(t, attempt, r.Attempts)
				assert.True(t, strings.HasPrefix(r.LastError, "status 500: \uFFFD[2Jno\uFFFD\uFFFD\uFFFDlong long "), r.LastError)
				assert.LessOrEqual(t, len(r.LastError), 303)
			})
			assert.Equal(t, 1, seen)
			time.Sleep(1300 * time.Millisecond)
		}
	})
}

// Without a pending event, a backend that is down counts as up again.
func TestBackendThatIsDownForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		c := start(t, &Handler{
			Name: "for-nothing", StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")),
			Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
				if up.Load() {
					return status(200)(w, r, next)
				}
				return status(503)(w, r, next)
			}),
		})
		defer c.stop(t)
		synctest.Wait()
		for range 6 {
			assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		}
		time.Sleep(time.Minute)
		assert.NotZero(t, c.queue().breaker.Backend().Down, "the backend stays down while events are pending")
		up.Store(true)
		_, err := c.queue().db.opened(t).Drop(t.Context(), store.Filter{})
		require.NoError(t, err)
		time.Sleep(17 * time.Second)
		synctest.Wait()
		assert.Zero(t, c.queue().breaker.Backend().Down)
		assert.Zero(t, seriesOf(t, "for-nothing")["backend_down"])
		assert.Equal(t, 1, c.logs.FilterMessage("no pending event is left to probe the backend: the backend counts as up again").Len())
		assert.Equal(t, "the backend's body", serve(t, c.handlers[0], post(body)).body)
	})
}

// Some handlers, such as php_fastcgi, do not end an attempt at attempt_timeout.
func TestAttemptThatDoesNotEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, calls atomic.Int64
		good := make(chan struct{})
		hanging := make(chan struct{})
		c := start(t, &Handler{
			StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), AnswerAfter: duration(0), AttemptTimeout: caddy.Duration(10 * time.Second), Concurrency: 2,
			Routes: routes(func(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
				text, err := io.ReadAll(r.Body)
				if string(text) != "good" {
					calls.Add(1)
					running.Add(1)
					<-hanging
					running.Add(-1)
				} else {
					close(good)
				}
				w.WriteHeader(http.StatusOK)
				return err
			}),
		})
		synctest.Wait()
		for range 4 {
			assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		}
		time.Sleep(10 * time.Minute)
		assert.EqualValues(t, 4, calls.Load(), "no second attempt at an event during its first attempt")
		assert.Equal(t, 4, c.logs.FilterMessageSnippet("an attempt goes on after attempt_timeout").FilterLevelExact(zapcore.WarnLevel).Len())
		assert.Equal(t, 200, serve(t, c.handlers[0], post("good")).status)
		<-good // the hanging attempts do not delay this event

		close(hanging)
		time.Sleep(10 * time.Minute)
		assert.Zero(t, running.Load())
		assert.Empty(t, c.counts(t), "the events are retried after their attempts have ended")
		assert.EqualValues(t, 8, calls.Load())

		hanging = make(chan struct{})
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		synctest.Wait()
		c.queue().cutOff() // like the end of the grace period
		before := time.Now()
		c.stop(t)
		assert.LessOrEqual(t, time.Since(before), endMargin+time.Second)
		close(hanging)
	})
}

func TestAttemptsThatDoNotEndAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most atomic.Int64
		hanging := make(chan struct{})
		c := start(t, &Handler{
			StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), AnswerAfter: duration(0), AttemptTimeout: caddy.Duration(time.Second), Concurrency: 64,
			Routes: routes(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
				most.Store(max(most.Load(), running.Add(1)))
				<-hanging
				running.Add(-1)
				return nil
			}),
		})
		synctest.Wait()
		for range 300 {
			assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		}
		time.Sleep(25 * time.Minute)
		assert.EqualValues(t, maxOverdue, most.Load())
		close(hanging)
		c.stop(t)
	})
}

// Some results of attempts mark the backend as down.
func TestBackendThatIsDown(t *testing.T) {
	withStatus := func(code int) func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
		return func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return caddyhttp.Error(code, errors.New("of a handler"))
		}
	}
	hangs := func(_ http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
		<-r.Context().Done()
		return r.Context().Err()
	}
	for _, tt := range []struct {
		name    string
		backend func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error
		down    bool
	}{
		{"no connection", withStatus(502), true},
		{"status 502 from the backend", status(502), true},
		{"status 503 from the backend", status(503), true},
		{"status 504 from the backend", status(504), true},
		{"status 429 from the backend", status(429), true},
		{"no answer in time", hangs, true},
		{"status 500 from the backend", status(500), false},
		{"status 404 from the backend", status(404), false},
		{"status 401 from the backend", status(401), false},
		{"an error with status 500 from a handler", withStatus(500), false},
		{"a panic", func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error { panic("x") }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var calls atomic.Int64
				var backend atomic.Value
				backend.Store(tt.backend)
				c := start(t, &Handler{
					StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), AnswerAfter: duration(0), AttemptTimeout: caddy.Duration(10 * time.Second),
					Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
						calls.Add(1)
						return backend.Load().(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error)(w, r, next)
					}),
				})
				defer c.stop(t)
				synctest.Wait()
				for range 5 {
					assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
				}
				time.Sleep(11 * time.Second)
				synctest.Wait()
				assert.Equal(t, tt.down, !c.queue().breaker.Backend().Down.IsZero())
				warned := c.logs.FilterMessage("the backend is down: events are stored, and one attempt a second is made").FilterLevelExact(zapcore.WarnLevel)
				if !tt.down {
					assert.Zero(t, warned.Len())
					return
				}
				assert.Equal(t, 1, warned.Len())

				// new events are stored without an attempt, and only probes reach the backend
				before := calls.Load()
				for range 100 {
					assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
				}
				assert.LessOrEqual(t, calls.Load()-before, int64(2))
				before = calls.Load()
				time.Sleep(time.Minute)
				assert.LessOrEqual(t, calls.Load()-before, int64(121), "at most two attempts a second")
				assert.GreaterOrEqual(t, calls.Load()-before, int64(5))

				backend.Store(status(200))
				time.Sleep(7 * time.Minute)
				synctest.Wait()
				assert.Empty(t, c.counts(t))
				assert.Equal(t, 1, c.logs.FilterMessage("the backend is back").FilterLevelExact(zapcore.InfoLevel).Len())
				assert.Equal(t, 1, warned.Len())
			})
		})
	}
}

// Events that always fail do not delay other events, and new events do not wait behind a
// backlog.
func TestNewEventsPassABacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		at, most := 0, 0
		slow := true
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Concurrency: 8, Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			mu.Lock()
			at++
			most = max(most, at)
			slow := slow
			mu.Unlock()
			defer func() {
				mu.Lock()
				at--
				mu.Unlock()
			}()
			if r.Header.Get("X-Bad") != "" {
				return status(500)(w, r, next)
			}
			if slow {
				time.Sleep(100 * time.Millisecond)
			}
			return status(200)(w, r, next)
		})})
		defer c.stop(t)
		synctest.Wait()
		for range 20 {
			r := post(body)
			r.Header.Set("X-Bad", "1")
			assert.Equal(t, 200, serve(t, c.handlers[0], r).status)
		}
		q := c.queue()
		for i := range 500 { // a backlog of due events
			r, e := arrived(t, "http://example.com/", body, nil)
			record := &store.Record{ID: fmt.Sprintf("backlog-%03d", i), Queue: "default", Received: time.Now()}
			q.db.writer.Add(writer.NewAddition(record, newRequest(r, e).Encode, time.Now().Add(time.Minute), func(error) {}))
		}
		synctest.Wait()
		for range 20 {
			got := serve(t, c.handlers[0], post(body))
			assert.Equal(t, "the backend's body", got.body)
			assert.Less(t, got.after, 210*time.Millisecond)
		}
		mu.Lock()
		assert.LessOrEqual(t, most, 8)
		slow = false
		mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Pending: 20}, c.counts(t), "only the events that always fail are left")
	})
}

// An event is dead when an attempt fails after max_age. A retry by an operator sets the age to 0.
func TestMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var attempts atomic.Int64
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), MaxAge: caddy.Duration(time.Hour), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			attempts.Add(1)
			return status(500)(w, r, next)
		})})
		defer c.stop(t)
		synctest.Wait()
		serve(t, c.handlers[0], post(body))
		time.Sleep(59 * time.Minute)
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Pending: 1}, c.counts(t))
		time.Sleep(8 * time.Minute)
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Dead: 1}, c.counts(t))
		died := c.logs.FilterMessage("an event is dead: the backend has not accepted it within max_age, see caddy inkit-queue retry").FilterLevelExact(zapcore.ErrorLevel)
		require.Equal(t, 1, died.Len())
		assert.Equal(t, "DOCUMENT_CREATE_FINISHED", died.All()[0].ContextMap()["event_type"])
		assert.EqualValues(t, attempts.Load(), died.All()[0].ContextMap()["attempts"])
		assert.InDelta(t, 23, attempts.Load(), 5, "1 s, 2 s, 4 s ... 5 min")

		before := attempts.Load()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		assert.Equal(t, before, attempts.Load(), "a dead event gets no attempts")
		n, err := c.queue().db.opened(t).Retry(t.Context(), store.Filter{States: []string{store.Dead}})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Pending: 1}, c.counts(t))
		assert.Greater(t, attempts.Load(), before+5)
	})
}

// The backend's Retry-After field delays the next attempt, for at most one hour.
func TestRetryAfterIsHeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var mu sync.Mutex
		var at []time.Duration
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			mu.Lock()
			at = append(at, time.Since(began).Round(time.Minute))
			n := len(at)
			mu.Unlock()
			w.Header().Set("Retry-After", []string{"600", "86400", "1"}[min(n-1, 2)])
			return status(500)(w, r, next)
		})})
		defer c.stop(t)
		synctest.Wait()
		serve(t, c.handlers[0], post(body))
		time.Sleep(72 * time.Minute)
		mu.Lock()
		defer mu.Unlock()
		assert.Equal(t, []time.Duration{0, 10 * time.Minute, 70 * time.Minute}, at)
	})
}

// A damaged event becomes dead, and is never delivered.
func TestSpoiltEventIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			t.Error("the damaged event is delivered")
			return nil
		})})
		defer c.stop(t)
		synctest.Wait()
		require.NoError(t, c.queue().db.opened(t).Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{{ID: "damaged", Queue: "default", Request: []byte("\x02{}x"), Checksum: []byte("no")}}}))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Dead: 1}, c.counts(t))
		lines := c.logs.FilterMessage("a stored event is damaged: it is dead now, and is never delivered").FilterLevelExact(zapcore.ErrorLevel).All()
		require.Len(t, lines, 1)
		assert.Equal(t, map[string]any{"id": "damaged", "error": "the checksum does not match"}, lines[0].ContextMap())
	})
}

// In an outage of the backend, no event is lost, dead or refused. With E2E_LONG, the outage
// lasts a day with 100,000 events. The clock of the test is synthetic, so only the
// transactions of events and probes take real time.
func TestOutage(t *testing.T) {
	outage, events, dir := 10*time.Minute, 500, t.TempDir()
	if os.Getenv("E2E_LONG") != "" {
		outage, events = 24*time.Hour, 100_000
		if memory, err := os.MkdirTemp("/dev/shm", "inkit-queue"); err == nil { // a slow disk would slow down the test
			defer os.RemoveAll(memory)
			dir = memory
		}
	}
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		var calls, delivered, first atomic.Int64
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(dir, "queue.db")), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			calls.Add(1)
			if !up.Load() {
				return caddyhttp.Error(502, errors.New("connection refused"))
			}
			if delivered.Add(1) == 1 {
				first.Store(time.Now().UnixNano())
			}
			return status(200)(w, r, next)
		})})
		c.handlers[0].logger = c.handlers[0].logger.WithOptions(zap.IncreaseLevel(zapcore.InfoLevel))
		defer c.stop(t)
		synctest.Wait()
		for i := range events {
			if got := serve(t, c.handlers[0], post(body)); got.status != 200 || got.body != "" || got.after > time.Second {
				t.Fatalf("event %d: status %d after %v: %s", i, got.status, got.after, got.error)
			}
			// The queue counts its events every 5 s on the clock of the test. If many events were
			// stored early, all these counts would take minutes of real time. So nine of ten
			// events arrive in the last tenth of the outage.
			if some := events / 10; i < some {
				time.Sleep(outage * 9 / 10 / time.Duration(some))
			} else {
				time.Sleep(outage / 10 / time.Duration(events-some))
			}
		}
		synctest.Wait()
		assert.Equal(t, map[string]int{store.Pending: events}, c.counts(t), "no event is dead or refused")
		assert.LessOrEqual(t, calls.Load(), int64(2*outage/time.Second))

		up.Store(true)
		back := time.Now()
		for range 600 {
			time.Sleep(time.Second)
			if delivered.Load() >= int64(events) {
				break
			}
		}
		synctest.Wait()
		assert.Equal(t, int64(events), delivered.Load(), "each event is delivered once")
		assert.Empty(t, c.counts(t))
		t.Logf("outage of %v: %d events, %d attempts; first delivery %v after the outage, all within %v", outage, events, calls.Load()-delivered.Load(),
			time.Unix(0, first.Load()).Sub(back).Round(time.Millisecond), time.Since(back))
	})
}
