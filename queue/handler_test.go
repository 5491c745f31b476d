package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const body = `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs"}`

func init() {
	caddy.RegisterModule(testBackend{})
	caddy.RegisterModule(testStore{})
}

// handed has the values that tests give to modules. Caddy creates a module from JSON, so the
// JSON has only the number of the value.
var (
	handed     sync.Map
	handedLast atomic.Int64
)

func hand(what any) int64 {
	number := handedLast.Add(1)
	handed.Store(number, what)
	return number
}

// testBackend is a handler that calls a function of a test.
type testBackend struct {
	Number int64 `json:"number"`
}

func (testBackend) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.queue_test", New: func() caddy.Module { return new(testBackend) }}
}

func (b *testBackend) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	f, _ := handed.Load(b.Number)
	return f.(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error)(w, r, next)
}

// routes returns the routes of a `deliver` block with a testBackend.
func routes(f func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error) caddyhttp.RouteList {
	return rawRoutes(fmt.Sprintf(`{"handler":"queue_test","number":%d}`, hand(f)))
}

func rawRoutes(handlers ...string) caddyhttp.RouteList {
	var route caddyhttp.Route
	for _, handler := range handlers {
		route.HandlersRaw = append(route.HandlersRaw, json.RawMessage(handler))
	}
	return caddyhttp.RouteList{route}
}

// status is a backend that answers each request with the given code.
func status(code int) func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
	return func(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
		w.Header().Set("X-Backend", "yes")
		w.WriteHeader(code)
		_, err := io.WriteString(w, "the backend's body")
		return err
	}
}

// testStore is a store module that uses the Opener of a test.
type testStore struct {
	Number       int64 `json:"number"`
	store.Opener `json:"-"`
}

func (testStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "inkit_queue.stores.queue_test", New: func() caddy.Module { return new(testStore) }}
}

func (s *testStore) Provision(caddy.Context) error {
	opener, _ := handed.Load(s.Number)
	s.Opener = opener.(store.Opener)
	return nil
}

func storeOf(opener store.Opener) json.RawMessage {
	return fmt.Appendf(nil, `{"module":"queue_test","number":%d}`, hand(opener))
}

func sqliteAt(path string) json.RawMessage {
	raw, _ := json.Marshal(map[string]string{"module": "sqlite", "path": path})
	return raw
}

// faulty is an SQLite store that a test can slow down or break.
type faulty struct {
	sqlite.SQLite
	err      atomic.Pointer[error] // the error of an Apply that adds events
	counting time.Duration         // how long a count takes
	counted  atomic.Int32          // how many counts have begun
	uncount  atomic.Bool           // whether counts fail
	unpeek   atomic.Bool           // whether Peek fails
	hangs    atomic.Bool           // whether an Apply that adds events hangs until its context ends
}

func (f *faulty) fail(err error) { f.err.Store(&err) }

func (f *faulty) Open(ctx context.Context, o store.Opening) (store.Store, error) {
	opened, err := f.SQLite.Open(ctx, o)
	return &faultyStore{opened, f}, err
}

type faultyStore struct {
	store.Store
	faulty *faulty
}

func (s *faultyStore) Apply(ctx context.Context, b *store.Batch) error {
	if s.faulty.hangs.Load() && len(b.Add) > 0 {
		<-ctx.Done()
		return ctx.Err()
	}
	if err := s.faulty.err.Load(); err != nil && *err != nil && len(b.Add) > 0 {
		return *err
	}
	return s.Store.Apply(ctx, b)
}

func (s *faultyStore) Peek(ctx context.Context, queue string) (store.Peek, error) {
	if s.faulty.unpeek.Load() {
		return store.Peek{Empty: true}, errors.New("the database does not answer")
	}
	return s.Store.Peek(ctx, queue)
}

