//go:build linux

package powercut

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// write writes whole pages, one for each letter.
func write(t *testing.T, f *os.File, at int64, letters string) {
	t.Helper()
	for i := range letters {
		_, err := f.WriteAt(bytes.Repeat([]byte(letters[i:i+1]), pageSize), (at+int64(i))*pageSize)
		require.NoError(t, err)
	}
}

// letters returns one character for each page of a file: the letter, a dot for an empty
// page, or a question mark for a torn page.
func letters(content []byte) (s string) {
	for len(content) > 0 {
		page := content[:min(pageSize, len(content))]
		content = content[len(page):]
		switch {
		case bytes.Count(page, page[:1]) < len(page):
			s += "?"
		case page[0] == 0:
			s += "."
		default:
			s += string(page[:1])
		}
	}
	return s
}

// TestDisk writes and syncs the pages a, b and c. Then it changes the file, and cuts the power.
func TestDisk(t *testing.T) {
	for _, tt := range []struct {
		name           string
		faults         faults
		then           func(t *testing.T, d *disk, f *os.File)
		arrives, tears float64
		want           []string // the allowed results
	}{
		{"unsynced pages are lost", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "BC")
		}, 0, 0, []string{"abc"}},
		{"unsynced pages arrive", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "BC")
		}, 1, 0, []string{"aBC"}},
		{"some unsynced pages arrive", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "BC")
		}, 0.5, 0, []string{"abc", "aBc", "abC", "aBC"}},
		{"an unsynced page is torn", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "B")
		}, 0, 1, []string{"a?c"}},
		{"synced pages stay", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "BC")
			require.NoError(t, f.Sync())
		}, 0, 0, []string{"aBC"}},
		{"each fsync has lied", faults{liesAbout: "-wal"}, func(t *testing.T, _ *disk, f *os.File) {
			write(t, f, 1, "BC")
			require.NoError(t, f.Sync())
		}, 0, 0, []string{"", ".", "..", "..."}},
		{"an fsync fails, and the next one succeeds", faults{}, func(t *testing.T, d *disk, f *os.File) {
			write(t, f, 1, "BC")
			d.failOneIn(1)
			require.ErrorIs(t, f.Sync(), syscall.EIO)
			d.failOneIn(0)
			write(t, f, 2, "D")
			require.NoError(t, f.Sync())
		}, 1, 0, []string{"abD"}},
		{"the file was truncated", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			require.NoError(t, f.Truncate(pageSize))
		}, 0, 0, []string{"a", "ab", "abc"}},
		{"the file was truncated and synced", faults{}, func(t *testing.T, _ *disk, f *os.File) {
			require.NoError(t, f.Truncate(pageSize))
			require.NoError(t, f.Sync())
		}, 0, 0, []string{"a"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, on := t.TempDir(), t.TempDir()
			d, server := mount(t, dir, on, tt.faults)
			f, err := os.Create(filepath.Join(on, "a-wal"))
			require.NoError(t, err)
			defer f.Close()
			write(t, f, 0, "abc")
			require.NoError(t, f.Sync())
			tt.then(t, d, f)
			d.cutAfter(1, func() {})
			_, err = f.WriteAt([]byte("after the cut"), 0)
			require.ErrorIs(t, err, syscall.EIO)
			require.ErrorIs(t, f.Sync(), syscall.EIO)
			f.Close()
			require.NoError(t, server.Unmount())
			_, err = d.settle(tt.arrives, tt.tears)
			require.NoError(t, err)
			content, err := os.ReadFile(filepath.Join(dir, "a-wal"))
			require.NoError(t, err)
			assert.Contains(t, tt.want, letters(content))
		})
	}
}
