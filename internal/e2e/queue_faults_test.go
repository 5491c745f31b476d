//go:build linux

package e2e

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	_ "github.com/jackc/pgx/v5/stdlib" // to read and change PostgreSQL
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// proxySite returns the same site as queueSite, but without the queue.
func proxySite(backend string) string {
	return `
http://{{addr}} {
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		reverse_proxy ` + backend + `
	}
	error 404
}`
}

// slowly is a transport that sends the body of each request 50 ms after the header.
type slowly struct{ *http.Transport }

func (s slowly) RoundTrip(req *http.Request) (*http.Response, error) {
	body := req.Body
	req.GetBody = nil
	req.Body = &lateBody{ReadCloser: body}
	return s.Transport.RoundTrip(req)
}

type lateBody struct {
	io.ReadCloser
	once sync.Once
}

func (b *lateBody) Read(p []byte) (int, error) {
	b.once.Do(func() { time.Sleep(50 * time.Millisecond) })
	return b.ReadCloser.Read(p)
}

// Requests that begin before a reload can reach the handlers of the old configuration after
// the Cleanup of these handlers. Slow senders cause such requests at each reload.
func TestQueueReloadsRefuseNothing(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"up", "down"} {
		t.Run("the backend is "+state, func(t *testing.T) { //nolint:tparallel // parallel subtests take longer, and so events wait longer
			t.Parallel()
			testQueueReloadsRefuseNothing(t, state == "down")
		})
	}
}

func testQueueReloadsRefuseNothing(t *testing.T, down bool) {
	t.Helper()
	for _, tt := range []struct {
		name  string
		sites func(site, backend string) []string // the test loads them in turn, again and again
	}{
		{"options change", func(_, backend string) []string { return changedOptions(backend) }},
		{"the store changes", func(site, _ string) []string {
			return []string{site, strings.Replace(site, "events.db", "others.db", 1)}
		}},
		{"the name changes", func(site, backend string) []string { return []string{site, queueSite(backend, "name another")} }},
		{"the queue goes and comes", func(site, backend string) []string { return []string{site, proxySite(backend)} }},
	} {
		if down && tt.name == "the queue goes and comes" { // the proxy stores no event
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			backend := newTaker(t, all)
			if down {
				backend.close()
			}
			sites := tt.sites(queueSite(backend.addr, ""), backend.addr)
			c := queueCaddy(t, backend.addr, "")
			load, cancel := context.WithCancel(t.Context())
			defer cancel()
			s, slow := newSender(t, c), newSender(t, c)
			slow.client.Transport = slowly{slow.client.Transport.(*http.Transport)}
			s.workers, slow.workers = 4, 4
			done, slowDone := s.sendAll(load, "reload", 1_000_000), slow.sendAll(load, "slow", 1_000_000)
			for i := range size(60, 6) {
				before := len(s.ids())
				waitFor(t, "events are accepted", c.process, func() bool { return len(s.ids()) >= before+20 })
				c.configure("grace_period 5s", sites[(i+1)%len(sites)])
				c.reload()
			}
			cancel()
			<-done
			<-slowDone
			ids := append(s.ids(), slow.ids()...)
			if down {
				backend.listen()
			}
			// A queue delivers only while it is configured, so configure each queue again and again.
			// The test waits long, because after a failed attempt, an event waits about as long
			// as its age.
			ended := time.Now()
			for i := 0; len(backend.missing(ids)) > 0 && time.Since(ended) < 3*time.Minute; i++ {
				c.configure("grace_period 5s", sites[i%len(sites)])
				c.reload()
				for began := time.Now(); len(backend.missing(ids)) > 0 && time.Since(began) < 5*time.Second; {
					time.Sleep(20 * time.Millisecond)
				}
			}
			t.Logf("all are delivered after %v", time.Since(ended).Round(time.Second))
			backend.hasAll(t, ids, time.Second)
			s.refusedNone(t)
			slow.refusedNone(t)
		})
	}
}

// changedOptions returns three sites with different options. Each site is in the list three times.
func changedOptions(backend string) (sites []string) {
	for _, seconds := range []int{5, 4, 3} {
		site := queueSite(backend, fmt.Sprintf("answer_after %ds\nconcurrency %d", seconds, 10+seconds))
		sites = append(sites, site, site, site)
	}
	return sites
}

