package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

	// rowsPerStatement is how many events a statement adds. More events are no faster.
	rowsPerStatement = 8

	// reserveSize is the space to free when the disk is full. It equals the size of the
	// write-ahead log, because SQLite may have to copy the whole log into the file.
	reserveSize = 1 << 20
)

// file is an open database file. It only detects damage: healing repairs the file.
type file struct {
	sqlstore.DB
	path string      // without symbolic links: SQLite puts its log next to the real file
	main os.FileInfo // of the opened file
	log  os.FileInfo // of the write-ahead log

	room room
}

// openFile opens the file at a path and creates its schema.
func openFile(ctx context.Context, path string, o store.Opening) (*file, error) {
	if info, err := os.Stat(path); o.Existing && (errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0) {
		return nil, errors.New("this database file does not exist: name another one with --db")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	made, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := made.Stat()
	if err := errors.Join(err, made.Close()); err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	path = real(path)
	busy := busyTimeout
	if o.Command {
		busy = commandBusyTimeout
	}
	f := &file{path: path, main: info, room: room{reserve: path + "-reserve"}}
	f.Dialect = sqlstore.Dialect{
		Bytes: "BLOB", Clustered: " WITHOUT ROWID", Rows: rowsPerStatement, Now: "inkit_queue_now()", Wrap: wrap,
		Size: `SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()`,
	}
	f.Write = openSQLite(path, 1, busy,
		"auto_vacuum(incremental)", "journal_mode(wal)", "synchronous(full)", "fullfsync(1)", "checkpoint_fullfsync(1)",
		fmt.Sprintf("wal_autocheckpoint(%d)", reserveSize/4096), fmt.Sprintf("journal_size_limit(%d)", reserveSize))
	f.Read = openSQLite(path, 2, busy, "query_only(1)")
	if err = f.prepare(ctx); err == nil {
		f.log, err = os.Stat(path + "-wal")
	}
	if err == nil && !o.Command {
		err = wrap(f.PrepareApply(ctx))
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if o.Command {
		return f, nil
	}
	for _, suffix := range []string{"", "-wal", "-shm"} { // existing files may be readable for other users
		if info, err := os.Stat(path + suffix); err == nil && info.Mode().Perm()&0o077 != 0 {
			_ = os.Chmod(path+suffix, 0o600) // fails only for a user who does not own the file
		}
	}
	f.room.full = !f.room.make()
	return f, nil
}

// real returns the path without symbolic links.
func real(path string) string {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		return target
	}
	return path
}

func openSQLite(path string, connections int, busy time.Duration, pragmas ...string) *sql.DB {
	pragmas = append([]string{fmt.Sprintf("busy_timeout(%d)", busy.Milliseconds())}, pragmas...)
	// this Open never fails: the first statement connects, and returns the error
	db, _ := sql.Open("sqlite", path+"?_txlock=immediate&_pragma="+strings.Join(pragmas, "&_pragma="))
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db
}

// prepare creates the schema, unless the file has other tables. If the schema exists, it
// only reads: a command must not wait while Caddy writes.
func (f *file) prepare(ctx context.Context) error {
	exists, err := f.exists(ctx, f.Write) // the first read opens the log, and creates a missing log
	switch {
	case err != nil:
		_, statErr := os.Stat(f.room.reserve)
		if err = wrap(err); errors.Is(err, errDamaged) && statErr != nil && isCode(err, sqlite3.SQLITE_NOTADB) {
			return errors.New("is not a database")
		}
		return err
	case exists:
		return wrap(f.CheckVersion(ctx, f.Read))
	}
	return f.InTx(ctx, func(tx *sql.Tx) error {
		exists, err := f.exists(ctx, tx) // another process may have created it since the first check
		if err != nil {
			return err
		}
		return f.Migrate(ctx, tx, exists)
	})
}

// exists reports whether the schema exists, and refuses the database of another program.
func (f *file) exists(ctx context.Context, db sqlstore.Querier) (bool, error) {
	var tables, ours int
	err := db.QueryRowContext(ctx, `SELECT count(*), count(*) FILTER (WHERE name = 'inkit_queue_schema') FROM sqlite_master`).Scan(&tables, &ours)
	if err == nil && tables > 0 && ours == 0 {
		err = errors.New("is the database of another program")
	}
	return ours > 0, err
}

// Apply implements store.Store. While the disk is full, it adds nothing: the store needs the
// remaining space to finish the events in the database.
func (f *file) Apply(ctx context.Context, b *store.Batch) error {
	if len(b.Add)+len(b.History)+len(b.Copied.Rows) > 0 && !f.room.isThere() {
		return store.ErrFull
	}
	err := f.DB.Apply(ctx, b)
	if errors.Is(err, store.ErrFull) {
		f.room.giveUp()
		_, _ = f.Write.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`) // moves the log into the file
	}
	return err
}

// Tidy implements store.Store. It gives free space back to the disk in small parts.
func (f *file) Tidy(ctx context.Context, keep []store.Keep) (u store.Upkeep, err error) {
	const pages = 256
	if _, err = f.DB.Tidy(ctx, keep); err != nil {
		return u, err
	}
	names, _ := filepath.Glob(globEscape.Replace(f.path) + ".damaged-*Z")
	u.DamagedFiles = len(names)
	var free int
	if err := f.Read.QueryRowContext(ctx, `PRAGMA freelist_count`).Scan(&free); err != nil || free < pages {
		return u, wrap(err)
	}
	if _, err := f.Write.ExecContext(ctx, fmt.Sprintf(`PRAGMA incremental_vacuum(%d)`, pages)); err != nil {
		return u, wrap(err)
	}
	if u.More = free >= 2*pages; !u.More {
		_, err = f.Write.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
	}
	return u, wrap(err)
}

var globEscape = strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`, `\`, `\\`)

// isAtPath reports whether the file and its log are still at their paths.
func (f *file) isAtPath() bool {
	return isFile(f.path, f.main) && isFile(f.path+"-wal", f.log)
}

func isFile(path string, opened os.FileInfo) bool {
	info, err := os.Stat(path)
	return err == nil && os.SameFile(info, opened)
}

// room is the reserve file. The store deletes it when the disk is full.
type room struct {
	reserve string // the path of the reserve file

	mu    sync.Mutex
	full  bool      // the file is deleted
	retry time.Time // when to try to create the file again
}

// make writes the file if it is missing, and reports whether it exists now.
func (r *room) make() bool {
	if info, err := os.Stat(r.reserve); err == nil && info.Size() == reserveSize {
		return true
	}
	file, err := os.OpenFile(r.reserve, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return false
	}
	_, err = file.Write(make([]byte, reserveSize))
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		_ = os.Remove(r.reserve)
	}
	return err == nil
}

// isThere reports whether the disk has space to add events. If not, it tries make once a second.
func (r *room) isThere() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.full && time.Now().After(r.retry) {
		r.retry = time.Now().Add(time.Second)
		r.full = !r.make()
	}
	return !r.full
}

func (r *room) giveUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full, r.retry = true, time.Now().Add(time.Second)
	_ = os.Remove(r.reserve)
}

// errDamaged means that SQLite cannot read the file as a database. healing moves such a file
// aside.
var errDamaged = errors.New("the database is damaged")

// wrap translates an error of SQLite.
func wrap(err error) error {
	switch {
	case isCode(err, sqlite3.SQLITE_FULL), isCode(err, sqlite3.SQLITE_IOERR_SHMSIZE):
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	case isCode(err, sqlite3.SQLITE_BUSY):
		return fmt.Errorf("%w: %w", store.ErrLocked, err)
	case isCode(err, sqlite3.SQLITE_CORRUPT), isCode(err, sqlite3.SQLITE_NOTADB):
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

// isCode reports whether err is an SQLite error with this code or one of its extended codes.
func isCode(err error, code int) bool {
	sqliteErr, ok := errors.AsType[*sqlite.Error](err)
	return ok && (sqliteErr.Code() == code || sqliteErr.Code()&0xff == code)
}
