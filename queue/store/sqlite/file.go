package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	// busyTimeout is how long a transaction waits for another process. A command waits
	// longer, since the running Caddy writes all the time.
	busyTimeout        = 4 * time.Second
	commandBusyTimeout = 30 * time.Second

	// rowsPerStatement is how many events a statement adds. More events in a statement are no
	// faster.
	rowsPerStatement = 8

	// reserve is the suffix of the file that Caddy empties when the disk is full. reserveSize is
	// also the usual size of the write-ahead log, because SQLite may need the space of the
	// reserve to copy the whole log into the database.
	reserve     = "-reserve"
	reserveSize = 1 << 20
)

// file is a store in a file. Apply, Peek, Counts and Tidy repair the file with the method heal.
// If another method finds damage, it returns an error.
type file struct {
	sqlstore.DB
	path    string // without symbolic links: SQLite puts its log next to the real file
	opening store.Opening
	opened  atomic.Pointer[opened]

	repairing sync.Mutex
}

// opened has the files that the connections have open: the database, its log, and the index of
// the log. While Open runs, only main is set.
type opened struct{ main, log, index os.FileInfo }

func openSQLite(path string, connections int, busy time.Duration, pragmas ...string) *sql.DB {
	pragmas = append([]string{fmt.Sprintf("busy_timeout(%d)", busy.Milliseconds())}, pragmas...)
	query := "_txlock=immediate&_pragma=" + strings.Join(pragmas, "&_pragma=")
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: filepath.ToSlash(path), RawQuery: query}
	// this Open never fails: the first statement connects, and returns the error
	db, _ := sql.Open("sqlite", dsn.String())
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db
}

// open prepares the file that is now at the path. It creates a missing schema, unless the file
// has other tables.
func (f *file) open(ctx context.Context) error {
	var tables, ours int
	err := f.Read.QueryRowContext(ctx, `
		SELECT count(*), count(*) FILTER (WHERE name = 'inkit_queue_schema') FROM sqlite_master`).Scan(&tables, &ours)
	_, reserveErr := os.Stat(f.path + reserve)
	switch {
	case hasCode(err, sqlite3.SQLITE_NOTADB) && reserveErr != nil: // moveAside must not move another program's file
		return errors.New("is not a database")
	case err != nil:
		return wrap(err)
	case tables == 0 && f.opening.Existing:
		return errors.New("is an empty database")
	case tables > 0 && ours == 0:
		return errors.New("is the database of another program")
	}
	for _, suffix := range []string{"", "-wal", "-shm"} { // existing files may be readable for other users, or read-only
		_ = os.Chmod(f.path+suffix, 0o600) // fails only for a user who does not own the file
	}
	changed := f.Write.PingContext(ctx) // sets the journal mode
	if !f.opening.Command || tables == 0 {
		change := `UPDATE inkit_queue_schema SET version = version` // fails if SQLite has opened the file read-only, because Caddy may not write to it
		if tables == 0 {
			change = f.SchemaSQL() // fails if another process was faster
		}
		changed = (&sqlstore.DB{Dialect: f.Dialect, Write: f.Write}).InTx(ctx, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, change)
			return err
		})
	}
	if hasCode(changed, sqlite3.SQLITE_READONLY) {
		return changed
	}
	for range f.Read.Stats().MaxOpenConnections { // open all connections now: a later connection could open another file
		conn, err := f.Read.Conn(ctx)
		if err != nil {
			return wrap(err)
		}
		defer conn.Close()
		if err := wrap(f.CheckVersion(ctx, conn)); errors.Is(err, errDamaged) {
			return err
		} else if err != nil {
			return cmp.Or(changed, err)
		}
	}
	main, err := os.Stat(f.path)
	log, logErr := os.Stat(f.path + "-wal") // the first query has opened the log and its index
	index, indexErr := os.Stat(f.path + "-shm")
	if err = errors.Join(err, logErr, indexErr); err != nil {
		return err
	}
	f.opened.Store(&opened{main, log, index})
	return nil
}