// Many other files in the folder of the database do not make the answers slow.
func TestQueueBesideManyFiles(t *testing.T) {
	backend := newTaker(t, all)
	c := newQueueCaddy(t, backend.addr, "")
	require.NoError(t, os.Mkdir(c.path("queue"), 0o700))
	for i := range size(200_000, 50_000) {
		f, err := os.Create(c.path(fmt.Sprintf("queue/another-file-of-somebody-else-%06d", i)))
		require.NoError(t, err)
		f.Close()
	}
	c.start()
	s := newSender(t, c)
	began := time.Now()
	for i := 0; i < size(1500, 500) || time.Since(began) < time.Duration(size(12, 6))*time.Second; i++ { // in this time, Caddy also counts the events
		require.True(t, s.send(t.Context(), fmt.Sprint("beside-", i), 0))
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("the slowest of %d answers after %v, the median %v", len(s.times), s.quantile(1).Round(time.Millisecond), s.median().Round(100*time.Microsecond))
	assert.Less(t, s.quantile(1), 250*time.Millisecond)
	backend.hasAll(t, s.ids(), 5*time.Second)
	s.refusedNone(t)
}

// The test shifts the times in the database, as if the clock were set back or forward: while
// Caddy runs, or before Caddy starts again after a kill.
func TestQueueWhoseClockIsSet(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, "fsync=off")
	for _, store := range []string{"SQLite", "PostgreSQL"} {
		for _, hours := range []int{10, -10} {
			// open starts a Caddy, and returns a function that shifts the times in the database
			open := func(t *testing.T, backend string) (c *caddy, shift func() (events int)) {
				t.Helper()
				const options = "answer_after 100ms\nmax_age 12h"
				var db *sql.DB
				var err error
				if store == "SQLite" {
					c = queueCaddy(t, backend, options)
					db, err = sql.Open("sqlite", c.path("queue/events.db")+"?_pragma=busy_timeout(5000)")
				} else {
					dsn := server.DSN(server.NewDatabase(t))
					c = pgCaddy(t, backend, dsn, options)
					db, err = sql.Open("pgx", dsn)
				}
				require.NoError(t, err)
				t.Cleanup(func() { db.Close() })
				return c, func() int {
					by := hours * 3_600_000
					tx, err := db.Begin()
					require.NoError(t, err)
					result, err := tx.Exec(fmt.Sprintf(`UPDATE inkit_queue_events SET due = due + %d, queued = queued + %d, lease = lease + %d`, by, by, by))
					require.NoError(t, err)
					require.NoError(t, tx.Commit())
					n, err := result.RowsAffected()
					require.NoError(t, err)
					return int(n)
				}
			}
			name := fmt.Sprintf("%s, %+d h, ", store, hours)
			// The function "answers" starts a backend. "slow" events get no answer before the test
			// closes `let`. Other events get `status` until the test calls `back`. During the shift,
			// attempts wait, because a failed attempt would delay its event by the shifted age.
			answers := func(t *testing.T, status int) (b *backend, back func(shift func() int), let chan struct{}) {
				t.Helper()
				var mu sync.RWMutex
				up, let := false, make(chan struct{})
				b = newTaker(t, func(id string, _ int) int {
					if strings.HasPrefix(id, "slow") {
						<-let
						return http.StatusOK
					}
					mu.RLock()
					defer mu.RUnlock()
					if !up {
						return status
					}
					return http.StatusOK
				})
				return b, func(shift func() int) {
					t.Helper()
					mu.Lock()
					defer mu.Unlock()
					require.Greater(t, shift(), 20)
					up = true
				}, let
			}

			t.Run(name+"events wait and are in flight", func(t *testing.T) {
				t.Parallel()
				backend, back, let := answers(t, http.StatusInternalServerError)
				c, shift := open(t, backend.addr)
				s := newSender(t, c)
				<-s.sendAll(t.Context(), "slow", 4)
				<-s.sendAll(t.Context(), "kept", 50)
				back(shift)
				var kept []string
				for _, id := range s.ids() {
					if strings.HasPrefix(id, "kept") {
						kept = append(kept, id)
					}
				}
				backend.hasAll(t, kept, 10*time.Second)
				require.True(t, s.send(t.Context(), "new", 0))
				time.Sleep(3 * time.Second) // the slow events must not get a second attempt in this time
				close(let)
				doubles := backend.hasAll(t, s.ids(), 10*time.Second)
				assert.Zero(t, doubles)
				for i := 1; i <= 4; i++ {
					assert.Equal(t, 1, backend.of(fmt.Sprintf("slow-%05d", i)).attempts)
				}
				assert.Empty(t, backend.atOnce, "twice at once")
				s.refusedNone(t)
			})
			t.Run(name+"the backend is down", func(t *testing.T) {
				t.Parallel()
				backend, back, _ := answers(t, http.StatusServiceUnavailable)
				c, shift := open(t, backend.addr)
				s := newSender(t, c)
				<-s.sendAll(t.Context(), "kept", 50)
				waitFor(t, "the backend is known to be down", c.process, func() bool {
					return c.metric(`caddy_inkit_queue_backend_down{queue="default"}`) == "1"
				})
				back(shift)
				require.True(t, s.send(t.Context(), "new", 0))
				assert.Zero(t, backend.hasAll(t, s.ids(), 10*time.Second))
				assert.Empty(t, backend.atOnce, "twice at once")
				s.refusedNone(t)
			})
			t.Run(name+"Caddy was killed", func(t *testing.T) {
				t.Parallel()
				backend, back, let := answers(t, http.StatusInternalServerError)
				c, shift := open(t, backend.addr)
				s := newSender(t, c)
				<-s.sendAll(t.Context(), "slow", 4)
				<-s.sendAll(t.Context(), "kept", 50)
				killHard(c)
				close(let)
				back(shift)
				c.start()
				backend.hasAll(t, s.ids(), 10*time.Second)
				waitFor(t, "what was in flight is attempted again, before its lease of 32 s is over", c.process, func() bool {
					return backend.of("slow-00001").attempts > 1 && backend.of("slow-00002").attempts > 1
				})
				s.refusedNone(t)
			})
		}
	}
}

