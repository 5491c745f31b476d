package delivery

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// LeaseMargin is how much longer a lease lasts than the timeout of its attempt.
const LeaseMargin = 2 * time.Second

// Source is the database with the stored events of a queue.
type Source interface {
	Peek() (store.Peek, error)
	Claim(c *store.Claim) ([]*store.Record, error)
}

// Schedule attempts the stored events of a queue when they are due.
type Schedule struct {
	Source  Source
	Breaker *Breaker
	Limits  *Limits

	// Queue is the name of the queue.
	Queue string

	// Timeout returns how long an attempt may take, or 0 while no handler delivers.
	Timeout func() time.Duration

	// Attempt makes one attempt, and calls ended when it is over.
	Attempt func(r *store.Record, claimed time.Time, ended func())

	// Forgotten is called when a backend that was down counts as up again, because no event
	// is left for a probe.
	Forgotten func()

	// Woken receives the signals of Wake. It needs a buffer of one.
	Woken chan struct{}

	running atomic.Int64
}

// Wake makes the schedule check again, because an event may be due sooner, or an attempt
// may begin now.
func (s *Schedule) Wake() {
	select {
	case s.Woken <- struct{}{}:
	default:
	}
}

// Run attempts events until the context ends.
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

// next begins the attempts that may begin now, and returns how long to wait.
func (s *Schedule) next(ctx context.Context) time.Duration {
	timeout := s.Timeout()
	if timeout == 0 {
		return pollInterval
	}
	look := Look{Limit: oldLimit(s.Limits.Limit()), Running: int(s.running.Load())}
	s.Breaker.look(&look)
	if look.Down && look.Probe > 0 { // each new event wakes the schedule: do not query the database each time
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
	if s.Breaker.Down() != look.Down { // the backend went down or came back during the wait for a place
		s.Limits.EndOld(places)
		return 0
	}
	claim := &store.Claim{Queue: s.Queue, Max: places, Lease: timeout + LeaseMargin, Newest: step.Newest}
	records, _ := s.Source.Claim(claim) // after an error, there are no records
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
	if len(records) == 0 { // Claim failed, or another process was faster
		return pollInterval
	}
	return 0
}
