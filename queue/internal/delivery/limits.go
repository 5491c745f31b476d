package delivery

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// The constant `most` is the number of places in the semaphore. An attempt takes one place. The
// places above the limit of parallel attempts are always taken.
const most = 1 << 20

// Limits has the limit of parallel attempts. Attempts get places in the order in which they ask.
type Limits struct {
	places *semaphore.Weighted
	limit  atomic.Int64
}

// NewLimits returns Limits that allow no attempt.
func NewLimits() *Limits {
	l := &Limits{places: semaphore.NewWeighted(most)}
	l.places.TryAcquire(most)
	return l
}

// Resize changes the number of parallel attempts. A smaller number applies as soon as enough
// running attempts have ended.
func (l *Limits) Resize(limit int) {
	limit = min(limit, most)
	more := int64(limit) - l.limit.Swap(int64(limit))
	if more > 0 {
		l.places.Release(more)
	} else if !l.places.TryAcquire(-more) {
		go func() { _ = l.places.Acquire(context.Background(), -more) }() // may wait for attempts to end
	}
}

// Limit returns the allowed number of parallel attempts.
func (l *Limits) Limit() int { return int(l.limit.Load()) }

// old returns how many attempts at old events the schedule may run at the same time: three quarters
// of the limit. The other places are only for new events, so that new events do not wait behind a
// backlog of hanging attempts.
func (l *Limits) old() int {
	limit := l.Limit()
	return min(limit, max(1, limit*3/4))
}

// TryTake takes a place if one is free and nobody waits for one, and reports whether it did.
func (l *Limits) TryTake() bool { return l.places.TryAcquire(1) }

// Take waits for a free place, and takes it. If more places are free, Take takes them too, until
// it has as many places as the argument `wanted` says. It returns the number of taken places, or 0
// if the context ends.
func (l *Limits) Take(ctx context.Context, wanted int) (n int) {
	if l.places.Acquire(ctx, 1) != nil {
		return 0
	}
	for n = 1; n < wanted && l.places.TryAcquire(1); n++ { // more places that are free
	}
	return n
}

// Free releases n places.
func (l *Limits) Free(n int) { l.places.Release(int64(n)) }
