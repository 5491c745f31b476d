package delivery

import (
	"context"
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
	for _, tt := range []struct {
		name string
		look Look
		want Step
	}{
		{"no event is pending", Look{Empty: true, Limit: 12}, Step{Wait: time.Second}},
		{"the database fails", Look{Failed: true, Limit: 12}, Step{Wait: time.Second}},
		{"an event is due soon", Look{Wait: 300 * time.Millisecond, Limit: 12}, Step{Wait: 300 * time.Millisecond}},
		{"an event is due in an hour, but another process may store an earlier event", Look{Wait: time.Hour, Limit: 12}, Step{Wait: time.Second}},
		{"events are due", Look{Limit: 12}, Step{Claim: 12}},
		{"events are due, and attempts are running", Look{Limit: 12, Running: 5}, Step{Claim: 7}},
		{"the number of running attempts is at the limit", Look{Limit: 12, Running: 12}, Step{Wait: time.Second}},
		{"the number of running attempts is above a reduced limit", Look{Limit: 1, Running: 12}, Step{Wait: time.Second}},
		{"the backend is down and was probed just now", Look{Limit: 12, Down: true, Probe: 400 * time.Millisecond}, Step{Wait: 400 * time.Millisecond}},
		{"the running probe has a long lease", Look{Limit: 12, Down: true, Probe: 5 * time.Minute}, Step{Wait: time.Second}},
		{"a probe is due", Look{Limit: 12, Down: true}, Step{Claim: 1, Newest: true}},
		{"a probe is due, and an attempt is running", Look{Limit: 12, Down: true, Running: 1}, Step{Wait: time.Second}},
		{"a probe is due, but no event is due", Look{Limit: 12, Down: true, Wait: time.Minute}, Step{Wait: time.Second}},
		{"the first probe succeeded", Look{Limit: 12, Ramp: 1}, Step{Claim: 1, Newest: true}},
		{"three attempts succeeded", Look{Limit: 12, Ramp: 4, Running: 1}, Step{Claim: 3, Newest: true}},
		{"the ramp is above the limit", Look{Limit: 3, Ramp: 8}, Step{Claim: 3, Newest: true}},
	} {
		t.Run(tt.name, func(t *testing.T) { assert.Equal(t, tt.want, Plan(tt.look)) })
	}
}

func TestBreaker(t *testing.T) {
	const found = ""
	for _, tt := range []struct {
		name     string
		attempts []string // the id of an event that did not reach the backend, or found
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
			var l Look
			b.look(&l)
			assert.Equal(t, tt.down, b.Down())
			assert.Equal(t, tt.down, l.Down)
			assert.Equal(t, tt.ramp, l.Ramp)
			assert.Equal(t, !tt.down && tt.ramp == 0, b.Allows())
		})
	}
}

func TestBreakerForgetsABackendWithoutEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := new(Breaker)
		for _, id := range []string{"a", "b", "c", "d", "e"} {
			b.Unreached(id)
		}
		assert.False(t, b.Empty(true))
		time.Sleep(forgetAfter - time.Second)
		assert.False(t, b.Empty(false), "an event has arrived")
		assert.False(t, b.Empty(true))
		time.Sleep(forgetAfter)
		assert.True(t, b.Empty(true))
		assert.False(t, b.Down())
		assert.False(t, b.Empty(true))
	})
}

func TestLimits(t *testing.T) {
	for limit, old := range map[int]int{1: 1, 2: 1, 3: 2, 4: 3, 8: 6, 16: 12} {
		l := NewLimits()
		l.Resize(limit)
		assert.Equal(t, old, l.Old(t.Context(), 100), "places for old events with limit %d", limit)
		for range limit - old {
			assert.True(t, l.TryNew(), "the other places are for new events")
		}
		assert.False(t, l.TryNew(), "the limit is strict")
	}
	synctest.Test(t, func(t *testing.T) {
		l := NewLimits()
		l.Resize(1)
		require.True(t, l.TryNew())
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
		wait("a new event", func() bool { return l.New(t.Context()) })
		wait("a new event that gives up", func() bool { return l.New(gaveUp) })
		wait("an old event", func() bool { return l.Old(t.Context(), 1) == 1 })
		wait("another new event", func() bool { return l.New(t.Context()) })
		giveUp()
		for range 2 {
			l.EndNew()
			synctest.Wait()
		}
		l.EndOld(1)
		synctest.Wait()
		assert.Equal(t, []string{"a new event", "an old event", "another new event"}, order, "first come, first served")

		l.Resize(3)
		require.True(t, l.TryNew())
		require.True(t, l.TryNew())
		l.Resize(1)
		for range 2 {
			l.EndNew()
			synctest.Wait()
			assert.False(t, l.TryNew(), "a smaller limit applies after enough attempts have ended")
		}
		l.EndNew()
		assert.True(t, l.TryNew())
	})
}

// source is a Source with due events, and records the claims.
type source struct {
	due    []*store.Record
	claims []store.Claim
}

func (s *source) Peek() (store.Peek, error) { return store.Peek{Empty: len(s.due) == 0}, nil }

func (s *source) Claim(c *store.Claim) ([]*store.Record, error) {
	s.claims = append(s.claims, *c)
	n := min(c.Max, len(s.due))
	taken := s.due[:n]
	s.due = s.due[n:]
	return taken, nil
}

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := new(source)
		for range 20 {
			src.due = append(src.due, &store.Record{ID: "event"})
		}
		var mu sync.Mutex
		running, most, done := 0, 0, 0
		s := &Schedule{
			Source: src, Breaker: new(Breaker), Limits: NewLimits(), Queue: "default", Woken: make(chan struct{}, 1),
			Timeout: func() time.Duration { return 30 * time.Second },
			Attempt: func(_ *store.Record, _ time.Time, ended func()) {
				mu.Lock()
				running++
				most = max(most, running)
				mu.Unlock()
				time.Sleep(time.Second)
				mu.Lock()
				running--
				done++
				mu.Unlock()
				ended()
			},
			Forgotten: func() {},
		}
		s.Limits.Resize(4)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { s.Run(ctx); close(ended) }()
		time.Sleep(8 * time.Second)
		synctest.Wait()
		assert.Equal(t, 20, done)
		assert.Equal(t, 3, most)
		assert.Equal(t, store.Claim{Queue: "default", Max: 3, Lease: 32 * time.Second}, src.claims[0])
		stop()
		<-ended
	})
}
