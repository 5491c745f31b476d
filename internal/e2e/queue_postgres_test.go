//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func pgCaddy(t *testing.T, backend, dsn, options string) *caddy {
	t.Helper()
	return startCaddy(t, "grace_period 5s", inPostgres(queueSite(backend, options)), "INKIT_QUEUE_DSN="+dsn)
}

// inPostgres takes a site from queueSite, and returns it with PostgreSQL in place of SQLite.
func inPostgres(site string) string {
	return strings.Replace(site, "store sqlite {{dir}}/queue/events.db", "store postgres {env.INKIT_QUEUE_DSN}", 1)
}

func TestPostgresTwoCaddysThatAreKilled(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	backend := newTaker(t, sometimes)
	const options = "answer_after 100ms\nattempt_timeout 3s"
	caddys := []*caddy{
		pgCaddy(t, backend.addr, dsn, options),
		pgCaddy(t, backend.addr, strings.Replace(dsn, server.Port, server.Bouncer(t), 1), options), // this Caddy connects through a pooler
	}
	s := newSender(t, caddys...)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	events := size(10_000, 600)
	done := s.sendAll(ctx, "killed", events)
	for i := range size(20, 4) {
		before := len(s.ids())
		waitFor(t, "events are accepted", nil, func() bool { return len(s.ids()) >= min(events, before+events/30) })
		killHard(caddys[i%2])
		if i%4 == 1 { // PostgreSQL stops while this Caddy is down
			server.Stop()
			server.Run()
		}
		caddys[i%2].start()
	}
	<-done
	require.Len(t, s.ids(), events)
	backend.hasAll(t, s.ids(), time.Minute)
	s.refusedNone(t)
}

func TestPostgresThatFails(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	name := server.NewDatabase(t)
	var failure atomic.Value // the name of the current failure
	backend := newTaker(t, func(id string, attempt int) int {
		if strings.HasPrefix(id, "kept "+failure.Load().(string)) {
			return http.StatusInternalServerError // so that the event stays in the database
		}
		return sometimes(id, attempt)
	})
	const options = "answer_after 100ms\nattempt_timeout 3s"
	caddys := []*caddy{pgCaddy(t, backend.addr, server.DSN(name), options), pgCaddy(t, backend.addr, server.DSN(name), options)}
	s := newSender(t, caddys...)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	pause := time.Duration(size(30, 6)) * time.Second
	for _, tt := range []struct {
		name string
		fail func()
	}{
		{"stopped for a while", func() { server.Signal(syscall.SIGSTOP); time.Sleep(pause); server.Signal(syscall.SIGCONT) }},
		{"ended for a while", func() { server.Stop(); time.Sleep(pause); server.Run() }},
		{"killed", func() { server.Kill(); server.Run() }},
		{"restarted", func() { server.Stop(); server.Run() }}, // a short failure comes last: after it, an event waits about as long as its age
	} {
		failure.Store(tt.name)
		load, stop := context.WithCancel(ctx)
		before := len(s.ids())
		done := s.sendAll(load, tt.name, 1_000_000)
		kept := s.sendAll(load, "kept "+tt.name, 1_000_000)
		waitFor(t, "events are accepted", nil, func() bool { return len(s.ids()) >= before+100 })
		tt.fail()
		began := time.Now()
		for i, c := range caddys {
			one := newSender(t, c)
			require.True(t, one.send(ctx, fmt.Sprintf("kept %s after %d", tt.name, i), 0))
			s.mu.Lock()
			s.accepted = append(s.accepted, one.accepted...)
			s.mu.Unlock()
		}
		took := time.Since(began)
		t.Logf("%s: accepts %v after its return", tt.name, took.Round(time.Millisecond))
		assert.Less(t, took, 5*time.Second, tt.name)
		stop()
		<-done
		<-kept
	}
	failure.Store("no more")
	backend.hasAll(t, s.ids(), 2*time.Minute)
	t.Logf("%d of %d requests were answered 5xx, all while there was no server for longer than senders wait", len(s.refused), s.tries)
}

