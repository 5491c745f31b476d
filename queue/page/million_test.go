//go:build linux

package page

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/postgres"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// With very many events, each view takes less than 300 ms, and visitors do not slow down
// the storing of new events. With E2E_LONG, nothing else runs beside this test. Without
// E2E_LONG, the limits are ten times as long, because the machine may be busy.
func TestPageOfManyEvents(t *testing.T) {
	events, slack := 5_000, 10
	if os.Getenv("E2E_LONG") != "" {
		events, slack = 1_000_000, 1
	}
	t.Run("sqlite", func(t *testing.T) {
		p := newDefaultPage(t)
		manyEvents(t, p, p.stores["queue.db"], events, slack)
	})
	t.Run("postgres", func(t *testing.T) {
		server := pgtest.Start(t)
		s, err := (&postgres.Postgres{DSN: server.DSN(server.NewDatabase(t))}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		p := newDefaultPage(t)
		p.queues[0].Store = func() (store.Store, error) { return s, nil }
		manyEvents(t, p, s, events, slack)
	})
}

func manyEvents(t *testing.T, p *fixture, s store.Store, events, slack int) {
	t.Helper()
	limit := func(d time.Duration) time.Duration { return time.Duration(slack) * d }
	record := func(i int) *store.Record {
		return &store.Record{
			ID: uuid.Must(uuid.NewV7()).String(), Queue: "default", Received: time.Now(), EventType: fmt.Sprint("TYPE_", i%10), ResourceID: fmt.Sprint("doc_", i),
			LastError: fmt.Sprint("status ", 500+i%5), Request: []byte(strings.Repeat("x", 600)), Checksum: make([]byte, 32),
		}
	}
	began := time.Now()
	for i := 0; i < events; i += 1000 {
		b := &store.Batch{Owner: "test"}
		for n := range 500 {
			b.Add = append(b.Add, record(i+n))
			r := record(i + n + 500)
			r.Finished, r.Attempts, r.Status, r.LastError = time.Now(), 1, 200, ""
			b.History = append(b.History, r)
			b.Add = append(b.Add, record(i+n+500))
			b.Finish = append(b.Finish, store.Finish{ID: b.Add[2*n].ID, Outcome: store.Later, After: time.Hour}, store.Finish{ID: b.Add[2*n+1].ID, Outcome: store.Later, After: time.Hour})
		}
		require.NoError(t, s.Apply(t.Context(), b))
	}
	t.Logf("%d events and half as many delivered ones written in %v", events, time.Since(began).Round(time.Millisecond))

	add := func(n int) (times []time.Duration) {
		for i := range n {
			began := time.Now()
			require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "test", Add: []*store.Record{record(i)}}))
			times = append(times, time.Since(began))
			time.Sleep(5 * time.Millisecond)
		}
		return times
	}
	p99 := func(times []time.Duration) time.Duration {
		slices.Sort(times)
		return times[len(times)*99/100]
	}
	alone := p99(add(200))
	first := time.Now()
	page := p.get("/")
	took := time.Since(first)
	assert.Less(t, took, limit(400*time.Millisecond), "the first overview")
	for strings.Contains(page, "being counted") {
		page = p.get("/")
	}
	t.Logf("the first overview: %v, with all numbers after %v", took.Round(time.Millisecond), time.Since(first).Round(time.Millisecond))
	for _, view := range []string{
		"/", "/events", "/events?order=oldest", "/events?state=dead", "/events?state=all", "/events?error=503", "/events?type=TYPE_7&error=502&order=oldest",
		"/events?resource=doc_77", "/events?since=1h&type=TYPE_3", "/events?error=nothing", "/events?state=delivered&type=TYPE_1",
	} {
		var times []time.Duration
		for range 5 {
			began := time.Now()
			p.get(view)
			times = append(times, time.Since(began))
		}
		t.Logf("%-55s median %v, at most %v", view, quantile(times), slices.Max(times).Round(time.Millisecond))
		if view != "/events?error=nothing" { // this search ends at its time limit
			assert.Less(t, quantile(times), limit(300*time.Millisecond), view)
		}
		assert.Less(t, slices.Max(times), limit(time.Second), view)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for n := i; ; n++ {
				select {
				case <-done:
					return
				default:
					p.get([]string{"/", "/events?error=503", "/events?state=all"}[n%3])
				}
			}
		})
	}
	visited := p99(add(200))
	close(done)
	wg.Wait()
	t.Logf("an event is stored within %v at p99, and within %v with 20 visitors without a pause", alone, visited)
	assert.Less(t, visited, alone+limit(100*time.Millisecond))
}

func quantile(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2].Round(time.Millisecond)
}
