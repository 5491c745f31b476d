package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// idAt returns an id with a time, like the ids of a queue.
func idAt(at time.Time) string {
	id := uuid.Must(uuid.NewV7())
	for i := range 6 {
		id[i] = byte(at.UnixMilli() >> (40 - 8*i))
	}
	return id.String()
}

// The function delivered returns a row of the history.
func delivered(id string, change func(r *store.Record)) *store.Record {
	r := record(id)
	r.Received, r.Finished, r.Attempts, r.Status = time.Now(), time.Now(), 1, 204
	if change != nil {
		change(r)
	}
	return r
}

// The function keyed returns an event with a digest. A second event with the same digest is a
// duplicate.
func keyed(id, digest string) *store.Record {
	r := record(id)
	r.Digest, r.Remember = []byte(digest), time.Hour
	return r
}

// memory tests what a store keeps: the history, digests, and which queues are paused.
func memory(t *testing.T, newDatabase func(t *testing.T) Database) {
	t.Helper()
	test := func(name string, f func(t *testing.T, s store.Store)) {
		t.Run(name, func(t *testing.T) { f(t, open(t, newDatabase(t))) })
	}
	test("a search", searches)
	test("a row of the history", func(t *testing.T, s store.Store) {
		apply(t, s, &store.Batch{History: []*store.Record{delivered("a", func(r *store.Record) { r.EventType = "a\x00b" }), delivered("b", nil)}})
		apply(t, s, &store.Batch{History: []*store.Record{delivered("a", nil)}}) // again, as after a transaction with an unknown result
		row := find(t, s, "b")
		require.NotNil(t, row)
		assert.Equal(t, []any{store.History, "default", "DOCUMENT_CREATE_FINISHED", `doc_ä"'\%`, 1, 204},
			[]any{row.State, row.Queue, row.EventType, row.ResourceID, row.Attempts, row.Status})
		assert.WithinDuration(t, time.Now(), row.Finished, time.Minute)
		assert.WithinDuration(t, time.Now(), row.Received, time.Minute)
		assert.Empty(t, counts(t, s))
		n, err := s.Retry(t.Context(), store.Filter{IDs: []string{"b"}, States: []string{store.History}})
		require.NoError(t, err)
		assert.Zero(t, n)
	})
	test("the history is limited by age and by number of rows", func(t *testing.T, s store.Store) {
		var rows []*store.Record
		for i := range 1200 {
			rows = append(rows, delivered(fmt.Sprintf("event-%05d", i), func(r *store.Record) {
				r.Finished = time.Now().Add(-time.Duration(i) * time.Minute)
				r.Queue = []string{"default", "other"}[i%2]
			}))
		}
		apply(t, s, &store.Batch{History: rows})
		left := func(keep ...store.Keep) (left [2]int) {
			_, err := s.Tidy(t.Context(), keep)
			require.NoError(t, err)
			for i, queue := range []string{"default", "other"} {
				Select(t, s, store.Filter{Queue: queue, States: []string{store.History}}, func(r *store.Record) { left[i]++ })
			}
			return left
		}
		assert.Equal(t, [2]int{600, 600}, left())
		assert.Equal(t, [2]int{600, 600}, left(store.Keep{Queue: "default", For: 24 * time.Hour, Rows: 1000}))
		assert.Equal(t, [2]int{300, 600}, left(store.Keep{Queue: "default", For: 10*time.Hour - 30*time.Second, Rows: 1000}))
		assert.Equal(t, [2]int{300, 7}, left(store.Keep{Queue: "default", For: 24 * time.Hour, Rows: 600}, store.Keep{Queue: "other", For: 24 * time.Hour, Rows: 7}))
		assert.Equal(t, [2]int{300, 0}, left(store.Keep{Queue: "other"}))
		assert.NotNil(t, find(t, s, "event-00000"), "the newest stay")
	})

	test("an event that is stored only once", onces)
	test("an expired key", func(t *testing.T, s store.Store) {
		r := keyed("a", "digest")
		r.Remember = time.Millisecond
		add(t, s, r)
		time.Sleep(20 * time.Millisecond)
		_, err := s.Tidy(t.Context(), nil)
		require.NoError(t, err)
		early := keyed("early", "digest")
		add(t, s, early)
		assert.Equal(t, "a", early.First, "the key of an event that is still there")
		apply(t, s, &store.Batch{Owner: "me", Finish: []store.Finish{{ID: "a", Queue: "default"}}})
		again := keyed("b", "digest")
		add(t, s, again)
		assert.Empty(t, again.First)
		short := keyed("c", "another")
		short.Remember = time.Millisecond
		add(t, s, short)
		apply(t, s, &store.Batch{Owner: "me", Finish: []store.Finish{{ID: "c", Queue: "default"}}})
		time.Sleep(20 * time.Millisecond)
		_, err = s.Tidy(t.Context(), nil)
		require.NoError(t, err)
		keys := rows(t, s, "once", false)
		require.Len(t, keys, 1)
		assert.Equal(t, []any{"default", []byte("digest"), "b"}, keys[0][:3])
		assert.Equal(t, int64(0), keys[0][4], "duplicates")
	})
	test("drop deletes a key without an event or history", func(t *testing.T, s store.Store) {
		add(t, s, keyed("a", "digest"))
		apply(t, s, &store.Batch{Owner: "me", Finish: []store.Finish{{ID: "a", Queue: "default"}}})
		n, err := s.Drop(t.Context(), store.Filter{IDs: []string{"a"}})
		require.NoError(t, err)
		assert.Zero(t, n, "it was to be dropped while pending, and was delivered before")
		assert.Len(t, rows(t, s, "once", false), 1)
		for _, want := range []int{1, 0} {
			n, err := s.Drop(t.Context(), store.Filter{IDs: []string{"a"}, States: []string{store.History}})
			require.NoError(t, err)
			assert.Equal(t, want, n)
		}
		again := keyed("b", "digest")
		add(t, s, again)
		assert.Empty(t, again.First)
	})
	t.Run("two stores add the same events at the same time", func(t *testing.T) {
		db := newDatabase(t)
		stores := []store.Store{open(t, db), open(t, db)}
		const batches, size = 6, 400
		stored := make(chan int, 2*batches)
		for i := range batches {
			for which, s := range stores {
				go func() {
					b := &store.Batch{Owner: fmt.Sprint(which)}
					for j := range size {
						if which == 1 {
							j = size - 1 - j // in reverse order
						}
						b.Add = append(b.Add, keyed(fmt.Sprintf("%d-%d-%d", which, i, j), fmt.Sprintf("digest-%d-%d", i, j)))
					}
					err := s.Apply(t.Context(), b)
					for errors.Is(err, store.ErrLocked) { // on a loaded machine
						err = s.Apply(t.Context(), b)
					}
					assert.NoError(t, err)
					n := 0
					for _, r := range b.Add {
						if r.First == "" {
							n++
						}
					}
					stored <- n
				}()
			}
		}
		total := 0
		for range 2 * batches {
			total += <-stored
		}
		assert.Equal(t, batches*size, total)
		assert.Equal(t, map[string]int{"default pending": batches * size}, counts(t, stores[0]))
	})

	test("pause", func(t *testing.T, s store.Store) {
		pause := func(paused bool) bool {
			changed, err := s.Pause(t.Context(), "default", paused)
			require.NoError(t, err)
			return changed
		}
		peek := func(queue string) time.Time {
			p, err := s.Peek(t.Context(), queue)
			require.NoError(t, err)
			return p.Paused
		}
		assert.False(t, pause(false))
		assert.Zero(t, peek("default"))
		assert.True(t, pause(true))
		assert.False(t, pause(true))
		assert.WithinDuration(t, time.Now(), peek("default"), time.Minute)
		assert.Zero(t, peek("other"))
		assert.True(t, pause(false))
		assert.Zero(t, peek("default"))
	})
	test("status", statuses)
	t.Run("all rows are copied", func(t *testing.T) { copies(t, open(t, newDatabase(t)), open(t, newDatabase(t))) })
}

