package queue

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// refusing is a database that a test can make full.
type refusing struct {
	store.Opener
	refuse atomic.Bool
}

func (o *refusing) Open(ctx context.Context, opening store.Opening) (store.Store, error) {
	s, err := o.Opener.Open(ctx, opening)
	return &refusingStore{s, o}, err
}

type refusingStore struct {
	store.Store
	opener *refusing
}

func (s *refusingStore) Apply(ctx context.Context, b *store.Batch) error {
	if s.opener.refuse.Load() && len(b.Add) > 0 {
		return store.ErrFull
	}
	return s.Store.Apply(ctx, b)
}

// remembering is a queue with the option "once", and a backend that a test controls.
type remembering struct {
	*configuration
	store    *refusing
	answer   atomic.Int64 // the status that the backend answers
	slow     atomic.Pointer[chan struct{}]
	arrivals atomic.Int64
	first    sync.WaitGroup // a request in flight
}

func newRemembering(t *testing.T, opener store.Opener, change func(h *Handler)) *remembering {
	t.Helper()
	r := &remembering{store: &refusing{Opener: opener}}
	r.answer.Store(200)
	h := &Handler{
		Name: "once", StoreRaw: storeOf(r.store), Once: []string{"*_CREATE_FINISHED"},
		Routes: routes(func(w http.ResponseWriter, req *http.Request, next caddyhttp.Handler) error {
			r.arrivals.Add(1)
			if slow := r.slow.Load(); slow != nil {
				<-*slow
			}
			return status(int(r.answer.Load()))(w, req, next)
		}),
	}
	if change != nil {
		change(h)
	}
	r.configuration = start(t, h)
	return r
}

func (r *remembering) send(t *testing.T) answered {
	t.Helper()
	return serve(t, r.handlers[0], post(body))
}

func sqliteIn(t *testing.T) store.Opener {
	t.Helper()
	return &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
}

// onceAnswers sends the same event twice to a queue with the option `once`: the second request
// comes during the first one, or after the first one had one of the possible results.
func onceAnswers(t *testing.T, newOpener func(t *testing.T) store.Opener) {
	t.Helper()
	for _, tt := range []struct {
		name     string
		first    func(t *testing.T, r *remembering)
		arrivals int64 // after both responses
		stored   map[string]int
	}{
		{"in flight", func(t *testing.T, r *remembering) {
			slow := make(chan struct{})
			r.slow.Store(&slow)
			r.first.Go(func() { r.send(t) })
			require.Eventually(t, func() bool { return r.arrivals.Load() == 1 }, 10*time.Second, time.Millisecond)
		}, 1, map[string]int{"pending": 1}},
		{"stored", func(t *testing.T, r *remembering) {
			r.answer.Store(500)
			assert.Equal(t, 200, r.send(t).status)
		}, 1, map[string]int{"pending": 1}},
		{"delivered", func(t *testing.T, r *remembering) {
			assert.Equal(t, "the backend's body", r.send(t).body)
		}, 1, map[string]int{}},
		{"refused", func(t *testing.T, r *remembering) {
			r.answer.Store(500)
			r.store.refuse.Store(true)
			assert.Equal(t, 503, r.send(t).status)
			r.store.refuse.Store(false)
			r.answer.Store(200)
		}, 2, map[string]int{}},
		{"dead", func(t *testing.T, r *remembering) {
			r.handlers[0].MaxAge = 1
			r.answer.Store(404)
			assert.Equal(t, 200, r.send(t).status)
			require.Eventually(t, func() bool { return r.counts(t)["dead"] == 1 }, 10*time.Second, time.Millisecond)
		}, 1, map[string]int{"dead": 1}},
		{"dropped", func(t *testing.T, r *remembering) {
			r.answer.Store(500)
			assert.Equal(t, 200, r.send(t).status)
			n, err := r.queue().db.opened(t).Drop(t.Context(), store.Filter{})
			require.NoError(t, err)
			require.Equal(t, 1, n)
			r.answer.Store(200)
		}, 2, map[string]int{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRemembering(t, newOpener(t), nil)
			defer r.stop(t)
			defer func() {
				if slow := r.slow.Load(); slow != nil {
					close(*slow)
				}
				r.first.Wait()
			}()
			tt.first(t, r)
			assert.Equal(t, 200, r.send(t).status)
			assert.Equal(t, tt.arrivals, r.arrivals.Load())
			require.Eventually(t, func() bool { return assert.ObjectsAreEqual(tt.stored, r.counts(t)) }, 10*time.Second, time.Millisecond)
		})
	}
}

