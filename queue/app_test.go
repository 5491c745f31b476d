package queue

import (
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// "caddy validate" and "caddy adapt" touch no file, and work while another Caddy runs.
func TestLoadingTouchesNoFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "folder", "queue.db")
	c, err := provision(t, &Handler{StoreRaw: sqliteAt(path), Routes: routes(status(200))})
	require.NoError(t, err)
	c.end() // without a start, as in caddy validate
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, entries)

	c = start(t, &Handler{StoreRaw: sqliteAt(path), Routes: routes(status(200))})
	c.queue().db.opened(t)
	folder, err := os.Stat(filepath.Dir(path))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o700), folder.Mode().Perm(), "no other user can read the folder")
	for _, suffix := range []string{"", "-wal", "-reserve"} {
		file, err := os.Stat(path + suffix)
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), file.Mode().Perm(), suffix)
	}
	c.stop(t)
}

// The function "by" returns a backend that answers with the status `code`. The backend counts
// its requests in `counter`.
func by(counter *atomic.Int64, code int) caddyhttp.RouteList {
	return routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
		counter.Add(1)
		return status(code)(w, r, next)
	})
}

// The tests reload with a pending event, in Caddy's order: Caddy provisions and starts the
// new configuration, and then stops and cleans up the old one.
func TestReloads(t *testing.T) {
	for _, tt := range []struct {
		name     string
		reload   func(t *testing.T, old *configuration, next func() (*configuration, error))
		old, new bool // whether the old and the new configuration deliver after the reload
	}{
		{"the new configuration takes over", func(t *testing.T, old *configuration, next func() (*configuration, error)) {
			c, err := next()
			require.NoError(t, err)
			require.NoError(t, c.app.Start())
			old.stop(t)
			old.app, old.handlers, old.end = c.app, c.handlers, c.end
		}, false, true},
		{"a reload that fails when the new configuration is loaded keeps the old one", func(t *testing.T, _ *configuration, next func() (*configuration, error)) {
			c, err := next()
			require.NoError(t, err)
			c.end()
		}, true, false},
		{"a reload that fails after the start of this app keeps the old one", func(t *testing.T, _ *configuration, next func() (*configuration, error)) {
			c, err := next()
			require.NoError(t, err)
			require.NoError(t, c.app.Start())
			time.Sleep(time.Minute) // another app starts slowly, and fails
			c.stop(t)
		}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "queue.db")
				var oldCalls, newCalls atomic.Int64
				c := start(t, &Handler{StoreRaw: sqliteAt(path), Routes: by(&oldCalls, 500)})
				defer func() { c.stop(t) }()
				synctest.Wait()
				serve(t, c.handlers[0], post(body))
				synctest.Wait()
				tt.reload(t, c, func() (*configuration, error) {
					return provision(t, &Handler{StoreRaw: sqliteAt(path), Routes: by(&newCalls, 500)})
				})
				synctest.Wait()
				if tt.old {
					assert.Zero(t, newCalls.Load(), "a configuration that fails delivers nothing")
				}
				oldCalls.Store(0)
				newCalls.Store(0)
				time.Sleep(time.Minute)
				synctest.Wait()
				assert.Equal(t, tt.old, oldCalls.Load() > 0, "whether the old configuration delivers")
				assert.Equal(t, tt.new, newCalls.Load() > 0, "whether the new configuration delivers")
				assert.Equal(t, map[string]int{store.Pending: 1}, c.counts(t))
			})
		})
	}
}

// The old configuration serves its last request, and completes the attempt of this request.
func TestReloadDuringAnAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "queue.db")
		var newCalls atomic.Int64
		old := start(t, &Handler{StoreRaw: sqliteAt(path), AnswerAfter: duration(time.Minute), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			time.Sleep(10 * time.Second)
			if err := r.Context().Err(); err != nil {
				return err
			}
			return status(200)(w, r, next)
		})})
		synctest.Wait()
		var got answered
		served := make(chan struct{})
		go func() {
			defer close(served)
			got = serve(t, old.handlers[0], post(body))
		}()
		time.Sleep(time.Second)
		c := start(t, &Handler{StoreRaw: sqliteAt(path), Routes: by(&newCalls, 200)})
		old.stop(t)
		<-served
		assert.Equal(t, "the backend's body", got.body)
		assert.Equal(t, 10*time.Second, got.after)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		assert.Zero(t, newCalls.Load(), "the event is delivered once")
		assert.Empty(t, c.counts(t))

		late := serve(t, old.handlers[0], post(body)) // after Cleanup, on a connection from before the reload
		assert.Equal(t, "the backend's body", late.body)
		c.stop(t)
	})
}