func rows(t *testing.T, s store.Store, table string, idle bool) (all [][]any) {
	t.Helper()
	for page := (store.Rows{Table: table}); ; {
		var err error
		page, err = s.ReadRows(t.Context(), page, idle)
		require.NoError(t, err)
		if len(page.Rows) == 0 {
			return all
		}
		all = append(all, page.Rows...)
	}
}

func copies(t *testing.T, from, to store.Store) {
	t.Helper()
	const many = 1100 // more than two pages
	add(t, from, records(many, func(i int, r *store.Record) { r.Digest, r.Remember = fmt.Appendf(nil, "digest %d", i), time.Hour })...)
	add(t, from, keyed("duplicate", "digest 7"))
	claim(t, from, "me", 2, time.Hour)
	leased := keyed("leased", "of the leased one")
	leased.Lease, leased.Attempts = time.Hour, 1
	add(t, from, leased)
	finish(t, from, "me", store.Finish{ID: "event-00000", Outcome: store.SetAside, LastError: "status 404"},
		store.Finish{ID: "event-00001", Outcome: store.Later, After: time.Hour, LastError: "status 500"})
	apply(t, from, &store.Batch{History: records(many, func(i int, r *store.Record) { r.Finished, r.Status = time.Now(), 204 })})
	_, err := from.Pause(t.Context(), "default", true)
	require.NoError(t, err)

	add(t, to, record("event-00002"), keyed("other", "digest 3"))
	byKey := func(s store.Store, table string) map[string]string {
		all := make(map[string]string)
		for _, row := range rows(t, s, table, false) {
			all[fmt.Sprint(row[:2])] = fmt.Sprintf("%#v", row)
		}
		return all
	}
	stays := map[string]map[string]string{"events": byKey(to, "events"), "once": byKey(to, "once")}
	for range 2 { // copying can be repeated
		var copied []string
		require.NoError(t, store.Copy(t.Context(), to, from, true, func(ids []string) error {
			copied = append(copied, ids...)
			return nil
		}))
		assert.Len(t, copied, many)
		assert.NotContains(t, copied, "leased")
	}
	assert.Nil(t, find(t, to, "leased"))
	require.NoError(t, store.Copy(t.Context(), to, from, false, func([]string) error { return nil }))
	for table, n := range map[string]int{"events": many + 1, "history": many, "once": many + 1, "paused": 1} {
		require.Len(t, rows(t, from, table, false), n, table)
		want, got := byKey(from, table), byKey(to, table)
		maps.Copy(want, stays[table])
		require.Len(t, got, len(want), table)
		for key := range want {
			require.Equal(t, want[key], got[key], table)
		}
	}
	finish(t, to, "me", store.Finish{ID: "leased", Outcome: store.Later, LastError: "of its owner"})
	assert.Equal(t, "of its owner", find(t, to, "leased").LastError, "the attempt that was running ends as before")

	ctx, stop := context.WithCancel(t.Context())
	err = store.Copy(ctx, to, from, false, func([]string) error { stop(); return nil })
	require.ErrorIs(t, err, context.Canceled)
}

