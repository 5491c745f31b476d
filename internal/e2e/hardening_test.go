//go:build unix

package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// status returns a field of /proc/<pid>/status in bytes.
func (p *process) status(t *testing.T, field string) int64 {
	t.Helper()
	_, rest, found := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)), field+":")
	require.True(t, found, field)
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	require.NoError(t, err)
	return kib << 10
}

// skipUnlessMemoryCounts skips a test that measures memory. Only Linux has /proc, and the
// race detector uses extra memory.
func skipUnlessMemoryCounts(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/proc/self/status"); err != nil {
		t.Skip("there is no /proc/self/status")
	}
	if raceEnabled {
		t.Skip("the race detector multiplies memory; the run without it measures this")
	}
}

// raiseFileLimit allows many open connections in this process, and in Caddy.
func raiseFileLimit(t *testing.T) {
	t.Helper()
	var limit syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if limit.Cur < 10_000 {
		if limit.Max < 10_000 {
			t.Skipf("no more than %d files can be open", limit.Max)
		}
		limit.Cur = limit.Max
		require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit))
	}
}

// guardedSite is plainSite with a guard.
const guardedSite = `http://:{{port}} {
	inkit_webhook {
		secret {env.INKIT_WEBHOOK_SECRET}
		max_size MAXSIZE
	}
	reverse_proxy UPSTREAM
}
`

// hold opens connections that send only a part of a request. It returns how many bytes of
// memory Caddy uses for them.
func hold(t *testing.T, c *caddy, connections int, request string) int64 {
	t.Helper()
	before := c.status(t, "VmRSS")
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for range connections {
		conn, err := net.Dial("tcp", c.addr)
		require.NoError(t, err)
		conns = append(conns, conn)
		_, err = io.WriteString(conn, request)
		require.NoError(t, err)
	}
	time.Sleep(time.Second)
	return c.status(t, "VmRSS") - before
}

// The memory for a request grows with the bytes that arrive, not with the declared length.
func TestMemoryOfSlowConnections(t *testing.T) {
	skipUnlessMemoryCounts(t)
	raiseFileLimit(t)
	const connections = 2000
	request := "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\nInkit-Signature: " + sign(secret, nil) + "\r\n\r\n" + strings.Repeat("a", 64)
	b := newBackend(t, good)
	perConnection := func(site string) int64 {
		c := startCaddy(t, "", strings.NewReplacer("UPSTREAMS", b.addr, "UPSTREAM", b.addr, "MAXSIZE", "2MiB").Replace(site))
		return hold(t, c, connections, request) / connections
	}
	guarded := perConnection(guardedSite)
	proxied := perConnection(plainSite)
	// only for the log line below: the memory of a connection while Caddy waits for the rest
	// of the header
	request = strings.Replace(request, "\r\n\r\n", "\r\nX: ", 1)
	idle := perConnection(plainSite)
	t.Logf("%d connections: %d bytes each, %d with plain reverse_proxy, %d with plain Caddy that waits for the header", connections, guarded, proxied, idle)
	assert.LessOrEqual(t, guarded-proxied, int64(8<<10))
}

