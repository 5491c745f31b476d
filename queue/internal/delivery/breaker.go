package delivery

import (
	"slices"
	"sync"
	"time"
)

const (
	// The backend counts as down when downAfter attempts in a row, at different events, have
	// not reached the backend. probeInterval is the time between two probes.
	downAfter     = 5
	probeInterval = time.Second
)

// Breaker decides from the attempts of this process whether the backend is down. While the
// backend is down, one attempt per second probes it. After a successful probe, the limit of
// parallel attempts is 1, and doubles with each attempt that reaches the backend. Changes of
// the system clock have no effect.
type Breaker struct {
	mu   sync.Mutex
	down time.Time // the time since which the backend is down, zero if it is up
	last time.Time // the time of the last attempt that did not reach the backend
	lost []string  // events whose attempts did not reach the backend, since the last attempt that did
	ramp int       // limit of parallel attempts after an outage, 0 for no limit
}

// Reached records that an attempt has reached the backend. If the backend was down, Reached
// returns the length of the outage and true. The argument limit is the usual limit of parallel
// attempts.
func (b *Breaker) Reached(limit int) (down time.Duration, back bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = nil
	if !b.down.IsZero() {
		down, b.down, b.ramp = time.Since(b.down), time.Time{}, 1
		return down, true
	}
	if b.ramp *= 2; b.ramp >= limit {
		b.ramp = 0
	}
	return 0, false
}

// Unreached records that the attempt at an event has not reached the backend. It returns true
// if the backend counted as up, and counts as down from now on.
func (b *Breaker) Unreached(id string) (down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = time.Now()
	if !b.down.IsZero() || slices.Contains(b.lost, id) {
		return false
	}
	if b.lost = append(b.lost, id); len(b.lost) < downAfter {
		return false
	}
	b.down, b.lost, b.ramp = b.last, nil, 0
	return true
}

// Forget makes the backend count as up, and reports whether it was down. Call Forget if no event is
// pending, because then no attempt can probe the backend.
func (b *Breaker) Forget() (was bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	was = !b.down.IsZero()
	b.down = time.Time{}
	return was
}

// Backend returns the state of the backend.
func (b *Breaker) Backend() Backend {
	b.mu.Lock()
	defer b.mu.Unlock()
	return Backend{Down: b.down, Probe: max(0, time.Until(b.last.Add(probeInterval))), Ramp: b.ramp}
}
