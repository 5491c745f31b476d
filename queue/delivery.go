package queue

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// An event is attempted again after about as long as it has waited so far, as
	// Postfix does it, within these bounds.
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute

	// jitter is by how much an interval is longer at most, as a part of it.
	jitter = 0.2

	// maxRetryAfter bounds what a backend may ask for.
	maxRetryAfter = time.Hour

	// maxDelay is how far ahead the next attempt can be due, with room for the jitter.
	maxDelay = maxRetryAfter + maxRetryAfter/5

	// downAfter is how many different events in a row must reach nobody for the
	// backend to be taken to be down, and probeInterval the pause between two probes.
	downAfter     = 5
	probeInterval = time.Second

	// forgetAfter is how long nothing must wait for a backend that is down, until it is
	// taken to be up: what has failed just now may still have to be written.
	forgetAfter = 15 * time.Second

	// pollInterval is how long an event may be due that another process has stored.
	pollInterval = 2 * time.Second

	// leaseMargin is how much longer than an attempt a lease is.
	leaseMargin = 2 * time.Second

	// endMargin is how long handlers have to end when an attempt has had its time. Not all
	// heed that: php_fastcgi waits for as long as its read_timeout says, or for ever.
	endMargin = time.Second

	// maxUnended is how many attempts may go on after that. Each holds a connection.
	maxUnended = 256
)

// queue delivers the events of one name in one database. It outlives the handlers of
// a configuration: the one that was attached last delivers.
type queue struct {
	name    string
	db      *database
	metrics queueMetrics

	wake    chan struct{}
	ctx     context.Context // of all attempts
	cancel  context.CancelFunc
	running sync.WaitGroup // attempts and requests
	stopped chan struct{}  // closed when the schedule has ended

	mu       sync.Mutex
	handlers []*Handler // attached, the latest last
	lanes    lanes
	breaker  breaker
	closing  bool
	unended  map[string]bool // events whose last attempt goes on though it has had its time

	refusedLine time.Time // when the log said that too many events wait

	// for the schedule alone:
	probe time.Time // when to look whether a probe is due
	empty time.Time // since when nothing waits for a backend that is down
}

func newQueue(name string, db *database, concurrency int) *queue {
	q := &queue{
		name: name, db: db, lanes: lanes{limit: concurrency}, metrics: newQueueMetrics(name),
		wake: make(chan struct{}, 1), stopped: make(chan struct{}), unended: make(map[string]bool),
	}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	go q.schedule()
	return q
}

// attach has a handler deliver, until detach.
func (q *queue) attach(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.handlers = append(q.handlers, h)
	q.followLocked(h)
	q.poke()
}

func (q *queue) detach(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, attached := range q.handlers {
		if attached == h {
			q.handlers = append(q.handlers[:i:i], q.handlers[i+1:]...)
			break
		}
	}
	if n := len(q.handlers); n > 0 {
		q.followLocked(q.handlers[n-1])
	}
}

// followLocked takes on what a configuration says.
func (q *queue) followLocked(h *Handler) {
	q.lanes.limit = h.Concurrency
	q.db.logger.Store(h.app.logger)
}

// current returns the handler that delivers, or nil.
func (q *queue) current() *Handler {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(q.handlers); n > 0 {
		return q.handlers[n-1]
	}
	return nil
}

func (q *queue) isDown() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.breaker.down
}

func (q *queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// enter keeps the queue from being closed until leave.
func (q *queue) enter() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closing {
		return false
	}
	q.running.Add(1)
	return true
}

func (q *queue) leave() { q.running.Done() }

// close ends the schedule, and waits until grace is over for what is in flight. What
// is left then is given back.
func (q *queue) close(grace <-chan struct{}) {
	q.mu.Lock()
	q.closing = true
	q.mu.Unlock()
	q.poke()
	<-q.stopped
	done := make(chan struct{})
	go func() {
		q.running.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-grace:
	}
	q.cancel()
	<-done
}

