package queue

import (
	"errors"
	"fmt"
	"io"
	"math"
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
		{"an event that has just come", 0, time.Second, 1200 * time.Millisecond},
		{"the clock was set back", -time.Hour, time.Second, 1200 * time.Millisecond},
		{"half a second", 500 * time.Millisecond, time.Second, 1200 * time.Millisecond},
		{"a second", time.Second, time.Second, 1200 * time.Millisecond},
		{"ten seconds", 10 * time.Second, 10 * time.Second, 12 * time.Second},
		{"five minutes", 5 * time.Minute, 5 * time.Minute, 6 * time.Minute},
		{"an hour", time.Hour, 5 * time.Minute, 6 * time.Minute},
		{"longer than can be", math.MaxInt64, 5 * time.Minute, 6 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			shortest, longest := time.Duration(math.MaxInt64), time.Duration(0)
			for range 2000 {
				wait := backoff(tt.age)
				shortest, longest = min(shortest, wait), max(longest, wait)
			}
			assert.GreaterOrEqual(t, shortest, tt.least)
			assert.LessOrEqual(t, longest, tt.all)
			assert.Less(t, float64(shortest), 1.02*float64(tt.least), "there is jitter")
			assert.Greater(t, float64(longest), 1.18*float64(tt.least), "of a fifth")
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name, value string
		want        time.Duration
	}{
		{"none", "", 0},
		{"seconds", "120", 2 * time.Minute},
		{"0 seconds", "0", 0},
		{"an hour", "3600", time.Hour},
		{"more than an hour", "3601", time.Hour},
		{"a day", "86400", time.Hour},
		{"as many as a number holds", "4294967295", time.Hour},
		{"more than a number holds", "99999999999999999999999", time.Hour},
		{"a date", "Wed, 25 Nov 2026 12:01:30 GMT", 90 * time.Second},
		{"a date in the old form", "Wednesday, 25-Nov-26 12:01:30 GMT", 90 * time.Second},
		{"a date that is over", "Wed, 25 Nov 2026 11:59:00 GMT", 0},
		{"a date in a year", "Thu, 25 Nov 2027 12:00:00 GMT", time.Hour},
		{"a negative number", "-5", 0},
		{"a fraction", "1.5", 0},
		{"a sign", "+5", 0},
		{"a space", " 5", 0},
		{"garbage", "soon", 0},
		{"a date of another form", "2026-11-25T12:01:30Z", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			assert.Equal(t, tt.want, retryAfter(tt.value, now))
		})
	}
}

// What an operator reads of the last error is one short line.
func TestLastError(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"as it is", "status 500: connection refused", "status 500: connection refused"},
		{"letters of all kinds", "Fehler: größer als 5 €", "Fehler: größer als 5 €"},
		{"lines", "one\r\ntwo\tthree", "one\uFFFD\uFFFDtwo\uFFFDthree"},
		{"an escape sequence", "\x1b[31mred\x1b[0m", "\uFFFD[31mred\uFFFD[0m"},
		{"NUL", "a\x00b", "a\uFFFDb"},
		{"no UTF-8", "a\xff\xc3(", "a\uFFFD\uFFFD("},
		{"a character that turns the direction", "a\u202eb", "a\uFFFDb"},
		{"300 bytes", strings.Repeat("a", 300), strings.Repeat("a", 300)},
		{"301 bytes", strings.Repeat("a", 301), strings.Repeat("a", 300) + "..."},
		{"10 kB", strings.Repeat("\x1b", 10_000), strings.Repeat("\uFFFD", 100) + "..."},
		{"cut in the middle of a letter", strings.Repeat("a", 299) + "ä" + strings.Repeat("a", 10_000), strings.Repeat("a", 299) + "..."},
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

// So it is when a backend is what says it, at the live attempt and at a later one.
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
			require.NoError(t, c.queue().db.opened().Select(t.Context(), Filter{}, false, func(r *Record) bool {
				seen++
				assert.Equal(t, attempt, r.Attempts)
				assert.True(t, strings.HasPrefix(r.LastError, "status 500: \uFFFD[2Jno\uFFFD\uFFFD\uFFFDlong long "), r.LastError)
				assert.LessOrEqual(t, len(r.LastError), 303)
				return true
			}))
			assert.Equal(t, 1, seen)
			time.Sleep(1300 * time.Millisecond)
		}
	})
}

