//go:build linux

package powercut

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const secret = "test_inkit_webhook_secret"

// TestPowerCuts sends events to a Caddy with its queue on a disk, and cuts the power of the
// disk again and again. The backend is up before one cut and down before the next. Each
// event with a 2xx response must arrive.
func TestPowerCuts(t *testing.T) {
	if _, err := exec.LookPath("sqlite3"); err != nil {
		t.Skip("sqlite3 is not there, which checks the database")
	}
	caddy := filepath.Join(t.TempDir(), "caddy")
	out, err := exec.Command("go", "build", "-C", "../..", "-o", caddy, "./cmd/caddy").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, tt := range []struct {
		name    string
		faults  faults
		cuts    int
		senders int
		events  int // maximum number of 2xx responses before a cut
		steps   int // maximum number of writes and syncs after these responses until the cut
	}{
		{"only the power is cut", faults{}, 20, 16, 400, 200},
		{"and one fsync in ten fails", faults{failOneIn: 10}, 20, 16, 200, 200},
		{"and an fsync takes 50 to 200 ms", faults{atLeast: 50 * time.Millisecond, more: 150 * time.Millisecond}, 20, 32, 100, 60},
		// this row must lose events, to prove that the test finds lost events
		{"and each fsync of the log lies", faults{liesAbout: "-wal"}, 6, 16, 400, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			began := time.Now()
			m := newMachine(t, caddy, tt.faults)
			var sum toll
			failed := 0
			for i := range tt.cuts {
				m.backend.up.Store(i%2 == 0)
				m.start(t)
				m.load(t, tt.senders, tt.events/2+rand.IntN(tt.events/2), 1+rand.IntN(tt.steps))
				cut, err := m.off(t)
				require.NoError(t, err)
				sum.lost, sum.torn, sum.kept = sum.lost+cut.lost, sum.torn+cut.torn, sum.kept+cut.kept
				failed += m.disk.failed
				if tt.faults.liesAbout == "" {
					m.check(t)
				}
			}
			m.backend.up.Store(true)
			m.faults = faults{} // the cuts are over, so the rest can be fast
			m.start(t)
			waitFor(t, "all stored events arrive", func() bool { return m.backend.missing(m.accepted) == 0 || m.keepsNothing() })
			m.stop(t)
			lost, doubles := m.backend.missing(m.accepted), m.backend.doubles()
			t.Logf("%d cuts: %d accepted, %d lost, %d doubles, %d refused; %d fsyncs failed; of the unsynced pages %d lost, %d torn, %d kept; %v",
				tt.cuts, len(m.accepted), lost, doubles, m.refused, failed, sum.lost, sum.torn, sum.kept, time.Since(began).Round(100*time.Millisecond))
			assert.NotZero(t, sum.lost, "lost pages")
			assert.NotZero(t, sum.torn, "torn pages")
			assert.Equal(t, tt.faults.failOneIn > 0, failed > 0)
			if tt.faults.liesAbout != "" {
				assert.NotZero(t, lost, "the log was never synced, but no event was lost: these cuts prove nothing")
				return
			}
			assert.Zero(t, lost)
			assert.NotContains(t, m.log(t), "damaged")
			assert.Zero(t, m.refused, "refused events, although the database could store events")
		})
	}
}

// machine has a disk, and a Caddy that runs while the machine has power.
type machine struct {
	caddy   string // the path of the program
	dir     string // for files outside of the disk
	faults  faults
	backend *backend

	disk   *disk
	server interface{ Unmount() error }
	cmd    *exec.Cmd
	exited chan struct{}

	mu       sync.Mutex
	sent     int
	accepted []string
	refused  int
}

func newMachine(t *testing.T, caddy string, f faults) *machine {
	t.Helper()
	m := &machine{caddy: caddy, dir: t.TempDir(), faults: f, backend: newBackend(t)}
	for _, name := range []string{"disk", "mounted"} {
		require.NoError(t, os.Mkdir(m.path(name), 0o700))
	}
	require.NoError(t, os.WriteFile(m.path("Caddyfile"), []byte(`
{
	admin off
	auto_https off
}
http:// {
	bind unix/`+m.path("caddy.sock")+`
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			store sqlite `+m.path("mounted/queue.db")+`
			attempt_timeout 2s # an event that was in an attempt waits that long after a cut
			deliver {
				reverse_proxy `+m.backend.addr+`
			}
		}
	}
	error 404
}
`), 0o600))
	t.Cleanup(func() {
		if m.cmd != nil {
			_ = m.cmd.Process.Kill()
		}
		if t.Failed() {
			log := m.log(t)
			t.Logf("the end of the log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) log(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(m.path("log"))
	require.NoError(t, err)
	return string(log)
}

// client returns a client of Caddy with its own connections.
func (m *machine) client() *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.path("caddy.sock"))
		},
	}}
}