// schedule is the goroutine that has due events delivered.
func (q *queue) schedule() {
	defer close(q.stopped)
	for {
		wait := q.next()
		q.mu.Lock()
		closing := q.closing
		q.mu.Unlock()
		if closing {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-q.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// next starts what can be started, and returns how long it is until there may be more.
func (q *queue) next() time.Duration {
	h := q.current()
	if h == nil {
		return pollInterval
	}
	if wait := time.Until(q.probe); wait > 0 && q.isDown() {
		return wait
	}
	before := q.db.announced(q.name)
	p, err := q.db.peek(q.name)
	if err != nil {
		return min(reopenInterval, pollInterval)
	}
	q.mu.Lock()
	if before.waiting == 0 && q.db.announced(q.name) == before { // or else what was read may be older than what is known here
		q.heardLocked(p.Down)
	}
	// An event that nobody ever answers would be taken for the backend, and come first
	// again and again. The newest ones have met it the least.
	down, ramping := q.breaker.down, q.breaker.ramp > 0
	free := q.lanes.backlogLocked(q.breaker.allowed(q.lanes.limit))
	lease := time.Duration(h.AttemptTimeout) + leaseMargin
	due := !p.Empty && (p.Wait == 0 || p.Last > farthest(lease))
	early := due && down && p.Probe > 0 && p.Probe <= lease // whose turn it is, the database knows
	if !due || early {
		free = 0
	}
	q.lanes.wanted = due && free == 0 && !early
	q.lanes.enterBacklogLocked(free)
	q.lanes.grantLocked()
	q.mu.Unlock()
	if !p.Empty || !down {
		q.empty = time.Time{}
	}
	switch {
	case p.Empty:
		switch {
		case !down:
		case q.empty.IsZero():
			q.empty = time.Now()
		case time.Since(q.empty) >= forgetAfter:
			q.forgetDown(h)
		}
		return pollInterval
	case !due:
		return min(p.Wait, pollInterval)
	case early:
		return q.untilProbe(min(p.Probe, probeInterval)) // others may find sooner that the backend is back
	case free == 0:
		return pollInterval // a lane that gets free pokes
	}
	claim := &Claim{Queue: q.name, Max: free, Lease: lease, Probe: down, Newest: down || ramping}
	records, err := q.db.claim(claim)
	q.mu.Lock()
	for range free - len(records) {
		q.lanes.leaveLocked(true)
	}
	q.running.Add(len(records))
	q.mu.Unlock()
	for _, rec := range records {
		go q.deliver(h, rec, time.Now())
	}
	switch {
	case err != nil:
		return min(reopenInterval, pollInterval)
	case down:
		return q.untilProbe(probeInterval + probeInterval/50) // when the next one is due, if this one fails at once
	case len(records) == 0:
		return minBackoff / 4 // another process was faster
	}
	return 0
}

// untilProbe has the schedule look at the database after that wait, and not before.
func (q *queue) untilProbe(wait time.Duration) time.Duration {
	q.probe = time.Now().Add(wait)
	return wait
}

// deliver makes one attempt at an event of the backlog.
func (q *queue) deliver(h *Handler, rec *Record, claimed time.Time) {
	defer q.running.Done()
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.lanes.leaveLocked(true)
		q.poke()
	}()
	r, err := decodeRequest(rec)
	if err != nil {
		h.logger.Error("a stored event is not what was stored: it was set aside", zap.String("id", rec.ID), zap.Error(err))
		q.db.finish(nil, Finish{ID: rec.ID, Queue: q.name, Outcome: Dead, LastError: lastError(err)})
		return
	}
	result := q.attempt(h, r, rec)
	q.settle(h, rec, result, rec.Age+time.Since(claimed), func(f Finish) { q.db.finish(nil, f) })
}

// result is what came of an attempt.
type result struct {
	answer      *answer
	err         error         // nil if the backend took the event
	unreachable bool          // whether that says more of the backend than of the event
	retryAfter  time.Duration // what the backend asked for
}

// attempt runs the handlers of the deliver block.
func (q *queue) attempt(h *Handler, r *request, rec *Record) (res result) {
	ctx, cancel := context.WithTimeout(q.ctx, time.Duration(h.AttemptTimeout))
	defer cancel()
	res.answer = newAnswer()
	if res.err = q.unendedAttempts(rec.ID); res.err != nil {
		res.unreachable = true
		return res
	}
	began := time.Now()
	answer := newAnswer()
	req := r.prepare(ctx, h.server, answer, rec)
	err, ended := q.runInTime(ctx, h, rec.ID, func() (err error) {
		// a proxy panics when an answer is cut short, and net/http is not here to recover
		defer func() {
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				err = errors.New("the answer was cut short, or abort ended it")
			default:
				h.logger.Error("a handler panicked while an event was delivered", zap.String("id", rec.ID), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
				err = errors.New("a handler panicked")
			}
		}()
		unhandled := false
		next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			unhandled = answer.status == 0
			return nil
		})
		if err = h.Routes.Compile(next).ServeHTTP(answer, req); err == nil && unhandled { // whatever status a handler such as templates makes of that
			err = errors.New("no directive of the deliver block took it")
		}
		return err
	})
	if ended { // or else it is the handlers' to write to
		res.answer = answer
	}

	status := res.answer.status
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && status == 0 {
		status = handlerErr.StatusCode
	}
	switch {
	case ctx.Err() == context.DeadlineExceeded && (err != nil || res.answer.status/100 != 2):
		res.err, res.unreachable = fmt.Errorf("no answer within %v", time.Duration(h.AttemptTimeout)), true
	case err != nil:
		res.err = reason(err)
	case res.answer.status == 0:
		res.err = errors.New("the backend gave no status")
	case res.answer.status/100 != 2:
		res.err = fmt.Errorf("status %d", res.answer.status)
	}
	if res.err != nil {
		switch status {
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusTooManyRequests:
			res.unreachable = true
		}
		res.retryAfter = retryAfter(res.answer.header.Get("Retry-After"), time.Now())
	}
	if c := h.logger.Check(zapcore.DebugLevel, "attempt"); c != nil {
		c.Write(zap.String("id", rec.ID), zap.String("event_type", rec.EventType), zap.String("resource_id", rec.ResourceID),
			zap.Int("attempt", rec.Attempts), zap.Int("status", status), zap.Duration("duration", time.Since(began)), zap.Error(res.err))
	}
	return res
}