// bare returns a queue without a schedule, and a handler that delivers for it.
func bare(t *testing.T, concurrency int) (*queue, *Handler) {
	t.Helper()
	d := newDatabase(&SQLite{Path: filepath.Join(t.TempDir(), "never opened")}, zap.NewNop())
	q := &queue{name: t.Name(), db: d, metrics: newQueueMetrics(t.Name()), wake: make(chan struct{}, 1)}
	h := &Handler{Concurrency: concurrency, logger: zap.NewNop(), app: &App{logger: zap.NewNop()}}
	q.attach(h)
	return q, h
}

func TestBreaker(t *testing.T) {
	lost := func(ids ...string) func(*queue, *Handler) {
		return func(q *queue, h *Handler) {
			for _, id := range ids {
				q.judge(h, id, result{err: errors.New("connection refused"), unreachable: true})
			}
		}
	}
	found := func(q *queue, h *Handler) { q.judge(h, "", result{}) }
	for _, tt := range []struct {
		name    string
		steps   []func(*queue, *Handler)
		down    bool
		allowed int
	}{
		{"nothing has happened", nil, false, 16},
		{"four different events", []func(*queue, *Handler){lost("a", "b", "c", "d")}, false, 16},
		{"five different events", []func(*queue, *Handler){lost("a", "b", "c", "d", "e")}, true, 1},
		{"one event five times", []func(*queue, *Handler){lost("a", "a", "a", "a", "a")}, false, 16},
		{"four events many times", []func(*queue, *Handler){lost("a", "b", "c", "d", "a", "b", "c", "d", "a", "b")}, false, 16},
		{"five, with one between that was reached", []func(*queue, *Handler){lost("a", "b", "c", "d"), found, lost("e")}, false, 16},
		{"five again after that", []func(*queue, *Handler){lost("a", "b"), found, lost("c", "d", "e", "a", "b")}, true, 1},
		{"a probe that fails", []func(*queue, *Handler){lost("a", "b", "c", "d", "e", "a")}, true, 1},
		{"the probe succeeds", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found}, false, 1},
		{"the next succeeds", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found}, false, 2},
		{"the third", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found, found}, false, 4},
		{"the fourth", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found, found, found}, false, 8},
		{"the fifth", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found, found, found, found}, false, 16},
		{"and there it stays", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found, found, found, found, found, found}, false, 16},
		{"down again while it recovers", []func(*queue, *Handler){lost("a", "b", "c", "d", "e"), found, found, lost("a", "b", "c", "d", "e")}, true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, h := bare(t, 16)
			for _, step := range tt.steps {
				step(q, h)
			}
			assert.Equal(t, tt.down, q.isDown())
			assert.Equal(t, tt.allowed, q.breaker.allowed(q.lanes.limit))
		})
	}
}

// What is being delivered, or was and cannot be noted, is not delivered again when its
// lease is over.
func TestClaimOfWhatIsHeld(t *testing.T) {
	d := &database{held: map[string]bool{"delivered": true}}
	assert.Equal(t, []*Record{{ID: "due"}}, d.holdLocked([]*Record{{ID: "delivered"}, {ID: "due"}}))
	assert.Empty(t, d.holdLocked([]*Record{{ID: "delivered"}, {ID: "due"}}))
}

// With nothing to probe with, the next event is the probe.
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
		assert.True(t, c.queue().isDown(), "while they wait")
		up.Store(true)
		_, err := c.queue().db.opened().Drop(t.Context(), Filter{})
		require.NoError(t, err)
		time.Sleep(forgetAfter + 2*pollInterval)
		synctest.Wait()
		assert.False(t, c.queue().isDown())
		assert.Zero(t, seriesOf(t, "for-nothing")["backend_down"])
		assert.Equal(t, 1, c.logs.FilterMessage("nothing waits any more for the backend that was down").Len())
		p, err := c.queue().db.opened().Peek(t.Context(), "for-nothing")
		require.NoError(t, err)
		assert.False(t, p.Down, "for other processes, too")
		assert.Equal(t, "the backend's body", serve(t, c.handlers[0], post(body)).body)
	})
}

// A handler that does not heed the time of an attempt, as php_fastcgi does not.
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
		assert.EqualValues(t, 4, calls.Load(), "each of them, and none again while that goes on")
		assert.Equal(t, 4, c.logs.FilterMessageSnippet("an attempt goes on though attempt_timeout is over").FilterLevelExact(zapcore.WarnLevel).Len())
		assert.Equal(t, 200, serve(t, c.handlers[0], post("good")).status)
		<-good // which they do not hold up

		close(hanging)
		time.Sleep(10 * time.Minute)
		assert.Zero(t, running.Load())
		assert.Empty(t, c.counts(t), "they are attempted again when that has ended")
		assert.EqualValues(t, 8, calls.Load())

		hanging = make(chan struct{})
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		synctest.Wait()
		c.queue().cancel() // as when the time of a stop is over
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
		assert.EqualValues(t, maxUnended, most.Load())
		close(hanging)
		c.stop(t)
	})
}