// upload sends large posts in parallel, reads the responses, and returns the largest memory
// that Caddy has used.
func upload(t *testing.T, c *caddy, posts int, size int64, status int, fields string) int64 {
	t.Helper()
	head := fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n", size, fields)
	var wg sync.WaitGroup
	for range posts {
		wg.Go(func() {
			conn, err := net.Dial("tcp", c.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			go func() { // send without waiting for the response
				_, _ = io.WriteString(conn, head)
				_, _ = io.CopyN(conn, zeros{}, size)
			}()
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Error(err)
				return
			}
			assert.Equal(t, status, resp.StatusCode)
			resp.Body.Close()
		})
	}
	wg.Wait()
	return c.status(t, "VmHWM")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestMemoryOfLargeUploads(t *testing.T) {
	skipUnlessMemoryCounts(t)
	const posts, size = 8, 64 << 20
	b := newBackend(t, func(_ *backend, _ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	run := func(site, maxSize string, status int, fields string) int64 {
		c := startCaddy(t, "", strings.NewReplacer("UPSTREAMS", b.addr, "UPSTREAM", b.addr, "MAXSIZE", maxSize).Replace(site))
		return upload(t, c, posts, size, status, fields)
	}
	plain := run(plainSite, "", 200, "")
	unsigned := run(guardedSite, "64MiB", 401, "")
	tooLarge := run(guardedSite, "64KiB", 413, "Inkit-Signature: "+compactSignature+"\r\n")
	forged := run(guardedSite, "64MiB", 401, "Inkit-Signature: "+compactSignature+"\r\n")
	t.Logf("%d posts of %d MiB: plain Caddy %d MiB, unsigned %d MiB, above max_size %d MiB, signed wrongly below max_size %d MiB",
		posts, size>>20, plain>>20, unsigned>>20, tooLarge>>20, forged>>20)
	assert.Less(t, float64(unsigned), 1.2*float64(plain))
	assert.Less(t, float64(tooLarge), 1.2*float64(plain))
	// the earlier, smaller buffers may not be freed yet: they take a third of the body's size
	assert.Less(t, float64(forged-plain), 1.35*posts*size)
}

// compactSignature is well-formed, but does not match.
const compactSignature = "f1e17187f7a3a3a72ab9c6f7f23d4bdff836ec5d8eb75930533a2511b1acbb5b"

// TestDribblingClients: while 2,000 clients send one byte a second, Caddy answers good events
// within 5 seconds. In the end, the option read_timeout disconnects the slow clients.
func TestDribblingClients(t *testing.T) {
	t.Parallel()
	raiseFileLimit(t)
	connections := 2000
	if raceEnabled {
		connections = 500
	}
	b := newBackend(t, good)
	_, site := recipe(t, "Nothing verified gets lost", "localhost:9000", b.addr)
	c := startCaddy(t, "", site)
	dribble := "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nInkit-Signature: " + compactSignature + "\r\n\r\n"
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range connections {
		conn, err := net.Dial("tcp", c.addr)
		require.NoError(t, err)
		_, err = io.WriteString(conn, dribble)
		require.NoError(t, err)
		wg.Go(func() {
			defer conn.Close()
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Second):
					if _, err := conn.Write([]byte("a")); err != nil {
						return
					}
				}
			}
		})
	}
	var took []time.Duration
	for i := range 200 {
		body := event(fmt.Sprintf("doc_%d", i))
		began := time.Now()
		assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		took = append(took, time.Since(began))
		time.Sleep(20 * time.Millisecond)
	}
	slices.Sort(took)
	assert.Less(t, took[len(took)-1], 5*time.Second)
	assert.Len(t, b.records(), 200)
	t.Logf("beside %d dribbling clients: median %v, slowest %v", connections, took[100], took[199])
	waitFor(t, "read_timeout ends them", c.process, func() bool {
		time.Sleep(time.Second)
		return strings.Count(c.output.String(), `"outcome":"body_unreadable"`) >= connections
	})
	close(stop)
	wg.Wait()
}

// TestSameVerdictAsInkitsListener sends random requests to Caddy, and to a Python listener
// that follows Inkit's documentation.
func TestSameVerdictAsInkitsListener(t *testing.T) {
	t.Parallel()
	needs(t, "python3")
	reference := freeAddr(t)
	cmd := exec.Command("python3", "listener.py", port(reference))
	cmd.Env = append(os.Environ(), "INKIT_WEBHOOK_SECRET="+secret, "PYTHONDONTWRITEBYTECODE=1")
	cmd.Dir = "testdata"
	p := start(t, cmd)
	waitFor(t, "the listener listens", p, listening(reference))
	b := newBackend(t, good)
	c := startCaddy(t, "", strings.ReplaceAll(bareSite, "UPSTREAMS", b.addr))

	requests := size(5000, 1500)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var mu sync.Mutex
	verdicts := make(map[int]int)
	inParallel(4, requests, func(i int) {
		request, whole := randomRequest(rand.New(rand.NewPCG(seed, uint64(i))))
		want, err := verdict(reference, request, whole)
		if err != nil {
			t.Errorf("the listener, request %d: %q: %v", i, request, err)
			return
		}
		got, err := verdict(c.addr, request, whole)
		if err != nil {
			t.Errorf("Caddy, request %d: %q: %v", i, request, err)
			return
		}
		assert.Equal(t, want, got, "request %d: %q", i, request)
		mu.Lock()
		verdicts[got]++
		mu.Unlock()
	})
	t.Logf("%d requests, same verdict: %v", requests, verdicts)
	for _, status := range []int{200, 400, 401, 405} {
		assert.Positive(t, verdicts[status], "%d", status)
	}
	assert.Len(t, b.records(), verdicts[200])
}

