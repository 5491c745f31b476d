package delivery

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// LeaseMargin is how much longer a lease lasts than the timeout of its attempt.
const LeaseMargin = 2 * time.Second

// Queue has the stored events.
type Queue interface {
	// Peek returns the state of the queue in the database.
	Peek() (store.Peek, error)

	// Claim leases due events, and returns them.
	Claim(c *store.Claim) ([]*store.Record, error)

	// Timeout returns how long an attempt may take, or 0 while no handler delivers.
	Timeout() time.Duration

	// AttemptStored makes one attempt at a claimed event. After the attempt, it calls `ended`.
	AttemptStored(r *store.Record, ended func())
}

// Schedule attempts the stored events of a queue when they are due.
type Schedule struct {
	queue   Queue
	breaker *Breaker
	limits  *Limits
	woken   chan struct{}
	running atomic.Int64
}

// NewSchedule returns a schedule for Run.
func NewSchedule(q Queue, b *Breaker, l *Limits) *Schedule {
	return &Schedule{queue: q, breaker: b, limits: l, woken: make(chan struct{}, 1)}
}

// Wake makes the schedule check for due events again. Call Wake when an event may be due sooner, or
// when another attempt may begin.
func (s *Schedule) Wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// Run attempts events until the context ends.
func (s *Schedule) Run(ctx context.Context) {
	for ctx.Err() == nil {
		wait := s.next(ctx)
		select {
		case <-s.woken:
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// next begins the attempts that may begin now. It returns how long Run waits before the next call.
func (s *Schedule) next(ctx context.Context) time.Duration {
	timeout, backend := s.queue.Timeout(), s.breaker.Backend()
	limit, running := s.limits.old(), int(s.running.Load())
	if timeout == 0 {
		return pollInterval
	}
	if claim, wait := Plan(backend, store.Peek{}, limit, running); backend.isDown() && claim == 0 {
		return wait // without a query, because each failed attempt wakes the schedule
	}
	peek, err := s.queue.Peek()
	if err != nil {
		return pollInterval
	}
	claim, wait := Plan(backend, peek, limit, running)
	if claim == 0 {
		return wait
	}
	places := s.limits.Take(ctx, claim)
	if places == 0 || s.breaker.Backend().isDown() != backend.isDown() { // the state of the backend has changed during the wait for a place
		s.limits.Free(places)
		return 0
	}
	// after an error, there are no records
	records, _ := s.queue.Claim(&store.Claim{Max: places, Lease: timeout + LeaseMargin, Newest: !backend.Allows()})
	s.limits.Free(places - len(records))
	s.running.Add(int64(len(records)))
	for _, r := range records {
		go s.queue.AttemptStored(r, func() {
			s.limits.Free(1)
			s.running.Add(-1)
			s.Wake()
		})
	}
	if len(records) == 0 { // Claim failed, or another process was faster
		return pollInterval
	}
	return 0
}
