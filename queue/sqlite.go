package queue

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

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

// SQLite keeps the events of a queue in a file on this machine.
//
// The file and its folder are made if they are not there, for nobody else to read.
// Several queues, and several processes on the machine, can share one file. It must
// not lie on a network file system. Beside it, SQLite keeps a write-ahead log
// (`-wal`) and an index of that (`-shm`), and this module a megabyte of room
// (`-reserve`) that is given up when the disk is full, since deleting takes room too.
type SQLite struct {
	// The path of the file, in which placeholders such as `{env.NAME}` are replaced when
	// the configuration is loaded. One that is relative starts at the directory in which
	// Caddy was started. Default: `inkit_queue.db` in Caddy's data directory.
	Path string `json:"path,omitempty"`

	busy time.Duration // busyTimeout, if it is another one
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
		return errors.New("path: must not hold a question mark")
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
		return d.Err("store: sqlite takes a path at most")
	}
	return nil
}

// real returns where the file is, beside which SQLite puts its log: the path may be a
// symbolic link.
func (s *SQLite) real() string {
	if path, err := filepath.EvalSymlinks(s.Path); err == nil {
		return path
	}
	return s.Path
}

// Key is of Opener.
func (s *SQLite) Key() string { return "sqlite " + s.Path }

// An older SQLite than 3.51.3 can damage a database that two processes write to. This
// does not compile with one.
const _ = uint(sqlite3.SQLITE_VERSION_NUMBER - 3_051_003)

const (
	// busyTimeout is how long a transaction waits for another process, and that of a
	// command, which nobody waits for but an operator, for a Caddy that writes all the time.
	busyTimeout        = 4 * time.Second
	commandBusyTimeout = 30 * time.Second

	// sqliteRows is how many events a statement adds: more are no faster.
	sqliteRows = 8

	// reserveSize is the room that is given up when the disk is full. It is that of the
	// write-ahead log, all of which may have to be copied into the file.
	reserveSize = 1 << 20
)

// sqliteStore is a Store in a file.
type sqliteStore struct {
	sqlStore
	path string
	file os.FileInfo // as it was opened
	log  os.FileInfo // the write-ahead log, likewise

	inserts [sqliteRows]*sql.Stmt // by the number of events, if they were needed

	mu       sync.Mutex
	full     bool      // whether the reserve is given up
	fullTill time.Time // when to see whether there is room for it again
}

// Open is of Opener. The file is left alone if it is none of ours.
func (s *SQLite) Open(ctx context.Context) (Store, error) {
	if err := os.MkdirAll(filepath.Dir(s.Path), 0o700); err != nil {
		return nil, withoutPath(err)
	}
	file, err := os.OpenFile(s.Path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, withoutPath(err)
	}
	info, err := file.Stat()
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("is not a regular file")
	}
	path := s.real()

	busy := s.busy
	if busy == 0 {
		busy = busyTimeout
	}
	store := &sqliteStore{
		sqlStore: sqlStore{dialect: dialect{bytes: "BLOB", rows: sqliteRows, now: "inkit_queue_now()", wrap: wrapSQLite}},
		path:     path,
		file:     info,
	}
	if store.write, err = openSQLite(path, 1, busy,
		"auto_vacuum(incremental)", "journal_mode(wal)", "synchronous(full)", "fullfsync(1)", "checkpoint_fullfsync(1)",
		fmt.Sprintf("wal_autocheckpoint(%d)", reserveSize/4096), fmt.Sprintf("journal_size_limit(%d)", reserveSize)); err != nil {
		return nil, err
	}
	if store.read, err = openSQLite(path, 2, busy, "query_only(1)"); err != nil {
		return nil, errors.Join(err, store.write.Close())
	}
	if err = store.prepare(ctx); err == nil {
		store.log, err = os.Stat(path + "-wal")
	}
	if err == nil {
		store.peek, err = store.read.PrepareContext(ctx, store.text(peekQuery)) //nolint:sqlclosecheck // closed with the database
	}
	if err != nil {
		_ = store.Close()
		return nil, withoutPath(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} { // one that was there may be another's to read
		if info, err := os.Stat(path + suffix); s.busy == 0 && err == nil && info.Mode().Perm()&0o077 != 0 {
			_ = os.Chmod(path+suffix, 0o600) // which only fails for who does not own it
		}
	}
	store.full = s.busy == 0 && !store.makeReserve() // a command leaves none behind
	return store, nil
}

