package delivery

import (
	"context"
	"errors"
	"math"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestImportsNeitherCaddyNorSQL(t *testing.T) {
	deps, err := exec.Command("go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	for dep := range strings.FieldsSeq(string(deps)) {
		assert.False(t, dep == "database/sql" || strings.HasPrefix(dep, "github.com/caddyserver/"), dep)
	}
}

func TestBackoff(t *testing.T) {
	for _, tt := range []struct {
		name       string
		age, least time.Duration
	}{
		{"an event that has just arrived", 0, time.Second},
		{"the clock was set back", -time.Hour, time.Second},
		{"half a second", 500 * time.Millisecond, time.Second},
		{"ten seconds", 10 * time.Second, 10 * time.Second},
		{"five minutes", 5 * time.Minute, 5 * time.Minute},
		{"an hour", time.Hour, 5 * time.Minute},
		{"the longest duration", math.MaxInt64, 5 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			assert.Equal(t, tt.least, Backoff(tt.age, 0))
			assert.InDelta(t, 1.2*float64(tt.least), float64(Backoff(tt.age, 1)), 1)
		})
	}
}

func TestPlan(t *testing.T) {
	down := Backend{Down: time.Now()}
	probed := func(next time.Duration) Backend { return Backend{Down: time.Now(), Probe: next} }
	due := store.Peek{}
	for _, tt := range []struct {
		name           string
		backend        Backend
		peek           store.Peek
		limit, running int
		claim          int
		wait           time.Duration
	}{
		{"no event is pending", Backend{}, store.Peek{Empty: true}, 12, 0, 0, time.Second},
		{"an event is due soon", Backend{}, store.Peek{Wait: 300 * time.Millisecond}, 12, 0, 0, 300 * time.Millisecond},
		{"an event is due in an hour, but another process may store an earlier event", Backend{}, store.Peek{Wait: time.Hour}, 12, 0, 0, time.Second},
		{"events are due", Backend{}, due, 12, 0, 12, 0},
		{"events are due, and attempts are running", Backend{}, due, 12, 5, 7, 0},
		{"the number of running attempts is at the limit", Backend{}, due, 12, 12, 0, time.Second},
		{"the number of running attempts is above a reduced limit", Backend{}, due, 1, 12, 0, time.Second},
		{"the backend is down and was probed just now", probed(400 * time.Millisecond), due, 12, 0, 0, 400 * time.Millisecond},
		{"a probe is due", down, due, 12, 0, 1, 0},
		{"a probe is due, and an attempt is running", down, due, 12, 1, 0, time.Second},
		{"a probe is due, but no event is due", down, store.Peek{Wait: time.Minute}, 12, 0, 0, time.Second},
		{"the first probe succeeded", Backend{Ramp: 1}, due, 12, 0, 1, 0},
		{"three attempts succeeded", Backend{Ramp: 4}, due, 12, 1, 3, 0},
		{"the ramp is above the limit", Backend{Ramp: 8}, due, 3, 0, 3, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			claim, wait := Plan(tt.backend, tt.peek, tt.limit, tt.running)
			assert.Equal(t, tt.claim, claim)
			assert.Equal(t, tt.wait, wait)
		})
	}
}

func TestBreaker(t *testing.T) {
	const found = ""
	for _, tt := range []struct {
		name     string
		attempts []string // for each attempt, the id of the event, or found if the attempt reached the backend
		down     bool
		ramp     int
	}{
		{"no attempt", nil, false, 0},
		{"four different events", []string{"a", "b", "c", "d"}, false, 0},
		{"five different events", []string{"a", "b", "c", "d", "e"}, true, 0},
		{"one event five times", []string{"a", "a", "a", "a", "a"}, false, 0},
		{"four events many times", []string{"a", "b", "c", "d", "a", "b", "c", "d", "a", "b"}, false, 0},
		{"five events with a success between them", []string{"a", "b", "c", "d", found, "e"}, false, 0},
		{"five in a row after a success", []string{"a", "b", found, "c", "d", "e", "a", "b"}, true, 0},
		{"a probe that fails", []string{"a", "b", "c", "d", "e", "a"}, true, 0},
		{"a probe that succeeds", []string{"a", "b", "c", "d", "e", found}, false, 1},
		{"a probe that succeeds, and the next success", []string{"a", "b", "c", "d", "e", found, found}, false, 2},
		{"the third success", []string{"a", "b", "c", "d", "e", found, found, found}, false, 4},
		{"the fifth success removes the limit", []string{"a", "b", "c", "d", "e", found, found, found, found, found}, false, 0},
		{"down again while it recovers", []string{"a", "b", "c", "d", "e", found, found, "a", "b", "c", "d", "e"}, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := new(Breaker)
			for _, id := range tt.attempts {
				if id == found {
					b.Reached(16)
				} else {
					b.Unreached(id)
				}
			}
			state := b.Backend()
			assert.Equal(t, tt.down, state.isDown())
			assert.Equal(t, tt.ramp, state.Ramp)
			assert.Equal(t, !tt.down && tt.ramp == 0, state.Allows())
		})
	}
}