// While the backend is down, a database that fails for some seconds makes senders wait. Caddy
// refuses no sender, and the database has each event that was answered 2xx.
func TestQueueWhoseDatabaseFailsForSomeSeconds(t *testing.T) {
	t.Parallel()
	// load sends events, and calls `fault` several times. Then the backend comes back, and must
	// get all events that were answered 2xx. On a busy machine, a fault may last so long that
	// Caddy refuses senders. Then load does not count this call, and calls `fault` again.
	load := func(t *testing.T, backend *backend, c *caddy, times int, fault func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := newSender(t, c)
		done := s.sendAll(ctx, "passing", 1_000_000)
		accepted := func(more int) {
			t.Helper()
			before := len(s.ids())
			waitFor(t, "events are accepted", c.process, func() bool { return len(s.ids()) >= before+more })
		}
		accepted(50)
		for tries := 5; times > 0; times-- {
			s.mu.Lock()
			refused := len(s.refused)
			s.gap = 0
			s.mu.Unlock()
			fault()
			accepted(50)
			s.mu.Lock()
			if s.gap > 4500*time.Millisecond && tries > 0 {
				t.Logf("an outage of %v does not count", s.gap)
				s.refused = s.refused[:refused]
				tries--
				times++
			}
			s.mu.Unlock()
		}
		cancel()
		<-done
		backend.listen()
		backend.hasAll(t, s.ids(), 2*time.Minute)
		s.refusedNone(t)
	}
	down := func(t *testing.T) *backend {
		t.Helper()
		backend := newTaker(t, all)
		backend.close()
		return backend
	}
	const disconnect = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`
	for _, tt := range []struct {
		name  string
		fault func(t *testing.T, server *pgtest.Server, database string)
		times int
	}{
		{"the connections are ended", func(t *testing.T, server *pgtest.Server, database string) {
			server.Exec(t, database, disconnect)
		}, 5},
		{"the server is started again", func(_ *testing.T, server *pgtest.Server, _ string) {
			server.Stop()
			server.Run()
		}, 3},
		{"the server is read-only for 4 s", func(t *testing.T, server *pgtest.Server, database string) {
			set := `ALTER DATABASE "` + database + `" SET default_transaction_read_only = `
			server.Exec(t, database, set+"on", disconnect)
			time.Sleep(4 * time.Second)
			server.Exec(t, "postgres", set+"off")
			server.Exec(t, database, disconnect)
		}, 1},
		{"the server is away for 3 s", func(_ *testing.T, server *pgtest.Server, _ string) {
			server.Stop()
			time.Sleep(3 * time.Second)
			server.Run()
		}, 1},
	} {
		t.Run("PostgreSQL, "+tt.name, func(t *testing.T) {
			t.Parallel()
			server := pgtest.Start(t)
			database := server.NewDatabase(t)
			backend := down(t)
			c := pgCaddy(t, backend.addr, server.DSN(database), "")
			load(t, backend, c, tt.times, func() { tt.fault(t, server, database) })
		})
	}
	t.Run("SQLite, ten fsyncs in a row fail", func(t *testing.T) {
		t.Parallel()
		strace := []string{"strace", "-f", "-q", "-o", "/dev/null"}
		if out, err := exec.Command(strace[0], append(strace[1:], "true")...).CombinedOutput(); err != nil {
			t.Skipf("strace does not work here: %v %s", err, out)
		}
		backend := down(t)
		c := newQueueCaddy(t, backend.addr, "")
		c.wrapper = append(strace, "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO:when=50..59")
		c.start()
		load(t, backend, c, 1, func() {
			c.logged("cannot store events")
			c.logged("storing events works again")
		})
		killHard(c) // also kills strace
	})
}
