package sqlite_test

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestSQLiteIsAStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Database {
		path := filepath.Join(t.TempDir(), "queue.db")
		return storetest.Database{Opener: &sqlite.SQLite{Path: path}, Exec: func(t *testing.T, statement string) {
			t.Helper()
			db, err := sql.Open("sqlite", path)
			require.NoError(t, err)
			defer db.Close()
			_, err = db.Exec(statement)
			require.NoError(t, err)
		}}
	})
}

// Close copies the events of a database whose file and log index (-shm) were deleted.
func TestSQLiteDeletedWithItsIndex(t *testing.T) {
	opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
	s, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{{
		ID: "a", Queue: "default", Received: time.Now(), Request: []byte("request"), Checksum: []byte("checksum"),
	}}}))
	require.NoError(t, os.Remove(opener.Path))
	require.NoError(t, os.Remove(opener.Path+"-shm"))
	require.NoError(t, s.Close())
	s, err = opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	found := 0
	storetest.Select(t, s, store.Filter{}, func(*store.Record) { found++ })
	require.Equal(t, 1, found)
}

// After a power cut, the write-ahead log can end anywhere. The events of all transactions
// before this end are stored.
func TestSQLiteLogThatIsCut(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "running?#%41.db") // these characters are special in the URI for the driver
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	var acked []int64 // for each event, the length of the log when the event was acknowledged
	for i := range 40 {
		request := make([]byte, i*37%3000)
		require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{{
			ID: fmt.Sprintf("event-%03d", i), Queue: "default", Received: time.Now(), Request: request, Checksum: []byte("checksum"),
		}}}))
		info, err := os.Stat(path + "-wal")
		require.NoError(t, err)
		acked = append(acked, info.Size())
	}
	database, err := os.ReadFile(path)
	require.NoError(t, err)
	log, err := os.ReadFile(path + "-wal")
	require.NoError(t, err)
	require.True(t, slices.IsSorted(acked), "the log was not written into the file meanwhile")

	random := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		cut := random.Int64N(acked[len(acked)-1] + 1)
		want, _ := slices.BinarySearchFunc(acked, cut, func(length, cut int64) int {
			if length <= cut {
				return -1
			}
			return 1
		})
		copied := filepath.Join(dir, fmt.Sprintf("copy-%d?mode=memory.db", i))
		require.NoError(t, os.WriteFile(copied, database, 0o600))
		require.NoError(t, os.WriteFile(copied+"-wal", log[:cut], 0o600))
		s, err := (&sqlite.SQLite{Path: copied}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
		require.NoError(t, err, "cut at %d", cut)
		var ids []string
		storetest.Select(t, s, store.Filter{}, func(r *store.Record) {
			ids = append(ids, r.ID)
		})
		require.GreaterOrEqual(t, len(ids), want, "cut at %d", cut)
		for j := range want {
			require.Equal(t, fmt.Sprintf("event-%03d", j), ids[j], "cut at %d", cut)
		}
		require.NoError(t, s.Close())
	}
}
