// Package sqlite keeps the events of a queue in a file of SQLite.
package sqlite

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
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

// SQLite before 3.51.3 can damage a database that two processes write to. This line does
// not compile with it.
const _ = uint(sqlite3.SQLITE_VERSION_NUMBER - 3_051_003)

// SQLite keeps the events of a queue in a file on this machine.
//
// A missing file or folder is made, and only Caddy's user can read it. Several queues,
// and several processes on the machine, can share one file. It must not be on a network
// file system. Beside it are SQLite's write-ahead log (`-wal`), the index of the log
// (`-shm`), and a reserve of a megabyte (`-reserve`). The reserve is deleted when the
// disk is full, since deleting events takes space too.
type SQLite struct {
	// The path of the file. Placeholders such as `{env.NAME}` are replaced when the
	// configuration is loaded. A relative path starts at Caddy's working directory.
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

// Validate refuses a path that the driver would cut.
func (s *SQLite) Validate() error {
	if strings.Contains(s.Path, "?") {
		return errors.New("path: must not contain a question mark")
	}
	return nil
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

// Key is of store.Opener.
func (s *SQLite) Key() string { return "sqlite " + s.Path }

// Migration is of store.Opener. A process that may write the file makes its schema.
func (*SQLite) Migration() string { return "" }

// Open is of store.Opener. It refuses a file that is not a database of this module, and
// moves a damaged one aside.
func (s *SQLite) Open(ctx context.Context, o store.Opening) (store.Store, error) {
	h := &healing{path: s.Path, opening: o}
	if err := h.open(ctx); err != nil {
		return nil, err
	}
	if o.Command { // repairs nothing: Caddy may be running
		return h.file, nil
	}
	return h, nil
}

// Same reports whether two stores, both opened for commands, are in one file.
func Same(a, b store.Store) bool {
	one, isFile := a.(*file)
	other, isFileToo := b.(*file)
	return isFile && isFileToo && os.SameFile(one.main, other.main)
}
