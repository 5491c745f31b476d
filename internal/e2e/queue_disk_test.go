//go:build linux

package e2e

import (
	"bytes"
	"database/sql"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite" // to read the database, and to lock it
)

// tmpfs mounts a file system in memory in a folder, with options such as its size.
func tmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount a file system")
	}
	require.NoError(t, os.MkdirAll(dir, 0o700))
	if err := syscall.Mount("none", dir, "tmpfs", 0, options); err != nil {
		t.Skip("no file system can be mounted here: " + err.Error())
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
}

// switchable returns a backend that accepts events while `up` is true, and otherwise answers 503.
func switchable(t *testing.T) (b *backend, up *atomic.Bool) {
	t.Helper()
	up = new(atomic.Bool)
	return newTaker(t, func(id string, attempt int) int {
		if !up.Load() {
			return http.StatusServiceUnavailable
		}
		return all(id, attempt)
	}), up
}

// The method "once" sends an event without a retry, and returns the response.
func (s *sender) once(t *testing.T, id string) answer {
	t.Helper()
	s.mu.Lock()
	s.tries++
	body := fmt.Appendf(nil, `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"%s","sent":%d}`, id, s.tries)
	s.mu.Unlock()
	got := post(t, s.urls[0], body, sign(secret, body))
	if got.status/100 == 2 {
		s.mu.Lock()
		s.accepted = append(s.accepted, id)
		s.mu.Unlock()
	}
	return got
}

// The function "refused" asserts that `got` is the response for an event that is neither stored
// nor delivered.
func refused(t *testing.T, got answer) {
	t.Helper()
	assert.Equal(t, http.StatusServiceUnavailable, got.status)
	assert.Equal(t, "30", got.header.Get("Retry-After"))
}

const cannotBeKept = "cannot store events"

func TestQueueOnADiskThatIsFull(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	takes := backend.status
	backend.status = func(id string, attempt int) int {
		if id == "taken" {
			return http.StatusOK
		}
		return takes(id, attempt)
	}
	c := newQueueCaddy(t, backend.addr, "once DOCUMENT_DELETED")
	tmpfs(t, c.path("queue"), "size=4m")
	c.start()
	s := newSender(t, c)
	large := strings.Repeat("x", 20_000)
	accepted := 0
	for got := s.once(t, "first"); got.status == http.StatusOK; got = s.once(t, fmt.Sprint(large, accepted)) {
		accepted++
		require.Less(t, accepted, 400, "8 MB in 4 MiB")
	}
	t.Logf("%d events of 20 kB were accepted", accepted)
	assert.Greater(t, accepted, 50)
	refused(t, s.once(t, large+"more"))
	c.logged(cannotBeKept)
	assert.NotEqual(t, "0", c.metric(`caddy_inkit_queue_stored_total{queue="default",result="failed"}`))
	deleted := []byte(`{"event_type":"DOCUMENT_DELETED","resource_id":"taken"}`)
	assert.Equal(t, http.StatusOK, post(t, "http://"+c.addr+"/webhook", deleted, sign(secret, deleted)).status, "a double is better than a loss")
	c.logged("cannot store events before their first attempt")

	up.Store(true)
	waitFor(t, "an event passes to a backend that is up again, though the disk is full", c.process, func() bool {
		return s.once(t, large+"passes").status == http.StatusOK
	})
	backend.hasAll(t, s.ids(), time.Minute)
	waitFor(t, "nothing waits", c.process, func() bool {
		return c.metric(`caddy_inkit_queue_events{queue="default",state="pending"}`) == "0"
	})
	up.Store(false)
	waitFor(t, "it accepts again, without a restart", c.process, func() bool {
		return s.once(t, large+"again").status == http.StatusOK
	})
	c.logged("storing events works again")
	for i := range 20 {
		assert.Equal(t, http.StatusOK, s.once(t, fmt.Sprint(large, "again-", i)).status)
	}
	up.Store(true)
	backend.hasAll(t, s.ids(), time.Minute)
}