// After a reload has removed the queue, the last requests of the old configuration are still
// delivered.
func TestLateRequestOfAQueueThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(status(201))})
		c.queue().db.opened(t)
		c.stop(t)
		for range 3 {
			late := serve(t, c.handlers[0], post(body))
			assert.Equal(t, 201, late.status)
			assert.Equal(t, "the backend's body", late.body)
			synctest.Wait()
		}
	})
}

// A request that arrives before the start of the app opens the queue.
func TestRequestBeforeTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := provision(t, &Handler{StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(status(201))})
		require.NoError(t, err)
		assert.Equal(t, 201, serve(t, c.handlers[0], post(body)).status)
		synctest.Wait()
		require.NoError(t, c.app.Start())
		assert.Equal(t, 201, serve(t, c.handlers[0], post(body)).status)
		c.stop(t)
	})
}

// A clean stop releases the leases, so the next process delivers immediately. Running
// attempts may go on until the grace period ends.
func TestEndGivesLeasesBack(t *testing.T) {
	for _, tt := range []struct {
		name    string
		takes   time.Duration // of the running attempt
		grace   time.Duration
		ends    time.Duration
		pending int
	}{
		{"the attempt ends within the grace period", 4 * time.Second, 10 * time.Second, 3 * time.Second, 0},
		{"the attempt is cancelled after the grace period", time.Minute, 10 * time.Second, 10 * time.Second, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "queue.db")
				c := start(t, &Handler{StoreRaw: sqliteAt(path), AnswerAfter: duration(0), AttemptTimeout: caddy.Duration(time.Hour), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
					select {
					case <-time.After(tt.takes):
						return status(200)(w, r, next)
					case <-r.Context().Done():
						return r.Context().Err()
					}
				})})
				synctest.Wait()
				began := time.Now()
				assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
				time.Sleep(time.Second - time.Since(began))
				time.AfterFunc(tt.grace, c.queue().cutOff) // as the HTTP app does after its grace period
				stopped := time.Now()
				c.stop(t)
				assert.InDelta(t, tt.ends, time.Since(stopped), float64(50*time.Millisecond))

				s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
				require.NoError(t, err)
				defer s.Close()
				claim := &store.Claim{Queue: "default", Max: 10, Lease: time.Minute}
				require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "the next one", Claims: []*store.Claim{claim}}))
				assert.Len(t, claim.Records, tt.pending, "the event is due, though its lease would last for another hour")
			})
		})
	}
}

// Two handlers with the same name share a queue. Two queues in the same file share a database.
func TestSharedDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "queue.db")
		deliver := routes(status(500))
		c := start(t,
			&Handler{Name: "a", StoreRaw: sqliteAt(path), Routes: deliver},
			&Handler{Name: "a", StoreRaw: sqliteAt(path), Routes: rawRoutes(string(deliver[0].HandlersRaw[0]))},
			&Handler{Name: "b", StoreRaw: sqliteAt(path), Routes: routes(status(500))})
		defer c.stop(t)
		queueOf := func(i int) *queue {
			q := c.handlers[i].acquire()
			q.release()
			return q
		}
		assert.Same(t, queueOf(0), queueOf(1))
		assert.NotSame(t, queueOf(0), queueOf(2))
		assert.Same(t, queueOf(0).db, queueOf(2).db)
	})
}

// A stop also waits for attempts that begin at the moment of the stop.
func TestStopLeavesNoLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "queue.db")
	var calls atomic.Int64
	for i := range 60 {
		c := start(t, &Handler{StoreRaw: sqliteAt(path), Concurrency: 16, Routes: by(&calls, 500)})
		opened := c.queue().db.opened(t)
		if i == 0 {
			for range 8 {
				serve(t, c.handlers[0], post(body))
			}
		}
		_, err := opened.Retry(t.Context(), store.Filter{})
		require.NoError(t, err)
		before := calls.Load()
		c.queue().schedule.Wake()
		for calls.Load() == before {
			time.Sleep(10 * time.Microsecond)
		}
		c.stop(t)
		s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
		require.NoError(t, err)
		storetest.Select(t, s, store.Filter{}, func(r *store.Record) {
			require.Zero(t, r.LeasedUntil, "stop %d: an event has a lease, but no attempt", i)
		})
		require.NoError(t, s.Close())
	}
}
