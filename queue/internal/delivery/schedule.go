package delivery

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// LeaseMargin is how much longer than an attempt its lease is.
const LeaseMargin = 2 * time.Second

// Source is where the stored events of a queue are.
type Source interface {
	Peek() (store.Peek, error)
	Claim(c *store.Claim) ([]*store.Record, error)
}

// Schedule has the stored events of a queue attempted when they are due.
type Schedule struct {
	Source  Source
	Breaker *Breaker
	Limits  *Limits

	// Queue is the name of the queue.
	Queue string

	// Timeout returns how long an attempt may take, or 0 while nobody can make one.
	Timeout func() time.Duration

	// Attempt makes one attempt, and calls ended when it is over.
	Attempt func(r *store.Record, claimed time.Time, ended func())

	// Forgotten is called when a backend that was down is taken for up, because there is
	// nothing left to find out with.
	Forgotten func()

	// Woken holds the last Wake. It needs room for one.
	Woken chan struct{}

	running atomic.Int64
}

// Wake says that an event may be due sooner than the schedule knows, or that an attempt
// may begin.
func (s *Schedule) Wake() {
	select {
	case s.Woken <- struct{}{}:
	default:
	}
}

// Run works until the context ends.
func (s *Schedule) Run(ctx context.Context) {
	for ctx.Err() == nil {
		wait := s.next(ctx)
		select {
		case <-s.Woken:
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// next begins the attempts that can begin, and returns how long to wait.
func (s *Schedule) next(ctx context.Context) time.Duration {
	timeout := s.Timeout()
	if timeout == 0 {
		return pollInterval
	}
	look := Look{Limit: oldLimit(s.Limits.Limit()), Running: int(s.running.Load())}
	s.Breaker.look(&look)
	if look.Down && look.Probe > 0 { // each new event wakes this: the database need not be asked
		return min(look.Probe, pollInterval)
	}
	peek, err := s.Source.Peek()
	look.Failed, look.Empty, look.Wait = err != nil, peek.Empty, peek.Wait
	if err == nil && s.Breaker.Empty(peek.Empty) {
		s.Forgotten()
	}
	step := Plan(look)
	if step.Claim == 0 {
		return step.Wait
	}
	places := s.Limits.Old(ctx, step.Claim)
	if places == 0 {
		return 0
	}
	if s.Breaker.Down() != look.Down { // it has changed while this waited for a place
		s.Limits.EndOld(places)
		return 0
	}
	claim := &store.Claim{Queue: s.Queue, Max: places, Lease: timeout + LeaseMargin, Newest: step.Newest}
	records, _ := s.Source.Claim(claim) // after an error there are none
	s.Limits.EndOld(places - len(records))
	if look.Down && len(records) > 0 {
		s.Breaker.probing(claim.Lease)
	}
	s.running.Add(int64(len(records)))
	claimed := time.Now()
	for _, r := range records {
		go s.Attempt(r, claimed, func() {
			s.Limits.EndOld(1)
			s.running.Add(-1)
			s.Wake()
		})
	}
	if len(records) == 0 { // there was an error, or another process was faster
		return pollInterval
	}
	return 0
}
