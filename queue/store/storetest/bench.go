package storetest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/require"
)

// benchSize is the number of events in each transaction of Measure.
const benchSize = 16

var benchID int

// NewBatch returns a batch that adds n events of 800 bytes.
func NewBatch(n int) *store.Batch {
	batch := &store.Batch{Owner: "me"}
	for range n {
		benchID++
		batch.Add = append(batch.Add, &store.Record{
			ID: fmt.Sprintf("new-%09d", benchID), Queue: "default", Received: time.Now(), Request: make([]byte, 800), Checksum: make([]byte, 32),
		})
	}
	return batch
}

func Apply(b *testing.B, s store.Store, batch *store.Batch) {
	b.Helper()
	require.NoError(b, s.Apply(context.Background(), batch))
}

// Deliver applies a batch that has the finishes in the argument `before` and claims n events. It
// returns a Finish for each claimed event.
func Deliver(b *testing.B, s store.Store, n int, before []store.Finish) []store.Finish {
	b.Helper()
	claim := &store.Claim{Queue: "default", Max: n, Lease: time.Minute}
	Apply(b, s, &store.Batch{Owner: "me", Finish: before, Claims: []*store.Claim{claim}})
	require.Len(b, claim.Records, n)
	finish := make([]store.Finish, n)
	for i, r := range claim.Records {
		finish[i] = store.Finish{ID: r.ID, Queue: "default", Outcome: store.Delivered}
	}
	return finish
}

// Measure runs the benchmarks of a store.
func Measure(b *testing.B, name string, s store.Store) {
	b.Helper()
	b.Run(name+"/store", func(b *testing.B) {
		for b.Loop() {
			Apply(b, s, NewBatch(benchSize))
		}
	})
	b.Run(name+"/deliver", func(b *testing.B) {
		var finish []store.Finish
		for b.Loop() {
			finish = Deliver(b, s, benchSize, finish)
			Apply(b, s, NewBatch(benchSize)) // keeps the number of pending events constant
		}
		Apply(b, s, &store.Batch{Owner: "me", Finish: finish})
	})
	b.Run(name+"/look", func(b *testing.B) {
		for b.Loop() {
			_, err := s.Peek(context.Background(), "default")
			require.NoError(b, err)
		}
	})
	b.Run(name+"/count", func(b *testing.B) {
		for b.Loop() {
			_, err := s.Counts(context.Background())
			require.NoError(b, err)
		}
	})
}
