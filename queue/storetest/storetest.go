// Package storetest says what a store of inkit_queue must do, whatever database is
// behind it.
package storetest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Database is one that is empty.
type Database struct {
	queue.Opener

	// Exec runs a statement on it, past the store.
	Exec func(t *testing.T, statement string)
}

const (
	pending = "pending"
	dead    = "dead"
)

func open(t *testing.T, db Database) queue.Store {
	t.Helper()
	store, err := db.Open(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// record returns an event as the queue makes them, with all that a database could
// spoil.
func record(id string) *queue.Record {
	request := make([]byte, 256)
	for i := range request {
		request[i] = byte(i)
	}
	return &queue.Record{
		ID: id, Queue: "default", State: pending,
		Received: time.UnixMilli(1_795_592_263_123), EventType: "DOCUMENT_CREATE_FINISHED", ResourceID: `doc_ä"'\%`,
		Request: request, Checksum: bytes.Repeat([]byte{0, 0xff}, 16),
	}
}

func records(n int, change func(i int, r *queue.Record)) (all []*queue.Record) {
	for i := range n {
		r := record(fmt.Sprintf("event-%05d", i))
		if change != nil {
			change(i, r)
		}
		all = append(all, r)
	}
	return all
}

func apply(t *testing.T, store queue.Store, b *queue.Batch) {
	t.Helper()
	if b.Owner == "" {
		b.Owner = "me"
	}
	require.NoError(t, store.Apply(t.Context(), b))
}

func add(t *testing.T, store queue.Store, all ...*queue.Record) {
	t.Helper()
	apply(t, store, &queue.Batch{Add: all})
}

// claim returns the ids of the events that an owner gets.
func claim(t *testing.T, store queue.Store, owner string, limit int, lease time.Duration) []string {
	t.Helper()
	c := &queue.Claim{Queue: "default", Max: limit, Lease: lease}
	apply(t, store, &queue.Batch{Owner: owner, Claims: []*queue.Claim{c}})
	return ids(c.Records)
}

func ids(all []*queue.Record) []string {
	list := []string{}
	for _, r := range all {
		list = append(list, r.ID)
	}
	slices.Sort(list)
	return list
}

func finish(t *testing.T, store queue.Store, owner string, all ...queue.Finish) {
	t.Helper()
	apply(t, store, &queue.Batch{Owner: owner, Finish: all})
}

// find returns an event as it is in the database, or nil.
func find(t *testing.T, store queue.Store, id string) (found *queue.Record) {
	t.Helper()
	require.NoError(t, store.Select(t.Context(), queue.Filter{IDs: []string{id}}, true, func(r *queue.Record) bool {
		found = r
		return true
	}))
	return found
}

func counts(t *testing.T, store queue.Store) map[string]int {
	t.Helper()
	list, err := store.Counts(t.Context())
	require.NoError(t, err)
	all := make(map[string]int)
	for _, c := range list {
		assert.GreaterOrEqual(t, c.Oldest, time.Duration(0))
		all[c.Queue+" "+c.State] = c.Events
	}
	return all
}

// Run runs the suite. Each of its tests gets a database of its own.
func Run(t *testing.T, newDatabase func(t *testing.T) Database) {
	test := func(name string, f func(t *testing.T, store queue.Store)) {
		t.Run(name, func(t *testing.T) { f(t, open(t, newDatabase(t))) })
	}

	test("an event comes back as it was added", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		c := &queue.Claim{Queue: "default", Max: 10, Lease: time.Minute}
		apply(t, store, &queue.Batch{Claims: []*queue.Claim{c}})
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

		row := find(t, store, "a")
		require.NotNil(t, row)
		assert.Equal(t, pending, row.State)
		assert.Equal(t, "default", row.Queue)
		assert.Equal(t, want.Request, row.Request)
		assert.Equal(t, want.Checksum, row.Checksum)
		assert.WithinDuration(t, time.Now().Add(time.Minute), row.LeasedUntil, 30*time.Second)
	})
	test("what is durable is there when it is opened again", func(t *testing.T, store queue.Store) {
		add(t, store, records(3, nil)...)
		require.NoError(t, store.Close())
	})
	t.Run("a store that is opened again has what was in it", func(t *testing.T) {
		db := newDatabase(t)
		store := open(t, db)
		add(t, store, records(3, nil)...)
		require.NoError(t, store.Close())
		assert.Equal(t, map[string]int{"default pending": 3}, counts(t, open(t, db)))
	})
	test("texts that no database takes are kept as far as they are texts", func(t *testing.T, store queue.Store) {
		r := record("a")
		r.EventType, r.ResourceID = "a\x00b", "\xff\xfe"
		add(t, store, r, record("b"))
		claim(t, store, "me", 2, time.Minute)
		finish(t, store, "me",
			queue.Finish{ID: "a", Outcome: queue.Later, After: time.Hour, LastError: "status 500: \xc3(\x00"},
			queue.Finish{ID: "b", Outcome: queue.Dead, LastError: "\x00"})
		row := find(t, store, "a")
		assert.Equal(t, []string{"a\uFFFDb", "\uFFFD", "status 500: \uFFFD(\uFFFD"}, []string{row.EventType, row.ResourceID, row.LastError})
	})
	test("claims give the events that are due, those first that are due for the longest", func(t *testing.T, store queue.Store) {
		add(t, store, records(3, func(i int, r *queue.Record) { r.Delay = time.Hour })...)
		assert.Empty(t, claim(t, store, "me", 10, time.Minute))
		for i := range 3 {
			add(t, store, record(fmt.Sprint("due-", i)))
			time.Sleep(2 * time.Millisecond) // the clock has milliseconds
		}
		assert.Equal(t, []string{"due-0", "due-1"}, claim(t, store, "me", 2, time.Minute))
		assert.Equal(t, []string{"due-2"}, claim(t, store, "me", 2, time.Minute))
		assert.Empty(t, claim(t, store, "me", 2, time.Minute))
	})
	test("claims give the events of their queue alone", func(t *testing.T, store queue.Store) {
		add(t, store, records(4, func(i int, r *queue.Record) { r.Queue = []string{"default", "other"}[i%2] })...)
		other := &queue.Claim{Queue: "other", Max: 10, Lease: time.Minute}
		mine := &queue.Claim{Queue: "default", Max: 1, Lease: time.Minute}
		apply(t, store, &queue.Batch{Claims: []*queue.Claim{other, mine}})
		assert.Equal(t, []string{"event-00001", "event-00003"}, ids(other.Records))
		assert.Len(t, mine.Records, 1)
	})
	test("a lease keeps others away until it ends", func(t *testing.T, store queue.Store) {
		r := record("live")
		r.Lease, r.Attempts = 300*time.Millisecond, 1 // as one that is being delivered when it is added
		add(t, store, r, record("due"))
		assert.Equal(t, []string{"due"}, claim(t, store, "me", 10, 300*time.Millisecond))
		assert.Empty(t, claim(t, store, "other", 10, time.Minute))
		var got []string
		require.Eventually(t, func() bool {
			got = append(got, claim(t, store, "other", 10, time.Minute)...)
			return len(got) == 2
		}, 20*time.Second, 20*time.Millisecond)
		assert.Equal(t, 2, find(t, store, "live").Attempts, "the attempt that nobody finished counts")
		assert.Equal(t, 2, find(t, store, "due").Attempts)
	})

	test("what is delivered is deleted, whoever delivers it", func(t *testing.T, store queue.Store) {
		add(t, store, records(3, nil)...)
		claim(t, store, "me", 2, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "event-00000", Outcome: queue.Delivered})
		finish(t, store, "other", queue.Finish{ID: "event-00001", Outcome: queue.Delivered})
		finish(t, store, "me", queue.Finish{ID: "event-00002", Outcome: queue.Delivered}, queue.Finish{ID: "none", Outcome: queue.Delivered})
		assert.Empty(t, counts(t, store))
	})
	test("what is to be attempted later is due then", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		claim(t, store, "me", 1, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Later, After: time.Hour, LastError: "status 500"})
		row := find(t, store, "a")
		assert.Equal(t, "status 500", row.LastError)
		assert.WithinDuration(t, time.Now().Add(time.Hour), row.Due, time.Minute)
		assert.True(t, row.LeasedUntil.IsZero())
		assert.Equal(t, 1, row.Attempts)
		p, err := store.Peek(t.Context(), "default")
		require.NoError(t, err)
		assert.InDelta(t, time.Hour, p.Wait, float64(time.Minute))
	})
	test("what is due later than can be is due, for the clock was set back", func(t *testing.T, store queue.Store) {
		delays := []time.Duration{70 * time.Minute, 74 * time.Minute, 0, 10 * time.Hour}
		add(t, store, records(4, func(i int, r *queue.Record) { r.Delay = delays[i] })...)
		assert.Equal(t, []string{"event-00001", "event-00002"}, claim(t, store, "me", 2, time.Minute))
		c := &queue.Claim{Queue: "default", Max: 2, Lease: time.Minute, Newest: true}
		apply(t, store, &queue.Batch{Owner: "me", Claims: []*queue.Claim{c}})
		assert.Equal(t, []string{"event-00003"}, ids(c.Records))
	})
	test("what is leased for longer than can be is due", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		assert.Equal(t, []string{"a"}, claim(t, store, "killed", 1, 10*time.Hour))
		assert.Empty(t, claim(t, store, "me", 1, 10*time.Hour))
		assert.Equal(t, []string{"a"}, claim(t, store, "me", 1, 9*time.Hour))
	})
	test("what is dead stays, and is claimed no more", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		claim(t, store, "me", 1, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Dead, LastError: "too old"})
		assert.Equal(t, map[string]int{"default dead": 1}, counts(t, store))
		assert.Empty(t, claim(t, store, "me", 1, time.Minute))
		assert.Equal(t, "too old", find(t, store, "a").LastError)
	})
	test("what is released is due at once, and keeps its last error", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		claim(t, store, "me", 1, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Later, LastError: "status 500"})
		claim(t, store, "me", 1, time.Hour)
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Released})
		assert.Equal(t, "status 500", find(t, store, "a").LastError)
		assert.Equal(t, 2, find(t, store, "a").Attempts)
		claim(t, store, "me", 1, time.Hour)
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Unbegun})
		assert.Equal(t, 2, find(t, store, "a").Attempts, "an attempt that has not begun does not count")
		assert.Equal(t, []string{"a"}, claim(t, store, "other", 1, time.Minute))
	})
	test("whoever has lost a lease has no say", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		claim(t, store, "slow", 1, 0)
		assert.Equal(t, []string{"a"}, claim(t, store, "fast", 1, time.Hour))
		for _, outcome := range []queue.Outcome{queue.Later, queue.Dead, queue.Released, queue.Unbegun} {
			finish(t, store, "slow", queue.Finish{ID: "a", Outcome: outcome, LastError: "of the slow one"})
			row := find(t, store, "a")
			assert.Equal(t, pending, row.State)
			assert.Empty(t, row.LastError)
			assert.WithinDuration(t, time.Now().Add(time.Hour), row.LeasedUntil, time.Minute)
		}
	})
	test("many in one batch", func(t *testing.T, store queue.Store) {
		all := records(2003, func(i int, r *queue.Record) { r.Lease = time.Minute })
		add(t, store, all...)
		assert.Equal(t, map[string]int{"default pending": 2003}, counts(t, store))
		var finished []queue.Finish
		for i, r := range all[:2000] {
			finished = append(finished, queue.Finish{ID: r.ID, Outcome: queue.Outcome(i % 5), LastError: fmt.Sprint(i)})
		}
		finish(t, store, "me", finished...)
		assert.Equal(t, map[string]int{"default pending": 1203, "default dead": 400}, counts(t, store))
		assert.Equal(t, "1996", find(t, store, "event-01996").LastError)
	})
	test("all of a batch or nothing", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"), record("b"))
		c := &queue.Claim{Queue: "default", Max: 1, Lease: time.Minute}
		without := record("d")
		without.Request = nil
		err := store.Apply(t.Context(), &queue.Batch{
			Owner: "me", Add: []*queue.Record{record("c"), without}, Claims: []*queue.Claim{c},
			Finish: []queue.Finish{{ID: "a", Outcome: queue.Delivered}},
		})
		require.Error(t, err, "there is no request")
		assert.NotContains(t, err.Error(), "DOCUMENT", "no part of an event")
		assert.Empty(t, c.Records)
		assert.Nil(t, find(t, store, "c"))
		assert.NotNil(t, find(t, store, "a"))
		add(t, store, record("c"))
	})
	test("an event that is there already", func(t *testing.T, store queue.Store) {
		add(t, store, record("a"))
		finish(t, store, "me", queue.Finish{ID: "a", Outcome: queue.Dead, LastError: "status 404"})
		again := record("a")
		again.Request = []byte("another")
		add(t, store, again, record("b"))
		assert.Equal(t, "status 404", find(t, store, "a").LastError)
		assert.NotEqual(t, "another", string(find(t, store, "a").Request))
		assert.NotNil(t, find(t, store, "b"))
	})
	test("a context that has ended", func(t *testing.T, store queue.Store) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.Error(t, store.Apply(ctx, &queue.Batch{Owner: "me", Add: []*queue.Record{record("a")}}))
		assert.Nil(t, find(t, store, "a"))
		add(t, store, record("a"))
	})

	test("peek", func(t *testing.T, store queue.Store) {
		var last time.Duration
		peek := func() queue.Peek {
			p, err := store.Peek(t.Context(), "default")
			require.NoError(t, err)
			last, p.Last = p.Last, 0
			return p
		}
		assert.Equal(t, queue.Peek{Empty: true}, peek())
		add(t, store, records(2, func(i int, r *queue.Record) { r.Delay = time.Duration(i+1) * time.Hour })...)
		assert.InDelta(t, time.Hour, peek().Wait, float64(time.Minute))
		assert.InDelta(t, 2*time.Hour, last, float64(time.Minute))
		add(t, store, record("due"))
		assert.Equal(t, queue.Peek{}, peek())
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true}, {Queue: "other", Down: true}}})
		assert.Equal(t, queue.Peek{Down: true}, peek())
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true, Probe: time.Hour}}})
		assert.InDelta(t, time.Hour, peek().Probe, float64(time.Minute))
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default"}}})
		assert.Equal(t, queue.Peek{}, peek())
	})
	test("a backend that is down is probed by one owner at a time", func(t *testing.T, store queue.Store) {
		probe := func(owner string) []string {
			c := &queue.Claim{Queue: "default", Max: 10, Lease: time.Minute, Probe: true}
			apply(t, store, &queue.Batch{Owner: owner, Claims: []*queue.Claim{c}})
			return ids(c.Records)
		}
		add(t, store, records(5, nil)...)
		assert.Empty(t, probe("me"), "it is not down")
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true}}})
		assert.Len(t, probe("me"), 1)
		assert.Empty(t, probe("me"))
		assert.Empty(t, probe("other"), "until the probe has ended")
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true, Probe: 50 * time.Millisecond}}})
		require.Eventually(t, func() bool { return len(probe("other")) == 1 }, 20*time.Second, 10*time.Millisecond)
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true, Probe: time.Minute}}})
		assert.Empty(t, probe("me"), "or is not to begin yet")
		apply(t, store, &queue.Batch{Backends: []queue.Backend{{Queue: "default", Down: true, Probe: 2 * time.Minute}}})
		assert.Len(t, probe("me"), 1, "it was noted before the clock was set back")
	})
	test("the newest first", func(t *testing.T, store queue.Store) {
		add(t, store, records(6, func(i int, r *queue.Record) {
			if i == 5 {
				r.Delay = time.Hour
			}
		})...)
		newest := func(limit int) []string {
			c := &queue.Claim{Queue: "default", Max: limit, Lease: time.Minute, Newest: true}
			apply(t, store, &queue.Batch{Owner: "me", Claims: []*queue.Claim{c}})
			return ids(c.Records)
		}
		assert.Equal(t, []string{"event-00004"}, newest(1))
		assert.Equal(t, []string{"event-00002", "event-00003"}, newest(2))
		assert.Equal(t, []string{"event-00000", "event-00001"}, newest(10))
		assert.Empty(t, newest(10))
	})
	test("the newest first, if the last ones are of another queue", func(t *testing.T, store queue.Store) {
		add(t, store, records(1, nil)...)
		add(t, store, records(1100, func(i int, r *queue.Record) { r.ID, r.Queue = fmt.Sprintf("later-%05d", i), "other" })...)
		c := &queue.Claim{Queue: "default", Max: 1, Lease: time.Minute, Newest: true}
		apply(t, store, &queue.Batch{Owner: "me", Claims: []*queue.Claim{c}})
		assert.Equal(t, []string{"event-00000"}, ids(c.Records))
	})
	test("counts", func(t *testing.T, store queue.Store) {
		assert.Empty(t, counts(t, store))
		add(t, store, records(7, func(i int, r *queue.Record) { r.Queue = []string{"a", "b"}[i%2] })...)
		assert.Equal(t, map[string]int{"a pending": 4, "b pending": 3}, counts(t, store))
	})

	test("select", func(t *testing.T, store queue.Store) {
		add(t, store, records(6, func(i int, r *queue.Record) {
			r.Queue, r.Delay = []string{"default", "other"}[i%2], time.Duration(i/2)*30*time.Minute
		})...)
		claim(t, store, "me", 1, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "event-00000", Outcome: queue.Dead})
		get := func(filter queue.Filter) (got []string) {
			require.NoError(t, store.Select(t.Context(), filter, false, func(r *queue.Record) bool {
				assert.Nil(t, r.Request)
				got = append(got, r.ID)
				return true
			}))
			return got
		}
		assert.Equal(t, []string{"event-00000", "event-00001", "event-00002", "event-00003", "event-00004", "event-00005"}, get(queue.Filter{}), "in order")
		assert.Equal(t, []string{"event-00001", "event-00003", "event-00005"}, get(queue.Filter{Queue: "other"}))
		assert.Equal(t, []string{"event-00000"}, get(queue.Filter{Dead: true}))
		assert.Equal(t, []string{"event-00001"}, get(queue.Filter{Due: true}))
		assert.Equal(t, []string{"event-00001", "event-00004"}, get(queue.Filter{IDs: []string{"event-00004", "event-00001", "none"}}))
		assert.Equal(t, []string{"event-00003", "event-00005"}, get(queue.Filter{Queue: "other", After: "event-00001"}))
		assert.Empty(t, get(queue.Filter{IDs: []string{}}))
		n := 0
		require.NoError(t, store.Select(t.Context(), queue.Filter{}, true, func(*queue.Record) bool { n++; return n < 2 }))
		assert.Equal(t, 2, n)
	})
	test("retry gives a fresh age", func(t *testing.T, store queue.Store) {
		add(t, store, records(3, nil)...)
		claim(t, store, "me", 2, time.Minute)
		finish(t, store, "me", queue.Finish{ID: "event-00000", Outcome: queue.Dead, LastError: "too old"})
		time.Sleep(20 * time.Millisecond)
		before := find(t, store, "event-00000").Queued
		n, err := store.Retry(t.Context(), queue.Filter{Dead: true})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		row := find(t, store, "event-00000")
		assert.Equal(t, pending, row.State)
		assert.True(t, row.Queued.After(before))
		assert.Equal(t, "too old", row.LastError, "which an operator may still want to know")
		n, err = store.Retry(t.Context(), queue.Filter{IDs: []string{"event-00001", "event-00002", "none"}})
		require.NoError(t, err)
		assert.Equal(t, 1, n, "what is being delivered is left alone")
		assert.Equal(t, []string{"event-00000", "event-00002"}, claim(t, store, "other", 10, time.Minute))
	})
	test("drop", func(t *testing.T, store queue.Store) {
		add(t, store, records(3, nil)...)
		n, err := store.Drop(t.Context(), queue.Filter{IDs: []string{"event-00000", "none"}})
		require.NoError(t, err)
		assert.Equal(t, 1, n)
		assert.Equal(t, map[string]int{"default pending": 2}, counts(t, store))
	})

	t.Run("two on one database store and deliver, and no event twice", func(t *testing.T) {
		db := newDatabase(t)
		stores := []queue.Store{open(t, db), open(t, db)}
		const events = 600
		var mu sync.Mutex
		claimed := make(map[string]int)
		var wg sync.WaitGroup
		for i, store := range stores {
			wg.Go(func() {
				for j := range events / 2 / 10 {
					b := &queue.Batch{Owner: fmt.Sprint("owner-", i)}
					for k := range 10 {
						b.Add = append(b.Add, record(fmt.Sprintf("%d-%05d-%d", i, j, k)))
					}
					assert.NoError(t, store.Apply(context.Background(), b))
				}
			})
			wg.Go(func() {
				for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					c := &queue.Claim{Queue: "default", Max: 7, Lease: time.Hour}
					if err := store.Apply(context.Background(), &queue.Batch{Owner: fmt.Sprint("owner-", i), Claims: []*queue.Claim{c}}); err != nil {
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
	t.Run("a schema of a later version is left alone", func(t *testing.T) {
		db := newDatabase(t)
		require.NoError(t, open(t, db).Close())
		db.Exec(t, `UPDATE inkit_queue_schema SET version = 99`)
		_, err := db.Open(t.Context())
		require.ErrorIs(t, err, queue.ErrNewer)
		assert.ErrorContains(t, err, "99")
	})
}