func (s *faultyStore) Counts(ctx context.Context) ([]store.Count, error) {
	s.faulty.counted.Add(1)
	counts, err := s.Store.Counts(ctx)
	select {
	case <-time.After(s.faulty.counting):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.faulty.uncount.Load() {
		return nil, errors.New("the table is locked")
	}
	return counts, err
}

type configuration struct {
	app      *App
	handlers []*Handler
	logs     *observer.ObservedLogs
	end      func() // unloads the configuration, with Cleanup
}

// provision loads handlers like a new configuration, but does not start their app.
func provision(tb testing.TB, handlers ...*Handler) (*configuration, error) {
	tb.Helper()
	base, err := caddy.ProvisionContext(&caddy.Config{})
	require.NoError(tb, err)
	ctx, cancel := caddy.NewContext(base)
	core, logs := observer.New(zapcore.DebugLevel)
	observed := func(logger *zap.Logger) *zap.Logger {
		return logger.WithOptions(zap.WrapCore(func(zapcore.Core) zapcore.Core { return core }))
	}
	c := &configuration{handlers: handlers, logs: logs, end: cancel}
	for _, h := range handlers {
		if err := h.Provision(ctx.WithValue(caddyhttp.ServerCtxKey, new(caddyhttp.Server))); err != nil {
			cancel()
			return nil, err
		}
		if err := h.Validate(); err != nil {
			cancel()
			return nil, err
		}
		h.logger = observed(h.logger)
		c.app = h.app
	}
	c.app.logger = observed(c.app.logger)
	return c, nil
}

// start loads handlers and starts their app, like a new configuration.
func start(tb testing.TB, handlers ...*Handler) *configuration {
	tb.Helper()
	c, err := provision(tb, handlers...)
	require.NoError(tb, err)
	require.NoError(tb, c.app.Start())
	return c
}

// stop ends a configuration, like a reload or a stop of Caddy.
func (c *configuration) stop(tb testing.TB) {
	tb.Helper()
	require.NoError(tb, c.app.Stop())
	c.end()
	for _, q := range c.app.queues {
		if _, open := queues.References(q.key); !open {
			<-q.closed // otherwise the test removes the folder while the database closes
		}
	}
}

// queue returns the queue of the first handler.
func (c *configuration) queue() *queue { return c.app.queues[0] }

type addition struct {
	rec     *store.Record
	request *request.Request
}

func (a *addition) seal() (err error) {
	a.rec.Request, err = a.request.Encode()
	a.rec.Checksum = a.rec.Sum()
	return err
}

// The method opened waits until the database is open, and returns it.
func (d *database) opened(tb testing.TB) store.Store {
	tb.Helper()
	for {
		if s, _ := d.writer.Store(); s != nil {
			return s
		}
		time.Sleep(time.Millisecond)
	}
}

// counts returns the number of events in each state, from the database of the first handler.
func (c *configuration) counts(tb testing.TB) map[string]int {
	tb.Helper()
	counts, err := c.queue().db.opened(tb).Counts(tb.Context())
	require.NoError(tb, err)
	all := make(map[string]int)
	for _, count := range counts {
		all[count.State] += count.Events
	}
	return all
}

func duration(d time.Duration) *caddy.Duration { return (*caddy.Duration)(&d) }

// post returns a request with a verified event.
func post(text string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "http://example.com/webhook?from=inkit", strings.NewReader(text))
	r.Header.Set("Idempotency-Key", "key of the event")
	r.Header.Set("Inkit-Signature", "s1gnature")
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, new(caddyhttp.Server))
	(&event.Event{Outcome: event.Verified, Body: []byte(text), SecretName: "current", IdempotencyKey: "key of the event"}).Attach(r.Context())
	return r
}

// The type answered is the response to the sender.
type answered struct {
	status      int // of the error or of the response
	body, error string
	header      http.Header
	after       time.Duration
}

