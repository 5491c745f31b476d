package queue

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func newRec(i int) *Record {
	r := &Record{ID: fmt.Sprintf("%s-%08d", time.Now().Format("150405.000000000"), i), Queue: "default", Received: time.Now(), EventType: "DOCUMENT_CREATE_FINISHED", ResourceID: "doc_2N0X2g4f3b1JJU75fqzDZs", Request: make([]byte, 700)}
	r.Checksum = r.checksum()
	return r
}

func BenchmarkFsync(b *testing.B) {
	f, err := os.Create(b.TempDir() + "/x")
	require.NoError(b, err)
	buf := make([]byte, 1024)
	for b.Loop() {
		f.Write(buf)
		syscall.Fdatasync(int(f.Fd()))
	}
}

func BenchmarkApply(b *testing.B) {
	for _, n := range []int{1, 8, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			o := &SQLite{Path: b.TempDir() + "/q.db"}
			st, err := o.Open(context.Background())
			require.NoError(b, err)
			defer st.Close()
			i := 0
			for b.Loop() {
				batch := &Batch{Owner: "me"}
				for range n {
					i++
					batch.Add = append(batch.Add, newRec(i))
				}
				require.NoError(b, st.Apply(context.Background(), batch))
			}
			b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

var _ = sync.Mutex{}
