package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

// queue delivers all events of one queue name in one database. It outlives the
// handlers of a configuration. The first attached handler delivers until it is detached,
// because during a reload the new configuration may still fail.
type queue struct {
	name     string
	db       *database
	metrics  *queueMetrics
	breaker  *delivery.Breaker
	limits   *delivery.Limits
	schedule *delivery.Schedule
	pause    *pause

	refusedLog, onceLog seldom

	attempting context.Context // the parent of the context of each attempt
	cutOff     context.CancelFunc
	stop       context.CancelFunc // ends the schedule
	running    sync.WaitGroup     // the schedule, and each attempt from its claim or arrival until the writer has its result

	mu       sync.Mutex
	handlers []*Handler      // attached; the first one delivers
	inFlight int             // running attempts
	overdue  map[string]bool // events with an attempt that goes on after attempt_timeout
}

func newQueue(name string, opener store.Opener, logger *zap.Logger) *queue {
	q := &queue{
		name: name, db: openDatabase(opener, logger), metrics: newQueueMetrics(name), pause: newPause(),
		breaker: new(delivery.Breaker), limits: delivery.NewLimits(), overdue: make(map[string]bool),
	}
	q.attempting, q.cutOff = context.WithCancel(context.Background())
	q.schedule = &delivery.Schedule{
		Source: q, Queue: name, Woken: make(chan struct{}, 1), Breaker: q.breaker, Limits: q.limits,
		Timeout: q.timeout, Attempt: q.attemptStored, Forgotten: q.forgetDown,
	}
	q.db.join(q)
	ctx, stop := context.WithCancel(context.Background())
	q.stop = stop
	q.running.Go(func() { q.schedule.Run(ctx) })
	return q
}

// Destruct waits for the running attempts, and closes the unused queue.
func (q *queue) Destruct() error {
	q.stop()
	q.running.Wait()
	q.cutOff()
	q.db.leave(q)
	_, err := databases.Delete(q.db.opener.Key())
	return err
}

// attach adds a handler. It delivers when all handlers before it are detached.
func (q *queue) attach(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.handlers = append(q.handlers, h); len(q.handlers) == 1 {
		q.followLocked(h)
	}
}

func (q *queue) detach(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.handlers = slices.DeleteFunc(q.handlers, func(attached *Handler) bool { return attached == h })
	if len(q.handlers) > 0 {
		q.followLocked(q.handlers[0])
	}
}

// lend uses the settings of a handler after the end of its configuration, if no handler is
// attached: the last requests of that configuration still need settings.
func (q *queue) lend(h *Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.handlers) == 0 {
		q.followLocked(h)
	}
}

// followLocked uses the settings of a handler.
func (q *queue) followLocked(h *Handler) {
	q.limits.Resize(h.Concurrency)
	q.db.logger.Store(h.app.logger)
	q.schedule.Wake()
}

// current returns the handler that delivers, or nil.
func (q *queue) current() *Handler {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.handlers) > 0 {
		return q.handlers[0]
	}
	return nil
}

// inFlightNow returns the number of running attempts.
func (q *queue) inFlightNow() (n int) {
	q.locked(func() { n = q.inFlight })
	return n
}

func (q *queue) timeout() time.Duration {
	if h := q.current(); h != nil {
		return time.Duration(h.AttemptTimeout)
	}
	return 0
}

// Peek implements delivery.Source.
func (q *queue) Peek() (store.Peek, error) {
	p, err := q.db.peek(q.name)
	if err == nil {
		q.heedPause(&p)
	}
	return p, err
}

// Claim implements delivery.Source.
func (q *queue) Claim(c *store.Claim) ([]*store.Record, error) {
	records, err := q.db.writer.Claim(c)
	q.running.Add(len(records)) // here and not in the goroutine of the attempt, because Destruct may already wait
	return records, err
}

