package queue_test

import (
	"database/sql"
	"path/filepath"
	"testing"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/storetest"
	"github.com/stretchr/testify/require"
)

func TestSQLiteIsAStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Database {
		path := filepath.Join(t.TempDir(), "queue.db")
		return storetest.Database{Opener: &queue.SQLite{Path: path}, Exec: func(t *testing.T, statement string) {
			t.Helper()
			db, err := sql.Open("sqlite", path)
			require.NoError(t, err)
			defer db.Close()
			_, err = db.Exec(statement)
			require.NoError(t, err)
		}}
	})
}
