package sqlite

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"go.uber.org/zap"
)

// rescueTimeout is how long copying the events of a deleted file may take.
const rescueTimeout = time.Minute

// healing is a store in a file that may be damaged, deleted or replaced while it is open.
// A damaged file is moved aside, and an empty one takes its place. The events of a file
// that was deleted or replaced are copied into the one that is at its path now, while the
// process still has the old one open.
type healing struct {
	path    string
	opening store.Opening

	// mu is held for reading while the file is in use, and for writing while another one
	// takes its place.
	mu   sync.RWMutex
	file *file // nil after a try to take another one has failed
}

// open opens the file, and moves a damaged one aside.
func (h *healing) open(ctx context.Context) error {
	f, err := openFile(ctx, h.path, h.opening)
	if errors.Is(err, errDamaged) && !h.opening.Command {
		if err := h.moveAside(err); err != nil {
			return err
		}
		f, err = openFile(ctx, h.path, h.opening)
	}
	if err == nil {
		h.file = f
	}
	return err
}

// moveAside renames a damaged database, with its log, to a name that says when.
func (h *healing) moveAside(why error) error {
	path := real(h.path)
	var name string
	for now := time.Now(); ; now = now.Add(time.Second) { // do not overwrite an earlier one
		name = path + ".damaged-" + now.UTC().Format("20060102T150405Z")
		if _, err := os.Lstat(name); err != nil {
			break
		}
	}
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, name+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			h.opening.Logger.Error("cannot move the damaged database aside", zap.Error(withoutPath(err)))
			return why
		}
	}
	h.opening.Logger.Error("the database is damaged: it was moved aside, and what can be recovered of its events is for an operator to recover",
		zap.String("moved_to", name), zap.Error(why))
	return nil
}

// use calls f with the file. If the file is damaged, it calls f again with the one that
// takes its place.
func (h *healing) use(ctx context.Context, f func(*file) error) error {
	used, err := h.try(f)
	if used == nil || errors.Is(err, errDamaged) && !h.opening.Command {
		if healErr := h.replaceDamaged(ctx, used, err); healErr != nil {
			return healErr
		}
		_, err = h.try(f)
	}
	return err
}

// try calls f with the file, if it is open, and returns it.
func (h *healing) try(f func(*file) error) (*file, error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return nil, nil
	}
	return h.file, f(h.file)
}

// replaceDamaged opens another file in the place of a damaged one, unless somebody else
// has done so.
func (h *healing) replaceDamaged(ctx context.Context, damaged *file, why error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != damaged {
		return nil
	}
	if damaged != nil {
		_ = damaged.Close()
		h.file = nil
		if err := h.moveAside(why); err != nil {
			return err
		}
	}
	return h.open(ctx)
}

// Apply is of store.Store. When the file is not at its path any more, the transaction is
// in a file that nobody will find: its events are copied before Apply returns.
func (h *healing) Apply(ctx context.Context, b *store.Batch) error {
	var moved *file
	err := h.use(ctx, func(f *file) error {
		err := f.Apply(ctx, b)
		if err == nil && !h.opening.Command && !f.isAtPath() {
			moved = f
		}
		return err
	})
	if err != nil || moved == nil {
		return err
	}
	if err := h.rescue(moved); err != nil {
		return fmt.Errorf("the database was deleted or replaced while it was open, and its events cannot be copied yet: %w", err)
	}
	return nil
}

// rescue copies the events of a file that is not at its path any more into the one that is
// there now, or into a new one.
func (h *healing) rescue(old *file) error {
	ctx, cancel := context.WithTimeout(context.Background(), rescueTimeout)
	defer cancel()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != old {
		return nil
	}
	moved, err := old.leave(ctx)
	if err != nil {
		return err // the old file is still there for this process
	}
	if !moved {
		h.opening.Logger.Error("the write-ahead log of the database was deleted while it was open: nothing is lost")
		_ = old.Close()
		h.file = nil
		return h.open(ctx)
	}
	if err := h.open(ctx); err != nil {
		return err
	}
	copied := 0
	// by the connection that writes: one that is opened now would open the new file
	from := &sqlstore.DB{Dialect: old.Dialect, Read: old.Write, Write: old.Write}
	err = store.Each(ctx, from, store.Filter{}, true, func(page []*store.Record) error {
		copied += len(page)
		return store.Copy(ctx, h.file, "rescue", page)
	})
	if err == nil {
		err = store.CopyMemory(ctx, h.file, from)
	}
	if err != nil {
		_ = h.file.Close()
		h.file = old
		return err
	}
	_ = old.Close()
	h.opening.Logger.Error("the database was deleted or replaced while it was open: its events were copied into the new one", zap.Int("events", copied))
	return nil
}

