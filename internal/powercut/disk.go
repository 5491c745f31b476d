//go:build linux

// Package powercut cuts the power of the disk of a Caddy with a queue in SQLite. The disk is
// simulated. The package is a separate module, so that nothing else needs its dependencies.
package powercut

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/stretchr/testify/require"
)

const (
	pageSize   = 4096
	sectorSize = 512
)

// disk is a file system whose power can be cut. It holds one folder of files.
//
// Programs read the newest content of each file, from a folder of the machine. The disk
// remembers the old content of a page until an fsync of the file. At a cut, a page that was
// not synced gets its old content, keeps its new content, or is torn: only its first sectors
// are new.
//
// In one way, this disk loses more than most disks: a page may become durable before an older
// write. In two ways, it loses less. Creating, renaming and deleting a file is durable without
// an fsync of the folder. An fsync also makes the writes durable that begin while it runs.
type disk struct {
	dir    string // has the newest content
	faults faults

	mu       sync.Mutex
	unsynced map[uint64]*file // by inode
	steps    int              // the number of writes and syncs until the cut; 0 for no cut
	kill     func()           // called at the cut
	cut      chan struct{}    // closed at the cut
	failed   int              // the number of fsyncs that have failed
}

// faults are the faults of a disk while it has power.
type faults struct {
	failOneIn     int           // with n, about one fsync in n fails with EIO, and its pages are lost at the cut unless they are written again
	atLeast, more time.Duration // an fsync takes atLeast, plus a random time below more
	liesAbout     string        // an fsync of a file with this suffix succeeds and does nothing
}

// file has the old, synced content of the pages that were written since the last fsync.
type file struct {
	size  int64
	pages map[int64]*page
}

type page struct {
	was     []byte
	dropped bool // an fsync has failed. As in ext4, programs still read the newest content
}

// toll counts the unsynced pages that a power cut has lost, torn or kept.
type toll struct{ lost, torn, kept int }

// mount mounts a disk at the path `on`. The disk has the files that another disk left in `dir`.
func mount(t *testing.T, dir, on string, f faults) (*disk, *fuse.Server) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount a file system")
	}
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skip("no file system can be served here: " + err.Error())
	} else {
		f.Close()
	}
	d := &disk{dir: dir, faults: f, unsynced: make(map[uint64]*file), cut: make(chan struct{})}
	loopback, err := fs.NewLoopbackRoot(dir)
	require.NoError(t, err)
	second := time.Second
	server, err := fs.Mount(on, &node{loopback.(*fs.LoopbackNode), d}, &fs.Options{
		EntryTimeout: &second, AttrTimeout: &second,
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "powercut", Name: "powercut", ExplicitDataCacheControl: true},
	})
	if errors.Is(err, syscall.EPERM) {
		t.Skip("no file system can be mounted here: " + err.Error())
	}
	require.NoError(t, err)
	t.Cleanup(func() { _ = syscall.Unmount(on, syscall.MNT_DETACH) }) // a failed test has not unmounted the disk
	return d, server
}

// cutAfter makes the disk count its writes and syncs from now. At the count of `steps`, the disk
// cuts the power, and calls `kill`.
func (d *disk) cutAfter(steps int, kill func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.steps, d.kill = steps, kill
}

// step counts a write or a sync that begins. Without power, it returns an error. The caller holds d.mu.
func (d *disk) step() syscall.Errno {
	if d.steps > 0 {
		if d.steps--; d.steps == 0 {
			d.kill()
			close(d.cut)
		}
	}
	select {
	case <-d.cut:
		return syscall.EIO
	default:
		return 0
	}
}

// The method remember saves the old content of the pages that a write will change.
func (d *disk) remember(f *os.File, from, to int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	u := d.unsynced[inode(info)]
	if u == nil {
		u = &file{size: info.Size(), pages: make(map[int64]*page)}
		d.unsynced[inode(info)] = u
	}
	for n := from / pageSize; n*pageSize < to; n++ {
		if p := u.pages[n]; p != nil {
			p.dropped = false
			continue
		}
		was := make([]byte, pageSize)
		if _, err := f.ReadAt(was, n*pageSize); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		u.pages[n] = &page{was: was}
	}
	return nil
}

func (d *disk) sync(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	u := d.unsynced[inode(info)]
	if u == nil {
		return nil
	}
	if d.faults.failOneIn > 0 && rand.IntN(d.faults.failOneIn) == 0 {
		d.failed++
		for _, p := range u.pages {
			p.dropped = true
		}
		return syscall.EIO
	}
	u.size = info.Size()
	for n, p := range u.pages {
		if !p.dropped {
			delete(u.pages, n)
		}
	}
	if len(u.pages) == 0 {
		delete(d.unsynced, inode(info))
	}
	return nil
}

func (d *disk) failOneIn(fsyncs int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults.failOneIn = fsyncs
}

