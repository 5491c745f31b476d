package sqlite_test

import (
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// Open fails while Caddy's user may not write to the file, so that Caddy tries again. SQLite would
// open such a file read-only, and would never notice the end of this.
func TestSQLiteFileThatIsReadOnly(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to make a file of another user")
	}
	const nobody = 65534
	opener := &sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}
	opening := store.Opening{Logger: zap.NewNop()}
	s, err := opener.Open(t.Context(), opening)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, os.Chmod(opener.Path, 0o644))                             //nolint:gosec // a restored backup
	require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(opener.Path)), 0o755)) //nolint:gosec // for nobody
	require.NoError(t, os.Chown(filepath.Dir(opener.Path), nobody, nobody))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	require.NoError(t, syscall.Setfsuid(nobody)) // of this thread
	_, err = opener.Open(t.Context(), opening)
	require.NoError(t, syscall.Setfsuid(0))
	require.ErrorContains(t, err, "attempt to write a readonly database")

	require.NoError(t, os.Chown(opener.Path, nobody, nobody))
	for _, mode := range []os.FileMode{0o644, 0o444} { // Open changes the mode to 0600
		require.NoError(t, os.Chmod(opener.Path, mode))
		require.NoError(t, syscall.Setfsuid(nobody))
		s, err = opener.Open(t.Context(), opening)
		require.NoError(t, syscall.Setfsuid(0))
		require.NoError(t, err)
		require.NoError(t, s.Close())
	}
}