func serve(tb testing.TB, h *Handler, r *http.Request) (a answered) {
	tb.Helper()
	w := httptest.NewRecorder()
	began := time.Now()
	err := h.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		tb.Error("the next handler is called")
		return nil
	}))
	a = answered{status: w.Code, body: w.Body.String(), header: w.Header(), after: time.Since(began)}
	if err != nil {
		var handlerErr caddyhttp.HandlerError
		if !errors.As(err, &handlerErr) {
			tb.Errorf("an error without a status: %v", err)
			return a
		}
		a.status, a.error = handlerErr.StatusCode, handlerErr.Err.Error()
	}
	return a
}

// In tests with a synthetic clock, a database opens within this time, because I/O takes no
// time on this clock.
const opening = time.Millisecond

func TestAnswers(t *testing.T) {
	broken := errors.New("the disk is broken")
	const notTaken = "the event could not be stored, and the backend has not accepted it"
	slow := func(wait time.Duration, code int) func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
		return func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			select {
			case <-time.After(wait):
				return status(code)(w, r, next)
			case <-r.Context().Done():
				return caddyhttp.Error(http.StatusBadGateway, r.Context().Err())
			}
		}
	}
	for _, tt := range []struct {
		name        string
		backend     func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error
		store       error
		full        bool
		answerAfter time.Duration // -1 for the default

		status  int
		body    string
		error   string
		least   time.Duration // until the response
		most    time.Duration
		pending int    // after the response
		last    string // the last error of the stored event
	}{
		{name: "the backend accepts the event, and the sender gets its response", backend: status(201), answerAfter: -1, status: 201, body: "the backend's body"},
		{name: "the backend accepts the event without a body", backend: func(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
			w.Header().Set("X-Backend", "yes")
			w.WriteHeader(204)
			return nil
		}, answerAfter: -1, status: 204},
		{name: "the backend writes only a body, which means status 200", backend: func(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
			w.Header().Set("X-Backend", "yes")
			_, err := io.WriteString(w, "success")
			return err
		}, answerAfter: -1, status: 200, body: "success"},
		{name: "the backend sends early hints first", backend: func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			w.WriteHeader(103)
			return status(202)(w, r, next)
		}, answerAfter: -1, status: 202, body: "the backend's body"},
		{name: "the backend accepts the event after a second", backend: slow(time.Second, 200), answerAfter: -1, status: 200, body: "the backend's body", least: time.Second, most: time.Second, pending: 0},

		{name: "the backend answers 500", backend: status(500), answerAfter: -1, status: 200, most: opening, pending: 1, last: "status 500"},
		{name: "the backend answers 404", backend: status(404), answerAfter: -1, status: 200, most: opening, pending: 1, last: "status 404"},
		{name: "the backend answers with a redirect", backend: status(302), answerAfter: -1, status: 200, most: opening, pending: 1, last: "status 302"},
		{name: "the proxy has an error", backend: func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return caddyhttp.Error(502, errors.New("connection refused"))
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "status 502: connection refused"},
		{name: "a handler has an error without a text", backend: func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return caddyhttp.Error(403, nil)
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "status 403"},
		{name: "a handler has an error without a status", backend: func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return errors.New("something else")
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "something else"},
		{name: "the backend answers 200, and returns an error", backend: func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			return errors.Join(status(200)(w, r, next), errors.New("its answer was cut"))
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "its answer was cut"},
		{name: "no directive handles the event", backend: func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			return next.ServeHTTP(w, r)
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "no directive of the deliver block handled the event"},
		{name: "no directive handles the event, and a handler in front writes status 200", backend: func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			return errors.Join(next.ServeHTTP(w, r), status(200)(w, r, next))
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "no directive of the deliver block handled the event"},
		{name: "the deliver block writes no status", backend: func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			return nil
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "the backend gave no status"},
		{name: "the response is incomplete", backend: func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			_ = status(200)(w, r, next)
			panic(http.ErrAbortHandler)
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "the backend's answer was cut short, or the directive abort ended the attempt"},
		{name: "a handler panics", backend: func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
			panic("of a third party")
		}, answerAfter: -1, status: 200, most: opening, pending: 1, last: "a handler panicked"},

		{name: "no response within the default of 5 s", backend: slow(20*time.Second, 200), answerAfter: -1, status: 200, least: 5 * time.Second, most: 5 * time.Second, pending: 1},
		{name: "no response within answer_after", backend: slow(20*time.Second, 200), answerAfter: 700 * time.Millisecond, status: 200, least: 700 * time.Millisecond, most: 700 * time.Millisecond, pending: 1},
		{name: "the attempt fails before answer_after", backend: slow(300*time.Millisecond, 500), answerAfter: time.Second, status: 200, least: 300 * time.Millisecond, most: 301 * time.Millisecond, pending: 1, last: "status 500"},
		{name: "answer_after of 0 waits only for the disk", backend: slow(time.Minute, 200), answerAfter: 0, status: 200, most: patience + opening, pending: 1},

		{name: "the store is broken and the backend accepts the event", backend: status(201), store: broken, answerAfter: -1, status: 201, body: "the backend's body"},
		{name: "the store is broken and the backend accepts the event after a second", backend: slow(time.Second, 201), store: broken, answerAfter: -1, status: 201, body: "the backend's body", least: time.Second, most: time.Second},
		{name: "the store is broken and the backend accepts the event after answer_after", backend: slow(time.Second, 201), store: broken, answerAfter: 500 * time.Millisecond, status: 201, body: "the backend's body", least: time.Second, most: time.Second},
		{name: "the store stays broken and the backend answers 500", backend: status(500), store: broken, answerAfter: -1, status: 503, error: notTaken, least: 5 * time.Second, most: 5 * time.Second},
		{name: "the store is broken and the backend does not answer", backend: slow(time.Hour, 200), store: broken, answerAfter: time.Second, status: 503, error: notTaken, least: 5 * time.Second, most: 5 * time.Second},
		{name: "the disk is full and the backend accepts the event", backend: status(200), store: store.ErrFull, answerAfter: -1, status: 200, body: "the backend's body"},
		{name: "the disk is full and the backend answers 500", backend: status(500), store: store.ErrFull, answerAfter: -1, status: 503, error: notTaken, most: opening},
		{name: "max_events are pending and the backend accepts the event", backend: status(200), full: true, answerAfter: -1, status: 200, body: "the backend's body", pending: 1},
		{name: "max_events are pending and the backend answers 500", backend: status(500), full: true, answerAfter: -1, status: 503, error: notTaken, pending: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}}
				var backend atomic.Value
				backend.Store(tt.backend)
				h := &Handler{StoreRaw: storeOf(opener), AnswerAfter: duration(tt.answerAfter), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
					return backend.Load().(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error)(w, r, next)
				})}
				if tt.answerAfter < 0 {
					h.AnswerAfter = nil
				}
				if tt.full {
					h.MaxEvents = 1
				}
				c := start(t, h)
				defer c.stop(t)
				synctest.Wait()
				if tt.full { // one event is pending, and its next attempt is much later
					backend.Store(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
						w.Header().Set("Retry-After", "120")
						return status(500)(w, r, next)
					})
					require.Equal(t, 200, serve(t, h, post(body)).status)
					backend.Store(tt.backend)
				}
				opener.fail(tt.store)

				got := serve(t, h, post(body))
				synctest.Wait()
				assert.Equal(t, tt.status, got.status)
				assert.Equal(t, tt.body, got.body)
				assert.Equal(t, tt.error, got.error)
				assert.GreaterOrEqual(t, got.after, tt.least)
				assert.LessOrEqual(t, got.after, max(tt.most, opening))
				if tt.status == 503 {
					assert.Equal(t, "30", got.header.Get("Retry-After"))
				}
				taken := tt.body != "" || tt.status == 204
				assert.Equal(t, taken, got.header.Get("X-Backend") == "yes", "a header field from the backend")
				assert.Equal(t, tt.pending, c.counts(t)[store.Pending])
				if tt.last != "" {
					storetest.Select(t, c.queue().db.opened(t), store.Filter{}, func(r *store.Record) {
						assert.Equal(t, tt.last, r.LastError)
						assert.Equal(t, []any{"DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs", 1}, []any{r.EventType, r.ResourceID, r.Attempts})
					})
				}
				for _, line := range c.logs.All() {
					text := fmt.Sprint(line.Message, line.ContextMap())
					assert.NotContains(t, text, "s1gnature")
					assert.NotContains(t, text, "event_type\":")
				}

				// when the store works and the backend accepts events, each stored event is delivered
				opener.fail(nil)
				backend.Store(status(200))
				time.Sleep(5 * time.Minute)
				assert.Empty(t, c.counts(t))
			})
		})
	}
}