// attemptStored makes one attempt at a stored event.
func (q *queue) attemptStored(r *store.Record, claimed time.Time, placeIsFree func()) {
	ended := func(f store.Finish) {
		f.ID, f.Queue = r.ID, q.name
		q.db.writer.Finish(nil, f)
		placeIsFree()
		q.running.Done()
	}
	h := q.current()
	decoded, err := request.Decode(r)
	switch {
	case h == nil:
		ended(store.Finish{Outcome: store.Unbegun})
	case err != nil:
		h.logger.Error("a stored event is damaged: it is dead now, and is never delivered", zap.String("id", r.ID), zap.Error(err))
		ended(store.Finish{Outcome: store.SetAside, LastError: lastError(err)})
	default:
		q.attempt(h, decoded, r, func(res result) { ended(q.settle(h, r, res, r.Age+time.Since(claimed))) })
	}
}

// settle records the result of an attempt in the metrics, the breaker and the history. It
// returns the Finish for the event.
func (q *queue) settle(h *Handler, r *store.Record, res result, age time.Duration) store.Finish {
	f := store.Finish{ID: r.ID, Queue: q.name}
	if res.err != nil && q.attempting.Err() != nil { // Caddy is stopping, and has cancelled the attempt
		f.Outcome = store.Later
		return f
	}
	q.metrics.attempts[res.name()].Inc()
	if res.unreachable {
		q.unreached(h, r.ID, res.err)
	} else {
		q.reached(h)
	}
	switch {
	case res.err == nil:
		f.Outcome = store.Delivered
		q.remember(h, r, res.status)
	case age >= time.Duration(h.MaxAge):
		h.logger.Error("an event is dead: the backend has not accepted it for max_age", zap.String("id", r.ID),
			zap.String("event_type", r.EventType), zap.String("resource_id", r.ResourceID),
			zap.Int("attempts", r.Attempts), zap.Duration("age", age), zap.Error(res.err))
		f.Outcome, f.LastError = store.SetAside, lastError(res.err)
	default:
		f.Outcome, f.LastError = store.Later, lastError(res.err)
		f.After = max(delivery.Backoff(age, rand.Float64()), res.retryAfter)
	}
	return f
}

func (q *queue) reached(h *Handler) {
	down, back := q.breaker.Reached(q.limits.Limit())
	if back {
		h.logger.Info("the backend is back", zap.String("queue", q.name), zap.Duration("down", down), zap.Int("pending", q.db.pending(q.name)))
		q.metrics.down.Set(0)
		q.schedule.Wake()
	}
}

func (q *queue) unreached(h *Handler, id string, err error) {
	if q.breaker.Unreached(id) {
		h.logger.Warn("the backend is down: events are stored, and one attempt a second is made", zap.String("queue", q.name), zap.Error(err))
		q.metrics.down.Set(1)
	}
}

// forgetDown reports the backend as up, because no event is left for a probe. The next new
// event is the probe.
func (q *queue) forgetDown() {
	q.db.logger.Load().Info("no pending event is left to probe the backend: the backend counts as up again", zap.String("queue", q.name))
	q.metrics.down.Set(0)
}

// errFull means that max_events are pending.
var errFull = errors.New("too many events are pending")

func (q *queue) isFull(h *Handler) bool { return q.db.pending(q.name) >= h.MaxEvents }

// warnFull logs that events are not stored, and requests a count.
func (q *queue) warnFull(h *Handler) {
	q.db.countSoon()
	if q.refusedLog.may() {
		h.logger.Error("cannot store events: max_events are pending", zap.String("queue", q.name), zap.Int("max_events", h.MaxEvents))
	}
}

// seldom limits a log line to one per minute.
type seldom struct {
	mu   sync.Mutex
	last time.Time
}

func (s *seldom) may() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.last) < time.Minute {
		return false
	}
	s.last = time.Now()
	return true
}

// noteStored counts an event by the result of storing it.
func (q *queue) noteStored(err error, took time.Duration) {
	switch {
	case err == nil:
		q.metrics.stored[resultStored].Inc()
		q.metrics.storeSeconds.Observe(took.Seconds())
	case errors.Is(err, writer.ErrCalledBack):
		q.metrics.stored[resultDelivered].Inc()
	case errors.Is(err, errFull):
		q.metrics.stored[resultRefused].Inc()
	case errors.Is(err, writer.ErrDuplicate):
		q.metrics.stored[resultDuplicate].Inc()
	default:
		q.metrics.stored[resultFailed].Inc()
	}
}