// runInTime runs the handlers of an attempt. It returns when they have ended, or when
// the context, which they should heed, has been over for a while.
func (q *queue) runInTime(ctx context.Context, h *Handler, id string, handlers func() error) (err error, ended bool) {
	result := make(chan error, 1)
	go func() { result <- handlers() }()
	select {
	case err = <-result:
		return err, true
	case <-ctx.Done():
	}
	select {
	case err = <-result:
		return err, true
	case <-time.After(endMargin):
	}
	q.mu.Lock()
	q.unended[id] = true
	q.mu.Unlock()
	go func() {
		err := <-result
		h.logger.Debug("an attempt has ended for which attempt_timeout was too short", zap.String("id", id), zap.Error(err))
		q.mu.Lock()
		delete(q.unended, id)
		q.mu.Unlock()
	}()
	if ctx.Err() == context.DeadlineExceeded { // and not the end of Caddy
		h.logger.Warn("an attempt goes on though attempt_timeout is over: what delivers does not heed it, such as php_fastcgi without read_timeout", zap.String("id", id))
	}
	return ctx.Err(), false
}

// unendedAttempts says why an attempt must not begin: the last one at the event goes
// on, or too many do.
func (q *queue) unendedAttempts(id string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.unended[id]:
		return errors.New("the last attempt has not ended yet")
	case len(q.unended) >= maxUnended:
		return errors.New("too many attempts have not ended yet")
	}
	return nil
}

