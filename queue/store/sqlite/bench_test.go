package sqlite_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// BenchmarkSQLite measures transactions of 16 events, with few and with many pending
// events.
func BenchmarkSQLite(b *testing.B) {
	open := func(b *testing.B, pending int) store.Store {
		b.Helper()
		s, err := (&sqlite.SQLite{Path: filepath.Join(b.TempDir(), "queue.db")}).Open(context.Background(), store.Opening{Logger: zap.NewNop()})
		require.NoError(b, err)
		b.Cleanup(func() { _ = s.Close() })
		for added := 0; added < pending; added += 500 {
			storetest.Apply(b, s, storetest.NewBatch(min(500, pending-added)))
		}
		return s
	}
	storetest.Measure(b, "1000_wait", open(b, 1000))
	storetest.Measure(b, "1000000_wait", open(b, 1_000_000))
}
