//go:build linux

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A sender that has closed its half of the connection still reads the response.
func TestQueueOfASenderThatHalfCloses(t *testing.T) {
	t.Parallel()
	halfClosed := func(t *testing.T, c *caddy, id string) int {
		t.Helper()
		body := event(id)
		conn, err := net.Dial("tcp", c.addr)
		require.NoError(t, err)
		defer conn.Close()
		_, err = fmt.Fprintf(conn, "POST /webhook HTTP/1.1\r\nHost: %s\r\nInkit-Signature: %s\r\nContent-Length: %d\r\n\r\n%s", c.addr, sign(secret, body), len(body), body)
		require.NoError(t, err)
		require.NoError(t, conn.(*net.TCPConn).CloseWrite())
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		resp.Body.Close()
		return resp.StatusCode
	}
	backend := newTaker(t, func(string, int) int {
		time.Sleep(20 * time.Millisecond)
		return http.StatusInternalServerError
	})
	t.Run("when nothing can be kept", func(t *testing.T) {
		t.Parallel()
		c := newQueueCaddy(t, backend.addr, "")
		require.NoError(t, os.MkdirAll(c.path("queue/events.db"), 0o700)) // the folder makes it impossible to create the database file
		c.start()
		inParallel(4, 4, func(i int) { // each sender waits 5 s
			assert.Equal(t, http.StatusServiceUnavailable, halfClosed(t, c, fmt.Sprint("refused-", i)))
		})
	})
	t.Run("when it is kept", func(t *testing.T) {
		t.Parallel()
		c := queueCaddy(t, backend.addr, "")
		for i := range 20 {
			assert.Equal(t, http.StatusOK, halfClosed(t, c, fmt.Sprint("kept-", i)))
		}
		assert.Len(t, c.list(t), 20)
	})
}

// After an outage, the backend gets events again, even if Caddy could not open the
// database.
func TestQueueWithoutADatabaseWhoseBackendComesBack(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	c := newQueueCaddy(t, backend.addr, "")
	require.NoError(t, os.MkdirAll(c.path("queue/events.db"), 0o700))
	c.start()
	s := newSender(t, c)
	inParallel(10, 10, func(i int) { refused(t, s.once(t, fmt.Sprint("refused-", i))) }) // each waits 5 s
	c.logged("the backend is down")
	up.Store(true)
	for i := range 10 {
		assert.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("passes-", i)).status)
	}
	backend.hasAll(t, s.ids(), time.Second)
}

// Events that make the backend drop the connection look like an outage. Other events arrive.
func TestQueueOfEventsThatLookLikeAnOutage(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, func(id string, attempt int) int {
		if strings.HasPrefix(id, "poison") {
			panic(http.ErrAbortHandler)
		}
		return all(id, attempt)
	})
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	<-s.sendAll(t.Context(), "poison", 60)
	good := newSender(t, c)
	<-good.sendAll(t.Context(), "good", 20)
	require.Len(t, good.ids(), 20)
	backend.hasAll(t, good.ids(), 15*time.Second)
}

func TestQueueWhoseDatabaseIsALink(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		make func(t *testing.T, target string)
	}{
		{"to a file", func(t *testing.T, target string) { writeFile(t, target, "") }},
		{"to nothing yet", func(*testing.T, string) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			backend, up := switchable(t)
			c := newQueueCaddy(t, backend.addr, "attempt_timeout 5s") // after a kill, the events stay leased for up to 7 s
			target := t.TempDir() + "/real.db"
			tt.make(t, target)
			require.NoError(t, os.Mkdir(c.path("queue"), 0o700))
			require.NoError(t, os.Symlink(target, c.path("queue/events.db")))
			c.start()
			s := newSender(t, c)
			for i := range 10 {
				require.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("kept-", i)).status)
			}
			assert.Len(t, c.list(t), 10)
			killHard(c)
			c.start()
			up.Store(true)
			backend.hasAll(t, s.ids(), 20*time.Second)
		})
	}
}

func TestQueuePath(t *testing.T) {
	t.Parallel()
	site := strings.Replace(queueSite("127.0.0.1:1", ""), "{{dir}}/queue/events.db", "{env.QUEUE_DB}", 1)
	c := newCaddy(t, "", site)
	_, err := c.command("validate", "--config", c.path("Caddyfile"))
	require.ErrorContains(t, err, "path: evaluated placeholder {env.QUEUE_DB} is empty")

	dir := t.TempDir()
	c = newCaddy(t, "", site, "QUEUE_DB="+dir+"/named.db")
	require.NoError(t, os.WriteFile(dir+"/named.db", nil, 0o644)) //nolint:gosec // Caddy must take these permissions away
	c.start()
	s := newSender(t, c)
	require.Equal(t, http.StatusOK, s.once(t, "kept").status)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(dir + "/named.db" + suffix)
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), info.Mode().Perm(), "nobody else can read it: %s", suffix)
	}
}

func TestQueueMoveThatMakesNoSense(t *testing.T) {
	t.Parallel()
	backend, up := switchable(t)
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	for i := range 3 {
		require.Equal(t, http.StatusOK, s.once(t, fmt.Sprint("kept-", i)).status)
	}
	require.NoError(t, os.Symlink(c.path("queue"), c.path("link")))
	for _, from := range []string{"queue/events.db", "link/events.db"} {
		_, err := c.command("inkit-queue", "move", "--from", c.path(from), "--config", c.path("Caddyfile"))
		require.ErrorContains(t, err, "this is the database of --from: name another one with --config or --db")
		assert.Len(t, c.list(t), 3)
	}
	other := newCaddy(t, "", queueSite(backend.addr, "")+strings.NewReplacer("{{addr}}", freeAddr(t), "events.db", "others.db", "inkit_queue {", "inkit_queue {\n\t\t\tname other").Replace(queueSite(backend.addr, "")))
	_, err := other.command("inkit-queue", "move", "--from", c.path("queue/events.db"), "--config", other.path("Caddyfile"))
	require.ErrorContains(t, err, "the configuration names several databases")
	assert.Len(t, c.list(t), 3)
	up.Store(true)
	backend.hasAll(t, s.ids(), 20*time.Second)
	c.stop(t, syscall.SIGTERM)
}