func (m *machine) command(args ...string) *exec.Cmd {
	cmd := exec.Command(m.caddy, args...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "HOME="+m.dir, "XDG_CONFIG_HOME="+m.dir, "XDG_DATA_HOME="+m.dir, "INKIT_WEBHOOK_SECRET="+secret)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start gives power to the machine, and waits until Caddy listens.
func (m *machine) start(t *testing.T) {
	t.Helper()
	m.disk, m.server = mount(t, m.path("disk"), m.path("mounted"), m.faults)
	_ = os.Remove(m.path("caddy.sock"))
	log, err := os.OpenFile(m.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer log.Close()
	cmd := m.command("run", "--config", m.path("Caddyfile"), "--adapter", "caddyfile")
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	m.cmd, m.exited = cmd, exited
	waitFor(t, "Caddy listens", func() bool {
		conn, err := net.Dial("unix", m.path("caddy.sock"))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// The method "load" starts goroutines that send events; `senders` is their number. After
// `events` accepted events, it counts the writes and syncs of the disk. The power is cut at
// number `steps`. The method returns when all goroutines have stopped.
func (m *machine) load(t *testing.T, senders, events, steps int) {
	t.Helper()
	client := m.client()
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	before := len(m.accepted)
	for range senders {
		wg.Go(func() {
			for m.send(ctx, t, client) {
			}
		})
	}
	waitFor(t, "enough events are accepted", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.accepted)-before >= events
	})
	m.disk.cutAfter(steps, func() { _ = m.cmd.Process.Kill() })
	select {
	case <-m.disk.cut:
		wg.Wait()
	case <-time.After(20 * time.Second):
		require.FailNow(t, "Caddy no longer writes to the disk")
	}
}

// send sends one event, and reports whether a response arrived.
func (m *machine) send(ctx context.Context, t *testing.T, client *http.Client) bool {
	m.mu.Lock()
	m.sent++
	id := fmt.Sprint("event-", m.sent)
	m.mu.Unlock()
	body := fmt.Appendf(nil, `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"%s","data":"%s"}`, id, strings.Repeat("x", rand.IntN(2000)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/webhook", bytes.NewReader(body))
	if err != nil {
		return false
	}
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write(body)
	req.Header.Set("Inkit-Signature", hex.EncodeToString(mac.Sum(nil)))
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case resp.StatusCode/100 == 2:
		m.accepted = append(m.accepted, id)
	case resp.StatusCode >= 500:
		m.refused++
	default:
		assert.Fail(t, "an unexpected response", resp.Status)
		return false
	}
	return true
}

// The method "off" waits until Caddy has ended, and unmounts the disk. Then it calls the method
// settle of the disk, which gives the files the content that they have after a power cut.
func (m *machine) off(t *testing.T) (toll, error) {
	t.Helper()
	select {
	case <-m.exited:
	case <-time.After(20 * time.Second):
		require.FailNow(t, "Caddy does not end")
	}
	require.NoError(t, m.server.Unmount())
	return m.disk.settle(rand.Float64()*0.8, 0.2)
}

func (m *machine) stop(t *testing.T) {
	t.Helper()
	require.NoError(t, m.cmd.Process.Signal(syscall.SIGTERM))
	_, err := m.off(t)
	require.NoError(t, err)
}

// check checks a copy of the database with SQLite.
func (m *machine) check(t *testing.T) {
	t.Helper()
	copied := filepath.Join(t.TempDir(), "queue.db")
	for _, suffix := range []string{"", "-wal"} {
		content, err := os.ReadFile(m.path("disk/queue.db" + suffix))
		if os.IsNotExist(err) {
			continue
		}
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(copied+suffix, content, 0o600))
	}
	out, err := exec.Command("sqlite3", copied, "PRAGMA integrity_check").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "ok\n", string(out))
}

// keepsNothing reports whether the database has no event.
func (m *machine) keepsNothing() bool {
	out, err := m.command("inkit-queue", "list", "--json", "--config", m.path("Caddyfile")).Output()
	return err == nil && len(out) == 0
}

// backend records the events that it accepts. While it is down, it breaks each connection.
type backend struct {
	addr string
	up   atomic.Bool

	mu    sync.Mutex
	taken map[string]int
}

func newBackend(t *testing.T) *backend {
	t.Helper()
	b := &backend{taken: make(map[string]int)}
	server := httptest.NewServer(b)
	t.Cleanup(server.Close)
	b.addr = server.Listener.Addr().String()
	return b
}

// ServeHTTP answers one event in ten late: after the 25 ms that the queue waits before it
// stores an event.
func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var event struct {
		ResourceID string `json:"resource_id"`
	}
	if err := json.NewDecoder(r.Body).Decode(&event); err != nil || !b.up.Load() {
		panic(http.ErrAbortHandler)
	}
	if strings.HasSuffix(event.ResourceID, "7") {
		time.Sleep(40 * time.Millisecond)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taken[event.ResourceID]++
}

// The method "missing" returns how many of these events the backend has not accepted.
func (b *backend) missing(ids []string) (missing int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range ids {
		if b.taken[id] == 0 {
			missing++
		}
	}
	return missing
}

// doubles returns how often the backend has accepted an event again.
func (b *backend) doubles() (doubles int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, taken := range b.taken {
		doubles += taken - 1
	}
	return doubles
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			require.FailNow(t, what+" does not happen")
		}
	}
}
