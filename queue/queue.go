package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// queue delivers all events of one queue name in one database. It outlives the
// handlers of a configuration. The first attached handler delivers until it is detached,
// because during a reload the new configuration may still fail.
type queue struct {
	key      string // the queue's key in queues
	name     string
	db       *database
	breaker  *delivery.Breaker
	limits   *delivery.Limits
	schedule *delivery.Schedule

	refusedLog, onceLog *rate.Limiter

	attempting context.Context // the parent of the context of each attempt
	cutOff     context.CancelFunc
	stop       context.CancelFunc // ends the schedule
	running    sync.WaitGroup     // the schedule, and each attempt from its claim or arrival until the writer has its result
	closed     chan struct{}

	paused     atomic.Pointer[time.Time] // the start of the pause, zero if the queue is not paused
	pauseKnown context.Context           // ends with the first answer of the database, or after half of storeWait
	knowPause  context.CancelFunc

	mu       sync.Mutex
	handlers []*Handler      // attached; the first one delivers
	overdue  map[string]bool // events with an attempt that goes on after attempt_timeout
}

func newQueue(key string, h *Handler) *queue {
	q := &queue{
		key: key, name: h.Name, db: openDatabase(h), breaker: new(delivery.Breaker), limits: delivery.NewLimits(),
		refusedLog: onceAMinute(), onceLog: onceAMinute(), closed: make(chan struct{}), overdue: make(map[string]bool),
	}
	q.paused.Store(new(time.Time))
	q.limits.Resize(h.Concurrency)
	q.attempting, q.cutOff = context.WithCancel(context.Background())
	q.schedule = delivery.NewSchedule(q, q.breaker, q.limits)
	q.pauseKnown, q.knowPause = context.WithTimeout(context.Background(), storeWait/2)
	createSeries(q.name)
	q.db.mu.Lock()
	q.db.queues[q.name] = q
	q.db.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	q.stop = stop
	q.running.Go(func() { q.schedule.Run(ctx) })
	return q
}

func (q *queue) release() { _, _ = queues.Delete(q.key) }

// Destruct closes the unused queue in the background, when the running attempts have ended.
func (q *queue) Destruct() error {
	q.stop()
	go func() {
		q.running.Wait()
		q.cutOff()
		q.db.leave(q)
		_, _ = databases.Delete(q.db.opener.Key())
		close(q.closed)
	}()
	return nil
}

// attach adds a handler. The handler delivers when all handlers that were attached before are
// detached.
func (q *queue) attach(h *Handler) {
	q.locked(func() { q.handlers = append(q.handlers, h) })
	q.follow()
}

func (q *queue) detach(h *Handler) {
	q.locked(func() {
		q.handlers = slices.DeleteFunc(q.handlers, func(attached *Handler) bool { return attached == h })
	})
	q.follow()
}