// An event that the guard has not verified is neither stored nor delivered.
func TestNoVerifiedEvent(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    func() *http.Request
	}{
		{"there is no guard", func() *http.Request {
			return caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body)), caddy.NewReplacer(), nil, nil)
		}},
		{"the guard has rejected the event", func() *http.Request {
			r := post(body)
			(&event.Event{Outcome: "signature_mismatch"}).Attach(r.Context())
			return r
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error {
					t.Error("the backend gets the event")
					return nil
				})})
				defer c.stop(t)
				synctest.Wait()
				got := serve(t, c.handlers[0], tt.r())
				assert.Equal(t, 500, got.status)
				assert.Equal(t, "there is no verified event: inkit_webhook must come before inkit_queue", got.error)
				time.Sleep(time.Minute)
				assert.Empty(t, c.counts(t))
			})
		})
	}
}

// After the sender hangs up, the attempt goes on. The event is stored until the backend accepts it.
func TestSenderThatHangsUp(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status int
		left   map[string]int
	}{
		{"the backend accepts the event later", 200, map[string]int{}},
		{"the backend does not accept the event", 500, map[string]int{store.Pending: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts := 0
				c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
					attempts++
					time.Sleep(2 * time.Second)
					require.NoError(t, r.Context().Err())
					return status(tt.status)(w, r, next)
				})})
				defer c.stop(t)
				synctest.Wait()
				r := post(body)
				ctx, hangUp := context.WithTimeout(r.Context(), 5*time.Millisecond)
				defer hangUp()
				got := serve(t, c.handlers[0], r.WithContext(ctx))
				assert.Equal(t, 2*time.Second, got.after, "a sender that has closed only its half gets the response")
				assert.Equal(t, 200, got.status)
				synctest.Wait()
				assert.Equal(t, tt.left, c.counts(t))
				assert.Equal(t, 1, attempts)
			})
		})
	}
}

