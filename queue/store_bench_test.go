package queue_test

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/stretchr/testify/require"
)

// benchSize is how many events a transaction of measure has.
const benchSize = 16

var benchID int

// newBatch returns n events to add, of 800 bytes.
func newBatch(n int) *queue.Batch {
	batch := &queue.Batch{Owner: "me"}
	for range n {
		benchID++
		batch.Add = append(batch.Add, &queue.Record{
			ID: fmt.Sprintf("new-%09d", benchID), Queue: "default", Received: time.Now(), Request: make([]byte, 800), Checksum: make([]byte, 32),
		})
	}
	return batch
}

func benchApply(b *testing.B, store queue.Store, batch *queue.Batch) {
	b.Helper()
	require.NoError(b, store.Apply(context.Background(), batch))
}

// benchDeliver delivers n events, and returns what is to be written of that.
func benchDeliver(b *testing.B, store queue.Store, n int, before []queue.Finish) []queue.Finish {
	b.Helper()
	claim := &queue.Claim{Queue: "default", Max: n, Lease: time.Minute}
	benchApply(b, store, &queue.Batch{Owner: "me", Finish: before, Claims: []*queue.Claim{claim}})
	require.Len(b, claim.Records, n)
	finish := make([]queue.Finish, n)
	for i, r := range claim.Records {
		finish[i] = queue.Finish{ID: r.ID, Queue: "default", Outcome: queue.Delivered}
	}
	return finish
}

// measure is for a store with events that wait.
func measure(b *testing.B, name string, store queue.Store) {
	b.Helper()
	b.Run(name+"/store", func(b *testing.B) {
		for b.Loop() {
			benchApply(b, store, newBatch(benchSize))
		}
	})
	b.Run(name+"/deliver", func(b *testing.B) {
		var finish []queue.Finish
		for b.Loop() {
			finish = benchDeliver(b, store, benchSize, finish)
			benchApply(b, store, newBatch(benchSize)) // so that there are as many
		}
		benchApply(b, store, &queue.Batch{Owner: "me", Finish: finish})
	})
	b.Run(name+"/look", func(b *testing.B) {
		for b.Loop() {
			_, err := store.Peek(context.Background(), "default")
			require.NoError(b, err)
		}
	})
	b.Run(name+"/count", func(b *testing.B) {
		for b.Loop() {
			_, err := store.Counts(context.Background())
			require.NoError(b, err)
		}
	})
}

// BenchmarkSQLite measures transactions of 16 events, with few and with many events
// that wait.
func BenchmarkSQLite(b *testing.B) {
	open := func(b *testing.B, pending int) queue.Store {
		b.Helper()
		store, err := (&queue.SQLite{Path: filepath.Join(b.TempDir(), "queue.db")}).Open(context.Background())
		require.NoError(b, err)
		b.Cleanup(func() { _ = store.Close() })
		for added := 0; added < pending; added += 500 {
			benchApply(b, store, newBatch(min(500, pending-added)))
		}
		return store
	}
	measure(b, "1000_wait", open(b, 1000))
	measure(b, "1000000_wait", open(b, 1_000_000))
}
