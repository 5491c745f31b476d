package delivery

import (
	"sync"
	"time"
)

const (
	// The backend counts as down after downAfter failed attempts in a row at different
	// events. probeInterval is the pause between two probes.
	downAfter     = 5
	probeInterval = time.Second

	// If no event is pending for forgetAfter, a backend that is down counts as up. The time is
	// not 0, because the writer may not have stored the last event yet.
	forgetAfter = 15 * time.Second
)

// Breaker decides from the attempts of this process whether the backend is down. While the
// backend is down, one attempt a second probes it. After a successful probe, the number of
// parallel attempts doubles from 1. Changes of the system clock have no effect.
type Breaker struct {
	mu    sync.Mutex
	down  bool
	since time.Time
	probe time.Time       // the time when the next probe may begin
	empty time.Time       // the time since which no event is pending
	lost  map[string]bool // the events of the failed attempts in a row
	ramp  int             // limit of parallel attempts, 0 for no limit
}

// Reached records that an attempt has reached the backend. If the backend was down,
// it also returns the length of the outage.
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

// Unreached records that an attempt has not reached the backend, and reports whether the
// backend counts as down from now on.
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

// DownSince returns the time since which the backend is down, zero if it is up.
func (b *Breaker) DownSince() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.down {
		return time.Time{}
	}
	return b.since
}

// Allows reports whether new events get an attempt before they are stored.
func (b *Breaker) Allows() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.down && b.ramp == 0
}

// Empty records whether no event is pending. It reports whether a backend that was down
// counts as up from now on, because no event is left for a probe.
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

// look fills in the fields of a Look that describe the backend.
func (b *Breaker) look(l *Look) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l.Down, l.Ramp, l.Probe = b.down, b.ramp, max(0, time.Until(b.probe))
}

// probing records that a probe begins. The probe ends with Reached, Unreached or its lease.
func (b *Breaker) probing(lease time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probe = time.Now().Add(max(lease, probeInterval))
}