// A later attempt has the same request as the first one.
func TestAttemptsAreAlike(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []map[string]string
		dir := t.TempDir()
		backend := func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			got := make(map[string]string)
			for _, name := range []string{
				"http.inkit_queue.id", "http.inkit_queue.attempt", "http.inkit_queue.received",
				"http.inkit_webhook.outcome", "http.inkit_webhook.secret_name", "http.inkit_webhook.event_type", "http.inkit_webhook.resource_id",
				"http.request.header.Idempotency-Key", "http.request.uri", "http.request.host", "http.request.method", "http.vars.colour",
			} {
				got[strings.TrimPrefix(name, "http.")] = repl.ReplaceAll("{"+name+"}", "none")
			}
			all, err := io.ReadAll(r.Body)
			require.NoError(t, err)
			got["body"] = string(all)
			got["length"] = fmt.Sprint(r.ContentLength)
			seen = append(seen, got)
			r.Header.Set("Idempotency-Key", "another") // must not reach the next attempt
			r.URL.Path = "/rewritten"
			caddyhttp.SetVar(r.Context(), "colour", "blue")
			return status(500)(w, r, next)
		}
		load := func() *configuration {
			c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(dir, "queue.db")), Routes: routes(backend)})
			synctest.Wait()
			return c
		}
		c := load()
		received := time.Now()
		r := post(body)
		caddyhttp.SetVar(r.Context(), "colour", "green")
		assert.Equal(t, 200, serve(t, c.handlers[0], r).status)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.Len(t, seen, 2)
		c.stop(t)
		synctest.Wait()
		c = load() // like a restart
		defer c.stop(t)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.GreaterOrEqual(t, len(seen), 3)
		for i, got := range seen {
			assert.Regexp(t, "^[0-9a-f-]{36}$", got["inkit_queue.id"])
			assert.Equal(t, map[string]string{
				"inkit_queue.id": seen[0]["inkit_queue.id"], "inkit_queue.attempt": fmt.Sprint(i + 1), "inkit_queue.received": received.UTC().Format(time.RFC3339),
				"inkit_webhook.outcome": "verified", "inkit_webhook.secret_name": "current",
				"inkit_webhook.event_type": "DOCUMENT_CREATE_FINISHED", "inkit_webhook.resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs",
				"request.header.Idempotency-Key": "key of the event", "request.uri": "/webhook?from=inkit", "request.host": "example.com", "request.method": "POST",
				"vars.colour": "green", "body": body, "length": fmt.Sprint(len(body)),
			}, got, "attempt %d", i+1)
		}
	})
}