// leave prepares for another file at the path, and reports whether there is or can be one.
// The log goes into the file, wherever that is now. Then the log must not be at its path
// any more: SQLite would take it for that of the other file.
func (f *file) leave(ctx context.Context) (moved bool, err error) {
	var busy, pages, copied int
	err = f.Write.QueryRowContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`).Scan(&busy, &pages, &copied)
	switch {
	case err != nil:
		return false, wrap(err)
	case busy != 0:
		return false, store.ErrLocked
	case isFile(f.path, f.main):
		return false, nil
	case isFile(f.path+"-wal", f.log):
		for _, suffix := range []string{"-wal", "-shm"} {
			if err := os.Remove(f.path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return false, withoutPath(err)
			}
		}
	}
	return true, nil
}

// Due is of store.Store. Who cannot write because another process does must not deliver
// the same events.
func (h *healing) Due(ctx context.Context, c *store.Claim, why error) error {
	if errors.Is(why, store.ErrLocked) {
		return why
	}
	return h.use(ctx, func(f *file) error { return f.Due(ctx, c, why) })
}

// Peek is of store.Store.
func (h *healing) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	err = h.use(ctx, func(f *file) (err error) { p, err = f.Peek(ctx, queue); return err })
	return p, err
}

// Counts is of store.Store.
func (h *healing) Counts(ctx context.Context) (counts []store.Count, err error) {
	err = h.use(ctx, func(f *file) (err error) { counts, err = f.Counts(ctx); return err })
	return counts, err
}

// Search is of store.Store.
func (h *healing) Search(ctx context.Context, filter store.Filter, withRequest bool) (page store.Page, err error) {
	err = h.use(ctx, func(f *file) (err error) { page, err = f.Search(ctx, filter, withRequest); return err })
	return page, err
}

// Keys is of store.Store.
func (h *healing) Keys(ctx context.Context, after store.Key) (keys []store.Key, err error) {
	err = h.use(ctx, func(f *file) (err error) { keys, err = f.Keys(ctx, after); return err })
	return keys, err
}

// Status is of store.Store.
func (h *healing) Status(ctx context.Context, queues ...string) (status store.Status, err error) {
	err = h.use(ctx, func(f *file) (err error) { status, err = f.Status(ctx, queues...); return err })
	return status, err
}

// Pause is of store.Store.
func (h *healing) Pause(ctx context.Context, queue string, paused bool) (changed bool, err error) {
	err = h.use(ctx, func(f *file) (err error) { changed, err = f.Pause(ctx, queue, paused); return err })
	return changed, err
}

// Retry is of store.Store.
func (h *healing) Retry(ctx context.Context, filter store.Filter) (n int, err error) {
	err = h.use(ctx, func(f *file) (err error) { n, err = f.Retry(ctx, filter); return err })
	return n, err
}

// Drop is of store.Store.
func (h *healing) Drop(ctx context.Context, filter store.Filter) (n int, err error) {
	err = h.use(ctx, func(f *file) (err error) { n, err = f.Drop(ctx, filter); return err })
	return n, err
}

// Tidy is of store.Store.
func (h *healing) Tidy(ctx context.Context, keep []store.Keep) (u store.Upkeep, err error) {
	err = h.use(ctx, func(f *file) (err error) { u, err = f.Tidy(ctx, keep); return err })
	return u, err
}

// Close is of store.Store. The file may have been deleted since the last transaction.
func (h *healing) Close() error {
	if f, _ := h.try(func(*file) error { return nil }); f != nil && !h.opening.Command && !f.isAtPath() {
		if err := h.rescue(f); err != nil {
			h.opening.Logger.Error("cannot copy the events of a database that was deleted or replaced while it was open", zap.Error(err))
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil
	}
	err := h.file.Close()
	h.file = nil
	return err
}

func (h *healing) isFileOf(other *healing) bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.file != nil && isFile(other.path, h.file.main)
}