func searches(t *testing.T, s store.Store) {
	now := time.Now().Truncate(time.Millisecond)
	names := make(map[string]string)
	at := func(name string, ago time.Duration, change func(r *store.Record)) *store.Record {
		r := delivered(idAt(now.Add(-ago)), change)
		r.Received = now.Add(-ago)
		names[r.ID] = name
		return r
	}
	failed := at("failed", 3*time.Hour, func(r *store.Record) { r.LastError = `status 500: 10% of a_b\c` })
	waits := at("waits", time.Hour, func(r *store.Record) { r.ResourceID, r.Queue = "doc_1", "other" })
	old := at("old", 5*time.Hour, func(r *store.Record) { r.ResourceID = "doc_1" })
	done := at("done", 4*time.Hour, func(r *store.Record) { r.ResourceID = "doc_1" })
	viewed := at("viewed", 2*time.Hour, func(r *store.Record) { r.EventType = "DOCUMENT_PDF_ACCESS" })
	apply(t, s, &store.Batch{Add: []*store.Record{failed, waits, old}, History: []*store.Record{done, viewed}})
	finish(t, s, "me", store.Finish{ID: old.ID, Outcome: store.SetAside, LastError: "status 404"})
	everything := []string{store.Pending, store.Dead, store.History}
	for _, tt := range []struct {
		name   string
		filter store.Filter
		want   []string
	}{
		{"pending and dead events", store.Filter{}, []string{"old", "failed", "waits"}},
		{"all", store.Filter{States: everything}, []string{"old", "done", "failed", "viewed", "waits"}},
		{"all, newest first", store.Filter{States: everything, Newest: true}, []string{"waits", "viewed", "failed", "done", "old"}},
		{"one state", store.Filter{States: []string{store.Pending}}, []string{"failed", "waits"}},
		{"dead events", store.Filter{States: []string{store.Dead}}, []string{"old"}},
		{"delivered events", store.Filter{States: []string{store.History}}, []string{"done", "viewed"}},
		{"all events of a resource", store.Filter{States: everything, Resource: "doc_1"}, []string{"old", "done", "waits"}},
		{"a resource in a queue", store.Filter{States: everything, Resource: "doc_1", Queue: "other"}, []string{"waits"}},
		{"a type", store.Filter{States: everything, Type: "DOCUMENT_PDF_ACCESS"}, []string{"viewed"}},
		{"a queue", store.Filter{States: everything, Queue: "other"}, []string{"waits"}},
		{"a part of an error", store.Filter{States: everything, Error: "Status"}, []string{"old", "failed"}},
		{"a part of an error with the wildcards of LIKE", store.Filter{Error: `0% of a_b\c`}, []string{"failed"}},
		{"a wildcard of LIKE matches only itself", store.Filter{Error: "4_4"}, nil},
		{"since", store.Filter{States: everything, Since: now.Add(-3 * time.Hour)}, []string{"failed", "viewed", "waits"}},
		{"until", store.Filter{States: everything, Until: now.Add(-3 * time.Hour)}, []string{"old", "done"}},
		{"since and until, newest first", store.Filter{States: everything, Since: now.Add(-4 * time.Hour), Until: now.Add(-time.Hour), Newest: true}, []string{"viewed", "failed", "done"}},
		{"ids", store.Filter{States: everything, IDs: []string{done.ID, failed.ID, "none"}}, []string{"done", "failed"}},
		{"no ids", store.Filter{States: everything, IDs: []string{}}, nil},
	} {
		for _, limit := range []int{0, 1, 2} {
			tt.filter.Limit = limit
			var got []string
			Select(t, s, tt.filter, func(r *store.Record) { got = append(got, names[r.ID]) })
			assert.Equal(t, tt.want, got, "%s, %d at a time", tt.name, limit)
		}
	}
	assert.WithinDuration(t, now.Add(-time.Hour), store.TimeOf(waits.ID), time.Second)
	assert.Zero(t, store.TimeOf("event"))

	n, err := s.Drop(t.Context(), store.Filter{States: everything, Resource: "doc_1", Until: now.Add(-2 * time.Hour)})
	require.NoError(t, err)
	assert.Equal(t, 2, n)
	assert.NotNil(t, find(t, s, waits.ID))
}

