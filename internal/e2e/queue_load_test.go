//go:build linux

package e2e

import (
	"crypto/sha256"
	"database/sql"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestQueueOfManyEvents has a million pending events, or fewer in a short run.
func TestQueueOfManyEvents(t *testing.T) {
	if !long { // a long run measures time, so no other test may run beside it
		t.Parallel()
	}
	events := size(1_000_000, 5_000)
	backend, up := switchable(t)
	backend.quiet = true
	var taken sync.Map
	backend.status = func(id string, attempt int) int {
		if !up.Load() {
			return http.StatusServiceUnavailable
		}
		taken.LoadOrStore("first", time.Now())
		return http.StatusOK
	}
	c := queueCaddy(t, backend.addr, "max_events 2000000\nconcurrency 64\nhistory 0")
	beside := queueCaddy(t, backend.addr, "") // for comparison: a Caddy with few events
	<-newSender(t, beside).sendAll(t.Context(), "beside", 100)
	s := newSender(t, c)
	s.workers = 64
	accept := func(name string, n int) time.Duration {
		began := time.Now()
		<-s.sendAll(t.Context(), name, n)
		return time.Since(began)
	}
	accept("first", 100)
	more := size(5000, 2000)
	few := accept("few", more)
	empty := c.status(t, "VmRSS")
	db := c.path("queue/events.db")
	c.stop(t, syscall.SIGTERM)
	fill(t, db, events)
	before := fileSize(t, db)
	t.Logf("%d events: %d bytes each in the file", events, before/int64(events))

	c.start()
	waitFor(t, "all are counted", c.process, func() bool {
		n, _ := strconv.ParseFloat(c.metric(pendingMetric), 64)
		return int(n) >= events
	})
	waitLong(t, "the work of the start is done", time.Minute, c.process, func() bool {
		before := cpuTicks(t, c)
		time.Sleep(time.Second)
		return cpuTicks(t, c)-before < 10 // hundredths of a second
	})
	ticks, ticksBeside := cpuTicks(t, c), cpuTicks(t, beside)
	began := time.Now()
	time.Sleep(time.Duration(size(20, 2)) * time.Second) // Caddy is idle, except for one probe a second
	seconds := 100 * time.Since(began).Seconds()
	idle, idleBeside := float64(cpuTicks(t, c)-ticks)/seconds, float64(cpuTicks(t, beside)-ticksBeside)/seconds
	beside.stop(t, syscall.SIGTERM)
	many := accept("many", more)
	full := c.status(t, "VmRSS")
	t.Logf("idle: %.2f %% of a core, and beside few events %.2f %%; %d events accepted in %v, and beside few in %v; resident %d MiB, and beside few %d",
		100*idle, 100*idleBeside, more, many.Round(time.Millisecond), few.Round(time.Millisecond), full>>20, empty>>20)
	if long {
		// One probe a second takes 0.5 % of a core on a quiet machine, and up to 4 % if other
		// processes fill the CPU caches. A probe takes the same time with few events as with many,
		// but measured times vary. BenchmarkSQLite compares databases with few and many events.
		assert.Less(t, idle, max(0.01, 3*idleBeside))
		assert.Less(t, idle, 0.1)
		assert.LessOrEqual(t, many.Seconds(), 2*few.Seconds())
	}
	assert.LessOrEqual(t, full-empty, int64(60<<20))

	c.stop(t, syscall.SIGTERM)
	// make all events due, as if no event had been attempted
	execSQL(t, db, `UPDATE inkit_queue_events SET due = queued WHERE attempts > 0`)
	up.Store(true)
	began = time.Now()
	c.start()
	started := time.Now()
	waitFor(t, "the first delivery", c.process, func() bool { _, ok := taken.Load("first"); return ok })
	first, _ := taken.Load("first")
	wait := first.(time.Time).Sub(started)
	t.Logf("the first delivery %v after the start, which took %v", wait.Round(time.Millisecond), started.Sub(began).Round(time.Millisecond))
	assert.Less(t, wait, max(time.Second, 2*started.Sub(began)))
	if long { // the rest of the test measures no time
		up.Store(false)
		t.Parallel()
		up.Store(true)
	}

	enough := min(events, 100_000)
	waitLong(t, "100,000 are delivered, or all", 5*time.Minute, c.process, func() bool {
		time.Sleep(500 * time.Millisecond) // the query uses CPU, too
		n, _ := strconv.ParseFloat(c.metric(`caddy_inkit_queue_attempts_total{queue="default",result="delivered"}`), 64)
		return int(n) >= enough && (long || c.metric(pendingMetric) == "0" && len(c.list(t)) == 0)
	})
	t.Logf("%d delivered in %v", enough, time.Since(began).Round(time.Second))
	assert.LessOrEqual(t, c.status(t, "VmRSS")-empty, int64(60<<20))
	c.stop(t, syscall.SIGTERM)
	execSQL(t, db, `DELETE FROM inkit_queue_events`) // as if the others were delivered, too
	c.start()
	waitLong(t, "the room is given back", 2*time.Minute, c.process, func() bool { return fileSize(t, db) < before/10 })
	assert.LessOrEqual(t, c.status(t, "VmRSS")-empty, int64(60<<20))
}

// fill copies an existing event until the database has the wanted number of events.
func fill(t *testing.T, path string, events int) {
	t.Helper()
	db, err := sql.Open("sqlite", path+"?_pragma=busy_timeout(5000)")
	require.NoError(t, err)
	defer db.Close()
	tx, err := db.Begin()
	require.NoError(t, err)
	var request []byte
	var model int64
	require.NoError(t, tx.QueryRow(`SELECT request, rowid FROM inkit_queue_events WHERE attempts = 0 LIMIT 1`).Scan(&request, &model))
	insert, err := tx.Prepare(`
		INSERT INTO inkit_queue_events
		SELECT ?, queue, state, received, queued, due, lease, owner, attempts, last_error, event_type, resource_id, request, ?
		FROM inkit_queue_events WHERE rowid = ?`)
	require.NoError(t, err)
	defer insert.Close()
	for i := range events {
		id := fmt.Sprintf("00000000-0000-7000-8000-%012d", i)
		checksum := sha256.Sum256(append([]byte(id+"\x00"), request...))
		_, err := insert.Exec(id, checksum[:], model)
		require.NoError(t, err)
	}
	require.NoError(t, tx.Commit())
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	return info.Size()
}

// cpuTicks returns the CPU time of a Caddy, in hundredths of a second.
func cpuTicks(t *testing.T, c *caddy) int64 {
	t.Helper()
	_, stat, _ := strings.Cut(readFile(t, filepath.Join("/proc", strconv.Itoa(c.cmd.Process.Pid), "stat")), ") ")
	fields := strings.Fields(stat)
	user, err := strconv.ParseInt(fields[11], 10, 64)
	require.NoError(t, err)
	system, err := strconv.ParseInt(fields[12], 10, 64)
	require.NoError(t, err)
	return user + system
}
