//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// sender sends events to Caddys in turn. If a Caddy does not accept an event, the next Caddy gets it.
type sender struct {
	urls    []string
	client  *http.Client
	workers int // how many goroutines sendAll uses

	mu       sync.Mutex
	tries    int // how many requests were sent
	accepted []string
	refused  []string // answered 5xx: the id and the status
	times    []time.Duration
	last     time.Time     // when an event was last accepted
	gap      time.Duration // the longest time between two accepted events
}

func newSender(t *testing.T, caddys ...*caddy) *sender {
	t.Helper()
	s := &sender{workers: 8, client: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	for _, c := range caddys {
		s.urls = append(s.urls, "http://"+c.addr+"/webhook")
	}
	t.Cleanup(s.client.CloseIdleConnections)
	return s
}

// send sends an event until a Caddy accepts it, or until ctx ends.
func (s *sender) send(ctx context.Context, id string, first int) bool {
	for i := first; ctx.Err() == nil; i++ {
		body := fmt.Appendf(nil, `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"%s","sent":%d}`, id, i-first)
		began := time.Now()
		s.mu.Lock()
		s.tries++
		s.mu.Unlock()
		got, err := send(ctx, s.client, s.urls[i%len(s.urls)], body, int64(len(body)), sign(secret, body))
		if err == nil && got.status/100 == 2 {
			s.mu.Lock()
			s.accepted = append(s.accepted, id)
			s.times = append(s.times, time.Since(began))
			if !s.last.IsZero() {
				s.gap = max(s.gap, time.Since(s.last))
			}
			s.last = time.Now()
			s.mu.Unlock()
			return true
		}
		if err == nil && got.status >= 500 {
			s.mu.Lock()
			s.refused = append(s.refused, fmt.Sprint(id, " ", got.status))
			s.mu.Unlock()
		}
		time.Sleep(20 * time.Millisecond)
	}
	return false
}

// refusedNone asserts that no event was answered 5xx. A 5xx is a fault if the backend is
// up, or if the queue can store the event.
func (s *sender) refusedNone(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	t.Logf("%d requests: %d answered 5xx", s.tries, len(s.refused))
	assert.Empty(t, s.refused[:min(10, len(s.refused))], "%d of %d requests were answered 5xx", len(s.refused), s.tries)
}

// sendAll starts all workers, which send n events in parallel. If ctx ends, the workers stop early.
// When all workers have stopped, `done` is closed.
func (s *sender) sendAll(ctx context.Context, name string, n int) (done chan struct{}) {
	done = make(chan struct{})
	var next atomic.Int64
	var wg sync.WaitGroup
	for range s.workers {
		wg.Go(func() {
			for i := int(next.Add(1)); i <= n && ctx.Err() == nil; i = int(next.Add(1)) {
				s.send(ctx, fmt.Sprintf("%s-%05d", name, i), i)
			}
		})
	}
	go func() {
		wg.Wait()
		close(done)
	}()
	return done
}

func (s *sender) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.accepted)
}

func (s *sender) median() time.Duration { return s.quantile(0.5) }

// quantile returns the time within which a share of the events was accepted.
func (s *sender) quantile(part float64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return quantile(s.times, part)
}

func quantile(times []time.Duration, part float64) time.Duration {
	times = slices.Sorted(slices.Values(times))
	return times[int(part*float64(len(times)-1))]
}

// With the function "sometimes", a backend of newTaker refuses the first attempt at each event
// whose id ends in 3, and takes 300 ms for the first attempt if the id ends in 7.
func sometimes(id string, attempt int) int {
	time.Sleep(2 * time.Millisecond)
	if attempt == 1 && strings.HasSuffix(id, "3") {
		return http.StatusInternalServerError
	}
	if attempt == 1 && strings.HasSuffix(id, "7") {
		time.Sleep(300 * time.Millisecond)
	}
	return http.StatusOK
}

// With firstHangs, the first attempt at each event takes the time `timeout`, and then fails.
func firstHangs(timeout time.Duration) func(id string, attempt int) int {
	return func(_ string, attempt int) int {
		if attempt == 1 {
			time.Sleep(timeout)
			return http.StatusInternalServerError
		}
		return http.StatusOK
	}
}