func openSQLite(path string, connections int, busy time.Duration, pragmas ...string) (*sql.DB, error) {
	pragmas = append([]string{fmt.Sprintf("busy_timeout(%d)", busy.Milliseconds())}, pragmas...)
	dsn := path + "?_txlock=immediate&_pragma=" + strings.Join(pragmas, "&_pragma=")
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, nil
}

// prepare makes the schema, unless the file holds something else. If there is one, it
// only reads: the commands need not wait for a Caddy that is busy writing.
func (s *sqliteStore) prepare(ctx context.Context) error {
	exists, err := s.exists(ctx, s.write) // whose first read opens the log, of a copy that has none too
	switch {
	case err != nil:
		_, statErr := os.Stat(s.reserve())
		if err = wrapSQLite(err); errors.Is(err, ErrDamaged) && statErr != nil && isCode(err, sqlite3.SQLITE_NOTADB) {
			return errors.New("is no database, and not ours")
		}
		return err
	case exists:
		return s.wrap(s.checkVersion(ctx, s.read))
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return wrapSQLite(err)
	}
	defer func() { _ = tx.Rollback() }()
	exists, err = s.exists(ctx, tx) // as another process has made it meanwhile
	if err == nil {
		err = s.migrate(ctx, tx, exists)
	}
	if err == nil {
		err = tx.Commit()
	}
	return s.wrap(err)
}

// exists reports whether the schema has been made.
func (s *sqliteStore) exists(ctx context.Context, db querier) (bool, error) {
	var tables, ours int
	err := db.QueryRowContext(ctx, `SELECT count(*), count(*) FILTER (WHERE name = 'inkit_queue_schema') FROM sqlite_master`).Scan(&tables, &ours)
	if err == nil && tables > 0 && ours == 0 {
		err = errors.New("is the database of another program")
	}
	return ours > 0, err
}

func (s *sqliteStore) reserve() string { return s.path + "-reserve" }

// makeReserve writes the reserve if it is not there, and reports whether it is now.
func (s *sqliteStore) makeReserve() bool {
	if info, err := os.Stat(s.reserve()); err == nil && info.Size() == reserveSize {
		return true
	}
	file, err := os.OpenFile(s.reserve(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return false
	}
	_, err = file.Write(make([]byte, reserveSize))
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		_ = os.Remove(s.reserve())
	}
	return err == nil
}

// Apply is of Store. Nothing is added while the disk is full, so that what is there
// can be finished.
func (s *sqliteStore) Apply(ctx context.Context, b *Batch) error {
	if len(b.Add) > 0 && !s.hasRoom() {
		return ErrFull
	}
	var err error
	if len(b.Add) > 0 && len(b.Add) <= s.rows && len(b.Finish)+len(b.Backends)+len(b.Claims) == 0 {
		err = s.addOnly(ctx, b)
	} else {
		err = s.sqlStore.Apply(ctx, b)
	}
	switch {
	case errors.Is(err, ErrFull):
		s.giveUpReserve(ctx)
	case err == nil && !s.isThere():
		err = ErrReplaced // and what was written is in a file that nobody finds
	}
	return err
}

// addOnly does a batch that only adds a few events: one statement is a transaction too,
// and need not be compiled anew each time. That saves a quarter of the time.
func (s *sqliteStore) addOnly(ctx context.Context, b *Batch) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	n := len(b.Add)
	if s.inserts[n-1] == nil {
		s.inserts[n-1], err = s.write.PrepareContext(ctx, s.insert(n)) //nolint:sqlclosecheck // closed with the database
		if err != nil {
			return s.wrap(err)
		}
	}
	_, err = s.inserts[n-1].ExecContext(context.WithoutCancel(ctx), insertArgs(b.Owner, b.Add)...)
	return s.wrap(err)
}

func (s *sqliteStore) isThere() bool { return isFile(s.path, s.file) && isFile(s.path+"-wal", s.log) }