func onces(t *testing.T, s store.Store) {
	firsts := func(all ...*store.Record) (firsts []string) {
		add(t, s, all...)
		for _, r := range all {
			firsts = append(firsts, r.First)
		}
		return firsts
	}
	other := keyed("other", "digest")
	other.Queue = "other"
	assert.Equal(t, []string{"", "a", "", "", "a", ""}, firsts(keyed("a", "digest"), keyed("b", "digest"), keyed("c", "another"), other, keyed("d", "digest"), record("e")))
	assert.Equal(t, map[string]int{"default pending": 3, "other pending": 1}, counts(t, s))
	assert.Equal(t, []string{"a"}, firsts(keyed("f", "digest")))
	assert.Equal(t, []string{""}, firsts(keyed("a", "digest")), "the same event again, whose transaction was in doubt")

	claim(t, s, "me", 10, time.Minute)
	finish(t, s, "me", store.Finish{ID: "a", Outcome: store.Delivered}, store.Finish{ID: "c", Outcome: store.SetAside})
	assert.Equal(t, []string{"a", "c"}, firsts(keyed("g", "digest"), keyed("h", "another")), "also when it is delivered, or dead")

	n, err := s.Drop(t.Context(), store.Filter{IDs: []string{"c"}})
	require.NoError(t, err)
	assert.Equal(t, 1, n)
	assert.Equal(t, []string{"a", ""}, firsts(keyed("i", "digest"), keyed("j", "another")), "and not when it is dropped")

	without := record("k")
	without.Request = nil
	require.Error(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{keyed("l", "new"), without}}))
	assert.Equal(t, []string{""}, firsts(keyed("m", "new")), "what was not stored leaves no key")
	status, err := s.Status(t.Context())
	require.NoError(t, err)
	require.Len(t, status.Queues, 2)
	assert.Equal(t, 5, status.Queues[0].Duplicates)
}