func TestQueueWhoseFolderCannotBeWritten(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	c := newQueueCaddy(t, backend.addr, "")
	tmpfs(t, c.path("queue"), "size=4m,mode=0500")
	require.NoError(t, syscall.Mount("none", c.path("queue"), "tmpfs", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	c.start()
	s := newSender(t, c)
	assert.Equal(t, "the other site", c.get("http://"+c.addr+"/other"))
	refused(t, s.once(t, "refused"))
	c.logged(cannotBeKept)
	up.Store(true)
	assert.Equal(t, http.StatusOK, s.once(t, "passes").status)
	up.Store(false)
	refused(t, s.once(t, "refused again"))

	require.NoError(t, syscall.Mount("none", c.path("queue"), "tmpfs", syscall.MS_REMOUNT, ""))
	waitFor(t, "it accepts, without a restart", c.process, func() bool { return s.once(t, "kept").status == http.StatusOK })
	up.Store(true)
	backend.hasAll(t, s.ids(), time.Minute)
}

func TestQueueWhoseDatabaseGoesAway(t *testing.T) {
	t.Parallel()
	remove := func(t *testing.T, db string) {
		t.Helper()
		for _, suffix := range []string{"-wal", "-shm", ""} {
			require.NoError(t, os.Remove(db+suffix))
		}
	}
	for _, tt := range []struct {
		name string
		away func(t *testing.T, db string)
	}{
		{"deleted", remove},
		{"deleted with its folder", func(t *testing.T, db string) { require.NoError(t, os.RemoveAll(filepath.Dir(db))) }},
		{"replaced by an empty one", func(t *testing.T, db string) {
			remove(t, db)
			require.NoError(t, os.WriteFile(db, nil, 0o600))
		}},
		{"replaced by another one of its kind", func(t *testing.T, db string) {
			other := filepath.Join(t.TempDir(), "other.db")
			copyDatabase(t, db, other)
			remove(t, db)
			require.NoError(t, os.Rename(other, db))
		}},
		{"renamed", func(t *testing.T, db string) { require.NoError(t, os.Rename(db, db+".old")) }},
		{"without its log", func(t *testing.T, db string) { require.NoError(t, os.Remove(db+"-wal")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			backend, up := switchable(t)
			c := queueCaddy(t, backend.addr, "")
			s := newSender(t, c)
			for i := range 10 {
				require.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("before-", i)).status)
			}
			tt.away(t, c.path("queue/events.db"))
			for i := range 10 {
				s.once(t, fmt.Sprint("after-", i)) // a status 2xx means that the event must arrive
			}
			assert.Equal(t, "the other site", c.get("http://"+c.addr+"/other"))
			c.logged("was deleted")
			waitFor(t, "it accepts", c.process, func() bool { return s.once(t, "kept").status == http.StatusOK })
			// after a crash, the file that is now at the path must have each event with a
			// 2xx response
			killHard(c)
			c.start()
			up.Store(true)
			backend.hasAll(t, s.ids(), time.Minute)
		})
	}
}

// Two Caddys store events in one database while its log is deleted, again and again.
func TestQueueOfTwoCaddysWhoseLogIsDeleted(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	one := queueCaddy(t, backend.addr, "")
	two := newCaddy(t, "grace_period 5s", strings.ReplaceAll(queueSite(backend.addr, ""), "{{dir}}", one.dir))
	two.start()
	s := newSender(t, one, two)
	for i := range 5 {
		sent := s.sendAll(t.Context(), fmt.Sprint("kept-", i), 40)
		require.NoError(t, os.Remove(one.path("queue/events.db-wal")))
		<-sent
		waitFor(t, "there is a new log", one.process, func() bool {
			_, err := os.Stat(one.path("queue/events.db-wal"))
			return err == nil
		})
	}
	one.logged("was deleted or replaced while it was open: its events are in the file")
	two.logged("was deleted or replaced while it was open: its events are in the file")
	s.refusedNone(t)
	up.Store(true)
	backend.hasAll(t, s.ids(), 20*time.Second)
}

// copyDatabase copies a database with its write-ahead log, while Caddy may be writing.
func copyDatabase(t *testing.T, from, to string) {
	t.Helper()
	for _, suffix := range []string{"", "-wal"} {
		content, err := os.ReadFile(from + suffix)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(to+suffix, content, 0o600))
	}
}

// Caddy still has the deleted file open. When Caddy stops, it copies the events to a new file.
func TestQueueWhoseDatabaseIsDeletedBeforeAStop(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, all)
	backend.close()
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	<-s.sendAll(t.Context(), "kept", 10)
	require.Len(t, s.ids(), 10)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		require.NoError(t, os.Remove(c.path("queue/events.db"+suffix)))
	}
	c.stop(t, syscall.SIGTERM)
	backend.listen()
	c.start()
	backend.hasAll(t, s.ids(), time.Minute)
}

