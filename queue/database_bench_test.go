package queue

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// BenchmarkStore has senders make events durable, each of them one after another: with
// the group commit of this package, and with a commit for each event. What one process
// can append to a file and have written to the disk is there to compare.
func BenchmarkStore(b *testing.B) {
	var last atomic.Int64
	r, e := arrived(b, "http://example.com/webhook", body, nil)
	request := newRequest(r, e)
	newRecord := func() *Record {
		return &Record{ID: fmt.Sprintf("event-%012d", last.Add(1)), Queue: "default", Received: time.Now(), EventType: e.Type(), ResourceID: e.ResourceID()}
	}
	encoded, err := request.encode()
	require.NoError(b, err)

	for _, senders := range []int{1, 8, 64} {
		run := func(name string, one func() error) {
			b.Run(fmt.Sprintf("%s/%d_senders", name, senders), func(b *testing.B) {
				var left atomic.Int64
				left.Store(int64(b.N))
				var wg sync.WaitGroup
				b.ResetTimer()
				for range senders {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if err := one(); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			})
		}

		d := newDatabase(&SQLite{Path: filepath.Join(b.TempDir(), "group.db")}, zap.NewNop())
		d.start()
		metrics := newQueueMetrics("benchmark")
		run("group_commit", func() error {
			a := d.add(newRecord(), request, false, &metrics)
			<-a.done
			return a.err
		})
		d.close()

		store, err := (&SQLite{Path: filepath.Join(b.TempDir(), "each.db")}).Open(b.Context())
		require.NoError(b, err)
		run("a_commit_each", func() error {
			rec := newRecord()
			rec.Request = encoded
			rec.Checksum = rec.checksum()
			return store.Apply(context.Background(), &Batch{Owner: "me", Add: []*Record{rec}})
		})
		require.NoError(b, store.Close())

		if senders == 1 {
			file, err := os.Create(filepath.Join(b.TempDir(), "appended"))
			require.NoError(b, err)
			run("append_and_sync", func() error {
				if _, err := file.Write(encoded); err != nil {
					return err
				}
				return file.Sync()
			})
			require.NoError(b, file.Close())
		}
	}
}