func TestPostgresStandbyThatTakesOver(t *testing.T) {
	t.Parallel()
	primary := pgtest.Start(t)
	name := primary.NewDatabase(t)
	standby := primary.Standby(t)
	dsn := strings.Replace(primary.DSN(name), primary.Port, primary.Port+",127.0.0.1:"+standby.Port, 1)
	var takes atomic.Bool
	backend := newTaker(t, func(id string, attempt int) int {
		if !takes.Load() {
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
	const options = "answer_after 100ms\nattempt_timeout 3s"
	caddys := []*caddy{pgCaddy(t, backend.addr, dsn, options), pgCaddy(t, backend.addr, dsn, options)}
	s := newSender(t, caddys...)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	done := s.sendAll(ctx, "replicated", size(5_000, 500))
	waitFor(t, "events are accepted", nil, func() bool { return len(s.ids()) >= 200 })
	primary.Kill()
	before := len(s.ids())
	standby.Exec(t, "postgres", "SELECT pg_promote()")
	began := time.Now()
	waitFor(t, "events are accepted", nil, func() bool { return len(s.ids()) > before })
	t.Logf("accepts %v after the standby has taken over", time.Since(began).Round(time.Millisecond))
	<-done
	require.Len(t, s.ids(), size(5_000, 500))
	takes.Store(true)
	backend.hasAll(t, s.ids(), 2*time.Minute)
}

func TestPostgresBackendThatIsDown(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	var up atomic.Bool
	backend := newTaker(t, func(string, int) int {
		if !up.Load() {
			return http.StatusServiceUnavailable
		}
		time.Sleep(5 * time.Millisecond)
		return http.StatusOK
	})
	caddys := []*caddy{pgCaddy(t, backend.addr, dsn, ""), pgCaddy(t, backend.addr, dsn, "")}
	s := newSender(t, caddys...)
	down := time.Now()
	for i := range 12 { // until both Caddys know that the backend is down
		s.send(t.Context(), fmt.Sprint("first-", i), i)
	}
	for _, c := range caddys {
		waitFor(t, "the metrics say that the backend is down", nil, func() bool {
			return strings.Contains(c.get("http://"+c.admin+"/metrics"), `caddy_inkit_queue_backend_down{queue="default"} 1`)
		})
	}
	backend.mu.Lock()
	backend.times = nil
	backend.mu.Unlock()
	s.times = nil
	<-s.sendAll(t.Context(), "waiting", size(5_000, 500))
	median := s.median()
	t.Logf("the median of %d accepted: %v", len(s.times), median.Round(100*time.Microsecond))
	if long { // the limit is too short with the race detector and parallel tests
		assert.Less(t, median, 100*time.Millisecond)
	}
	time.Sleep(time.Until(down.Add(time.Duration(size(60, 8)) * time.Second))) // the length of the outage
	backend.mu.Lock()
	times := slices.Clone(backend.times)
	backend.most = 0
	backend.mu.Unlock()
	most := mostInASecond(times)
	t.Logf("%d attempts while it was down, %d at most in a second", len(times), most)
	assert.NotEmpty(t, times)
	assert.LessOrEqual(t, most, 2)
	up.Store(true)
	backend.hasAll(t, s.ids(), 2*time.Minute) // after a failed attempt, an event waits about as long as its age
	most = backend.snapshot().most
	t.Logf("%d attempts at most at a time", most)
	assert.LessOrEqual(t, most, 2*16)
	for _, c := range caddys {
		waitFor(t, "the metrics say that the backend is up", nil, func() bool {
			return strings.Contains(c.get("http://"+c.admin+"/metrics"), `caddy_inkit_queue_backend_down{queue="default"} 0`)
		})
	}
}

// An operator locks the row of an event in a transaction, and forgets to end the transaction.
func TestPostgresRowThatIsLocked(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, "fsync=off")
	let := make(chan struct{})
	backend := newTaker(t, func(id string, attempt int) int {
		switch {
		case strings.HasPrefix(id, "locked"):
			<-let
		case attempt < 2:
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
	c := pgCaddy(t, backend.addr, server.DSN("postgres"), "answer_after 100ms\nattempt_timeout 5m") // the lease outlasts the test
	s := newSender(t, c)
	require.Equal(t, http.StatusOK, s.once(t, "locked").status)
	conn, err := pgx.Connect(t.Context(), server.DSN("postgres"))
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	var rows int
	require.NoError(t, tx.QueryRow(t.Context(), `SELECT count(*) FROM (SELECT id FROM inkit_queue_events WHERE resource_id LIKE 'locked%' FOR UPDATE) AS locked`).Scan(&rows))
	require.Equal(t, 1, rows)
	close(let) // the event is delivered now, but Caddy cannot delete the row
	c.logged("another program has locked these rows")
	for i := range 5 {
		assert.Equal(t, http.StatusOK, s.once(t, fmt.Sprintf("kept-%d", i)).status)
	}
	ids := s.ids()
	assert.Zero(t, backend.hasAll(t, ids, time.Minute), "which are retried")
	waitFor(t, "the locked one alone is left", c.process, func() bool { return len(c.list(t)) == 1 })
	require.NoError(t, tx.Rollback(t.Context()))
	waitFor(t, "nothing is left", c.process, func() bool { return len(c.list(t)) == 0 })
	assert.Zero(t, backend.hasAll(t, ids, time.Minute), "none twice")
}

func TestPostgresCaddyThatDiesForGood(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	const attemptTimeout = 4 * time.Second
	backend := newTaker(t, firstHangs(attemptTimeout))
	options := "answer_after 100ms\nattempt_timeout " + attemptTimeout.String()
	one := pgCaddy(t, backend.addr, dsn, options)
	pgCaddy(t, backend.addr, dsn, options)
	s := newSender(t, one)
	<-s.sendAll(t.Context(), "orphan", 12)
	require.Len(t, s.ids(), 12)
	require.Equal(t, 12, backend.snapshot().events, "it has begun to deliver each")
	require.Equal(t, 12, backend.snapshot().now, "and has delivered none")
	killHard(one)
	began := time.Now()
	backend.hasAll(t, s.ids(), 30*time.Second)
	assert.Less(t, time.Since(began), attemptTimeout+2*time.Second+5*time.Second, "a lease, and 5 s")
}

// TestPostgresExample runs examples/two-caddys as its README says.
func TestPostgresExample(t *testing.T) {
	t.Parallel()
	needs(t, "python3", "bash", "curl", "openssl")
	server := pgtest.Start(t)
	dir, err := filepath.Abs("../../examples/two-caddys")
	require.NoError(t, err)
	_, commands, _ := strings.Cut(readFile(t, dir+"/README.md"), "CREATE ROLE ")
	role, commands, _ := strings.Cut(commands, "\"")
	_, commands, _ = strings.Cut(commands, "CREATE DATABASE ")
	database, _, _ := strings.Cut(commands, "\"")
	server.Exec(t, "postgres", "CREATE ROLE "+role, "CREATE DATABASE "+database)
	_, dsn, _ := strings.Cut(readFile(t, dir+"/README.md"), "INKIT_QUEUE_DSN='")
	dsn, _, _ = strings.Cut(dsn, "'")
	dsn = strings.Replace(dsn, "@localhost/", "@localhost:"+server.Port+"/", 1)

	upstream := freeAddr(t)
	backend := func() *process { return start(t, exec.Command("python3", dir+"/backend.py", port(upstream))) }
	var caddys []*caddy
	for range 2 {
		c := newCaddy(t, "", "", "INKIT_QUEUE_DSN="+dsn, "UPSTREAM=localhost:"+port(upstream))
		c.env = append(c.env, "PORT="+port(c.addr), "ADMIN="+c.admin)
		writeFile(t, c.path("Caddyfile"), readFile(t, dir+"/Caddyfile"))
		c.run()
		waitFor(t, "Caddy answers", c.process, listening("localhost:"+port(c.addr)))
		caddys = append(caddys, c)
	}
	// for each Caddy, the test runs the command from the README that sends an event
	_, curl, _ := strings.Cut(readFile(t, dir+"/README.md"), "BODY=")
	curl, _, _ = strings.Cut(curl, "```")
	for i, c := range caddys {
		cmd := exec.Command("bash", "-c", "BODY="+strings.Replace(curl, "doc_1", fmt.Sprint("doc_", i), 1))
		cmd.Env = append(os.Environ(), "PORT="+port(c.addr))
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "HTTP/1.1 200", "while there is no backend")
	}
	killHard(caddys[0])
	p := backend()
	waitFor(t, "the other Caddy delivers both", p, func() bool {
		return strings.Contains(p.output.String(), "doc_0 ") && strings.Contains(p.output.String(), "doc_1 ")
	})
}

// While PostgreSQL refuses the password, Caddy serves the other sites, and the log says why
// the queue cannot store events.
func TestPostgresThatIsNotThere(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	name := server.NewDatabase(t)
	backend := newTaker(t, func(string, int) int { return http.StatusServiceUnavailable })
	server.Exec(t, name, "CREATE ROLE late LOGIN PASSWORD 'another'", "GRANT CREATE ON SCHEMA public TO late")
	c := pgCaddy(t, backend.addr, strings.Replace(server.DSN(name), "//postgres:", "//late:", 1), "")
	require.Equal(t, "the other site", c.get("http://"+c.addr+"/other"))
	c.logged(`password authentication failed for user`)
	body := event("refused")
	got := post(t, "http://"+c.addr+"/webhook", body, sign(secret, body))
	require.Equal(t, http.StatusServiceUnavailable, got.status)
	require.NotEmpty(t, got.header.Get("Retry-After"))
	assert.NotContains(t, c.output.String(), pgtest.Password)

	server.Exec(t, name, "ALTER ROLE late PASSWORD '"+pgtest.Password+"'")
	s := newSender(t, c)
	began := time.Now()
	require.True(t, s.send(t.Context(), "accepted", 0), "without a reload")
	assert.Less(t, time.Since(began), 5*time.Second)
	assert.NotContains(t, c.output.String(), pgtest.Password)
}

// TestPostgresMove moves events from SQLite, as in docs/postgres.md.
func TestPostgresMove(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	backend, up := switchable(t)
	c := newCaddy(t, "grace_period 5s", queueSite(backend.addr, "max_age 500ms\nattempt_timeout 2s"), "INKIT_QUEUE_DSN="+dsn)
	c.start()
	s := newSender(t, c)
	s.once(t, "dead") // it is attempted, because the backend does not count as down yet
	waitFor(t, "one is dead", c.process, func() bool { return len(c.list(t, "--state", "dead")) == 1 })
	c.configure("grace_period 5s", queueSite(backend.addr, ""))
	c.reload()
	events := size(3000, 600)
	<-s.sendAll(t.Context(), "moved", events)
	require.Len(t, s.ids(), events+1)
	before := c.list(t)

	c.configure("grace_period 5s", inPostgres(queueSite(backend.addr, "")))
	c.reload()
	file := c.path("queue/events.db")
	move := func() string {
		out, err := c.command("inkit-queue", "move", "--from", file, "--config", c.path("Caddyfile"))
		require.NoError(t, err)
		return out
	}
	moved := 0
	waitFor(t, "all are moved, those too that were being delivered", c.process, func() bool {
		var n int
		_, err := fmt.Sscanf(move(), "events moved: %d", &n)
		require.NoError(t, err)
		moved += n
		return moved == events+1
	})
	assert.Equal(t, "events moved: 0\n", move())
	after := c.list(t)
	require.Len(t, after, len(before))
	for i, e := range before {
		assert.Equal(t, e.ID, after[i].ID)
		assert.Equal(t, e.ResourceID, after[i].ResourceID)
		assert.Equal(t, e.State, after[i].State)
		assert.Equal(t, e.Received, after[i].Received)
	}
	assert.Equal(t, "status 503", c.list(t, "--state", "dead")[0].LastError)
	up.Store(true)
	backend.hasAll(t, s.ids()[1:], time.Minute)
	out, err := c.command("inkit-queue", "retry", "--state", "dead", "--config", c.path("Caddyfile"))
	require.NoError(t, err)
	assert.Equal(t, "events due: 1\n", out)
	backend.hasAll(t, s.ids(), time.Minute)
	out, err = c.command("inkit-queue", "list", "--json", "--db", file)
	require.NoError(t, err)
	assert.Empty(t, out)
}

// TestPostgresMigrate creates the tables with a role other than Caddy's.
func TestPostgresMigrate(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	name := server.NewDatabase(t)
	server.Exec(t, name, "CREATE ROLE few LOGIN PASSWORD '"+pgtest.Password+"'", "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
	backend := newTaker(t, func(string, int) int { return http.StatusServiceUnavailable })
	c := pgCaddy(t, backend.addr, strings.Replace(server.DSN(name), "//postgres:", "//few:", 1), "")
	c.logged("the role is not allowed to create the tables: with another role, run the SQL that caddy inkit-queue migrate prints")
	statements, err := c.command("inkit-queue", "migrate", "--config", c.path("Caddyfile"))
	require.NoError(t, err)
	assert.NotContains(t, statements, pgtest.Password)
	server.Exec(t, name, statements, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO few")
	s := newSender(t, c)
	waitFor(t, "it accepts, without a reload", c.process, func() bool { return s.once(t, fmt.Sprint("kept-", s.tries)).status == http.StatusOK })
	_, err = c.command("inkit-queue", "migrate", "--db", c.path("x.db"))
	require.ErrorContains(t, err, "no queue in the configuration uses PostgreSQL")
}