func TestOnceAnswersInSQLite(t *testing.T) {
	onceAnswers(t, sqliteIn)
}

func TestOnce(t *testing.T) {
	t.Run("20 parallel duplicates are one event", func(t *testing.T) {
		r := newRemembering(t, sqliteIn(t), nil)
		defer r.stop(t)
		before := seriesOf(t, "once")["stored_total duplicate"]
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { assert.Equal(t, 200, r.send(t).status) })
		}
		wg.Wait()
		assert.EqualValues(t, 1, r.arrivals.Load())
		assert.InDelta(t, 19, seriesOf(t, "once")["stored_total duplicate"]-before, 0)
		lines := r.logs.FilterMessage("an event came again, and is not delivered twice").All()
		require.Len(t, lines, 19)
		fields := lines[0].ContextMap()
		assert.Equal(t, zapcore.InfoLevel, lines[0].Level)
		assert.Len(t, fields["first"], 36)
		delete(fields, "first")
		assert.Equal(t, map[string]any{"queue": "once", "event_type": "DOCUMENT_CREATE_FINISHED", "resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs"}, fields)
	})
	for _, tt := range []struct {
		name     string
		change   func(h *Handler)
		bodies   []string
		arrivals int64
	}{
		{"the same bytes", nil, []string{body, body, body}, 1},
		{"other bytes, same resource", nil, []string{body, body + "\n"}, 2},
		{"a type that is not in once", func(h *Handler) { h.Once = []string{"DOCUMENT", "TEMPLATE_*"} }, []string{body, body, body}, 3},
		{"a type that is in once", func(h *Handler) { h.Once = []string{"TEMPLATE_*", "DOCUMENT_CREATE_FINISHED"} }, []string{body, body}, 1},
		{"no type", func(h *Handler) { h.Once = nil }, []string{body, body}, 2},
		{"every type", func(h *Handler) { h.Once = []string{"*"} }, []string{body, body}, 1},
		{"every type, but events without a resource id", func(h *Handler) { h.Once = []string{"*"} }, []string{"no JSON\n{}", "no JSON\n{}"}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRemembering(t, sqliteIn(t), tt.change)
			defer r.stop(t)
			for _, text := range tt.bodies {
				assert.Equal(t, 200, serve(t, r.handlers[0], post(text)).status)
			}
			assert.Equal(t, tt.arrivals, r.arrivals.Load())
		})
	}
	t.Run("no duplicate after remember, or in another queue", func(t *testing.T) {
		opener := sqliteIn(t)
		r := newRemembering(t, opener, func(h *Handler) { h.Remember = caddy.Duration(300 * time.Millisecond) })
		defer r.stop(t)
		r.send(t)
		r.send(t)
		assert.EqualValues(t, 1, r.arrivals.Load())
		time.Sleep(400 * time.Millisecond)
		r.send(t)
		assert.EqualValues(t, 2, r.arrivals.Load())
		other := newRemembering(t, opener, func(h *Handler) { h.Name = "another" })
		defer other.stop(t)
		other.send(t)
		assert.EqualValues(t, 1, other.arrivals.Load())
	})
	t.Run("delivered even if the database fails", func(t *testing.T) {
		r := newRemembering(t, sqliteIn(t), nil)
		defer r.stop(t)
		r.store.refuse.Store(true)
		for range 3 {
			assert.Equal(t, answered{status: 200, body: "the backend's body"}, func() answered {
				a := r.send(t)
				return answered{status: a.status, body: a.body}
			}())
		}
		assert.EqualValues(t, 3, r.arrivals.Load())
		assert.Equal(t, 1, r.logs.FilterMessageSnippet("cannot store events before their first attempt").FilterLevelExact(zapcore.WarnLevel).Len())
	})
	t.Run("delivered even if too many events are pending", func(t *testing.T) {
		r := newRemembering(t, sqliteIn(t), func(h *Handler) { h.MaxEvents = 1 })
		defer r.stop(t)
		r.answer.Store(500)
		serve(t, r.handlers[0], post(body+" "))
		r.answer.Store(200)
		assert.Equal(t, "the backend's body", r.send(t).body)
	})
}

