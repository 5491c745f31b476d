//go:build linux

package e2e

import (
	"context"
	"database/sql"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const pendingMetric = `caddy_inkit_queue_events{queue="default",state="pending"}`

func TestQueueAcrossReloads(t *testing.T) { //nolint:tparallel // its subtests share a Caddy
	t.Parallel()
	old := newTaker(t, func(id string, attempt int) int {
		time.Sleep(1500 * time.Millisecond)
		if strings.HasPrefix(id, "stays") {
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
	next := newTaker(t, all)
	c := queueCaddy(t, old.addr, "answer_after 50ms")
	s := newSender(t, c)
	s.once(t, "stays")
	s.once(t, "in flight")
	waitFor(t, "two attempts", c.process, func() bool { return old.snapshot().now == 2 })
	c.configure("grace_period 5s", queueSite(next.addr, "answer_after 50ms"))
	c.reload()
	waitFor(t, "the delivery in flight ends under the old configuration", c.process, func() bool { return len(old.missing([]string{"in flight"})) == 0 })
	next.hasAll(t, []string{"stays"}, 20*time.Second)
	s.once(t, "new")
	next.hasAll(t, []string{"new"}, 5*time.Second)
	assert.Equal(t, 2, old.snapshot().events)
	assert.Zero(t, next.of("in flight").attempts)

	t.Run("one that fails leaves the old one delivering", func(t *testing.T) {
		next.close()
		for i := range 10 {
			s.once(t, fmt.Sprint("waits-", i))
		}
		for i := range 5 {
			c.configure("grace_period 5s", queueSite(old.addr, "")+"\nhttp://:"+port(old.addr)+" {\n\tbind 127.0.0.1\n\trespond \"this address is in use\"\n}\n")
			_, err := c.command("reload", "--config", c.path("Caddyfile"), "--address", c.admin, "--force")
			require.ErrorContains(t, err, "address already in use", i)
		}
		next.listen()
		next.hasAll(t, s.ids()[2:], 20*time.Second)
		assert.Equal(t, 2, old.snapshot().events)
	})
	t.Run("that take the queue away and bring it back", func(t *testing.T) {
		next.close()
		for i := range 10 {
			s.once(t, fmt.Sprint("left-", i))
		}
		waitFor(t, "the metric has them", c.process, func() bool { return c.metric(pendingMetric) == "10" })
		c.configure("", "http://{{addr}} {\n\trespond /other \"the other site\"\n\terror 404\n}")
		c.reload()
		c.logged("events are pending in a queue that is not configured")
		assert.Contains(t, c.output.String(), `"queue":"default","pending":10`)
		c.configure("", strings.Replace(queueSite(next.addr, "name another"), "/webhook", "/another", 1))
		c.reload()
		next.listen()
		c.configure("", queueSite(next.addr, ""))
		c.reload()
		next.hasAll(t, s.ids()[2:], 20*time.Second)
	})
}

func TestQueueOfACaddyThatStops(t *testing.T) {
	t.Parallel()
	var slow atomic.Bool
	slow.Store(true)
	backend := newTaker(t, func(id string, attempt int) int {
		switch {
		case strings.HasPrefix(id, "slow"):
			time.Sleep(time.Second)
		case strings.HasPrefix(id, "hangs") && slow.Load():
			time.Sleep(20 * time.Second)
			return http.StatusInternalServerError
		}
		return all(id, attempt)
	})
	c := newCaddy(t, "grace_period 2s", queueSite(backend.addr, "answer_after 50ms"))
	c.start()
	s := newSender(t, c)
	s.once(t, "slow")
	s.once(t, "hangs")
	began := time.Now()
	c.stop(t, syscall.SIGTERM)
	assert.Less(t, time.Since(began), 8*time.Second)
	assert.Empty(t, backend.missing([]string{"slow"}), "it had the grace period")
	slow.Store(false)
	c.start()
	backend.hasAll(t, s.ids(), 5*time.Second) // earlier than the end of the lease of 32 s
	assert.Equal(t, 1, backend.of("slow").taken)
	assert.Equal(t, 2, backend.of("hangs").attempts)
}

func TestQueueOfTwoCaddysOnOneFile(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, sometimes)
	one := queueCaddy(t, backend.addr, "")
	two := newCaddy(t, "grace_period 5s", strings.ReplaceAll(queueSite(backend.addr, ""), "{{dir}}", one.dir))
	two.start()
	s := newSender(t, one, two)
	events := size(3000, 300)
	<-s.sendAll(t.Context(), "both", events)
	require.Len(t, s.ids(), events)
	assert.Zero(t, backend.hasAll(t, s.ids(), time.Minute))
	backend.close()
	<-s.sendAll(t.Context(), "kept", events)
	one.stop(t, syscall.SIGTERM)
	backend.listen()
	assert.Zero(t, backend.hasAll(t, s.ids(), 2*time.Minute), "the other one delivers")
	s.refusedNone(t)
}

// While another program locks the file, a Caddy cannot store which events it attempts. So it
// makes no attempts, because the other Caddy could deliver these events, too.
func TestQueueOfTwoCaddysWhileTheFileIsLocked(t *testing.T) {
	t.Parallel()
	var up atomic.Bool
	backend := newTaker(t, func(id string, attempt int) int {
		if !up.Load() {
			return http.StatusInternalServerError // unlike 503, status 500 does not mark the backend as down
		}
		return all(id, attempt)
	})
	one := queueCaddy(t, backend.addr, "")
	two := newCaddy(t, "grace_period 5s", strings.ReplaceAll(queueSite(backend.addr, ""), "{{dir}}", one.dir))
	two.start()
	s := newSender(t, one, two)
	<-s.sendAll(t.Context(), "kept", 10)
	require.Len(t, s.ids(), 10)
	db, err := sql.Open("sqlite", one.path("queue/events.db")+"?_txlock=immediate&_pragma=busy_timeout(5000)")
	require.NoError(t, err)
	defer db.Close()
	tx, err := db.Begin()
	require.NoError(t, err)
	up.Store(true)
	one.logged(cannotBeKept)
	two.logged(cannotBeKept)
	time.Sleep(time.Second) // time for unwanted attempts
	require.NoError(t, tx.Rollback())
	assert.Zero(t, backend.hasAll(t, s.ids(), time.Minute), "none twice")
}

func TestQueueIsNotTouchedByValidate(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, all)
	backend.close()
	c := newQueueCaddy(t, backend.addr, "")
	_, err := c.command("validate", "--config", c.path("Caddyfile"))
	require.NoError(t, err)
	require.NoDirExists(t, c.path("queue"))
	_, err = c.command("adapt", "--config", c.path("Caddyfile"), "--validate")
	require.NoError(t, err)
	require.NoDirExists(t, c.path("queue"))
	c.start()
	s := newSender(t, c)
	s.once(t, "before")
	_, err = c.command("validate", "--config", c.path("Caddyfile"))
	require.NoError(t, err, "beside a Caddy that runs")
	info, err := os.Stat(c.path("queue"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o700), info.Mode().Perm())
	for _, suffix := range []string{"", "-wal", "-shm", "-reserve"} {
		info, err := os.Stat(c.path("queue/events.db" + suffix))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), info.Mode().Perm(), suffix)
	}
	s.once(t, "after")
	backend.listen()
	backend.hasAll(t, s.ids(), 20*time.Second)
}

