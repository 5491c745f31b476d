// Package storetest is the test suite for every store of inkit_queue.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest"
)

// Database is an empty database.
type Database struct {
	store.Opener

	// Exec runs a statement in the database without the store.
	Exec func(t *testing.T, statement string)
}

// Select calls f for all events that a filter selects.
func Select(t *testing.T, s store.Store, filter store.Filter, f func(r *store.Record)) {
	t.Helper()
	require.NoError(t, store.Each(t.Context(), s, filter, func(page []*store.Record) error {
		for _, r := range page {
			f(r)
		}
		return nil
	}))
}

const (
	pending = "pending"
	dead    = "dead"
)

func open(t *testing.T, db Database) store.Store {
	t.Helper()
	s, err := db.Open(t.Context(), store.Opening{Logger: zaptest.NewLogger(t)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// record returns an event like the events of a queue. If a store has a wrong column type or
// encoding, the values of this event change in the store.
func record(id string) *store.Record {
	request := make([]byte, 256)
	for i := range request {
		request[i] = byte(i)
	}
	return &store.Record{
		ID: id, Queue: "default", State: pending,
		Received: time.UnixMilli(1_795_592_263_123), EventType: "DOCUMENT_CREATE_FINISHED", ResourceID: `doc_ä"'\%`,
		Request: request, Checksum: bytes.Repeat([]byte{0, 0xff}, 16),
	}
}

func records(n int, change func(i int, r *store.Record)) (all []*store.Record) {
	for i := range n {
		r := record(fmt.Sprintf("event-%05d", i))
		if change != nil {
			change(i, r)
		}
		all = append(all, r)
	}
	return all
}

func apply(t *testing.T, s store.Store, b *store.Batch) {
	t.Helper()
	if b.Owner == "" {
		b.Owner = "me"
	}
	require.NoError(t, s.Apply(t.Context(), b))
}

func add(t *testing.T, s store.Store, all ...*store.Record) {
	t.Helper()
	apply(t, s, &store.Batch{Add: all})
}

// claim claims due events for an owner, and returns their ids.
func claim(t *testing.T, s store.Store, owner string, limit int, lease time.Duration) []string {
	t.Helper()
	c := &store.Claim{Queue: "default", Max: limit, Lease: lease}
	apply(t, s, &store.Batch{Owner: owner, Claims: []*store.Claim{c}})
	return ids(c.Records)
}

func ids(all []*store.Record) []string {
	list := []string{}
	for _, r := range all {
		list = append(list, r.ID)
	}
	slices.Sort(list)
	return list
}

func finish(t *testing.T, s store.Store, owner string, all ...store.Finish) {
	t.Helper()
	apply(t, s, &store.Batch{Owner: owner, Finish: all})
}

// find returns an event from the database, or nil.
func find(t *testing.T, s store.Store, id string) (found *store.Record) {
	t.Helper()
	page, err := s.Search(t.Context(), store.Filter{IDs: []string{id}, States: []string{store.Pending, store.Dead, store.History}}, true)
	require.NoError(t, err)
	for _, r := range page.Records {
		found = r
	}
	return found
}

func counts(t *testing.T, s store.Store) map[string]int {
	t.Helper()
	list, err := s.Counts(t.Context())
	require.NoError(t, err)
	all := make(map[string]int)
	for _, c := range list {
		assert.GreaterOrEqual(t, c.Oldest, time.Duration(0))
		all[c.Queue+" "+c.State] = c.Events
	}
	return all
}

// Run runs the suite. Each test gets its own database.
func Run(t *testing.T, newDatabase func(t *testing.T) Database) {
	test := func(name string, f func(t *testing.T, s store.Store)) {
		t.Run(name, func(t *testing.T) { f(t, open(t, newDatabase(t))) })
	}

	test("a claimed event has the values that were added", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		c := &store.Claim{Queue: "default", Max: 10, Lease: time.Minute}
		apply(t, s, &store.Batch{Claims: []*store.Claim{c}})
		require.Len(t, c.Records, 1)
		got, want := c.Records[0], record("a")
		assert.Equal(t, want.Request, got.Request)
		assert.Equal(t, want.Checksum, got.Checksum)
		assert.Equal(t, want.EventType, got.EventType)
		assert.Equal(t, want.ResourceID, got.ResourceID)
		assert.True(t, want.Received.Equal(got.Received))
		assert.Equal(t, 1, got.Attempts)
		assert.GreaterOrEqual(t, got.Age, time.Duration(0))
		assert.Less(t, got.Age, time.Minute)

		row := find(t, s, "a")
		require.NotNil(t, row)
		assert.Equal(t, pending, row.State)
		assert.Equal(t, "default", row.Queue)
		assert.Equal(t, want.Request, row.Request)
		assert.Equal(t, want.Checksum, row.Checksum)
		assert.WithinDuration(t, time.Now().Add(time.Minute), row.LeasedUntil, 30*time.Second)
	})
	test("a store with events can be closed", func(t *testing.T, s store.Store) {
		add(t, s, records(3, nil)...)
		require.NoError(t, s.Close())
	})
	t.Run("a store that is opened again still has its events", func(t *testing.T) {
		db := newDatabase(t)
		s := open(t, db)
		add(t, s, records(3, nil)...)
		require.NoError(t, s.Close())
		assert.Equal(t, map[string]int{"default pending": 3}, counts(t, open(t, db)))
	})
	test("invalid characters in texts are replaced", func(t *testing.T, s store.Store) {
		r := record("a")
		r.EventType, r.ResourceID = "a\x00b", "\xff\xfe"
		add(t, s, r, record("b"))
		claim(t, s, "me", 2, time.Minute)
		finish(t, s, "me",
			store.Finish{ID: "a", Outcome: store.Later, After: time.Hour, LastError: "status 500: \xc3(\x00"},
			store.Finish{ID: "b", Outcome: store.SetAside, LastError: "\x00"})
		row := find(t, s, "a")
		assert.Equal(t, []string{"a\uFFFDb", "\uFFFD", "status 500: \uFFFD(\uFFFD"}, []string{row.EventType, row.ResourceID, row.LastError})
	})
	test("a very long resource id is cut, and a search finds it", func(t *testing.T, s store.Store) {
		long := make([]byte, 60_000)
		for i := range long {
			long[i] = 'a' + byte(rand.IntN(26)) // random, so that no database can compress the text
		}
		r := record("a")
		r.ResourceID, r.EventType = string(long), string(long)
		delivered := *r
		delivered.ID, delivered.Finished = "b", time.Now()
		apply(t, s, &store.Batch{Add: []*store.Record{r}, History: []*store.Record{&delivered}})
		page, err := s.Search(t.Context(), store.Filter{States: []string{store.Pending, store.History}, Resource: string(long), Type: string(long)}, false)
		require.NoError(t, err)
		assert.Equal(t, []string{"a", "b"}, ids(page.Records))
		assert.Len(t, page.Records[0].ResourceID, 256)
	})
	test("a claim gets only due events, the earliest due event first", func(t *testing.T, s store.Store) {
		add(t, s, records(3, func(i int, r *store.Record) { r.Lease = time.Hour })...)
		assert.Empty(t, claim(t, s, "me", 10, time.Minute))
		for i := range 3 {
			add(t, s, record(fmt.Sprint("due-", i)))
			time.Sleep(2 * time.Millisecond) // the clock counts milliseconds
		}
		assert.Equal(t, []string{"due-0", "due-1"}, claim(t, s, "me", 2, time.Minute))
		assert.Equal(t, []string{"due-2"}, claim(t, s, "me", 2, time.Minute))
		assert.Empty(t, claim(t, s, "me", 2, time.Minute))
	})
	test("a claim gets only events of its queue", func(t *testing.T, s store.Store) {
		add(t, s, records(4, func(i int, r *store.Record) { r.Queue = []string{"default", "other"}[i%2] })...)
		other := &store.Claim{Queue: "other", Max: 10, Lease: time.Minute}
		mine := &store.Claim{Queue: "default", Max: 1, Lease: time.Minute}
		apply(t, s, &store.Batch{Claims: []*store.Claim{other, mine}})
		assert.Equal(t, []string{"event-00001", "event-00003"}, ids(other.Records))
		assert.Len(t, mine.Records, 1)
	})
	test("other owners get no event before its lease ends", func(t *testing.T, s store.Store) {
		r := record("live")
		r.Lease, r.Attempts = 3*time.Second, 1 // added during its first attempt
		add(t, s, r, record("due"))
		assert.Equal(t, []string{"due"}, claim(t, s, "me", 10, 3*time.Second))
		assert.Empty(t, claim(t, s, "other", 10, time.Minute))
		var got []string
		require.Eventually(t, func() bool {
			got = append(got, claim(t, s, "other", 10, time.Minute)...)
			return len(got) == 2
		}, 20*time.Second, 20*time.Millisecond)
		assert.Equal(t, 2, find(t, s, "live").Attempts, "the attempt that nobody finished counts")
		assert.Equal(t, 2, find(t, s, "due").Attempts)
	})

	test("a delivered event is deleted, also without the lease", func(t *testing.T, s store.Store) {
		add(t, s, records(3, nil)...)
		claim(t, s, "me", 2, time.Minute)
		finish(t, s, "me", store.Finish{ID: "event-00000", Outcome: store.Delivered})
		finish(t, s, "other", store.Finish{ID: "event-00001", Outcome: store.Delivered})
		finish(t, s, "me", store.Finish{ID: "event-00002", Outcome: store.Delivered}, store.Finish{ID: "none", Outcome: store.Delivered})
		assert.Empty(t, counts(t, s))
	})
	test("an event for a later attempt is due at that time", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		claim(t, s, "me", 1, time.Minute)
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.Later, After: time.Hour, LastError: "status 500"})
		row := find(t, s, "a")
		assert.Equal(t, "status 500", row.LastError)
		assert.WithinDuration(t, time.Now().Add(time.Hour), row.Due, time.Minute)
		assert.True(t, row.LeasedUntil.IsZero())
		assert.Equal(t, 1, row.Attempts)
		p, err := s.Peek(t.Context(), "default")
		require.NoError(t, err)
		assert.InDelta(t, time.Hour, p.Wait, float64(time.Minute))
	})
	test("a dead event stays, and no claim gets it", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		claim(t, s, "me", 1, time.Minute)
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.SetAside, LastError: "too old"})
		assert.Equal(t, map[string]int{"default dead": 1}, counts(t, s))
		assert.Empty(t, claim(t, s, "me", 1, time.Minute))
		assert.Equal(t, "too old", find(t, s, "a").LastError)
	})
	test("a released event is due now, and keeps its last error", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		claim(t, s, "me", 1, time.Minute)
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.Later, LastError: "status 500"})
		claim(t, s, "me", 1, time.Hour)
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.Later})
		assert.Equal(t, "status 500", find(t, s, "a").LastError)
		assert.Equal(t, 2, find(t, s, "a").Attempts)
		claim(t, s, "me", 1, time.Hour)
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.Unbegun})
		assert.Equal(t, 2, find(t, s, "a").Attempts, "an attempt that has not begun does not count")
		assert.Equal(t, []string{"a"}, claim(t, s, "other", 1, time.Minute))
	})
	test("an owner without the lease cannot change the event", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		claim(t, s, "slow", 1, 0)
		assert.Equal(t, []string{"a"}, claim(t, s, "fast", 1, time.Hour))
		for _, outcome := range []store.Outcome{store.Later, store.SetAside, store.Unbegun} {
			finish(t, s, "slow", store.Finish{ID: "a", Outcome: outcome, LastError: "of the slow one"})
			row := find(t, s, "a")
			assert.Equal(t, pending, row.State)
			assert.Empty(t, row.LastError)
			assert.WithinDuration(t, time.Now().Add(time.Hour), row.LeasedUntil, time.Minute)
		}
	})
	test("many events in one batch", func(t *testing.T, s store.Store) {
		all := records(2003, func(i int, r *store.Record) { r.Lease = time.Minute })
		add(t, s, all...)
		assert.Equal(t, map[string]int{"default pending": 2003}, counts(t, s))
		var finished []store.Finish
		for i, r := range all[:2000] {
			finished = append(finished, store.Finish{ID: r.ID, Outcome: store.Outcome(i % 4), LastError: fmt.Sprint(i)})
		}
		finish(t, s, "me", finished...)
		assert.Equal(t, map[string]int{"default pending": 1003, "default dead": 500}, counts(t, s))
		assert.Equal(t, "1997", find(t, s, "event-01997").LastError)
	})
	test("a failed batch changes nothing", func(t *testing.T, s store.Store) {
		add(t, s, record("a"), record("b"))
		c := &store.Claim{Queue: "default", Max: 1, Lease: time.Minute}
		without := record("d")
		without.Request = nil
		err := s.Apply(t.Context(), &store.Batch{
			Owner: "me", Add: []*store.Record{record("c"), without}, Claims: []*store.Claim{c},
			Finish: []store.Finish{{ID: "a", Outcome: store.Delivered}},
		})
		require.Error(t, err, "there is no request")
		assert.NotContains(t, err.Error(), "DOCUMENT", "no part of an event")
		assert.Empty(t, c.Records)
		assert.Nil(t, find(t, s, "c"))
		assert.NotNil(t, find(t, s, "a"))
		add(t, s, record("c"))
	})
	test("adding an existing event changes nothing", func(t *testing.T, s store.Store) {
		add(t, s, record("a"))
		finish(t, s, "me", store.Finish{ID: "a", Outcome: store.SetAside, LastError: "status 404"})
		again := record("a")
		again.Request = []byte("another")
		add(t, s, again, record("b"))
		assert.Equal(t, "status 404", find(t, s, "a").LastError)
		assert.NotEqual(t, "another", string(find(t, s, "a").Request))
		assert.NotNil(t, find(t, s, "b"))
	})
	test("a context that has ended", func(t *testing.T, s store.Store) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.Error(t, s.Apply(ctx, &store.Batch{Owner: "me", Add: []*store.Record{record("a")}}))
		assert.Nil(t, find(t, s, "a"))
		add(t, s, record("a"))
	})

	test("peek", func(t *testing.T, s store.Store) {
		peek := func() store.Peek {
			p, err := s.Peek(t.Context(), "default")
			require.NoError(t, err)
			return p
		}
		assert.Equal(t, store.Peek{Empty: true}, peek())
		add(t, s, records(2, func(i int, r *store.Record) { r.Lease = time.Duration(i+1) * 30 * time.Minute })...)
		assert.InDelta(t, 30*time.Minute, peek().Wait, float64(time.Minute))
		add(t, s, record("due"))
		assert.Equal(t, store.Peek{}, peek())
	})
	for _, shift := range []time.Duration{10 * time.Hour, -10 * time.Hour} {
		t.Run(fmt.Sprintf("a clock that was wrong by %v delays no event", shift), func(t *testing.T) {
			db := newDatabase(t)
			s := open(t, db)
			add(t, s, record("waits"), record("leased"))
			claim(t, s, "of a crashed Caddy", 1, time.Minute)
			claim(t, s, "me", 1, time.Minute)
			finish(t, s, "me", store.Finish{ID: "waits", Outcome: store.Later, After: 5 * time.Minute})
			db.Exec(t, fmt.Sprintf(`UPDATE inkit_queue_events SET due = due + %[1]d, queued = queued + %[1]d, lease = lease + %[1]d`, shift.Milliseconds()))
			p, err := s.Peek(t.Context(), "default")
			require.NoError(t, err)
			assert.Equal(t, store.Peek{}, p)
			c := &store.Claim{Queue: "default", Max: 10, Lease: time.Minute}
			apply(t, s, &store.Batch{Claims: []*store.Claim{c}})
			assert.Equal(t, []string{"leased", "waits"}, ids(c.Records))
			for _, r := range c.Records {
				assert.GreaterOrEqual(t, r.Age, time.Duration(0))
				assert.Less(t, r.Age, 11*time.Hour)
			}
			assert.Empty(t, claim(t, s, "other", 10, time.Minute), "nothing twice at once")
		})
	}
	test("newest events first", func(t *testing.T, s store.Store) {
		add(t, s, records(6, func(i int, r *store.Record) {
			if i == 5 {
				r.Lease = time.Hour
			}
		})...)
		newest := func(limit int) []string {
			c := &store.Claim{Queue: "default", Max: limit, Lease: time.Minute, Newest: true}
			apply(t, s, &store.Batch{Owner: "me", Claims: []*store.Claim{c}})
			return ids(c.Records)
		}
		assert.Equal(t, []string{"event-00004"}, newest(1))
		assert.Equal(t, []string{"event-00002", "event-00003"}, newest(2))
		assert.Equal(t, []string{"event-00000", "event-00001"}, newest(10))
		assert.Empty(t, newest(10))
	})
	test("newest events first, if the last events are in another queue", func(t *testing.T, s store.Store) {
		add(t, s, records(1, nil)...)
		add(t, s, records(1100, func(i int, r *store.Record) { r.ID, r.Queue = fmt.Sprintf("later-%05d", i), "other" })...)
		c := &store.Claim{Queue: "default", Max: 1, Lease: time.Minute, Newest: true}
		apply(t, s, &store.Batch{Owner: "me", Claims: []*store.Claim{c}})
		assert.Equal(t, []string{"event-00000"}, ids(c.Records))
	})
	test("counts", func(t *testing.T, s store.Store) {
		assert.Empty(t, counts(t, s))
		add(t, s, records(7, func(i int, r *store.Record) { r.Queue = []string{"a", "b"}[i%2] })...)
		assert.Equal(t, map[string]int{"a pending": 4, "b pending": 3}, counts(t, s))
	})

	test("select", func(t *testing.T, s store.Store) {
		add(t, s, records(6, func(i int, r *store.Record) {
			r.Queue, r.Lease = []string{"default", "other"}[i%2], time.Duration(i/2)*20*time.Minute
		})...)
		claim(t, s, "me", 1, time.Minute)
		finish(t, s, "me", store.Finish{ID: "event-00000", Outcome: store.SetAside})
		get := func(filter store.Filter) (got []string) {
			require.NoError(t, store.Each(t.Context(), s, filter, func(page []*store.Record) error {
				for _, r := range page {
					assert.Nil(t, r.Request)
					got = append(got, r.ID)
				}
				return nil
			}))
			return got
		}
		assert.Equal(t, []string{"event-00000", "event-00001", "event-00002", "event-00003", "event-00004", "event-00005"}, get(store.Filter{}), "in order")
		assert.Equal(t, []string{"event-00001", "event-00003", "event-00005"}, get(store.Filter{Queue: "other"}))
		assert.Equal(t, []string{"event-00000"}, get(store.Filter{States: []string{store.Dead}}))
		assert.Equal(t, []string{"event-00001", "event-00004"}, get(store.Filter{IDs: []string{"event-00004", "event-00001", "none"}}))
		assert.Equal(t, []string{"event-00003", "event-00005"}, get(store.Filter{Queue: "other", After: "event-00001"}))
		assert.Empty(t, get(store.Filter{IDs: []string{}}))
	})
	test("retry resets the age", func(t *testing.T, s store.Store) {
		add(t, s, records(3, nil)...)
		claim(t, s, "me", 2, time.Minute)
		finish(t, s, "me", store.Finish{ID: "event-00000", Outcome: store.SetAside, LastError: "too old"})
		time.Sleep(20 * time.Millisecond)
		before := rows(t, s, "events", false)[0][4]
		n, err := s.Retry(t.Context(), store.Filter{States: []string{store.Dead}})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		row := find(t, s, "event-00000")
		assert.Equal(t, pending, row.State)
		assert.Greater(t, rows(t, s, "events", false)[0][4], before, "its age begins again")
		assert.Equal(t, "too old", row.LastError, "which an operator may still want to know")
		n, err = s.Retry(t.Context(), store.Filter{IDs: []string{"event-00001", "event-00002", "none"}})
		require.NoError(t, err)
		assert.Equal(t, 1, n, "what is being delivered is left alone")
		assert.Equal(t, []string{"event-00000", "event-00002"}, claim(t, s, "other", 10, time.Minute))
	})
	test("drop", func(t *testing.T, s store.Store) {
		add(t, s, records(3, nil)...)
		n, err := s.Drop(t.Context(), store.Filter{IDs: []string{"event-00000", "none"}})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		assert.Equal(t, map[string]int{"default pending": 2}, counts(t, s))
	})

	memory(t, newDatabase)

	t.Run("two stores on one database claim no event twice", func(t *testing.T) {
		db := newDatabase(t)
		stores := []store.Store{open(t, db), open(t, db)}
		const events = 600
		var mu sync.Mutex
		claimed := make(map[string]int)
		apply := func(s store.Store, b *store.Batch) error { // on a slow disk, the other store may write for a long time
			for deadline := time.Now().Add(time.Minute); ; {
				if err := s.Apply(context.Background(), b); !errors.Is(err, store.ErrLocked) || time.Now().After(deadline) {
					return err
				}
			}
		}
		var wg sync.WaitGroup
		for i, s := range stores {
			wg.Go(func() {
				for j := range events / 2 / 10 {
					b := &store.Batch{Owner: fmt.Sprint("owner-", i)}
					for k := range 10 {
						b.Add = append(b.Add, record(fmt.Sprintf("%d-%05d-%d", i, j, k)))
					}
					assert.NoError(t, apply(s, b))
				}
			})
			wg.Go(func() {
				for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					c := &store.Claim{Queue: "default", Max: 7, Lease: time.Hour}
					if err := apply(s, &store.Batch{Owner: fmt.Sprint("owner-", i), Claims: []*store.Claim{c}}); err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					for _, r := range c.Records {
						claimed[r.ID]++
					}
					done := len(claimed) == events
					mu.Unlock()
					if done {
						return
					}
				}
			})
		}
		wg.Wait()
		assert.Len(t, claimed, events)
		for id, n := range claimed {
			assert.Equal(t, 1, n, id)
		}
	})
	test("on a full disk, the due events come without those that could not be finished", func(t *testing.T, s store.Store) {
		add(t, s, record("a"), record("b"), record("c"))
		c := &store.Claim{Queue: "default", Max: 1, Without: map[string]bool{"a": true}}
		require.NoError(t, s.Due(t.Context(), c, store.ErrFull))
		assert.Equal(t, []string{"b"}, ids(c.Records))
		assert.Equal(t, 1, c.Records[0].Attempts)
		c = &store.Claim{Queue: "default", Max: 3, Without: map[string]bool{"a": true, "b": true, "c": true}}
		assert.ErrorIs(t, s.Due(t.Context(), c, store.ErrFull), store.ErrFull)
	})
	t.Run("a schema of another version is refused", func(t *testing.T) {
		db := newDatabase(t)
		require.NoError(t, open(t, db).Close())
		db.Exec(t, `UPDATE inkit_queue_schema SET version = 99`)
		_, err := db.Open(t.Context(), store.Opening{Logger: zaptest.NewLogger(t)})
		assert.ErrorContains(t, err, "another version: 99")
	})
}