// While events cannot be stored, the log has a line a minute, and one more at the recovery.
func TestErrorLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}}
		c := start(t, &Handler{StoreRaw: storeOf(opener), MaxEvents: 3, Routes: routes(status(500))})
		defer c.stop(t)
		time.Sleep(2 * time.Minute)
		opener.fail(errors.New("the disk is broken"))
		for range 22 { // each request waits 5 s
			assert.Equal(t, 503, serve(t, c.handlers[0], post(body)).status)
			time.Sleep(time.Second)
		}
		const cannot = "cannot store events: passing them to the backend, refusing with 503 what it does not accept"
		assert.Equal(t, 3, c.logs.FilterMessage(cannot).FilterLevelExact(zapcore.ErrorLevel).Len())
		opener.fail(nil)
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		synctest.Wait()
		assert.Equal(t, 1, c.logs.FilterMessage("storing events works again").Len())

		for range 4 {
			serve(t, c.handlers[0], post(body))
		}
		full := c.logs.FilterMessage("cannot store events: max_events are pending").FilterLevelExact(zapcore.ErrorLevel)
		require.Equal(t, 1, full.Len())
		assert.Equal(t, map[string]any{"queue": "default", "max_events": int64(3)}, full.All()[0].ContextMap())
	})
}

// If the queue is full (max_events), even a backend that counts as down gets a new event.
func TestFullQueueAsksTheBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), MaxEvents: 6, Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			return status(map[bool]int{false: 502, true: 201}[up.Load()])(w, r, next)
		})})
		defer c.stop(t)
		synctest.Wait()
		for range 6 {
			assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		}
		assert.Equal(t, 503, serve(t, c.handlers[0], post(body)).status)
		up.Store(true)
		assert.Equal(t, 201, serve(t, c.handlers[0], post(body)).status)
	})
}

// A backend that counts as down stays down while the database does not answer.
func TestOutageOfBoth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}}
		c := start(t, &Handler{StoreRaw: storeOf(opener), Routes: routes(status(502))})
		defer c.stop(t)
		synctest.Wait()
		for range 6 {
			serve(t, c.handlers[0], post(body))
		}
		opener.unpeek.Store(true)
		time.Sleep(time.Minute)
		assert.False(t, c.queue().breaker.Backend().Down.IsZero())
	})
}