func (f *file) Apply(ctx context.Context, b *store.Batch) error {
	return f.heal(ctx, func() error { return f.apply(ctx, b) })
}

// apply applies a batch, but repairs nothing. While the disk is full, it adds nothing, because the
// store needs the remaining space to finish the events in the database.
func (f *file) apply(ctx context.Context, b *store.Batch) error {
	if len(b.Add)+len(b.History)+len(b.Copied.Rows) > 0 && !f.hasRoom(false) {
		return store.ErrFull
	}
	err := f.DB.Apply(ctx, b)
	if errors.Is(err, store.ErrFull) {
		_ = os.Truncate(f.path+reserve, 0)
		_ = checkpoint(ctx, f.Write, "TRUNCATE")
	}
	return err
}

func (f *file) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	err = f.heal(ctx, func() (err error) {
		p, err = f.DB.Peek(ctx, queue)
		return cmp.Or(err, f.checkPaths()) // Caddy calls Peek once a second, even if there is nothing to write
	})
	return p, err
}

func (f *file) Counts(ctx context.Context) (counts []store.Count, err error) {
	err = f.heal(ctx, func() (err error) {
		counts, err = f.DB.Counts(ctx)
		return err
	})
	return counts, err
}

// Tidy implements store.Store. It also gives free space back to the disk.
func (f *file) Tidy(ctx context.Context, keep []store.Keep) (damagedFiles int, err error) {
	names, _ := filepath.Glob(f.path + ".damaged-*Z")
	return len(names), f.heal(ctx, func() error {
		if _, err := f.DB.Tidy(ctx, keep); err != nil {
			return err
		}
		return f.shrink(ctx)
	})
}

// shrink gives free space back to the disk in small parts, so that no event waits long.
func (f *file) shrink(ctx context.Context) error {
	const pages = 256
	for more, last := true, math.MaxInt; more; {
		var free int
		if err := f.Read.QueryRowContext(ctx, `PRAGMA freelist_count`).Scan(&free); err != nil || free < pages {
			return wrap(err)
		}
		err := f.InTx(ctx, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA incremental_vacuum(%d)`, pages))
			return err
		})
		if err != nil {
			return err
		}
		more, last = free >= 2*pages && free < last, free // a file from another program, such as sqlite3, may never shrink
	}
	_ = checkpoint(ctx, f.Write, "TRUNCATE")
	return nil
}

// hasRoom reports whether the disk has space for new events, as shown by a complete reserve. If the
// reserve is not complete, hasRoom tries to write it, but waits for a second after the last change
// of the file. At the start, it does not wait: a power cut may have left an incomplete reserve.
func (f *file) hasRoom(start bool) bool {
	info, err := os.Stat(f.path + reserve)
	switch {
	case f.opening.Command, err == nil && info.Size() == reserveSize:
		return true
	case err != nil && !start && !errors.Is(err, fs.ErrNotExist): // the folder may be unreadable for a while
		return true
	case err == nil && !start && time.Since(info.ModTime()).Abs() < time.Second:
		return false
	}
	if err = os.WriteFile(f.path+reserve, make([]byte, reserveSize), 0o600); err != nil {
		_ = os.Truncate(f.path+reserve, 0)
	}
	return err == nil
}

// wrap translates an error of SQLite.
func wrap(err error) error {
	switch {
	case hasCode(err, sqlite3.SQLITE_FULL), hasCode(err, sqlite3.SQLITE_IOERR_SHMSIZE):
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	case hasCode(err, sqlite3.SQLITE_BUSY):
		return fmt.Errorf("%w: %w", store.ErrLocked, err)
	case hasCode(err, sqlite3.SQLITE_CORRUPT), hasCode(err, sqlite3.SQLITE_NOTADB):
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

// hasCode reports whether err is an SQLite error with this code or one of its extended codes.
func hasCode(err error, code int) bool {
	sqliteErr, ok := errors.AsType[*sqlite.Error](err)
	return ok && (sqliteErr.Code() == code || sqliteErr.Code()&0xff == code)
}