func isFile(path string, file os.FileInfo) bool {
	info, err := os.Stat(path)
	return err == nil && os.SameFile(info, file)
}

// leave prepares for another database at the path, and reports whether there is or can
// be one. What is in the log goes into the file, wherever that is now. The log must not
// be there any more then: SQLite would take it to be that of the other database.
func (s *sqliteStore) leave(ctx context.Context) (moved bool, err error) {
	var busy, pages, copied int
	err = s.write.QueryRowContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`).Scan(&busy, &pages, &copied)
	switch {
	case err != nil:
		return false, wrapSQLite(err)
	case busy != 0:
		return false, errLocked
	case isFile(s.path, s.file):
		return false, nil
	case isFile(s.path+"-wal", s.log):
		for _, suffix := range []string{"-wal", "-shm"} {
			if err := os.Remove(s.path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return false, withoutPath(err)
			}
		}
	}
	return true, nil
}

// hasRoom reports whether there is room to add events, that is, for the reserve.
func (s *sqliteStore) hasRoom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full && time.Now().After(s.fullTill) {
		s.fullTill = time.Now().Add(time.Second)
		s.full = !s.makeReserve()
	}
	return !s.full
}

func (s *sqliteStore) giveUpReserve(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full, s.fullTill = true, time.Now().Add(time.Second)
	_ = os.Remove(s.reserve())
	// what the log holds goes into the file, and the log becomes empty
	_, _ = s.write.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
}

// Tidy gives room that is not used back to the disk, a part of it at a time, and
// reports whether there is more. It is to be called when there is little else to do.
func (s *sqliteStore) Tidy(ctx context.Context) (more bool, err error) {
	const pages = 256
	var free int
	if err := s.read.QueryRowContext(ctx, `PRAGMA freelist_count`).Scan(&free); err != nil || free < pages {
		return false, wrapSQLite(err)
	}
	if _, err := s.write.ExecContext(ctx, fmt.Sprintf(`PRAGMA incremental_vacuum(%d)`, pages)); err != nil {
		return false, wrapSQLite(err)
	}
	if free < 2*pages {
		_, err = s.write.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
	}
	return free >= 2*pages, wrapSQLite(err)
}

// moveAside renames a damaged database under a name that says when, with its log, and
// returns that name.
func (s *SQLite) moveAside(now time.Time) (string, error) {
	path := s.real()
	var name string
	for ; ; now = now.Add(time.Second) { // nothing is to be overwritten
		name = path + ".damaged-" + now.UTC().Format("20060102T150405Z")
		if _, err := os.Lstat(name); err != nil {
			break
		}
	}
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, name+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", withoutPath(err)
		}
	}
	return name, nil
}

// damagedFiles returns how many of the databases that were moved aside are still there.
func (s *SQLite) damagedFiles() int {
	names, _ := filepath.Glob(globEscape.Replace(s.real()) + ".damaged-*Z")
	return len(names)
}

var globEscape = strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`, `\`, `\\`)

// errLocked says that another process writes, or has begun to and not ended.
var errLocked = errors.New("the database is locked")

// wrapSQLite says what an error of SQLite means to the callers of a store.
func wrapSQLite(err error) error {
	switch {
	case isCode(err, sqlite3.SQLITE_FULL), isCode(err, sqlite3.SQLITE_IOERR_SHMSIZE):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case isCode(err, sqlite3.SQLITE_BUSY):
		return fmt.Errorf("%w: %w", errLocked, err)
	case isCode(err, sqlite3.SQLITE_CORRUPT), isCode(err, sqlite3.SQLITE_NOTADB):
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// isCode reports whether err is of SQLite and has a code, or one that it is a part of.
func isCode(err error, code int) bool {
	sqliteErr, ok := errors.AsType[*sqlite.Error](err)
	return ok && (sqliteErr.Code() == code || sqliteErr.Code()&0xff == code)
}

// withoutPath leaves out the path of an error, which the line of the log has beside it.
func withoutPath(err error) error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}

// Interface guards
var (
	_ Opener                = (*SQLite)(nil)
	_ caddy.Provisioner     = (*SQLite)(nil)
	_ caddy.Validator       = (*SQLite)(nil)
	_ caddyfile.Unmarshaler = (*SQLite)(nil)
)