// randomRequest returns a request with a random body, signature, method and framing. Each of
// these parts is usually correct. The result `whole` is true if the request is complete.
func randomRequest(r *rand.Rand) (request []byte, whole bool) {
	whole = true
	pick := func(values ...string) string { return values[r.IntN(len(values))] }
	method := "POST"
	if r.IntN(8) == 0 {
		method = pick("GET", "PUT", "DELETE", "PATCH", "OPTIONS")
	}
	var body []byte
	switch r.IntN(4) {
	case 0:
		body = event(fmt.Sprint(r.Int()))
	case 1:
		body = fmt.Appendf(nil, "{\r\n \"event_type\": \"é\\u00e9\",\n\t\"resource_id\": %q}\n", fmt.Sprint(r.Int()))
	case 2:
		body = make([]byte, r.IntN(10_000))
		for i := range body {
			body[i] = byte(r.Uint32())
		}
	}
	genuine := sign(secret, body)
	fields := []string{"Inkit-Signature: " + genuine}
	switch r.IntN(20) {
	case 0:
		fields = nil
	case 1:
		fields = []string{"Inkit-Signature:"}
	case 2:
		fields = append(fields, fields[0])
	case 3:
		fields = append(fields, "Inkit-Signature: "+sign("wrong", body))
	case 4:
		fields = []string{"Inkit-Signature: " + strings.ToUpper(genuine)}
		if strings.ToUpper(genuine) == genuine {
			fields = nil
		}
	case 5:
		fields = []string{"Inkit-Signature: sha256=" + genuine}
	case 6:
		fields = []string{"Inkit-Signature: " + genuine + "," + genuine}
	case 7:
		fields = []string{"Inkit-Signature: " + genuine[:r.IntN(64)]}
	case 8:
		i := r.IntN(64)
		fields = []string{"Inkit-Signature: " + genuine[:i] + pick("0", "9", "a", "f", "g", "F", " ", "\xe9") + genuine[i+1:]}
	case 9:
		fields = []string{"Inkit-Signature: " + sign(pick("", "wrong", secret+"\n", strings.ToUpper(secret)), body)}
	case 10:
		fields = []string{"Inkit-Signature: " + sign(secret, append(slices.Clone(body), pick("\n", "\x00", " ", "{}")...))}
	case 11:
		fields = []string{"INKIT-SIGNATURE:\t " + genuine + " \t"} // case and white space do not matter
	case 12:
		fields = []string{pick("Signature", "X-Inkit-Signature", "Inkit-Signatur", "InkitSignature") + ": " + genuine}
	}
	fields = append(fields, "Host: localhost", "Content-Type: "+pick("application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"))
	if r.IntN(4) == 0 {
		fields = append(fields, "Content-Encoding: "+pick("gzip", "identity"))
	}

	var framed bytes.Buffer
	switch r.IntN(8) {
	case 0, 1, 2: // chunks
		fields = append(fields, "Transfer-Encoding: chunked")
		for rest := body; len(rest) > 0; {
			n := 1 + r.IntN(len(rest))
			extension := pick("", "", ";a=b")
			fmt.Fprintf(&framed, pick("%x", "%X", "0%x")+"%s\r\n%s\r\n", n, extension, rest[:n])
			rest = rest[n:]
		}
		framed.WriteString("0\r\n" + pick("", "", "X-Trailer: 1\r\n") + "\r\n")
		if r.IntN(8) == 0 && framed.Len() > 5 {
			framed.Truncate(framed.Len() - 1 - r.IntN(min(framed.Len(), 5)-1) - 4)
			whole = false
		}
	case 3: // incomplete
		whole = false
		fields = append(fields, fmt.Sprintf("Content-Length: %d", len(body)+1+r.IntN(10)))
		framed.Write(body)
	default:
		fields = append(fields, fmt.Sprintf("Content-Length: %d", len(body)))
		framed.Write(body)
	}
	r.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
	return append([]byte(method+" /webhook HTTP/1.1\r\n"+strings.Join(fields, "\r\n")+"\r\n\r\n"), framed.Bytes()...), whole
}

// verdict sends a request and returns the status of the response. After an incomplete request,
// verdict closes its half of the connection. After a complete request, verdict leaves its half
// open, because net/http would treat a sender with a closed half as disconnected.
func verdict(addr string, request []byte, whole bool) (int, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(request); err != nil {
		return 0, err
	}
	if !whole {
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			return 0, err
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return resp.StatusCode, nil
}