func TestOnceOptions(t *testing.T) {
	for _, tt := range []struct {
		name    string
		types   []string
		message string
	}{
		{"letters, digits, _ and *", []string{"DOCUMENT_CREATE_FINISHED", "*_2", "*"}, ""},
		{"a dot", []string{"A", "DOCUMENT.CREATE"}, "once: an event type must be letters, digits, '_' and '*'"},
		{"an empty type", []string{""}, "once: an event type must be letters, digits, '_' and '*'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := provision(t, &Handler{Once: tt.types, Routes: routes(status(200))})
			if tt.message != "" {
				require.EqualError(t, err, tt.message)
				return
			}
			require.NoError(t, err)
			c.end()
		})
	}
}

func TestHistory(t *testing.T) {
	for _, tt := range []struct {
		name    string
		history time.Duration
		rows    int
	}{{"a week", 7 * 24 * time.Hour, 2}, {"none", 0, 0}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var attempts atomic.Int64
				c := start(t, &Handler{
					Name: "history", StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), History: duration(tt.history),
					Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
						if attempts.Add(1) == 1 {
							return errors.New("no")
						}
						return status(201)(w, r, next)
					}),
				})
				defer c.stop(t)
				s := c.queue().db.opened(t)
				serve(t, c.handlers[0], post(body)) // delivered by the second attempt
				serve(t, c.handlers[0], post(body)) // delivered by the first attempt, so never pending
				time.Sleep(4 * time.Second)
				var rows [][]any
				storetest.Select(t, s, store.Filter{States: []string{store.History}}, func(r *store.Record) {
					rows = append(rows, []any{r.Queue, r.EventType, r.ResourceID, r.Attempts, r.Status})
					assert.False(t, r.Finished.Before(r.Received))
				})
				require.Len(t, rows, tt.rows)
				for i, row := range rows {
					assert.Equal(t, []any{"history", "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", 2 - i, 201}, row)
				}
				assert.Empty(t, c.counts(t))
			})
		})
	}
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := sqliteIn(t)
		r := newRemembering(t, opener, nil)
		s := r.queue().db.opened(t)
		pause := func(paused bool) {
			changed, err := s.Pause(t.Context(), "once", paused)
			require.NoError(t, err)
			require.True(t, changed)
			time.Sleep(2 * time.Second)
		}
		texts := []string{body, body + " ", body + "  ", "another"}
		pause(true)
		assert.InDelta(t, 1, seriesOf(t, "once")["paused"], 0)
		for _, text := range texts {
			assert.Equal(t, 200, serve(t, r.handlers[0], post(text)).status)
		}
		time.Sleep(time.Minute)
		assert.Zero(t, r.arrivals.Load())
		assert.Equal(t, map[string]int{"pending": 4}, r.counts(t))
		r.store.refuse.Store(true)
		assert.Equal(t, 503, serve(t, r.handlers[0], post("no room")).status)
		r.store.refuse.Store(false)
		assert.Zero(t, r.arrivals.Load())
		r.stop(t)

		again := newRemembering(t, opener, nil) // after a restart, Caddy does not know yet that the queue is paused
		defer again.stop(t)
		assert.Equal(t, 200, serve(t, again.handlers[0], post("one more")).status)
		s = again.queue().db.opened(t)
		time.Sleep(10 * time.Second)
		assert.Zero(t, again.arrivals.Load())
		pause(false)
		assert.EqualValues(t, 5, again.arrivals.Load())
		assert.Zero(t, seriesOf(t, "once")["paused"])
		assert.Equal(t, 1, again.logs.FilterMessage("the queue is paused: events are stored, but not delivered, until you run caddy inkit-queue resume").Len())
		assert.Equal(t, 1, again.logs.FilterMessage("the queue is no longer paused").Len())
		assert.Equal(t, "once", again.app.Queues()[0].Name)
	})
}
