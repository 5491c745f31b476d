//go:build linux

package postgres_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// BenchmarkPostgres measures transactions of 16 events, with few and with many pending
// events, and after a million delivered events. Run it with -benchtime=5s.
func BenchmarkPostgres(b *testing.B) {
	server := pgtest.Start(b)
	open := func(b *testing.B, pending int) (store.Store, string) {
		b.Helper()
		name := server.NewDatabase(b)
		s, err := opener(server.DSN(name)).Open(context.Background(), store.Opening{Logger: zap.NewNop()})
		require.NoError(b, err)
		b.Cleanup(func() { _ = s.Close() })
		server.Exec(b, name, fmt.Sprintf(`INSERT INTO inkit_queue_events
			SELECT 'old-' || lpad(n::text, 9, '0'), 'default', 'pending', n, n + 0, n + 0, NULL::bigint, NULL, 0, '', 'DOCUMENT_CREATE_FINISHED', 'doc', decode(repeat('ab', 800), 'hex'), '\x00'
			FROM generate_series(1, %d) n`, pending), "ANALYZE", "CHECKPOINT")
		return s, name
	}
	few, name := open(b, 1000)
	storetest.Measure(b, "1000_wait", few)
	many, _ := open(b, 1_000_000)
	storetest.Measure(b, "1000000_wait", many)

	began := time.Now()
	const through = 1_000_000
	var finish []store.Finish
	for i := 0; i < through; i += 500 {
		storetest.Apply(b, few, storetest.NewBatch(500))
		finish = storetest.Deliver(b, few, 500, finish)
	}
	storetest.Apply(b, few, &store.Batch{Owner: "me", Finish: finish})
	fmt.Printf("%d delivered in %v; then %s\n", through, time.Since(began).Round(time.Second), server.Query(b, name,
		`SELECT n_dead_tup || ' dead rows, ' || autovacuum_count || ' autovacuums, ' || n_tup_hot_upd || ' of ' || n_tup_upd || ' updates HOT, table ' || pg_size_pretty(pg_table_size(relid)) || ', indexes ' || pg_size_pretty(pg_indexes_size(relid)) FROM pg_stat_user_tables WHERE relname = 'inkit_queue_events'`))
	storetest.Measure(b, "after_1000000_delivered", few)
}