func TestBreakerForgets(t *testing.T) {
	b := new(Breaker)
	assert.False(t, b.Forget())
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		b.Unreached(id)
	}
	assert.True(t, b.Forget())
	assert.True(t, b.Backend().Allows())
	assert.False(t, b.Forget())
}

func TestLimits(t *testing.T) {
	for limit, old := range map[int]int{1: 1, 2: 1, 3: 2, 4: 3, 8: 6, 16: 12} {
		l := NewLimits()
		l.Resize(limit)
		assert.Equal(t, old, l.old(), "attempts at old events with limit %d", limit)
		assert.Equal(t, limit, l.Take(t.Context(), 100), "the limit is strict")
	}
	synctest.Test(t, func(t *testing.T) {
		l := NewLimits()
		l.Resize(1)
		require.Equal(t, 1, l.Take(t.Context(), 1))
		var order []string
		var mu sync.Mutex
		wait := func(name string, take func() bool) {
			go func() {
				if take() {
					mu.Lock()
					defer mu.Unlock()
					order = append(order, name)
				}
			}()
			synctest.Wait()
		}
		gaveUp, giveUp := context.WithCancel(t.Context())
		wait("a new event", func() bool { return l.Take(t.Context(), 1) == 1 })
		wait("a new event that gives up", func() bool { return l.Take(gaveUp, 1) == 1 })
		wait("old events", func() bool { return l.Take(t.Context(), 3) == 1 })
		wait("another new event", func() bool { return l.Take(t.Context(), 1) == 1 })
		giveUp()
		for range 2 {
			l.Free(1)
			synctest.Wait()
		}
		l.Free(1)
		synctest.Wait()
		assert.Equal(t, []string{"a new event", "old events", "another new event"}, order, "first come, first served")

		l.Resize(3)
		require.Equal(t, 1, l.Take(t.Context(), 1))
		require.Equal(t, 1, l.Take(t.Context(), 1))
		l.Resize(1)
		for range 2 {
			l.Free(1)
			synctest.Wait()
			assert.False(t, l.places.TryAcquire(1), "a smaller limit applies after enough attempts have ended")
		}
		l.Free(1)
		assert.True(t, l.places.TryAcquire(1))
	})
}

// source is a queue with due events, and records the claims. Its first Peek fails.
type source struct {
	due    []*store.Record
	claims []store.Claim
	first  time.Time // when the first claim was
	peeks  int

	mu                  sync.Mutex
	running, most, done int
}

func (s *source) Peek() (store.Peek, error) {
	if s.peeks++; s.peeks == 1 {
		return store.Peek{}, errors.New("the database fails")
	}
	return store.Peek{Empty: len(s.due) == 0}, nil
}

func (s *source) Claim(c *store.Claim) ([]*store.Record, error) {
	if s.claims = append(s.claims, *c); len(s.claims) == 1 {
		s.first = time.Now()
	}
	n := min(c.Max, len(s.due))
	taken := s.due[:n]
	s.due = s.due[n:]
	return taken, nil
}

func (s *source) Timeout() time.Duration { return 30 * time.Second }

func (s *source) AttemptStored(_ *store.Record, ended func()) {
	s.mu.Lock()
	s.running++
	s.most = max(s.most, s.running)
	s.mu.Unlock()
	time.Sleep(time.Second)
	s.mu.Lock()
	s.running--
	s.done++
	s.mu.Unlock()
	ended()
}

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := new(source)
		for range 20 {
			src.due = append(src.due, &store.Record{ID: "event"})
		}
		s := NewSchedule(src, new(Breaker), NewLimits())
		s.limits.Resize(4)
		ctx, stop := context.WithCancel(t.Context())
		began, ended := time.Now(), make(chan struct{})
		go func() { s.Run(ctx); close(ended) }()
		time.Sleep(9 * time.Second)
		synctest.Wait()
		assert.Equal(t, pollInterval, src.first.Sub(began))
		assert.Equal(t, 20, src.done)
		assert.Equal(t, 3, src.most)
		assert.Equal(t, store.Claim{Max: 3, Lease: 32 * time.Second}, src.claims[0])
		stop()
		<-ended
	})
}