// settle gives the files their content after the cut. The disk must be unmounted. `arrives` is the
// probability that an unsynced page has its new content, `tears` the probability that it is torn.
func (d *disk) settle(arrives, tears float64) (sum toll, err error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return sum, err
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			return sum, err
		}
		if u := d.unsynced[inode(info)]; u != nil {
			if err := u.settle(filepath.Join(d.dir, entry.Name()), info.Size(), arrives, tears, &sum); err != nil {
				return sum, err
			}
		}
	}
	return sum, nil
}

func (u *file) settle(path string, size int64, arrives, tears float64, sum *toll) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	switch rand.IntN(3) {
	case 0:
		size = u.size
	case 1:
		size = min(size, u.size) + rand.Int64N(max(size, u.size)-min(size, u.size)+1)
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	for n, p := range u.pages {
		sectors := 0 // the number of sectors that arrive
		switch x := rand.Float64(); {
		case p.dropped || x >= arrives+tears:
			sum.lost++
		case x >= arrives:
			sum.torn++
			sectors = 1 + rand.IntN(pageSize/sectorSize-1)
		default:
			sum.kept++
			continue
		}
		from := n*pageSize + int64(sectors)*sectorSize
		if from >= size {
			continue
		}
		was := p.was[sectors*sectorSize:]
		if _, err := f.WriteAt(was[:min(int64(len(was)), size-from)], from); err != nil {
			return err
		}
	}
	return nil
}

func inode(info os.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

// node is a file, or the folder.
type node struct {
	*fs.LoopbackNode
	disk *disk
}

func (n *node) path() string { return filepath.Join(n.disk.dir, n.Path(nil)) }

func (n *node) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{ops.(*fs.LoopbackNode), n.disk}
}

// Create is only called for a file that does not exist.
func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	child, handle, _, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	_ = handle.(fs.FileReleaser).Release(ctx)
	f, err := os.OpenFile(filepath.Join(n.path(), name), os.O_RDWR, 0)
	if err != nil {
		return nil, nil, 0, fs.ToErrno(err)
	}
	info, err := f.Stat()
	if err == nil {
		delete(n.disk.unsynced, inode(info)) // a deleted file may have had the same inode
	}
	return child, f, 0, fs.ToErrno(err)
}

// Open always opens the file for reading, too, because the disk reads the old content of a
// page before a write. It ignores O_TRUNC: the kernel truncates with Setattr.
func (n *node) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, err := os.OpenFile(n.path(), os.O_RDWR, 0)
	return f, 0, fs.ToErrno(err)
}

func (n *node) Release(_ context.Context, handle fs.FileHandle) syscall.Errno {
	return fs.ToErrno(handle.(*os.File).Close())
}

func (n *node) Read(_ context.Context, handle fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	read, err := handle.(*os.File).ReadAt(dest, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return fuse.ReadResultData(dest[:read]), fs.ToErrno(err)
}

func (n *node) Write(_ context.Context, handle fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if errno := n.disk.step(); errno != 0 {
		return 0, errno
	}
	f := handle.(*os.File)
	if err := n.disk.remember(f, off, off+int64(len(data))); err != nil {
		return 0, fs.ToErrno(err)
	}
	written, err := f.WriteAt(data, off)
	return uint32(written), fs.ToErrno(err)
}

func (n *node) Setattr(ctx context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if size, ok := in.GetSize(); ok {
		if errno := n.disk.step(); errno != 0 {
			return errno
		}
		f, err := os.OpenFile(n.path(), os.O_RDWR, 0)
		if err != nil {
			return fs.ToErrno(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err == nil {
			err = n.disk.remember(f, int64(size), info.Size())
		}
		if err != nil {
			return fs.ToErrno(err)
		}
	}
	return n.LoopbackNode.Setattr(ctx, nil, in, out)
}

func (n *node) Fsync(_ context.Context, handle fs.FileHandle, _ uint32) syscall.Errno {
	f, ok := handle.(*os.File)
	if !ok {
		return 0 // the folder is always durable
	}
	if n.disk.faults.more > 0 {
		time.Sleep(n.disk.faults.atLeast + rand.N(n.disk.faults.more))
	}
	n.disk.mu.Lock()
	defer n.disk.mu.Unlock()
	if errno := n.disk.step(); errno != 0 {
		return errno
	}
	if lies := n.disk.faults.liesAbout; lies != "" && strings.HasSuffix(n.path(), lies) {
		return 0
	}
	return fs.ToErrno(n.disk.sync(f))
}

// Interface guards
var (
	_ fs.NodeWrapChilder = (*node)(nil)
	_ fs.NodeCreater     = (*node)(nil)
	_ fs.NodeOpener      = (*node)(nil)
	_ fs.NodeReleaser    = (*node)(nil)
	_ fs.NodeReader      = (*node)(nil)
	_ fs.NodeWriter      = (*node)(nil)
	_ fs.NodeSetattrer   = (*node)(nil)
	_ fs.NodeFsyncer     = (*node)(nil)
)
