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

// rescueTimeout limits the time to copy the events of a deleted file.
const rescueTimeout = time.Minute

// healing is a store that repairs its file. If the file is damaged, healing moves it aside
// and opens an empty file. If another process has deleted or replaced the open file, healing
// copies the events into the file that is now at the path. This works because the process
// still has the old file open.
type healing struct {
	path    string
	opening store.Opening

	// mu is read-locked while a method uses the file, and write-locked while healing replaces
	// the file.
	mu   sync.RWMutex
	file *file // nil if healing could not open a new file
}

// open opens the file. If the file is damaged, it moves the file aside and opens an empty file.
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

// moveAside renames a damaged database and its log. The new names contain the time.
func (h *healing) moveAside(why error) error {
	path := real(h.path)
	name := path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000Z")
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, name+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			h.opening.Logger.Error("cannot move the damaged database aside", zap.Error(err))
			return why
		}
	}
	h.opening.Logger.Error("the database is damaged: it was moved aside, recover its events as in docs/queue.md",
		zap.String("moved_to", name), zap.Error(why))
	return nil
}

// use calls f with the file. If the file is damaged, it replaces the file and calls f with
// the new file.
func (h *healing) use(ctx context.Context, f func(*file) error) error {
	used, err := h.try(f)
	if used == nil || errors.Is(err, errDamaged) {
		if healErr := h.heal(ctx, used, err); healErr != nil {
			return healErr
		}
		_, err = h.try(f)
	}
	return err
}

// try calls f with the open file, and returns the file. Without an open file, it returns nil.
func (h *healing) try(f func(*file) error) (*file, error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return nil, nil
	}
	return h.file, f(h.file)
}

// with does the same as use, and returns the result of f.
func with[T any](ctx context.Context, h *healing, f func(*file) (T, error)) (result T, err error) {
	err = h.use(ctx, func(file *file) (err error) {
		result, err = f(file)
		return err
	})
	return result, err
}

// heal opens a file in place of old, which is damaged, deleted or replaced. It does nothing
// if another goroutine has already done this.
func (h *healing) heal(ctx context.Context, old *file, damage error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.file != old:
		return nil
	case old != nil && damage == nil:
		return h.rescue(ctx)
	case old != nil:
		_ = old.Close()
		h.file = nil
		if err := h.moveAside(damage); err != nil {
			return err
		}
	}
	return h.open(ctx)
}

// rescue is for an open file that is no longer at its path. It copies the events into the
// file that is now at the path, and creates a missing file.
func (h *healing) rescue(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rescueTimeout)
	defer cancel()
	old := h.file
	moved, err := old.leave(ctx)
	if err != nil {
		return err // this process can still use the old file
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
	// read through the open connection: a new connection would open the new file
	from := &sqlstore.DB{Dialect: old.Dialect, Read: old.Write, Write: old.Write}
	err = store.Copy(ctx, h.file, from, false, func(ids []string) error {
		copied += len(ids)
		return nil
	})
	if err != nil {
		_ = h.file.Close()
		h.file = old
		return err
	}
	_ = old.Close()
	h.opening.Logger.Error("the database was deleted or replaced while it was open: its events were copied into the new one", zap.Int("events", copied))
	return nil
}

// leave prepares to open another file at the path. It copies the log into the old file, and
// deletes the log: SQLite would use this log for the new file. It reports false if the old
// file is still at the path.
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
				return false, err
			}
		}
	}
	return true, nil
}

// The methods of store.Store.

// Apply copies the events if the file is no longer at its path. Otherwise, the transaction
// would be lost with the old file.
func (h *healing) Apply(ctx context.Context, b *store.Batch) error {
	var moved *file
	err := h.use(ctx, func(f *file) error {
		err := f.Apply(ctx, b)
		if err == nil && !f.isAtPath() {
			moved = f
		}
		return err
	})
	if err != nil || moved == nil {
		return err
	}
	if err := h.heal(ctx, moved, nil); err != nil {
		return fmt.Errorf("the database was deleted or replaced while it was open, and its events cannot be copied yet: %w", err)
	}
	return nil
}

func (h *healing) Due(ctx context.Context, c *store.Claim, why error) error {
	return h.use(ctx, func(f *file) error { return f.Due(ctx, c, why) })
}

func (h *healing) Peek(ctx context.Context, queue string) (store.Peek, error) {
	return with(ctx, h, func(f *file) (store.Peek, error) { return f.Peek(ctx, queue) })
}

func (h *healing) Counts(ctx context.Context) ([]store.Count, error) {
	return with(ctx, h, func(f *file) ([]store.Count, error) { return f.Counts(ctx) })
}

func (h *healing) Search(ctx context.Context, filter store.Filter, withRequest bool) (store.Page, error) {
	return with(ctx, h, func(f *file) (store.Page, error) { return f.Search(ctx, filter, withRequest) })
}

func (h *healing) ReadRows(ctx context.Context, after store.Rows, idle bool) (store.Rows, error) {
	return with(ctx, h, func(f *file) (store.Rows, error) { return f.ReadRows(ctx, after, idle) })
}

func (h *healing) Status(ctx context.Context, queues ...string) (store.Status, error) {
	return with(ctx, h, func(f *file) (store.Status, error) { return f.Status(ctx, queues...) })
}

func (h *healing) Pause(ctx context.Context, queue string, paused bool) (bool, error) {
	return with(ctx, h, func(f *file) (bool, error) { return f.Pause(ctx, queue, paused) })
}

func (h *healing) Retry(ctx context.Context, filter store.Filter) (int, error) {
	return with(ctx, h, func(f *file) (int, error) { return f.Retry(ctx, filter) })
}

func (h *healing) Drop(ctx context.Context, filter store.Filter) (int, error) {
	return with(ctx, h, func(f *file) (int, error) { return f.Drop(ctx, filter) })
}

func (h *healing) Tidy(ctx context.Context, keep []store.Keep) (store.Upkeep, error) {
	return with(ctx, h, func(f *file) (store.Upkeep, error) { return f.Tidy(ctx, keep) })
}

// Close copies the events if the file was deleted after the last transaction.
func (h *healing) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != nil && !h.file.isAtPath() {
		if err := h.rescue(context.Background()); err != nil {
			h.opening.Logger.Error("cannot copy the events of a database that was deleted or replaced while it was open", zap.Error(err))
		}
	}
	if h.file == nil {
		return nil
	}
	return h.file.Close()
}