// reason returns what an error of a handler says, without the marks of Caddy's log.
func reason(err error) error {
	handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err)
	switch {
	case !ok:
		return err
	case handlerErr.Err == nil:
		return fmt.Errorf("status %d", handlerErr.StatusCode)
	default:
		return fmt.Errorf("status %d: %w", handlerErr.StatusCode, handlerErr.Err)
	}
}

// retryAfter returns the wait that a Retry-After field asks for (RFC 9110, 10.2.3).
func retryAfter(value string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(value, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(seconds, uint64(maxRetryAfter/time.Second))) * time.Second
	}
	if date, err := http.ParseTime(value); err == nil {
		return min(max(0, date.Sub(now)), maxRetryAfter)
	}
	return 0
}

// backoff returns how long an event waits for its next attempt that has been queued
// for that long.
func backoff(age time.Duration) time.Duration {
	wait := float64(min(max(age, minBackoff), maxBackoff))
	return time.Duration(wait * (1 + jitter*rand.Float64()))
}

// maxError is how many bytes of the last error are kept with an event.
const maxError = 300

// lastError returns what is kept of an error: a line that a terminal can show.
func lastError(err error) string {
	text := printable(err.Error())
	if len(text) > maxError {
		text = strings.ToValidUTF8(text[:maxError], "") + "..."
	}
	return text
}

// settle draws the consequences of an attempt: for the event, which finish writes, and
// for what is known of the backend.
func (q *queue) settle(h *Handler, rec *Record, res result, age time.Duration, finish func(Finish)) {
	if res.err != nil && q.ctx.Err() != nil { // it was cut off by the end of this process
		finish(Finish{ID: rec.ID, Queue: q.name, Outcome: Released})
		return
	}
	if announced := q.judge(h, rec.ID, res); announced {
		defer q.db.poke() // what finish does not always do
	}
	switch {
	case res.err == nil:
		q.metrics.attempts[resultDelivered].Inc()
		finish(Finish{ID: rec.ID, Queue: q.name, Outcome: Delivered})
		return
	case res.unreachable:
		q.metrics.attempts[resultUnreachable].Inc()
	default:
		q.metrics.attempts[resultFailed].Inc()
	}
	if age >= time.Duration(h.MaxAge) {
		h.logger.Error("an event is dead: the backend has not taken it for max_age", zap.String("id", rec.ID),
			zap.String("event_type", rec.EventType), zap.String("resource_id", rec.ResourceID),
			zap.Int("attempts", rec.Attempts), zap.Duration("age", age), zap.Error(res.err))
		finish(Finish{ID: rec.ID, Queue: q.name, Outcome: Dead, LastError: lastError(res.err)})
	} else {
		after := max(backoff(age), res.retryAfter)
		finish(Finish{ID: rec.ID, Queue: q.name, Outcome: Later, After: after, LastError: lastError(res.err)})
	}
}

// breaker knows whether the backend is down. While it is, there is one attempt at a
// time; when it is back, as many as doubles with each that succeeds.
type breaker struct {
	down  bool
	since time.Time
	lost  map[string]bool // the events in a row that reached nobody
	ramp  int             // how many attempts there may be at a time; 0 for no limit
}

// allowed returns how many attempts there may be at a time.
func (b *breaker) allowed(limit int) int {
	switch {
	case b.down:
		return 1
	case b.ramp > 0:
		return min(b.ramp, limit)
	}
	return limit
}

// judge notes what an attempt says of the backend, and reports whether others are to
// hear of it.
func (q *queue) judge(h *Handler, id string, res result) (announced bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if res.err != nil && res.unreachable {
		return q.unreachedLocked(h, id, res.err)
	}
	return q.reachedLocked(h)
}

