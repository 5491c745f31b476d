package sqlite_test

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
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

// After the delivery of many events, the file shrinks. If another program has rebuilt the file, it
// may not shrink, but Tidy still ends. A command that only reads, such as list, writes nothing into
// the file.
func TestSQLiteFileShrinks(t *testing.T) {
	opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
	s, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	size := func(suffix string) int64 {
		info, err := os.Stat(opener.Path + suffix)
		require.NoError(t, err)
		return info.Size()
	}
	fillAndTidy := func() {
		batch, finish := new(store.Batch), new(store.Batch)
		for i := range 200 {
			id := fmt.Sprintf("event-%03d", i)
			batch.Add = append(batch.Add, &store.Record{ID: id, Queue: "default", Received: time.Now(), Request: make([]byte, 1<<15), Checksum: []byte("checksum")})
			finish.Finish = append(finish.Finish, store.Finish{ID: id, Queue: "default", Outcome: store.Delivered})
		}
		require.NoError(t, s.Apply(t.Context(), batch))
		require.NoError(t, s.Apply(t.Context(), finish))
		require.Greater(t, size(""), int64(4<<20))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = s.Tidy(ctx, nil)
		require.NoError(t, err)
	}
	fillAndTidy()
	require.Less(t, size(""), int64(2<<20))

	require.Zero(t, size("-wal"))
	command, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop(), Command: true, Existing: true})
	require.NoError(t, err)
	storetest.Select(t, command, store.Filter{}, func(*store.Record) {})
	require.NoError(t, command.Close())
	require.Zero(t, size("-wal"))

	db, err := sql.Open("sqlite", opener.Path)
	require.NoError(t, err)
	_, err = db.Exec(`PRAGMA auto_vacuum = none; VACUUM`)
	require.NoError(t, err)
	require.NoError(t, db.Close())
	fillAndTidy()

	require.NoError(t, s.Close())
	require.NoError(t, os.WriteFile(opener.Path, bytes.Repeat([]byte("damaged "), 1<<12), 0o600))
	s, err = opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	fillAndTidy()
	require.Less(t, size(""), int64(2<<20), "a new file shrinks, too")
}

// Several Caddys open a damaged file at the same time. The first one moves it aside. The others must
// not move the new file aside, because it may already have events.
func TestSQLiteDamagedForSeveral(t *testing.T) {
	const rounds, limit = 20, 2 // a Caddy checks the file just before it renames the file: a small risk is left
	wrong := 0
	for range rounds {
		opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
		require.NoError(t, os.WriteFile(opener.Path, bytes.Repeat([]byte("damaged "), 1<<12), 0o600))
		require.NoError(t, os.WriteFile(opener.Path+"-reserve", nil, 0o600)) // shows that the file is Caddy's
		var opening sync.WaitGroup
		for range 4 {
			opening.Go(func() {
				for t.Context().Err() == nil {
					if s, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()}); err == nil {
						_ = s.Close()
						return
					} // Caddy tries again, too
				}
			})
		}
		opening.Wait()
		aside, err := filepath.Glob(opener.Path + ".damaged-*Z")
		require.NoError(t, err)
		if len(aside) != 1 {
			t.Log(aside)
			wrong++
		}
	}
	require.LessOrEqual(t, wrong, limit, "of %d files", rounds)
}

// A file that Open refuses does not change.
func TestSQLiteFilesThatAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name    string
		opening store.Opening
		make    string
		says    string
	}{
		{"an empty file, for a command such as list", store.Opening{Command: true, Existing: true}, ``, "is an empty database"},
		{"the database of another program", store.Opening{}, `CREATE TABLE mine (id)`, "is the database of another program"},
		{"the database of another program, for a command", store.Opening{Command: true}, `CREATE TABLE mine (id)`, "is the database of another program"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
			require.NoError(t, os.WriteFile(opener.Path, nil, 0o600))
			db, err := sql.Open("sqlite", opener.Path)
			require.NoError(t, err)
			_, err = db.Exec(tt.make)
			require.NoError(t, err)
			require.NoError(t, db.Close())
			before, err := os.ReadFile(opener.Path)
			require.NoError(t, err)
			tt.opening.Logger = zap.NewNop()
			_, err = opener.Open(t.Context(), tt.opening)
			require.EqualError(t, err, tt.says)
			after, err := os.ReadFile(opener.Path)
			require.NoError(t, err)
			require.Equal(t, before, after)
		})
	}
}

// A program that still reads the old file does not delay the events.
func TestSQLiteFileThatIsReplacedDuringARead(t *testing.T) {
	opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
	s, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	add := func(id string) {
		require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{{
			ID: id, Queue: "default", Received: time.Now(), Request: []byte("request"), Checksum: []byte("checksum"),
		}}}))
	}
	add("a")
	reader, err := sql.Open("sqlite", opener.Path)
	require.NoError(t, err)
	defer reader.Close()
	rows, err := reader.Query(`SELECT id FROM inkit_queue_events`)
	require.NoError(t, err)
	defer rows.Close()
	require.True(t, rows.Next())
	add("b")
	require.NoError(t, os.Rename(opener.Path, opener.Path+".old"))
	add("c")
	var ids []string
	storetest.Select(t, s, store.Filter{}, func(r *store.Record) { ids = append(ids, r.ID) })
	require.Equal(t, []string{"a", "b", "c"}, ids)
	require.NoError(t, rows.Err())
}

// Another program's file is in the place of the database, so that no event can be copied. The old
// file has all its events, although its log is gone.
func TestSQLiteFileThatIsReplacedByAnotherProgram(t *testing.T) {
	opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
	s, err := opener.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	record := store.Record{ID: "a", Queue: "default", Received: time.Now(), Request: []byte("request"), Checksum: []byte("checksum")}
	require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{&record}}))
	old := &sqlite.SQLite{Path: opener.Path + ".old"}
	require.NoError(t, os.Rename(opener.Path, old.Path))
	other, err := sql.Open("sqlite", filepath.Join(t.TempDir(), "other.db"))
	require.NoError(t, err)
	defer other.Close()
	_, err = other.Exec(`CREATE TABLE mine (id); VACUUM INTO '` + opener.Path + `'`)
	require.NoError(t, err)
	err = s.Apply(t.Context(), &store.Batch{Owner: "me", Add: []*store.Record{&record}})
	require.ErrorContains(t, err, "its events cannot be copied yet: is the database of another program")
	require.NoError(t, s.Close())

	s, err = old.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	found := 0
	storetest.Select(t, s, store.Filter{}, func(*store.Record) { found++ })
	require.Equal(t, 1, found)
}
