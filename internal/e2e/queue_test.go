//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
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

// size returns full in a long run, and quick in a short run.
func size(full, quick int) int {
	if long {
		return full
	}
	return quick
}

// taker is a backend that records its requests and the events that it has accepted.
type taker struct {
	addr   string
	status func(id string, attempt int) int
	quiet  bool // whether it records nothing

	mu       sync.Mutex
	server   *http.Server // nil while nothing listens
	taken    map[string]int
	takenAt  map[string]time.Time // when the event was first accepted
	attempts map[string]int
	keys     map[string]map[string]bool // the Idempotency-Key fields, by event and request of the sender
	times    []time.Time                // of attempts
	now      int                        // attempts at this moment
	most     int                        // the largest value of now
}

// newTaker starts a taker. status returns the status of its response to an attempt.
func newTaker(t *testing.T, status func(id string, attempt int) int) *taker {
	t.Helper()
	b := &taker{
		addr: freeAddr(t), status: status, taken: make(map[string]int), takenAt: make(map[string]time.Time),
		attempts: make(map[string]int), keys: make(map[string]map[string]bool),
	}
	b.listen(t)
	t.Cleanup(b.close)
	return b
}

// listen starts the server. close stops the server and closes all connections.
func (b *taker) listen(t *testing.T) {
	t.Helper()
	server := &http.Server{Addr: b.addr, Handler: b}
	b.mu.Lock()
	b.server = server
	b.mu.Unlock()
	go func() { _ = server.ListenAndServe() }()
	waitFor(t, "the backend listens", nil, listening(b.addr))
}

func (b *taker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	_ = b.server.Close()
}

// all makes a taker accept all events.
func all(string, int) int {
	time.Sleep(2 * time.Millisecond)
	return http.StatusOK
}

func (b *taker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var e struct {
		ResourceID string `json:"resource_id"`
		Sent       int    `json:"sent"` // how often the sender has sent it
	}
	if err != nil || json.Unmarshal(body, &e) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if b.quiet {
		w.WriteHeader(b.status(e.ResourceID, 1))
		return
	}
	b.mu.Lock()
	b.attempts[e.ResourceID]++
	attempt := b.attempts[e.ResourceID]
	sent := fmt.Sprint(e.ResourceID, " ", e.Sent)
	if b.keys[sent] == nil {
		b.keys[sent] = make(map[string]bool)
	}
	b.keys[sent][r.Header.Get("Idempotency-Key")] = true
	b.times = append(b.times, time.Now())
	b.now++
	b.most = max(b.most, b.now)
	b.mu.Unlock()
	status := b.status(e.ResourceID, attempt)
	b.mu.Lock()
	b.now--
	if status == http.StatusOK {
		if b.taken[e.ResourceID]++; b.taken[e.ResourceID] == 1 {
			b.takenAt[e.ResourceID] = time.Now()
		}
	}
	b.mu.Unlock()
	w.WriteHeader(status)
}

// snapshot returns the number of events with an attempt, the number of attempts at this
// moment, and the largest number of attempts at the same time.
func (b *taker) snapshot() (s struct{ events, now, most int }) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s.events, s.now, s.most = len(b.attempts), b.now, b.most
	return s
}

// of returns the number of attempts at an event, and how often the backend accepted it.
func (b *taker) of(id string) (e struct{ attempts, taken int }) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.attempts, e.taken = b.attempts[id], b.taken[id]
	return e
}

// missing returns the ids of the events that the backend has not accepted.
func (b *taker) missing(ids []string) (missing []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range ids {
		if b.taken[id] == 0 {
			missing = append(missing, id)
		}
	}
	return missing
}