// Which answers say that the backend is down, with what the log and the metric say.
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
		{"502 of the backend", status(502), true},
		{"503 of the backend", status(503), true},
		{"504 of the backend", status(504), true},
		{"429 of the backend", status(429), true},
		{"no answer in time", hangs, true},
		{"500 of the backend", status(500), false},
		{"404 of the backend", status(404), false},
		{"401 of the backend", status(401), false},
		{"an error of a handler with 500", withStatus(500), false},
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
				assert.Equal(t, tt.down, c.queue().isDown())
				warned := c.logs.FilterMessage("the backend is down: events are kept, and one attempt is made at a time").FilterLevelExact(zapcore.WarnLevel)
				if !tt.down {
					assert.Zero(t, warned.Len())
					return
				}
				assert.Equal(t, 1, warned.Len())

				// new events are kept without an attempt of their own
				before := calls.Load()
				for range 100 {
					assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
				}
				assert.LessOrEqual(t, calls.Load()-before, int64(2))
				before = calls.Load()
				time.Sleep(time.Minute)
				assert.LessOrEqual(t, calls.Load()-before, int64(121), "at most two a second")
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

// The backlog leaves a quarter of the lanes, and new events go first.
func TestLanes(t *testing.T) {
	for _, tt := range []struct {
		name         string
		allowed      int
		all, backlog int // in use
		waiting      int
		want         int
	}{
		{"all are free", 16, 0, 0, 0, 12},
		{"new events have some", 16, 4, 0, 0, 12},
		{"new events have more than a quarter", 16, 10, 0, 0, 6},
		{"the backlog has all that it may", 16, 12, 12, 0, 0},
		{"none is free", 16, 16, 12, 0, 0},
		{"more are in use than there are after a reload", 4, 16, 12, 0, 0},
		{"a new event waits", 16, 12, 0, 1, 4},
		{"a new event waits, and the backlog has its quarter", 16, 14, 4, 1, 0},
		{"a new event waits for one of two lanes", 2, 1, 0, 1, 1},
		{"a new event waits for the only lane", 1, 0, 0, 1, 0},
		{"one lane in all", 1, 0, 0, 0, 1},
		{"one lane in all, in use", 1, 1, 0, 0, 0},
		{"two lanes", 2, 0, 0, 0, 1},
		{"four lanes", 4, 0, 0, 0, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &lanes{limit: tt.allowed, all: tt.all, backlog: tt.backlog, waiting: make([]chan bool, tt.waiting)}
			assert.Equal(t, tt.want, l.backlogLocked(tt.allowed))
		})
	}
}

// New events that never end do not keep retries from happening: with one lane, they take
// turns.
func TestRetriesBesideManyNewEvents(t *testing.T) {
	for _, limit := range []int{1, 2, 3, 16} {
		t.Run(fmt.Sprint(limit, " at a time"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				attempts := make(map[string]int)
				c := start(t, &Handler{
					StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Concurrency: limit, AnswerAfter: duration(time.Minute),
					Routes: routes(func(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
						time.Sleep(2 * time.Second)
						mu.Lock()
						defer mu.Unlock()
						name := r.Header.Get("X-Name")
						attempts[name]++
						if name == "once" && attempts[name] == 1 {
							w.WriteHeader(500)
						} else {
							w.WriteHeader(200)
						}
						return nil
					}),
				})
				synctest.Wait()
				done := make(chan struct{})
				var senders sync.WaitGroup
				for range 2*limit + 4 {
					senders.Go(func() {
						for {
							select {
							case <-done:
								return
							default:
								serve(t, c.handlers[0], post(body))
							}
						}
					})
				}
				time.Sleep(time.Second)
				r := post(body)
				r.Header.Set("X-Name", "once")
				serve(t, c.handlers[0], r)
				time.Sleep(time.Minute)
				mu.Lock()
				assert.Equal(t, 2, attempts["once"])
				assert.Greater(t, attempts[""], 10*limit, "and new events go on")
				mu.Unlock()
				close(done)
				senders.Wait()
				c.stop(t)
			})
		})
	}
}

