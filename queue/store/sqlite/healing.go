package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"go.uber.org/zap"
)

// errDamaged means that SQLite cannot read the file as a database. errMoved means that another
// process has deleted or replaced the file or its log.
var (
	errDamaged = errors.New("the database is damaged")
	errMoved   = errors.New("the database was deleted or replaced while it was open")
)

// heal runs an operation. If the operation fails because of the file, heal repairs the file and runs
// the operation again.
func (f *file) heal(ctx context.Context, operation func() error) error {
	used := f.opened.Load()
	err := operation()
	if err == nil {
		return nil
	}
	if !f.isAtPath(used) {
		err = errMoved
	}
	if err = f.repair(ctx, used, err); err == nil {
		err = operation()
	}
	return err
}

// repair repairs the file after an operation that failed with err, and had the files in `used`
// open. It moves a damaged file aside and opens an empty one. If the open file is no longer at
// its path, repair copies its events into the file that is there now. This works because this
// process still has the old file open. repair returns nil if the file is repaired now, and err
// if the file needs no repair. A command repairs nothing, because Caddy may be running.
func (f *file) repair(ctx context.Context, used *opened, err error) error {
	moved := errors.Is(err, errMoved)
	if f.opening.Command || !moved && !errors.Is(err, errDamaged) {
		return err
	}
	f.repairing.Lock()
	defer f.repairing.Unlock()
	if f.opened.Load() != used { // another goroutine has repaired the file
		return nil
	}
	ctx = context.WithoutCancel(ctx) // an interrupted query would close its connection, and with it the only access to a deleted file
	if moved {
		err = f.rescue(ctx, used)
	} else {
		err = f.moveAside(ctx, used, err)
	}
	if err == nil {
		err = f.disconnect(ctx)
	}
	if err == nil {
		err = f.open(ctx)
	}
	if err == nil && moved {
		f.opening.Logger.Error("the database or its write-ahead log was deleted or replaced while it was open: its events are in the file that is there now, but find out what deletes or replaces these files")
	}
	return err
}

// moveAside renames a damaged database and its log, unless another Caddy has already done this, and
// makes a new database. The new names contain the time. The argument cause is the error that shows
// the damage.
func (f *file) moveAside(ctx context.Context, used *opened, cause error) error {
	for _, db := range []*sql.DB{f.Read, f.Write} { // Windows cannot rename an open file
		db.SetMaxIdleConns(0)
		defer db.SetMaxIdleConns(db.Stats().MaxOpenConnections)
	}
	if !isFile(f.path, used.main) { // not isAtPath, because closing the last connection deletes the log
		return nil
	}
	name := f.path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000Z")
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(f.path+suffix, name+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w; it cannot be moved aside, let Caddy's user write to its folder: %w", cause, err)
		}
	}
	f.opening.Logger.Error("the database is damaged: it was moved aside, recover its events as in docs/queue.md",
		zap.String("moved_to", name), zap.Error(cause))
	fresh, err := (&SQLite{Path: f.path}).Open(ctx, f.opening)
	if err != nil {
		return err
	}
	return fresh.Close()
}

// rescue copies the events of the open file into the file that is now at the path. If only the log
// is no longer at its path, it is enough to move the log into the file, which is still there.
// Other processes may have both files open, too: they notice this before their next change.
func (f *file) rescue(ctx context.Context, used *opened) error {
	if f.isAtPath(used) {
		return nil
	}
	logGone, mode := isFile(f.path, used.main), "TRUNCATE"
	if !logGone {
		mode = "PASSIVE" // does not wait for other programs that read the old file
	}
	if err := f.unreadable(checkpoint(ctx, f.Write, mode)); err != nil {
		return err
	}
	for suffix, info := range map[string]os.FileInfo{"-wal": used.log, "-shm": used.index} {
		if isFile(f.path+suffix, info) { // SQLite would use it together with the new files
			if err := os.Remove(f.path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	if logGone {
		return nil
	}
	fresh, err := (&SQLite{Path: f.path}).Open(ctx, f.opening)
	if err != nil {
		return fmt.Errorf("%w, and its events cannot be copied yet: %w", errMoved, err)
	}
	defer fresh.Close()
	// read through the open connection: a new connection would open the new file
	from := &sqlstore.DB{Dialect: f.Dialect, Read: f.Write, Write: f.Write}
	return f.unreadable(store.Copy(ctx, fresh, from, false, func([]string) error { return nil }))
}

// unreadable logs that the open file is damaged, and then returns nil, because trying again would
// not help. It returns all other errors.
func (f *file) unreadable(err error) error {
	if !errors.Is(err, errDamaged) {
		return err
	}
	f.opening.Logger.Error("the database was deleted or replaced while it was open, and is damaged: not all of its events could be copied", zap.Error(err))
	return nil
}

// disconnect closes all connections while no other goroutine uses them. A later connection opens the
// file that is at the path at that time.
func (f *file) disconnect(ctx context.Context) error {
	var bad error
	for _, db := range []*sql.DB{f.Read, f.Write} {
		for range db.Stats().MaxOpenConnections {
			conn, err := db.Conn(ctx)
			if err != nil {
				return wrap(err)
			}
			defer func() {
				_ = conn.Raw(func(any) error { return bad })
				_ = conn.Close()
			}()
		}
	}
	bad = driver.ErrBadConn
	return nil
}

// checkpoint moves the log into the file. In the mode TRUNCATE, it returns ErrLocked if another
// connection prevents this.
func checkpoint(ctx context.Context, db sqlstore.Querier, mode string) error {
	var busy, pages, moved int
	err := db.QueryRowContext(ctx, `PRAGMA wal_checkpoint(`+mode+`)`).Scan(&busy, &pages, &moved)
	if err == nil && busy != 0 {
		err = store.ErrLocked
	}
	return wrap(err)
}

// checkPaths returns errMoved if the open file or its log is no longer at its path.
func (f *file) checkPaths() error {
	if !f.isAtPath(f.opened.Load()) {
		return errMoved
	}
	return nil
}

// isAtPath reports whether the open file and its log are still at their paths.
func (f *file) isAtPath(used *opened) bool {
	return isFile(f.path, used.main) && isFile(f.path+"-wal", used.log)
}

func isFile(path string, opened os.FileInfo) bool {
	info, err := os.Stat(path)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) // the folder may be unreadable for a while
	}
	return os.SameFile(info, opened)
}

// Close implements store.Store. If the file was deleted or replaced after the last
// transaction, Close copies the events into the file at the path, except in a command.
func (f *file) Close() error {
	if used := f.opened.Load(); !f.opening.Command && !f.isAtPath(used) {
		if err := f.repair(context.Background(), used, errMoved); err != nil {
			f.opening.Logger.Error("the database was deleted or replaced while it was open, and its events could not be copied into a new file: they are lost, unless the old file still exists", zap.Error(err))
		}
	}
	return f.DB.Close()
}
