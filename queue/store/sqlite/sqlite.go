// Package sqlite keeps the events of a queue in an SQLite file.
package sqlite

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"go.uber.org/zap"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(SQLite{})
	sqlite.MustRegisterScalarFunction("inkit_queue_now", 0, func(*sqlite.FunctionContext, []driver.Value) (driver.Value, error) {
		return time.Now().UnixMilli(), nil
	})
}

// Before version 3.51.3, SQLite can damage a database if two processes write to it. This
// line does not compile with an older version.
const _ = uint(sqlite3.SQLITE_VERSION_NUMBER - 3_051_003)

// SQLite keeps the events of a queue in a file on this machine.
//
// Caddy creates a missing file or folder. Only Caddy's user can read the file. Several queues,
// and several processes on the machine, can share one file. The file must not be on a network
// file system. Next to the file are SQLite's write-ahead log (`-wal`), the index of the log
// (`-shm`), and a reserve of 1 MB (`-reserve`). Caddy empties the reserve when the disk is
// full, because deleting events needs space too.
type SQLite struct {
	// The path of the file. Caddy replaces placeholders such as `{env.NAME}` when it
	// loads the configuration. A relative path starts at Caddy's working directory.
	// Default: `inkit_queue.db` in Caddy's data directory.
	Path string `json:"path,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (SQLite) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "inkit_queue.stores.sqlite",
		New: func() caddy.Module { return new(SQLite) },
	}
}

// Provision sets the default, and makes the path absolute. It touches no file.
func (s *SQLite) Provision(caddy.Context) (err error) {
	if s.Path, err = caddy.NewReplacer().ReplaceOrErr(s.Path, true, true); err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if s.Path == "" {
		s.Path = filepath.Join(caddy.AppDataDir(), "inkit_queue.db")
	}
	s.Path, err = filepath.Abs(s.Path)
	return err
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store sqlite [<path>]
func (s *SQLite) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name of the store
	if d.NextArg() {
		s.Path = d.Val()
	}
	if d.NextArg() || d.NextBlock(d.Nesting()) {
		return d.Err("store: sqlite takes at most one argument, the path")
	}
	return nil
}

// Key implements store.Opener.
func (s *SQLite) Key() string { return "sqlite " + s.Path }

// Migration implements store.Opener. It is empty, because Open can always create the schema.
func (*SQLite) Migration() string { return "" }

// Open implements store.Opener. It refuses a file that is not a database of this module. It
// moves a damaged database aside.
func (s *SQLite) Open(ctx context.Context, o store.Opening) (store.Store, error) {
	found, err := os.Stat(s.Path)
	if err != nil || !found.Mode().IsRegular() { // never for an existing database: closing it would drop all locks of this process on it
		if o.Existing && errors.Is(err, fs.ErrNotExist) {
			return nil, errors.New("this database file does not exist: name another one with --db")
		}
		if err := os.MkdirAll(filepath.Dir(s.Path), 0o700); err != nil {
			return nil, err
		}
		made, err := os.OpenFile(s.Path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		found, _ = made.Stat()
		_ = made.Close()
	}
	path, err := filepath.EvalSymlinks(s.Path)
	if err != nil {
		return nil, err
	}
	busy := busyTimeout
	if o.Command {
		busy = commandBusyTimeout
	}
	o.Logger = o.Logger.With(zap.String("path", path))
	f := &file{path: path, opening: o}
	f.Dialect = sqlstore.Dialect{
		Bytes: "BLOB", Clustered: " WITHOUT ROWID", Rows: rowsPerStatement, Now: "inkit_queue_now()", Wrap: wrap,
		Size: `SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()`,
	}
	pragmas := []string{
		"journal_mode(wal)", "synchronous(full)", "fullfsync(1)", "checkpoint_fullfsync(1)",
		fmt.Sprintf("wal_autocheckpoint(%d)", reserveSize/4096), fmt.Sprintf("journal_size_limit(%d)", reserveSize),
	}
	if found.Size() == 0 { // in any other file, this pragma changes nothing, but writes a page
		pragmas = append([]string{"auto_vacuum(incremental)"}, pragmas...)
	}
	f.Write = openSQLite(path, 1, busy, pragmas...)
	f.Read = openSQLite(path, 2, busy, "query_only(1)")
	f.opened.Store(&opened{main: found})
	if err = f.open(ctx); errors.Is(err, errDamaged) {
		err = f.repair(ctx, f.opened.Load(), err)
	}
	f.Check = f.checkPaths
	if err == nil && !o.Command {
		err = wrap(f.PrepareApply(ctx))
	}
	if err != nil {
		_ = f.DB.Close()
		return nil, err
	}
	f.hasRoom(true) // writes the reserve
	return f, nil
}

// Same reports whether two stores use the same file.
func Same(a, b store.Store) bool {
	one, isFile := a.(*file)
	other, isFileToo := b.(*file)
	return isFile && isFileToo && os.SameFile(one.opened.Load().main, other.opened.Load().main)
}