func TestLaneGoesToTheNewEventThatWaitsLongest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := bare(t, 2)
		require.True(t, q.enterLive(nil, true))
		require.True(t, q.enterLive(nil, true))
		var order []string
		gaveUp := make(chan struct{})
		for _, name := range []string{"first", "second, which gives up", "third"} {
			given := make(chan struct{})
			if strings.HasPrefix(name, "second") {
				given = gaveUp
			}
			go func() {
				order = append(order, fmt.Sprint(name, " ", q.enterLive(given, true)))
			}()
			synctest.Wait()
		}
		close(gaveUp)
		synctest.Wait()
		q.leaveLive()
		synctest.Wait()
		q.leaveLive()
		synctest.Wait()
		assert.Equal(t, []string{"second, which gives up false", "first true", "third true"}, order)
		assert.Equal(t, 2, q.lanes.all)

		go func() { order = append(order, fmt.Sprint("fourth ", q.enterLive(nil, true))) }()
		synctest.Wait()
		q.mu.Lock()
		q.downLocked(q.handlers[0], errors.New("x"))
		q.mu.Unlock()
		synctest.Wait()
		assert.Equal(t, "fourth false", order[len(order)-1], "nobody waits for a backend that is down")
		assert.False(t, q.enterLive(nil, true))
	})
}

// An event that always fails and one that is never answered hold up nobody, and new
// events do not wait behind a backlog.
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
		for i := range 500 { // a backlog that is due
			r, e := arrived(t, "http://example.com/", body, nil)
			q.db.add(&Record{ID: fmt.Sprintf("backlog-%03d", i), Queue: "default", Received: time.Now()}, newRequest(r, e), false, &q.metrics)
		}
		synctest.Wait()
		q.poke()
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
		assert.Equal(t, map[string]int{statePending: 20}, c.counts(t), "those that always fail")
	})
}

// An event is dead when an attempt fails after max_age, and a retry gives it a fresh age.
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
		assert.Equal(t, map[string]int{statePending: 1}, c.counts(t))
		time.Sleep(8 * time.Minute)
		synctest.Wait()
		assert.Equal(t, map[string]int{stateDead: 1}, c.counts(t))
		died := c.logs.FilterMessage("an event is dead: the backend has not taken it for max_age").FilterLevelExact(zapcore.ErrorLevel)
		require.Equal(t, 1, died.Len())
		assert.Equal(t, "DOCUMENT_CREATE_FINISHED", died.All()[0].ContextMap()["event_type"])
		assert.EqualValues(t, attempts.Load(), died.All()[0].ContextMap()["attempts"])
		assert.InDelta(t, 23, attempts.Load(), 5, "1 s, 2 s, 4 s ... 5 min")

		before := attempts.Load()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		assert.Equal(t, before, attempts.Load(), "a dead one is left alone")
		n, err := c.queue().db.opened().Retry(t.Context(), Filter{Dead: true})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		assert.Equal(t, map[string]int{statePending: 1}, c.counts(t))
		assert.Greater(t, attempts.Load(), before+5)
	})
}

// Retry-After of the backend is heeded, one hour at most.
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

// What is stored and is not what was stored is set aside, and never delivered.
func TestSpoiltEventIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			t.Error("it is delivered")
			return nil
		})})
		defer c.stop(t)
		synctest.Wait()
		require.NoError(t, c.queue().db.opened().Apply(t.Context(), &Batch{Owner: "me", Add: []*Record{{ID: "spoilt", Queue: "default", Request: []byte("\x02{}x"), Checksum: []byte("no")}}}))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		assert.Equal(t, map[string]int{stateDead: 1}, c.counts(t))
		lines := c.logs.FilterMessage("a stored event is not what was stored: it was set aside").FilterLevelExact(zapcore.ErrorLevel).All()
		require.Len(t, lines, 1)
		assert.Equal(t, map[string]any{"id": "spoilt", "error": "the checksum does not match"}, lines[0].ContextMap())
	})
}

// An outage of the backend costs no event: none is dead, none is refused. The clock is
// that of the test. E2E_LONG has a day with 100,000 events; the clock costs nothing,
// but each event and each probe is a transaction.
func TestOutage(t *testing.T) {
	outage, events, dir := 10*time.Minute, 500, t.TempDir()
	if os.Getenv("E2E_LONG") != "" {
		outage, events = 24*time.Hour, 100_000
		if memory, err := os.MkdirTemp("/dev/shm", "inkit-queue"); err == nil { // where the disk is not what is measured
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
			time.Sleep(outage / time.Duration(events))
		}
		synctest.Wait()
		assert.Equal(t, map[string]int{statePending: events}, c.counts(t), "0 dead, 0 refused")
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
		assert.Equal(t, int64(events), delivered.Load(), "each once")
		assert.Empty(t, c.counts(t))
		t.Logf("outage of %v: %d events, %d attempts; first delivery %v after it, all within %v", outage, events, calls.Load()-delivered.Load(),
			time.Unix(0, first.Load()).Sub(back).Round(time.Millisecond), time.Since(back))
	})
}