// reachedLocked notes that an attempt has reached the backend.
func (q *queue) reachedLocked(h *Handler) (announced bool) {
	b := &q.breaker
	b.lost = nil
	if b.ramp *= 2; b.ramp >= q.lanes.limit {
		b.ramp = 0
	}
	if !b.down {
		return false
	}
	q.upLocked(h)
	q.db.announce(Backend{Queue: q.name})
	q.poke()
	return true
}

// forgetDown takes the backend to be up again, since there is nothing any more to find
// out with whether it is: the next event will tell.
func (q *queue) forgetDown(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.breaker.down {
		return
	}
	h.logger.Info("nothing waits any more for the backend that was down", zap.String("queue", q.name))
	q.breaker = breaker{}
	q.metrics.down.Set(0)
	q.db.announce(Backend{Queue: q.name})
	q.db.poke()
}

func (q *queue) upLocked(h *Handler) {
	b := &q.breaker
	h.logger.Info("the backend is back", zap.String("queue", q.name), zap.Duration("down", time.Since(b.since)), zap.Int("pending", q.db.pending(q.name)))
	b.down, b.ramp = false, 1
	q.metrics.down.Set(0)
}

// unreachedLocked notes that an attempt has reached nobody.
func (q *queue) unreachedLocked(h *Handler, id string, err error) (announced bool) {
	if b := &q.breaker; !b.down {
		if b.lost == nil {
			b.lost = make(map[string]bool)
		}
		if b.lost[id] = true; len(b.lost) < downAfter {
			return false
		}
		q.downLocked(h, err)
	}
	q.db.announce(Backend{Queue: q.name, Down: true, Probe: probeInterval})
	return true
}

func (q *queue) downLocked(h *Handler, err error) {
	q.breaker = breaker{down: true, since: time.Now()}
	for _, turn := range q.lanes.waiting { // whose events are kept
		turn <- false
	}
	q.lanes.waiting = nil
	q.metrics.down.Set(1)
	h.logger.Warn("the backend is down: events are kept, and one attempt is made at a time", zap.String("queue", q.name), zap.Error(err))
}

// heardLocked notes what another process says of the backend.
func (q *queue) heardLocked(down bool) {
	n := len(q.handlers)
	switch {
	case n == 0 || down == q.breaker.down:
	case down:
		q.downLocked(q.handlers[n-1], errors.New("it was found to be down before, or by another process"))
	default:
		q.upLocked(q.handlers[n-1])
	}
}

// lanes are the attempts at a time. A quarter of them is for new events alone, so that
// they do not wait behind a backlog, and a quarter for the backlog, so that retries come
// at all. For the rest, new events have the right of way.
type lanes struct {
	limit   int
	all     int         // in use
	backlog int         // of which by the backlog
	waiting []chan bool // each of which gets a lane, or none
	wanted  bool        // whether the backlog waits for one
	turn    bool        // whether it is that of the backlog, if there is one lane alone
}

// backlogLocked returns how many attempts at events of the backlog may begin now.
func (l *lanes) backlogLocked(allowed int) int {
	most := allowed
	if allowed > 1 {
		most -= max(1, allowed/4)
	}
	if len(l.waiting) > 0 { // the rest is for them
		most = min(most, max(1, allowed/4))
		if l.limit == 1 && !l.turn {
			return 0
		}
	}
	return max(0, min(allowed-l.all, most-l.backlog))
}

// liveLocked reports whether there is a lane for a new event.
func (l *lanes) liveLocked(limit int) bool {
	switch {
	case l.all >= limit:
		return false
	case !l.wanted:
		return true
	case limit == 1:
		return !l.turn
	}
	return l.all-l.backlog < limit-max(1, limit/4)
}

func (l *lanes) enterBacklogLocked(n int) {
	l.all += n
	l.backlog += n
	l.turn = l.turn && n == 0
}

// leaveLocked ends an attempt.
func (l *lanes) leaveLocked(backlog bool) {
	l.all--
	if backlog {
		l.backlog--
	} else {
		l.turn = true
	}
	l.grantLocked()
}