func TestQueueWhoseDatabaseIsLocked(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	require.Equal(t, http.StatusOK, s.once(t, "before").status)
	db, err := sql.Open("sqlite", c.path("queue/events.db")+"?_txlock=immediate&_pragma=busy_timeout(5000)")
	require.NoError(t, err)
	defer db.Close()
	tx, err := db.Begin()
	require.NoError(t, err)
	refused(t, s.once(t, "refused"))
	c.logged(cannotBeKept)
	up.Store(true)
	waitFor(t, "an event passes", c.process, func() bool { return s.once(t, "passes").status == http.StatusOK })
	up.Store(false)
	refused(t, s.once(t, "refused again"))
	require.NoError(t, tx.Rollback())
	waitFor(t, "it accepts", c.process, func() bool { return s.once(t, "kept").status == http.StatusOK })
	up.Store(true)
	backend.hasAll(t, s.ids(), time.Minute)
}

// The function "kept" returns the path of a new database with pending events, and their ids.
func kept(t *testing.T, events int) (db string, ids []string) {
	t.Helper()
	backend := newTaker(t, all)
	backend.close()
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	<-s.sendAll(t.Context(), "kept", events)
	require.Len(t, s.ids(), events)
	c.stop(t, syscall.SIGTERM)
	return c.path("queue/events.db"), s.ids()
}

func edit(t *testing.T, path string, change func([]byte) []byte) {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, change(content), 0o600))
}

func TestQueueWhoseDatabaseIsDamaged(t *testing.T) {
	t.Parallel()
	const aside = "the database is damaged: it was moved aside"
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, db string)
		aside  bool // whether the database is moved aside
		says   string
		all    bool // whether all events of the database are delivered
		keeps  bool // whether new events are stored
	}{
		{"cut in half", func(t *testing.T, db string) {
			edit(t, db, func(b []byte) []byte { return b[:len(b)/2] })
		}, true, aside, false, true},
		{"4 KiB of noise in the middle", func(t *testing.T, db string) {
			edit(t, db, func(b []byte) []byte {
				copy(b[len(b)/2&^4095:], bytes.Repeat([]byte{0xa5, 0x17, 0xff}, 4096/3))
				return b
			})
		}, true, aside, false, true},
		{"noise from its begin", func(t *testing.T, db string) {
			edit(t, db, func(b []byte) []byte { return bytes.Repeat([]byte("noise"), len(b)/5) })
		}, true, aside, false, true},
		{"of length 0", func(t *testing.T, db string) {
			edit(t, db, func([]byte) []byte { return nil })
		}, false, "", false, true},
		{"of another program", func(t *testing.T, db string) {
			require.NoError(t, os.Remove(db))
			execSQL(t, db, `CREATE TABLE contacts (name TEXT)`)
		}, false, "is the database of another program", false, false},
		{"of a later version", func(t *testing.T, db string) {
			execSQL(t, db, `UPDATE inkit_queue_schema SET version = 99`)
		}, false, "the database has the schema of another version: 99", false, false},
		{"unreadable", func(t *testing.T, db string) {
			require.NoError(t, os.Remove(db))
			require.NoError(t, os.Mkdir(db, 0o700)) // a folder, because root can read any file
		}, false, "is a directory", false, false},
		{"whole", func(*testing.T, string) {}, false, "", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			db, ids := kept(t, size(2000, 200))
			tt.damage(t, db)
			backend, up := switchable(t)
			up.Store(true)
			c := newQueueCaddy(t, backend.addr, "")
			require.NoError(t, os.Rename(filepath.Dir(db), c.path("queue")))
			c.start()
			assert.Equal(t, "the other site", c.get("http://"+c.addr+"/other"))
			s := newSender(t, c)
			if tt.says != "" {
				c.logged(tt.says)
			}
			assert.Equal(t, http.StatusOK, s.once(t, "passes").status)
			if tt.all {
				backend.hasAll(t, ids, 20*time.Second)
			}
			if tt.aside {
				files, err := filepath.Glob(c.path("queue/events.db.damaged-*Z"))
				require.NoError(t, err)
				assert.Len(t, files, 1)
				waitFor(t, "the metric says so", c.process, func() bool {
					return c.metric(`caddy_inkit_queue_damaged_files{queue="default"}`) == "1"
				})
			}
			up.Store(false)
			if !tt.keeps {
				refused(t, s.once(t, "refused"))
				return
			}
			for i := range 20 {
				require.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("new-", i)).status)
			}
			up.Store(true)
			backend.hasAll(t, s.ids(), time.Minute)
		})
	}
}

func execSQL(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path+"?_pragma=busy_timeout(5000)")
	require.NoError(t, err)
	defer db.Close()
	_, err = db.Exec(statement)
	require.NoError(t, err)
}