// An event is still stored or delivered after its sender has disconnected.
func TestQueueOfASenderThatHangsUp(t *testing.T) {
	t.Parallel()
	var up atomic.Bool
	backend := newTaker(t, func(id string, attempt int) int {
		if !up.Load() {
			time.Sleep(500 * time.Millisecond)
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
	c := queueCaddy(t, backend.addr, "concurrency 64")
	var ids []string
	for i := range 20 {
		id := fmt.Sprint("hangs-up-", i)
		body := event(id)
		ctx, cancel := context.WithCancel(t.Context())
		failed := make(chan error)
		go func() {
			_, err := send(ctx, http.DefaultClient, "http://"+c.addr+"/webhook", body, int64(len(body)), sign(secret, body))
			failed <- err
		}()
		waitFor(t, "an attempt", c.process, func() bool { return backend.of(id).attempts > 0 })
		cancel()
		require.ErrorIs(t, <-failed, context.Canceled)
		ids = append(ids, id)
	}
	up.Store(true)
	backend.hasAll(t, ids, 20*time.Second)
}

func TestQueueThatIsFull(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	c := queueCaddy(t, backend.addr, "max_events 10")
	s := newSender(t, c)
	waitFor(t, "there are too many", c.process, func() bool { return s.once(t, fmt.Sprint("fills-", s.tries)).status != http.StatusOK })
	kept := len(s.ids())
	assert.GreaterOrEqual(t, kept, 10)
	refused(t, s.once(t, "refused"))
	c.logged("max_events are pending")
	assert.NotEqual(t, "0", c.metric(`caddy_inkit_queue_stored_total{queue="default",result="refused"}`))
	assert.Len(t, c.list(t), kept, "no older event was dropped")

	c.configure("", queueSite(backend.addr, "max_events 1")) // more events than this are pending
	c.stop(t, syscall.SIGTERM)
	c.start()
	up.Store(true)
	backend.hasAll(t, s.ids(), 20*time.Second)
	assert.Equal(t, http.StatusOK, s.once(t, "again").status)
}

func TestQueueCommands(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, func(id string, attempt int) int {
		if strings.HasPrefix(id, "bad") && attempt < 3 {
			return http.StatusNotFound
		}
		return http.StatusOK
	})
	c := queueCaddy(t, backend.addr, "max_age 1s")
	s := newSender(t, c)
	for i := range 3 {
		require.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("bad-", i)).status)
	}
	waitFor(t, "they are dead", c.process, func() bool { return len(c.list(t, "--state", "dead")) == 3 })
	assert.Equal(t, 3, strings.Count(c.output.String(), "an event is dead: the backend has not accepted it within max_age, see caddy inkit-queue retry"), "a line for each")
	waitFor(t, "the metric says so", c.process, func() bool {
		return c.metric(`caddy_inkit_queue_events{queue="default",state="dead"}`) == "3"
	})
	dead := c.list(t, "--state", "dead")
	for i, e := range dead {
		assert.Equal(t, fmt.Sprint("bad-", i), e.ResourceID)
		assert.Equal(t, "DOCUMENT_CREATE_FINISHED", e.EventType)
		assert.Equal(t, "status 404", e.LastError)
		assert.Equal(t, 2, e.Attempts)
		assert.Empty(t, e.NextAttempt)
		_, err := time.Parse(time.RFC3339, e.Received)
		require.NoError(t, err)
	}

	db := []string{"--db", c.path("queue/events.db")}
	run := func(args ...string) string {
		out, err := c.command(append(append([]string{"inkit-queue"}, args...), db...)...)
		require.NoError(t, err)
		return out
	}
	table := run("list")
	assert.Contains(t, table, "ID ")
	assert.Equal(t, 4, strings.Count(table, "\n"))
	shown := run("show", dead[0].ID)
	assert.Contains(t, shown, `"resource_id":"bad-0"`)
	assert.Contains(t, shown, `"last_error": "status 404"`)
	assert.NotContains(t, shown, sign(secret, []byte(`{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"bad-0","sent":1}`)))
	assert.Contains(t, shown, "REDACTED")

	assert.Equal(t, "events dropped: 1\n", run("drop", dead[0].ID))
	assert.Equal(t, "events due: 1\n", run("retry", dead[1].ID))
	backend.hasAll(t, []string{"bad-1"}, 10*time.Second)
	assert.Equal(t, "events due: 1\n", run("retry", "--state", "dead"))
	backend.hasAll(t, []string{"bad-2"}, 10*time.Second)
	waitFor(t, "nothing is left", c.process, func() bool { return len(c.list(t)) == 0 })
	assert.Zero(t, backend.of("bad-0").taken)

	for _, tt := range []struct {
		name, says string
		args       []string
	}{
		{"an unknown id", "there is no event to show: 019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52", []string{"show", "019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52"}},
		{"one to retry", "not changed, because unknown, delivered or being delivered: nothing", []string{"retry", "nothing"}},
		{"one to drop", "there is no event to drop: nothing", []string{"drop", "nothing"}},
		{"nothing to retry", "needs either the ids of events, or a filter such as --state dead", []string{"retry"}},
		{"both", "needs either the ids of events, or a filter such as --state dead", []string{"retry", "--state", "dead", "x"}},
		{"an unknown command", `unknown command "lists"`, []string{"lists"}},
	} {
		_, err := c.command(append(append([]string{"inkit-queue"}, tt.args...), db...)...)
		require.ErrorContains(t, err, "exit status 1", tt.name)
		require.ErrorContains(t, err, tt.says, tt.name)
	}
	_, err := c.command("inkit-queue", "list", "--db", c.path("nothing.db"))
	require.ErrorContains(t, err, "sqlite "+c.path("nothing.db")+": this database file does not exist")
	assert.NoFileExists(t, c.path("nothing.db"))
	c.stop(t, syscall.SIGTERM)
	assert.Empty(t, c.list(t), "and without a Caddy that runs")
}
