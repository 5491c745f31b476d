package writer

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// database is a store in memory. A test can slow down its transactions or make them fail.
type database struct {
	store.Store

	mu      sync.Mutex
	apply   func(b *store.Batch) error
	batches []store.Batch
}

func (d *database) Apply(_ context.Context, b *store.Batch) error {
	d.mu.Lock()
	apply := d.apply
	d.mu.Unlock()
	if apply != nil {
		if err := apply(b); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.batches = append(d.batches, *b)
	return nil
}

// The method written returns the successful transactions.
func (d *database) written() []store.Batch {
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.batches)
}

func (d *database) Due(_ context.Context, _ *store.Claim, why error) error { return why }
func (d *database) Close() error                                           { return nil }

type silent struct{}

func (silent) Opened()              {}
func (silent) Written(*store.Batch) {}
func (silent) Failed(error)         {}

func event(id string) *store.Record {
	return &store.Record{ID: id, Queue: "default", Lease: time.Minute, Attempts: 1}
}

func request() ([]byte, error) { return []byte("request"), nil }

// add adds an event whose sender waits for the duration `wait`.
func add(w *Writer, r *store.Record, wait time.Duration) *Addition {
	a := NewAddition(r, request, time.Now().Add(wait), func(error) {})
	w.Add(a)
	return a
}