// follow applies the settings of the handler that delivers now.
func (q *queue) follow() {
	if h := q.current(); h != nil {
		q.limits.Resize(h.Concurrency)
		q.db.logger.Store(h.app.logger)
		q.schedule.Wake()
	}
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

// Timeout implements delivery.Queue.
func (q *queue) Timeout() time.Duration {
	if h := q.current(); h != nil {
		return time.Duration(h.AttemptTimeout)
	}
	return 0
}

// Peek implements delivery.Queue. If no event is pending for a probe, a backend that is down
// counts as up again, and the next new event is the probe.
func (q *queue) Peek() (p store.Peek, err error) {
	s, err := q.db.writer.Store()
	if s == nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(q.db.ctx, peekTimeout)
	defer cancel()
	if p, err = s.Peek(ctx, q.name); err == nil {
		q.heedPause(&p)
	}
	if err == nil && p.Empty && !q.db.writer.Failing() && q.breaker.Forget() {
		q.db.logger.Load().Info("no pending event is left to probe the backend: the backend counts as up again", zap.String("queue", q.name))
	}
	return p, err
}

// heedPause records whether the queue is paused. For a paused queue, it changes p so that
// no event is due.
func (q *queue) heedPause(p *store.Peek) {
	was := q.paused.Swap(&p.Paused)
	q.knowPause()
	logger := q.db.logger.Load()
	switch {
	case p.Paused.IsZero() && !was.IsZero():
		logger.Info("the queue is no longer paused", zap.String("queue", q.name), zap.Duration("paused", time.Since(*was)))
	case !p.Paused.IsZero() && was.IsZero():
		logger.Warn("the queue is paused: events are stored, but not delivered, until you run caddy inkit-queue resume", zap.String("queue", q.name), zap.Time("since", p.Paused))
	}
	if !p.Paused.IsZero() {
		p.Empty, p.Wait = false, store.Latest
	}
}

// isPaused reports whether the queue is paused. After the start, it waits for the first answer of
// the database, because the backend of a paused queue must not get an event. It waits at most half
// of storeWait, and not at all while the database fails.
func (q *queue) isPaused() bool {
	if !q.db.writer.Failing() {
		<-q.pauseKnown.Done()
	}
	return !q.paused.Load().IsZero()
}

// Claim implements delivery.Queue.
func (q *queue) Claim(c *store.Claim) ([]*store.Record, error) {
	c.Queue = q.name
	records, err := q.db.writer.Claim(c)
	q.running.Add(len(records)) // here and not in the goroutine of the attempt, because Destruct may already wait for running
	return records, err
}

// AttemptStored implements delivery.Queue.
func (q *queue) AttemptStored(r *store.Record, placeIsFree func()) {
	defer q.running.Done()
	claimed := time.Now()
	f := store.Finish{ID: r.ID, Queue: q.name}
	h := q.current()
	decoded, err := request.Decode(r)
	switch {
	case h == nil:
		f.Outcome = store.Unbegun
	case err != nil:
		h.logger.Error("a stored event is damaged: it is dead now, and is never delivered", zap.String("id", r.ID), zap.Error(err))
		f.Outcome, f.LastError = store.SetAside, lastError(err)
	default:
		res := q.attempt(h, decoded, r)
		f = q.settle(h, r, res, r.Age+time.Since(claimed))
	}
	q.db.writer.Finish(nil, f)
	placeIsFree()
}

// settle records the result of an attempt in the metrics, the breaker and the history. It
// returns the Finish for the event.
func (q *queue) settle(h *Handler, r *store.Record, res result, age time.Duration) store.Finish {
	f := store.Finish{ID: r.ID, Queue: q.name}
	if res.err != nil && q.attempting.Err() != nil { // Caddy is stopping, and has cancelled the attempt
		f.Outcome = store.Later
		return f
	}
	label := "failed"
	if res.unreachable {
		label = "unreachable"
		if q.breaker.Unreached(r.ID) {
			h.logger.Warn("the backend is down: events are stored, and one attempt a second is made", zap.String("queue", q.name), zap.Error(res.err))
		}
	} else if down, back := q.breaker.Reached(q.limits.Limit()); back {
		h.logger.Info("the backend is back", zap.String("queue", q.name), zap.Duration("down", down), zap.Int("pending", q.db.pending(q.name)))
		q.schedule.Wake()
	}
	switch {
	case res.err == nil:
		label = "delivered"
		f.Outcome = store.Delivered
		if *h.History > 0 {
			q.db.writer.Remember(&store.Record{
				ID: r.ID, Queue: q.name, EventType: r.EventType, ResourceID: r.ResourceID,
				Received: r.Received, Finished: time.Now(), Attempts: r.Attempts, Status: res.status,
			})
		}
	case age >= time.Duration(h.MaxAge):
		h.logger.Error("an event is dead: the backend has not accepted it within max_age, see caddy inkit-queue retry", zap.String("id", r.ID),
			zap.String("event_type", r.EventType), zap.String("resource_id", r.ResourceID),
			zap.Int("attempts", r.Attempts), zap.Duration("age", age), zap.Error(res.err))
		f.Outcome, f.LastError = store.SetAside, lastError(res.err)
	default:
		f.Outcome, f.LastError = store.Later, lastError(res.err)
		f.After = max(delivery.Backoff(age, rand.Float64()), res.retryAfter)
	}
	attemptsTotal.WithLabelValues(q.name, label).Inc()
	return f
}

// errFull means that as many events are pending as the option max_events allows.
var errFull = errors.New("too many events are pending")

// onceAMinute returns a limiter that allows a log line at most one time a minute.
func onceAMinute() *rate.Limiter { return rate.NewLimiter(rate.Every(time.Minute), 1) }

// noteStored counts an event by the result of storing it.
func (q *queue) noteStored(err error, took time.Duration) {
	result := "failed"
	switch {
	case err == nil:
		result = "stored"
		storeSeconds.WithLabelValues(q.name).Observe(took.Seconds())
	case errors.Is(err, writer.ErrCalledBack):
		result = "delivered"
	case errors.Is(err, errFull):
		result = "refused"
	case errors.Is(err, writer.ErrDuplicate):
		result = "duplicate"
	}
	storedTotal.WithLabelValues(q.name, result).Inc()
}