// queueCaddy starts a Caddy with a queue in SQLite, in front of a backend.
func queueCaddy(t *testing.T, backend, options string) *caddy {
	t.Helper()
	c := newQueueCaddy(t, backend, options)
	c.start()
	return c
}

// newQueueCaddy does the same as queueCaddy, but does not start Caddy.
func newQueueCaddy(t *testing.T, backend, options string) *caddy {
	t.Helper()
	return newCaddy(t, "grace_period 5s", queueSite(backend, options))
}

func queueSite(backend, options string) string {
	return `
http://{{addr}} {
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			store sqlite {{dir}}/queue/events.db
			` + options + `
			deliver {
				reverse_proxy ` + backend + `
			}
		}
	}
	handle /other {
		respond "the other site"
	}
	error 404
}`
}

// metric returns the value of a series, or an empty string if the series does not exist.
func (c *caddy) metric(series string) string {
	c.t.Helper()
	for line := range strings.Lines(c.get("http://" + c.admin + "/metrics")) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func TestQueueOutage(t *testing.T) {
	events := size(10_000, 1_000)
	backend := newTaker(t, all)
	backend.close()
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	s.workers = 16
	<-s.sendAll(t.Context(), "outage", events)
	require.Len(t, s.ids(), events)
	assert.Equal(t, events, s.tries, "each was answered 200 at once")
	t.Logf("the slowest answer after %v, the median %v", s.quantile(1).Round(time.Millisecond), s.median().Round(100*time.Microsecond))
	assert.Less(t, s.quantile(1), time.Second)

	killHard(c)
	c.start()
	c.reload()
	backend.listen()
	backend.hasAll(t, s.ids(), 2*time.Minute)
	most := backend.snapshot().most
	t.Logf("%d attempts at most at a time", most)
	assert.LessOrEqual(t, most, 16)
	waitFor(t, "the metrics say that nothing waits", c.process, func() bool {
		return c.metric(`caddy_inkit_queue_events{queue="default",state="pending"}`) == "0"
	})
}

func TestQueueOfACaddyThatIsKilledAndReloaded(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, func(id string, attempt int) int {
		time.Sleep(2 * time.Millisecond)
		if attempt == 1 && (id[len(id)-1]-'0')%3 == 0 {
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
	c := queueCaddy(t, backend.addr, "attempt_timeout 3s")
	s := newSender(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	load, stop := context.WithCancel(ctx)
	done := s.sendAll(load, "killed", 1_000_000)
	kills := size(50, 3)
	for i := range kills {
		for _, change := range []func(){c.reload, func() { killHard(c); c.start() }} {
			before := len(s.ids())
			waitFor(t, "events are accepted", c.process, func() bool { return len(s.ids()) >= max(before, (2*i+1)*size(200, 50)) })
			change()
		}
	}
	waitFor(t, "enough events are accepted", c.process, func() bool { return len(s.ids()) >= size(20_000, 200) })
	stop()
	<-done
	doubles := backend.hasAll(t, s.ids(), time.Minute)
	assert.LessOrEqual(t, doubles, 16*kills, "what was in flight when Caddy was killed")
	s.refusedNone(t)
}

func TestQueueOfACaddyThatDiesWhileItDelivers(t *testing.T) {
	t.Parallel()
	const attemptTimeout = 4 * time.Second
	backend := newTaker(t, firstHangs(attemptTimeout))
	c := queueCaddy(t, backend.addr, "answer_after 100ms\nattempt_timeout "+attemptTimeout.String())
	s := newSender(t, c)
	<-s.sendAll(t.Context(), "orphan", 12)
	require.Len(t, s.ids(), 12)
	require.Equal(t, 12, backend.snapshot().now, "all are being delivered")
	killHard(c)
	c.start()
	began := time.Now()
	backend.hasAll(t, s.ids(), 30*time.Second)
	assert.Less(t, time.Since(began), attemptTimeout+5*time.Second)
}

// TestQueueSyncsBeforeItAnswers checks the order of Caddy's system calls.
func TestQueueSyncsBeforeItAnswers(t *testing.T) {
	t.Parallel()
	needs(t, "strace")
	// the function "traced" returns the system calls of Caddy while the function "use" runs
	traced := func(t *testing.T, use func(c *caddy)) string {
		t.Helper()
		backend := newTaker(t, all)
		backend.close()
		c := newQueueCaddy(t, backend.addr, "")
		c.wrapper = []string{"strace", "-f", "-q", "-y", "-s", "16", "-e", "trace=fsync,fdatasync,write,writev,sendto", "-o", c.path("calls")}
		c.run()
		waitFor(t, "Caddy answers", c.process, func() bool { return listening(c.admin)() && listening(c.addr)() })
		if strings.Contains(c.output.String(), "ptrace") {
			t.Skip("processes may not be traced here")
		}
		for i := range 8 { // until the backend counts as down
			newSender(t, c).send(t.Context(), fmt.Sprint("first-", i), 0)
		}
		before := len(readFile(t, c.path("calls")))
		use(c)
		tracer := c.cmd.Process.Pid
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", tracer, tracer))
		require.NoError(t, err)
		caddyPID, err := strconv.Atoi(strings.TrimSpace(string(children)))
		require.NoError(t, err)
		require.NoError(t, syscall.Kill(caddyPID, syscall.SIGTERM)) // when Caddy ends, strace writes the rest of its output, and ends
		<-c.exited
		return readFile(t, c.path("calls"))[before:]
	}
	isAnswer := func(line string) bool { return strings.Contains(line, "HTTP/1.1 200 OK") }

	t.Run("one sender", func(t *testing.T) {
		t.Parallel()
		calls := traced(t, func(c *caddy) {
			s := newSender(t, c)
			for i := range 100 {
				require.True(t, s.send(t.Context(), fmt.Sprint("one-", i), 0))
			}
		})
		answers, synced, ordered := 0, false, 0
		syncing := make(map[string]bool) // threads with a sync call that has not returned
		for line := range strings.Lines(calls) {
			thread, call, _ := strings.Cut(line, " ")
			call = strings.TrimSpace(call)
			isSync := strings.HasPrefix(call, "fsync(") || strings.HasPrefix(call, "fdatasync(")
			switch {
			case isSync && strings.Contains(call, "events.db-wal>"):
				synced = synced || strings.HasSuffix(call, "= 0")
				syncing[thread] = strings.Contains(call, "unfinished")
			case strings.Contains(call, "sync resumed") && syncing[thread]:
				synced, syncing[thread] = strings.HasSuffix(call, "= 0"), false
			case isAnswer(call):
				answers++
				if synced {
					ordered++
				}
				synced = false
			}
		}
		assert.Equal(t, 100, answers)
		assert.Equal(t, 100, ordered, "answers after the write-ahead log was synced")
	})
	t.Run("64 senders", func(t *testing.T) {
		t.Parallel()
		events := size(6400, 1600)
		calls := traced(t, func(c *caddy) {
			s := newSender(t, c)
			s.workers = 64
			<-s.sendAll(t.Context(), "many", events)
			require.Len(t, s.ids(), events)
		})
		answers, syncs := 0, 0
		for line := range strings.Lines(calls) {
			switch {
			case isAnswer(line):
				answers++
			case strings.Contains(line, " fsync(") || strings.Contains(line, " fdatasync("):
				syncs++
			}
		}
		t.Logf("%d answers, %d fsync or fdatasync, %.3f an event", answers, syncs, float64(syncs)/float64(answers))
		assert.Equal(t, events, answers)
		assert.LessOrEqual(t, float64(syncs)/float64(answers), 0.2)
		assert.NotZero(t, syncs)
	})
}

func TestQueueAsksADeadBackendSeldom(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, func(string, int) int { return http.StatusServiceUnavailable })
	c := queueCaddy(t, backend.addr, "")
	for i := range 5 { // parallel senders would cause more attempts before the backend counts as down
		require.True(t, newSender(t, c).send(t.Context(), fmt.Sprint("first-", i), 0))
	}
	s := newSender(t, c)
	s.workers = 16
	events := size(10_000, 1_000)
	<-s.sendAll(t.Context(), "waiting", events)
	require.Len(t, s.ids(), events)
	asked := func() []time.Time {
		backend.mu.Lock()
		defer backend.mu.Unlock()
		return slices.Clone(backend.times)
	}
	from := len(asked())
	waitLong(t, "it is asked again and again", time.Minute, nil, func() bool { return len(asked()) >= from+size(30, 6) })
	times := asked()
	t.Logf("it was asked %d times in %v", len(times), times[len(times)-1].Sub(times[0]).Round(time.Second))
	assert.LessOrEqual(t, mostInASecond(times[10:]), 2)
}

// mostInASecond returns the largest number of the sorted times within any one second.
func mostInASecond(times []time.Time) (most int) {
	for i, at := range times {
		n := 0
		for n < len(times)-i && times[i+n].Sub(at) < time.Second {
			n++
		}
		most = max(most, n)
	}
	return most
}

func TestQueueOfEventsThatFail(t *testing.T) {
	backend := newTaker(t, func(id string, attempt int) int {
		switch {
		case strings.HasPrefix(id, "bad"):
			return http.StatusInternalServerError
		case strings.HasPrefix(id, "never"):
			time.Sleep(time.Minute)
		}
		return all(id, attempt)
	})
	t.Cleanup(backend.close)
	c := queueCaddy(t, backend.addr, "answer_after 500ms")
	s := newSender(t, c)
	<-s.sendAll(t.Context(), "bad", 20)
	<-s.sendAll(t.Context(), "never", 1)
	var slowest time.Duration
	for i := range size(200, 60) { // long enough for many retries of the bad events
		id := fmt.Sprint("good-", i)
		began := time.Now()
		require.True(t, s.send(t.Context(), id, 0))
		waitFor(t, "a good one is delivered", c.process, func() bool { return len(backend.missing([]string{id})) == 0 })
		backend.mu.Lock()
		slowest = max(slowest, backend.takenAt[id].Sub(began))
		backend.mu.Unlock()
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("the slowest good one after %v", slowest.Round(time.Millisecond))
	assert.Less(t, slowest, time.Second)
	assert.Equal(t, "0", c.metric(`caddy_inkit_queue_backend_down{queue="default"}`))
}

func TestQueueDrainsBesideLiveEvents(t *testing.T) {
	backend := newTaker(t, func(id string, attempt int) int {
		time.Sleep(5 * time.Millisecond)
		return http.StatusOK
	})
	c := queueCaddy(t, backend.addr, "")
	live := func(name string, goOn func(i int) bool) []time.Duration {
		s := newSender(t, c)
		for i := 0; goOn(i); i++ {
			require.True(t, s.send(t.Context(), fmt.Sprint(name, "-", i), 0))
			time.Sleep(5 * time.Millisecond)
		}
		backend.hasAll(t, s.ids(), 5*time.Second)
		return s.times
	}
	alone := live("alone", func(i int) bool { return i < 200 })

	backend.close()
	s := newSender(t, c)
	s.workers = 16
	events := size(10_000, 2_000)
	<-s.sendAll(t.Context(), "backlog", events)
	require.Len(t, s.ids(), events)
	backend.listen()
	waitFor(t, "the backend is known to be up", c.process, func() bool { return len(backend.missing(s.ids())) < events-200 })
	beside := live("beside", func(int) bool { return len(backend.missing(s.ids())) > 200 })
	backend.hasAll(t, s.ids(), time.Minute)
	t.Logf("the 99th percentile of %d live events: %v, and of %d without a backlog %v",
		len(beside), quantile(beside, 0.99), len(alone), quantile(alone, 0.99))
	assert.Greater(t, len(beside), 20)
	assert.LessOrEqual(t, quantile(beside, 0.99), max(50*time.Millisecond, 2*quantile(alone, 0.99)))
}

// command runs a command of Caddy in the environment and the folder of c.
func (c *caddy) command(args ...string) (stdout string, err error) {
	c.t.Helper()
	cmd := exec.Command(caddyPath, args...)
	cmd.Env, cmd.Dir = c.env, c.dir
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), nil
}
