package delivery

import (
	"sync"
	"time"
)

const (
	// downAfter is how many different events in a row must reach nobody for the backend to
	// be taken for down, and probeInterval the pause between two probes of it.
	downAfter     = 5
	probeInterval = time.Second

	// forgetAfter is how long a backend that is down has no event to be probed with, until
	// it is taken for up: an attempt that failed just now may still have to be written.
	forgetAfter = 15 * time.Second
)

// Breaker knows whether the backend of a queue is down, by the attempts of this process.
// While it is down there is one attempt a second; when one succeeds, the number of attempts
// at a time doubles from 1. Its times are monotonic: a clock that is set changes nothing.
type Breaker struct {
	mu    sync.Mutex
	down  bool
	since time.Time
	probe time.Time       // when the next probe may begin
	empty time.Time       // since when there is nothing to probe with
	lost  map[string]bool // the events in a row that reached nobody
	ramp  int             // how many attempts there may be at a time, 0 for no limit
}

// Reached notes that an attempt has reached the backend. If it was down, it returns for
// how long.
func (b *Breaker) Reached(limit int) (down time.Duration, back bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = nil
	if b.down {
		b.down, b.ramp = false, 1
		return time.Since(b.since), true
	}
	if b.ramp *= 2; b.ramp >= limit {
		b.ramp = 0
	}
	return 0, false
}

// Unreached notes that an attempt at an event has reached nobody, and reports whether the
// backend is taken for down with it.
func (b *Breaker) Unreached(id string) (down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probe = time.Now().Add(probeInterval)
	if b.down {
		return false
	}
	if b.lost == nil {
		b.lost = make(map[string]bool)
	}
	if b.lost[id] = true; len(b.lost) < downAfter {
		return false
	}
	b.down, b.since, b.empty, b.lost, b.ramp = true, time.Now(), time.Time{}, nil, 0
	return true
}

// Down reports whether the backend is down.
func (b *Breaker) Down() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.down
}

// DownSince returns since when the backend is down, zero if it is not.
func (b *Breaker) DownSince() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.down {
		return time.Time{}
	}
	return b.since
}

// Allows reports whether one more attempt may begin beside those that are running.
func (b *Breaker) Allows(running int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.down && (b.ramp == 0 || running < b.ramp)
}

// Empty notes whether any event is pending, and reports whether a backend that was down
// is taken for up with it, because there is nothing to probe it with.
func (b *Breaker) Empty(empty bool) (forgotten bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !b.down || !empty:
		b.empty = time.Time{}
	case b.empty.IsZero():
		b.empty = time.Now()
	case time.Since(b.empty) >= forgetAfter:
		b.down, b.empty = false, time.Time{}
		return true
	}
	return false
}

// look fills in what the plan needs to know.
func (b *Breaker) look(l *Look) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l.Down, l.Ramp, l.Probe = b.down, b.ramp, max(0, time.Until(b.probe))
}

// probing notes that a probe begins. It ends by Reached or Unreached, or with its lease.
func (b *Breaker) probing(lease time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probe = time.Now().Add(max(lease, probeInterval))
}
