package delivery

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// most is the size of the semaphores. The places above the limit stay acquired.
const most = 1 << 20

// Limits sets how many attempts run at the same time. The first to ask is the first to run.
// Old events, which the schedule attempts, get at most three quarters of the places: new
// events do not wait behind a backlog of hanging attempts.
type Limits struct {
	all, old *semaphore.Weighted

	mu    sync.Mutex
	limit int
}

// NewLimits returns limits of 0.
func NewLimits() *Limits {
	l := &Limits{all: semaphore.NewWeighted(most), old: semaphore.NewWeighted(most)}
	l.all.TryAcquire(most)
	l.old.TryAcquire(most)
	return l
}

// oldLimit returns the limit of attempts at old events.
func oldLimit(limit int) int { return min(limit, max(1, limit*3/4)) }

// Resize changes the number of parallel attempts. A smaller number applies once enough
// running attempts have ended.
func (l *Limits) Resize(limit int) {
	limit = min(limit, most)
	l.mu.Lock()
	defer l.mu.Unlock()
	resize(l.all, l.limit, limit)
	resize(l.old, oldLimit(l.limit), oldLimit(limit))
	l.limit = limit
}

func resize(s *semaphore.Weighted, from, to int) {
	switch {
	case to > from:
		s.Release(int64(to - from))
	case to < from && !s.TryAcquire(int64(from-to)):
		go func() { _ = s.Acquire(context.Background(), int64(from-to)) }() // may wait for attempts to end
	}
}

// Limit returns the allowed number of parallel attempts.
func (l *Limits) Limit() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limit
}

// TryNew takes a place for an attempt at a new event, if one is free.
func (l *Limits) TryNew() bool { return l.all.TryAcquire(1) }

// New waits for a place for an attempt at a new event.
func (l *Limits) New(ctx context.Context) bool { return l.all.Acquire(ctx, 1) == nil }

// EndNew releases the place of an attempt at a new event.
func (l *Limits) EndNew() { l.all.Release(1) }

// Old waits for a place for an attempt at an old event, and takes more places if they are
// free. It returns the number of taken places: 0 if the context has ended.
func (l *Limits) Old(ctx context.Context, wanted int) (n int) {
	if l.old.Acquire(ctx, 1) != nil {
		return 0
	}
	if l.all.Acquire(ctx, 1) != nil {
		l.old.Release(1)
		return 0
	}
	for n = 1; n < wanted && l.old.TryAcquire(1); n++ {
		if !l.all.TryAcquire(1) {
			l.old.Release(1)
			break
		}
	}
	return n
}

// EndOld releases n places of attempts at old events.
func (l *Limits) EndOld(n int) {
	l.all.Release(int64(n))
	l.old.Release(int64(n))
}