// hasAll waits until the backend has accepted all events. It asserts that all attempts for
// one request have the same key. It returns how many events the backend has accepted twice.
func (b *taker) hasAll(t *testing.T, ids []string, within time.Duration) (doubles int) {
	t.Helper()
	require.NotEmpty(t, ids)
	began := time.Now()
	for len(b.missing(ids)) > 0 && time.Since(began) < within {
		time.Sleep(50 * time.Millisecond)
	}
	missing := b.missing(ids)
	require.Empty(t, missing[:min(10, len(missing))], "%d of %d events that were answered 2xx are lost", len(missing), len(ids))
	b.mu.Lock()
	defer b.mu.Unlock()
	for sent, keys := range b.keys {
		require.Len(t, keys, 1, sent)
		require.NotContains(t, keys, "", sent)
	}
	for _, id := range ids {
		doubles += b.taken[id] - 1
	}
	t.Logf("%d events were answered 2xx: 0 lost, %d taken twice, the last %v after the last was accepted", len(ids), doubles, time.Since(began).Round(time.Millisecond))
	return doubles
}

// sender sends events to Caddys in turn. If a Caddy does not accept an event, it tries the
// next Caddy.
type sender struct {
	urls    []string
	client  *http.Client
	workers int // of sendAll

	mu       sync.Mutex
	tries    int // how many requests were sent
	accepted []string
	refused  []string // answered 5xx: the id and the response
	times    []time.Duration
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

// sendAll sends n events with all workers in parallel. done is closed at the end.
func (s *sender) sendAll(ctx context.Context, name string, n int) (done chan struct{}) {
	done = make(chan struct{})
	var next atomic.Int64
	var wg sync.WaitGroup
	for range s.workers {
		wg.Go(func() {
			for i := int(next.Add(1)); i <= n; i = int(next.Add(1)) {
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

// quantile returns the time in which this part of the events was accepted.
func (s *sender) quantile(part float64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return quantile(s.times, part)
}

func quantile(times []time.Duration, part float64) time.Duration {
	times = slices.Sorted(slices.Values(times))
	return times[int(part*float64(len(times)-1))]
}

// sometimes makes a taker often refuse the first attempt at an event.
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
	backend.listen(t)
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
	backend := newTaker(t, func(id string, attempt int) int {
		if attempt == 1 {
			time.Sleep(attemptTimeout) // the attempts do not end
			return http.StatusInternalServerError
		}
		return http.StatusOK
	})
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
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed")
	}
	// traced returns the system calls of Caddy during use
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
		require.NoError(t, syscall.Kill(caddyPID, syscall.SIGTERM)) // strace writes all its output, and ends with Caddy
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
	waitLong(t, "it is asked again and again", time.Minute, func() bool { return len(asked()) >= from+size(30, 6) })
	times := asked()
	t.Logf("it was asked %d times in %v", len(times), times[len(times)-1].Sub(times[0]).Round(time.Second))
	for i, at := range times {
		if i < 10 {
			continue
		}
		n := 0
		for _, other := range times[i:] {
			if other.Sub(at) < time.Second {
				n++
			}
		}
		assert.LessOrEqual(t, n, 2, "in the second after %v", at.Sub(times[0]))
	}
}

// waitLong does the same as waitFor with a longer limit.
func waitLong(t *testing.T, what string, limit time.Duration, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if done() {
			return
		}
	}
	require.FailNow(t, what+" does not happen")
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
	backend.listen(t)
	waitFor(t, "the backend is known to be up", c.process, func() bool { return len(backend.missing(s.ids())) < events-200 })
	beside := live("beside", func(int) bool { return len(backend.missing(s.ids())) > 200 })
	backend.hasAll(t, s.ids(), time.Minute)
	t.Logf("the 99th percentile of %d live events: %v, and of %d without a backlog %v",
		len(beside), quantile(beside, 0.99), len(alone), quantile(alone, 0.99))
	assert.Greater(t, len(beside), 20)
	assert.LessOrEqual(t, quantile(beside, 0.99), max(50*time.Millisecond, 2*quantile(alone, 0.99)))
}

// command runs a command of Caddy while Caddy runs.
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