func TestWriter(t *testing.T) {
	broken := errors.New("the connection is broken")
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, w *Writer, d *database)
	}{
		{"all waiting events go into one transaction", func(t *testing.T, w *Writer, d *database) {
			slow := make(chan struct{})
			d.apply = func(*store.Batch) error { <-slow; return nil }
			first := add(w, event("first"), time.Minute)
			synctest.Wait()
			var rest []*Addition
			for range 10 {
				rest = append(rest, add(w, event("later"), time.Minute))
			}
			close(slow)
			synctest.Wait()
			require.NoError(t, first.Err())
			for _, a := range rest {
				<-a.Done()
			}
			require.Len(t, d.written(), 2)
			assert.Len(t, d.written()[1].Add, 10)
		}},
		{"a failed transaction is retried until it succeeds", func(t *testing.T, w *Writer, d *database) {
			until := time.Now().Add(3 * time.Second)
			d.apply = func(*store.Batch) error {
				if time.Now().Before(until) {
					return broken
				}
				return nil
			}
			a := add(w, event("a"), 5*time.Second)
			<-a.Done()
			require.NoError(t, a.Err())
			assert.False(t, w.Failing())
		}},
		{"an event fails when its sender stops waiting", func(t *testing.T, w *Writer, d *database) {
			d.apply = func(*store.Batch) error { return broken }
			began := time.Now()
			a := add(w, event("a"), 5*time.Second)
			<-a.Done()
			require.Error(t, a.Err())
			assert.InDelta(t, 5*time.Second, time.Since(began), float64(time.Second))
			assert.True(t, w.Failing())
		}},
		{"a full disk refuses new events immediately, but stores results", func(t *testing.T, w *Writer, d *database) {
			d.apply = func(b *store.Batch) error {
				if len(b.Add) > 0 {
					return store.ErrFull
				}
				return nil
			}
			began := time.Now()
			w.Finish(nil, store.Finish{ID: "delivered"})
			a := add(w, event("a"), 5*time.Second)
			<-a.Done()
			require.ErrorIs(t, a.Err(), store.ErrFull)
			assert.Zero(t, time.Since(began))
			synctest.Wait()
			require.NotEmpty(t, d.written())
			assert.Equal(t, "delivered", d.written()[0].Finish[0].ID)
		}},
		{"an event that is delivered before its transaction is not written", func(t *testing.T, w *Writer, d *database) {
			slow := make(chan struct{})
			d.apply = func(*store.Batch) error { <-slow; return nil }
			add(w, event("other"), time.Minute)
			synctest.Wait()
			a := add(w, event("a"), time.Minute)
			w.Finish(a, store.Finish{ID: "a"})
			require.ErrorIs(t, a.Err(), ErrCalledBack)
			close(slow)
			synctest.Wait()
			require.Len(t, d.written(), 1)
		}},
		{"an event that is delivered during a failing transaction is not written", func(t *testing.T, w *Writer, d *database) {
			slow := make(chan struct{})
			d.apply = func(*store.Batch) error { <-slow; return broken }
			a := add(w, event("a"), time.Minute)
			synctest.Wait()
			w.Finish(a, store.Finish{ID: "a"})
			close(slow)
			<-a.Done()
			require.ErrorIs(t, a.Err(), ErrCalledBack)
		}},
		{"if an attempt fails during the transaction of its event, the next transaction has the result", func(t *testing.T, w *Writer, d *database) {
			slow := make(chan struct{}, 1)
			d.apply = func(*store.Batch) error { <-slow; return nil }
			a := add(w, event("a"), time.Minute)
			synctest.Wait()
			w.Finish(a, store.Finish{ID: "a", Outcome: store.Later, After: time.Second, LastError: "status 500"})
			close(slow)
			synctest.Wait()
			require.Len(t, d.written(), 2)
			assert.Equal(t, "status 500", d.written()[1].Finish[0].LastError)
		}},
		{"if an attempt fails before, the same transaction has the result, and the retry too", func(t *testing.T, w *Writer, d *database) {
			why := broken
			d.apply = func(*store.Batch) (err error) { err, why = why, nil; return err }
			a := NewAddition(event("a"), request, time.Now().Add(time.Minute), func(error) {})
			w.Finish(a, store.Finish{ID: "a", Outcome: store.Later, LastError: "status 500"})
			w.Add(a)
			<-a.Done()
			require.NoError(t, a.Err())
			assert.Equal(t, "status 500", d.written()[0].Finish[0].LastError)
			assert.Len(t, d.written()[0].Add, 1)
		}},
		{"history is written with the next transaction", func(t *testing.T, w *Writer, d *database) {
			w.Remember(event("delivered"))
			add(w, event("a"), time.Minute)
			synctest.Wait()
			require.Len(t, d.written(), 1)
			assert.Len(t, d.written()[0].History, 1)
			time.Sleep(2 * historyPause)
			synctest.Wait()
			assert.Len(t, d.written(), 1)
		}},
		{"without another transaction, history is written within a second, many rows at a time", func(t *testing.T, w *Writer, d *database) {
			for range 2 * maxBatch {
				w.Remember(event("delivered"))
			}
			synctest.Wait()
			assert.Empty(t, d.written())
			time.Sleep(historyPause)
			synctest.Wait()
			require.Len(t, d.written(), 2)
			assert.Len(t, d.written()[1].History, maxBatch)
		}},
		{"history that cannot be written is retried, and its size is bounded", func(t *testing.T, w *Writer, d *database) {
			d.apply = func(*store.Batch) error { return broken }
			for range historyRoom + maxBatch {
				w.Remember(event("delivered"))
			}
			time.Sleep(10 * time.Second)
			d.mu.Lock()
			d.apply = nil
			d.mu.Unlock()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			rows := 0
			for _, b := range d.written() {
				rows += len(b.History)
			}
			assert.Equal(t, historyRoom, rows)
			assert.False(t, w.Failing(), "failed history does not count as a failure to store events")
		}},
		{"a full disk drops history, but stores results", func(t *testing.T, w *Writer, d *database) {
			d.apply = func(b *store.Batch) error {
				if len(b.History) > 0 {
					return store.ErrFull
				}
				return nil
			}
			w.Remember(event("delivered"))
			w.Finish(nil, store.Finish{ID: "delivered"})
			synctest.Wait()
			require.Len(t, d.written(), 1)
			assert.Len(t, d.written()[0].Finish, 1)
			time.Sleep(2 * historyPause)
			synctest.Wait()
			assert.Len(t, d.written(), 1)
		}},
		{"Close writes all history", func(t *testing.T, w *Writer, d *database) {
			for range 3 * maxBatch {
				w.Remember(event("delivered"))
			}
			t.Cleanup(func() {
				rows := 0
				for _, b := range d.written() {
					rows += len(b.History)
				}
				assert.Equal(t, 3*maxBatch, rows)
			})
		}},
		{"an event that was stored before is a duplicate", func(t *testing.T, w *Writer, d *database) {
			d.apply = func(b *store.Batch) error { b.Add[0].First = "first"; return nil }
			a := add(w, event("a"), time.Minute)
			<-a.Done()
			require.ErrorIs(t, a.Err(), ErrDuplicate)
			w.Finish(a, store.Finish{ID: "a"})
			synctest.Wait()
			assert.Len(t, d.written(), 1)
		}},
		{"a result for a locked row is retried, and its event is not claimed before it is written", func(t *testing.T, w *Writer, d *database) {
			locked := true
			d.apply = func(b *store.Batch) error {
				if b.Left = nil; locked {
					b.Left = b.Finish
				}
				for _, c := range b.Claims {
					c.Records = []*store.Record{{ID: "a"}, {ID: "b"}}
				}
				return nil
			}
			w.Finish(nil, store.Finish{ID: "a"})
			synctest.Wait()
			records, err := w.Claim(&store.Claim{Queue: "default", Max: 2})
			require.NoError(t, err)
			assert.Equal(t, []*store.Record{{ID: "b"}}, records)
			w.Finish(nil, store.Finish{ID: "b", Outcome: store.Later})
			d.mu.Lock()
			locked = false
			d.mu.Unlock()
			time.Sleep(pause)
			records, err = w.Claim(&store.Claim{Queue: "default", Max: 2})
			require.NoError(t, err)
			assert.Len(t, records, 2)
		}},
		{"an event is claimed again after a claim that failed after its commit", func(t *testing.T, w *Writer, d *database) {
			why := broken
			d.apply = func(b *store.Batch) error {
				for _, c := range b.Claims {
					c.Records = []*store.Record{{ID: "old"}}
				}
				return why
			}
			_, err := w.Claim(&store.Claim{Queue: "default", Max: 1})
			require.ErrorIs(t, err, broken)
			why = nil
			records, err := w.Claim(&store.Claim{Queue: "default", Max: 1})
			require.NoError(t, err)
			assert.Len(t, records, 1)
		}},
		{"an event in an attempt is not claimed, even if the clock makes it due and the attempt ends during the claim", func(t *testing.T, w *Writer, d *database) {
			var during func()
			d.apply = func(b *store.Batch) error {
				for _, c := range b.Claims {
					c.Records = []*store.Record{{ID: "old"}, {ID: "new"}}
					during()
				}
				return nil
			}
			during = func() {}
			a := add(w, event("new"), time.Minute)
			<-a.Done()
			records, err := w.Claim(&store.Claim{Queue: "default", Max: 2})
			require.NoError(t, err)
			assert.Equal(t, []*store.Record{{ID: "old"}}, records)
			during = func() {
				w.Finish(a, store.Finish{ID: "new"})
				w.Finish(nil, store.Finish{ID: "old"})
			}
			late := &claim{&store.Claim{Queue: "default", Max: 2}, make(chan error)} // the test receives the result of this claim late
			w.mu.Lock()
			w.claims = append(w.claims, late)
			w.mu.Unlock()
			w.poke()
			synctest.Wait()
			require.NoError(t, <-late.done)
			synctest.Wait()
			assert.Empty(t, late.Records)
			assert.Len(t, d.written()[len(d.written())-1].Finish, 2)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := new(database)
				w := New("me", func(context.Context) (store.Store, error) { return d, nil }, silent{})
				synctest.Wait()
				tt.do(t, w, d)
				d.mu.Lock()
				d.apply = nil
				d.mu.Unlock()
				w.Close()
			})
		})
	}
}

// A writer closes even if its database never opens.
func TestWriterThatNeverOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New("me", func(context.Context) (store.Store, error) { return nil, errors.New("there is no server") }, silent{})
		w.Remember(event("delivered"))
		w.Finish(nil, store.Finish{ID: "a"})
		time.Sleep(time.Minute)
		w.Close()
	})
}

func TestWriterBeforeTheDatabaseIsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, tries := new(database), 0
		var w *Writer
		var a, delivered *Addition
		w = New("me", func(context.Context) (store.Store, error) {
			if tries++; tries < 4 {
				return nil, errors.New("the server starts")
			}
			w.Finish(delivered, store.Finish{ID: "delivered"})
			return d, nil
		}, silent{})
		a, delivered = add(w, event("a"), 5*time.Second), add(w, event("delivered"), 5*time.Second)
		_, err := w.Claim(new(store.Claim))
		require.Error(t, err)
		<-a.Done()
		require.NoError(t, a.Err())
		require.ErrorIs(t, delivered.Err(), ErrCalledBack)
		assert.Len(t, d.written()[0].Add, 1)
		w.Close()
	})
}