// grantLocked gives what is free to the new events that wait for the longest.
func (l *lanes) grantLocked() {
	for len(l.waiting) > 0 && l.liveLocked(l.limit) {
		l.all++
		l.waiting[0] <- true
		l.waiting = l.waiting[1:]
	}
}

// enterLive takes a lane for a new event. It returns false if there is none until
// given is closed, and if the backend is down and the event can be kept.
func (q *queue) enterLive(given <-chan struct{}, keeping bool) bool {
	q.mu.Lock()
	if q.breaker.down && keeping {
		q.mu.Unlock()
		return false
	}
	if q.lanes.liveLocked(q.lanes.limit) && (!keeping || q.lanes.all < q.breaker.allowed(q.lanes.limit)) && len(q.lanes.waiting) == 0 {
		q.lanes.all++
		q.mu.Unlock()
		return true
	}
	turn := make(chan bool, 1)
	q.lanes.waiting = append(q.lanes.waiting, turn)
	q.mu.Unlock()
	select {
	case granted := <-turn:
		return granted
	case <-given:
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, waiting := range q.lanes.waiting {
		if waiting == turn {
			q.lanes.waiting = append(q.lanes.waiting[:i:i], q.lanes.waiting[i+1:]...)
			return false
		}
	}
	return <-turn // its turn has come just then
}

func (q *queue) leaveLive() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.lanes.leaveLocked(false)
	if q.lanes.wanted {
		q.poke()
	}
}

// live is a new event whose sender waits.
type live struct {
	addition  *addition       // nil if it is not to be kept
	durable   <-chan struct{} // closed when it is known whether it is kept
	attempted chan result     // nil if there is no attempt
	given     chan struct{}   // closed when the sender waits no longer
	stop      sync.Once
}

func (l *live) stopWaiting() { l.stop.Do(func() { close(l.given) }) }

// live starts to keep a new event, and to deliver it.
func (q *queue) live(h *Handler, r *request, rec *Record) *live {
	l := &live{given: make(chan struct{})}
	keeping := q.db.keeping()
	down := q.isDown() && keeping // or else this event is the only probe that there can be
	if !down {
		rec.Attempts, rec.Lease = 1, time.Duration(h.AttemptTimeout)+leaseMargin
	}
	if q.db.pending(q.name) < h.MaxEvents {
		l.addition = q.db.add(rec, r, time.Duration(*h.AnswerAfter) < linger, &q.metrics)
		l.durable = l.addition.done
	} else {
		q.refused(h)
		full := make(chan struct{})
		close(full)
		l.durable = full
	}
	if down {
		return l
	}
	l.attempted = make(chan result, 1)
	q.running.Go(func() {
		finish := func(f Finish) {
			if l.addition != nil {
				q.db.finish(l.addition, f)
			}
		}
		if !q.enterLive(l.given, keeping) {
			finish(Finish{ID: rec.ID, Queue: q.name, Outcome: Unbegun})
			l.attempted <- result{err: errors.New("no attempt was to be had")}
			return
		}
		defer q.leaveLive()
		began := time.Now()
		res := q.attempt(h, r, &Record{ID: rec.ID, Received: rec.Received, Attempts: 1, EventType: rec.EventType, ResourceID: rec.ResourceID})
		q.settle(h, rec, res, time.Since(began), finish)
		l.attempted <- res
	})
	return l
}

// refused notes that an event is not kept because too many are.
func (q *queue) refused(h *Handler) {
	q.metrics.stored[resultRefused].Inc()
	q.db.recount()
	q.mu.Lock()
	defer q.mu.Unlock()
	if time.Since(q.refusedLine) >= errorInterval {
		q.refusedLine = time.Now()
		h.logger.Error("events are not kept: max_events wait", zap.String("queue", q.name), zap.Int("max_events", h.MaxEvents))
	}
}