func statuses(t *testing.T, s store.Store) {
	status, err := s.Status(t.Context(), "configured")
	require.NoError(t, err)
	assert.Positive(t, status.Size)
	assert.Equal(t, []store.QueueStatus{{Queue: "configured"}}, status.Queues)

	add(t, s, records(30, func(i int, r *store.Record) {
		r.LastError = fmt.Sprint("status ", 500+i%7)
		r.Lease = 30 * time.Minute
	})...)
	finish(t, s, "me", store.Finish{ID: "event-00000", Outcome: store.SetAside, LastError: "status 404"})
	ago := func(name string, ago time.Duration, attempts int) *store.Record {
		return delivered(name, func(r *store.Record) { r.Finished, r.Attempts = time.Now().Add(-ago), attempts })
	}
	apply(t, s, &store.Batch{History: []*store.Record{
		ago("future", -time.Minute, 1), ago("now", 0, 3), ago("earlier", 61*time.Minute, 1), ago("yesterday", 23*time.Hour+time.Minute, 2), ago("before", 25*time.Hour, 5),
	}})
	_, err = s.Pause(t.Context(), "paused", true)
	require.NoError(t, err)
	status, err = s.Status(t.Context())
	require.NoError(t, err)
	require.Len(t, status.Queues, 2)
	got := status.Queues[0]
	assert.Equal(t, []any{"default", 29, 1, 4, 3}, []any{got.Queue, got.Pending, got.Dead, got.Delivered.Sum(), got.Failed.Sum()})
	assert.Equal(t, store.Hours{0: 1, 22: 1, 23: 2}, got.Delivered)
	assert.InDelta(t, 30*time.Minute, got.Next, float64(time.Minute))
	assert.Zero(t, got.Paused)
	assert.Equal(t, []store.ErrorCount{
		{Error: "status 501", Events: 5}, {Error: "status 500", Events: 4}, {Error: "status 502", Events: 4}, {Error: "status 503", Events: 4}, {Error: "status 504", Events: 4},
	}, got.Errors)
	id, err := uuid.NewV7()
	require.NoError(t, err)
	add(t, s, record(id.String()))
	status, err = s.Status(t.Context())
	require.NoError(t, err)
	assert.Equal(t, store.Hours{23: 1}, status.Kept, "by the time in the id")
	assert.Equal(t, store.Hours{0: 1, 23: 2}, status.Queues[0].Failed)
	assert.Equal(t, "paused", status.Queues[1].Queue)
	assert.WithinDuration(t, time.Now(), status.Queues[1].Paused, time.Minute)
}