// If a reload fails after all new apps have started, Caddy calls Cleanup, but not Stop.
func TestCleanupWithoutStop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "queue.db")
	c := start(t, &Handler{StoreRaw: sqliteAt(path), Routes: routes(status(200))})
	defer c.stop(t)
	failed := start(t, &Handler{StoreRaw: sqliteAt(path), Routes: routes(status(200))})
	failed.end()
	assert.Equal(t, c.handlers, c.queue().handlers)
}

// If the queue is full, a new event waits until `concurrency` allows its first attempt.
func TestFullQueueWaitsForTheBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), MaxEvents: 1, Concurrency: 1, Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			if up.Load() {
				time.Sleep(200 * time.Millisecond)
			}
			return status(map[bool]int{false: 500, true: 201}[up.Load()])(w, r, next)
		})})
		defer c.stop(t)
		synctest.Wait()
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		up.Store(true)
		var senders sync.WaitGroup
		for range 3 {
			senders.Go(func() { assert.Equal(t, 201, serve(t, c.handlers[0], post(body)).status) })
		}
		senders.Wait()
	})
}

// The backend counts as down, but is up again, and the database hangs. The event gets an attempt
// before its sender is refused.
func TestLastChance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}}
		var up atomic.Bool
		h := &Handler{StoreRaw: storeOf(opener), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			if up.Load() {
				return status(201)(w, r, next)
			}
			return status(502)(w, r, next)
		})}
		c := start(t, h)
		defer c.stop(t)
		synctest.Wait()
		for range 6 {
			require.Equal(t, 200, serve(t, h, post(body)).status)
		}
		require.False(t, c.queue().breaker.Backend().Allows())
		up.Store(true)
		opener.hangs.Store(true)
		began := time.Now()
		assert.Equal(t, 201, serve(t, h, post(body)).status)
		assert.Equal(t, storeWait-lastChance, time.Since(began))
		opener.hangs.Store(false)
	})
}

// The sender gets the body of the backend's response. If this body is longer than maxAnswer,
// the sender gets no body.
func TestLongAnswer(t *testing.T) {
	for _, tt := range []struct{ size, want int }{{maxAnswer, maxAnswer}, {maxAnswer + 1, 0}, {3 * maxAnswer, 0}} {
		w := newAnswer()
		w.Header().Set("Content-Length", fmt.Sprint(tt.size))
		for left := tt.size; left > 0; left -= 1 << 16 {
			n, err := w.Write(make([]byte, min(left, 1<<16)))
			require.NoError(t, err)
			assert.Equal(t, min(left, 1<<16), n)
		}
		recorder := httptest.NewRecorder()
		require.NoError(t, w.copyTo(recorder))
		assert.Equal(t, tt.want, recorder.Body.Len())
		assert.Equal(t, tt.want > 0, recorder.Header().Get("Content-Length") != "")
	}
}

// handle_response with copy_response_headers and respond sends the length of another body.
func TestAnswerWithAWrongLength(t *testing.T) {
	w := newAnswer()
	w.Header().Set("Content-Length", "3")
	w.WriteHeader(http.StatusOK)
	recorder := httptest.NewRecorder()
	require.NoError(t, w.copyTo(recorder))
	assert.Empty(t, recorder.Header())
}

func TestDefaults(t *testing.T) {
	h := &Handler{Routes: routes(status(200))}
	c, err := provision(t, h)
	require.NoError(t, err)
	defer c.end()
	assert.Equal(t, []any{"default", 5 * time.Second, 30 * time.Second, 120 * time.Hour, 1_000_000, 16}, []any{
		h.Name, time.Duration(*h.AnswerAfter), time.Duration(h.AttemptTimeout), time.Duration(h.MaxAge), h.MaxEvents, h.Concurrency,
	})
	assert.Equal(t, "sqlite "+filepath.Join(caddy.AppDataDir(), "inkit_queue.db"), h.opener.Key())
}
