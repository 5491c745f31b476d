//go:build unix

// Package e2e runs a real Caddy with this module in front of real backends. The tests send
// real requests on the loopback interface.
package e2e

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const secret = "test_inkit_webhook_secret"

// long is true with E2E_LONG=1, as in .ci/run. Then the tests that take minutes run at full
// length.
var long = os.Getenv("E2E_LONG") != ""

// size returns the argument `full` if `long` is true, and the argument `quick` if it is not.
func size(full, quick int) int {
	if long {
		return full
	}
	return quick
}

// caddyPath is the binary under test: cmd/caddy, or the file in E2E_CADDY, for example a
// build of xcaddy with another version of Caddy.
var caddyPath string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	// Parallel tests mostly wait, so there can be more tests than processors. -parallel on
	// the command line overrides this number.
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	flag.Parse()
	caddyPath = os.Getenv("E2E_CADDY")
	if caddyPath == "" {
		dir, err := os.MkdirTemp("", "inkit-e2e")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		caddyPath = filepath.Join(dir, "caddy")
		args := []string{"build", "-o", caddyPath}
		if raceEnabled {
			args = append(args, "-race")
		}
		build := exec.Command("go", append(args, "../../cmd/caddy")...)
		build.Stdout, build.Stderr = os.Stdout, os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "building cmd/caddy:", err)
			return 1
		}
	}
	return m.Run()
}

// process is a program that a test started. It ends with the test.
type process struct {
	cmd    *exec.Cmd
	output *lockedBuffer
	exited chan struct{}
}

// Each process has its own process group, so that its children can be killed with it.
var sysProcAttr = syscall.SysProcAttr{Setpgid: true}

func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, output: new(lockedBuffer), exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.output, p.output
	cmd.SysProcAttr = &sysProcAttr
	require.NoError(t, cmd.Start())
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.stop(t, syscall.SIGTERM)
		require.NotContains(t, p.output.String(), "DATA RACE")
		require.NotContains(t, p.output.String(), "panic: ")
		if output := p.output.String(); output != "" && t.Failed() {
			t.Logf("the end of the output of %s:\n%s", cmd.Path, output[max(0, len(output)-2000):])
		}
	})
	return p
}

// stop sends a signal to the process. If the process does not end, stop kills it and its
// children.
func (p *process) stop(t *testing.T, signal syscall.Signal) {
	t.Helper()
	_ = p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
	case <-time.After(10 * time.Second):
		t.Errorf("%s does not end on signal %v", p.cmd.Path, signal)
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.exited
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

var lastPort atomic.Uint32

// Each test process begins at another port, so that two of them do not try the same ports.
func init() { lastPort.Store(uint32(os.Getpid()*97) % 12_000) }

// freeAddr returns an address on which nothing listens. Its port is below the ports of
// outgoing connections, so no outgoing connection can take it.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+lastPort.Add(1)%12_000))
		if err != nil {
			continue
		}
		addr := l.Addr().String()
		l.Close()
		for listening(addr)() { // a program that a parallel test starts at this moment inherits the socket for a short time
			time.Sleep(time.Millisecond)
		}
		return addr
	}
	require.FailNow(t, "no port is free")
	return ""
}

func port(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func waitFor(t *testing.T, what string, p *process, done func() bool) {
	t.Helper()
	waitLong(t, what, 20*time.Second, p, done)
}

// waitLong is waitFor with a longer limit.
func waitLong(t *testing.T, what string, limit time.Duration, p *process, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if done() {
			return
		}
		if p != nil && !p.running() {
			break
		}
	}
	output := ""
	if p != nil {
		output = p.output.String()
	}
	require.FailNow(t, what+" does not happen", output)
}

func listening(addr string) func() bool {
	return func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	}
}

type caddy struct {
	*process
	t     *testing.T
	addr  string // of the site
	admin string
	dir   string
	env   []string

	wrapper []string // a command that runs Caddy, such as strace
}

// startCaddy runs Caddy with a Caddyfile. {{addr}} and {{port}} are the address and port
// of the site, and {{dir}} is a folder for this Caddy. The global options set the
// address of the admin API, and contain the text in the argument `options`.
func startCaddy(t *testing.T, options, sites string, env ...string) *caddy {
	t.Helper()
	c := newCaddy(t, options, sites, env...)
	c.start()
	return c
}

// newCaddy does the same as startCaddy, but does not start Caddy.
func newCaddy(t *testing.T, options, sites string, env ...string) *caddy {
	t.Helper()
	c := &caddy{t: t, addr: freeAddr(t), admin: freeAddr(t), dir: t.TempDir()}
	c.env = append(append(os.Environ(),
		"HOME="+c.dir, "XDG_CONFIG_HOME="+c.dir, "XDG_DATA_HOME="+c.dir,
		"INKIT_WEBHOOK_SECRET="+secret,
	), env...)
	c.configure(options, sites)
	return c
}

// lookAtSources calls Stat for the sources of the binary, so that go test reuses no cached
// result after they change.
var lookAtSources = sync.OnceFunc(func() {
	for _, name := range []string{"E2E_LONG", "E2E_CADDY"} { // the first reads were too early for go test to notice
		_ = os.Getenv(name)
	}
	for _, pattern := range []string{"../../*.go", "../../cmd/*/*.go", "../../queue/*.go", "../../queue/*/*.go", "../../queue/*/*/*.go", "../../internal/*/*.go", "../../go.sum"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			_, _ = os.Stat(file)
		}
	}
})

// The method run starts the process. The method start also waits until Caddy answers.
func (c *caddy) run() {
	c.t.Helper()
	lookAtSources()
	args := append(c.wrapper, caddyPath, "run", "--config", c.path("Caddyfile"), "--adapter", "caddyfile")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = c.env
	cmd.Dir = c.dir
	c.process = start(c.t, cmd)
}

func (c *caddy) start() {
	c.t.Helper()
	c.run()
	waitFor(c.t, "Caddy answers", c.process, func() bool {
		return listening(c.admin)() && listening(c.addr)()
	})
}

func (c *caddy) path(name string) string { return filepath.Join(c.dir, name) }

func (c *caddy) configure(options, sites string) {
	c.t.Helper()
	config := fmt.Sprintf("{\n\tadmin %s\n\tskip_install_trust\n\tauto_https disable_redirects\n%s\n}\n%s", c.admin, options, sites)
	config = strings.ReplaceAll(config, "{{addr}}", c.addr)
	config = strings.ReplaceAll(config, "{{port}}", port(c.addr))
	config = strings.ReplaceAll(config, "{{dir}}", c.dir)
	require.NoError(c.t, os.WriteFile(c.path("Caddyfile"), []byte(config), 0o600))
}

// reload runs caddy reload, like an operator.
func (c *caddy) reload() {
	c.t.Helper()
	cmd := exec.Command(caddyPath, "reload", "--config", c.path("Caddyfile"), "--adapter", "caddyfile", "--address", c.admin, "--force")
	cmd.Env = c.env
	out, err := cmd.CombinedOutput()
	require.NoError(c.t, err, "%s", out)
	c.settled()
}

// The method settled waits until the old configuration has closed its listeners. Caddy may do
// this a moment after it reports the new configuration as loaded. The kernel resets the
// connections that the old configuration has not accepted.
func (c *caddy) settled() {
	c.t.Helper()
	waitFor(c.t, "the old configuration listens no longer", c.process, func() bool {
		return listeners(port(c.addr)) <= 1
	})
}

// listeners returns how many sockets listen on a port, according to Linux.
func listeners(port string) (n int) {
	number, _ := strconv.Atoi(port)
	suffix := fmt.Sprintf(":%04X", number)
	for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		table, _ := os.ReadFile(name)
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); strings.HasSuffix(f[1], suffix) && f[3] == "0A" {
				n++
			}
		}
	}
	return n
}

func (c *caddy) get(url string) string {
	c.t.Helper()
	resp, err := http.Get(url)
	require.NoError(c.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(c.t, err)
	return string(body)
}

// tlsConfig trusts the internal CA of this Caddy.
func (c *caddy) tlsConfig() *tls.Config {
	c.t.Helper()
	root, err := os.ReadFile(c.path("caddy/pki/authorities/local/root.crt"))
	require.NoError(c.t, err)
	pool := x509.NewCertPool()
	require.True(c.t, pool.AppendCertsFromPEM(root))
	return &tls.Config{RootCAs: pool, ServerName: "localhost"}
}

// The function sign does not use the code of the module, so that the tests are independent.
func sign(key string, body []byte) string {
	m := hmac.New(sha256.New, []byte(key))
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}

type answer struct {
	status int
	header http.Header
	body   string
}

// send posts a body with any number of signatures. If `length` is -1, it sends the body in chunks.
func send(ctx context.Context, client *http.Client, url string, body []byte, length int64, signatures ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.ContentLength = length
	if length < 0 {
		req.Body = io.NopCloser(struct{ io.Reader }{bytes.NewReader(body)})
		req.GetBody = nil
	}
	req.Header.Set("Content-Type", "application/json")
	for _, signature := range signatures {
		req.Header.Add("Inkit-Signature", signature)
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(got)}, err
}

// post sends a body of known length. Without a response, the test fails.
func post(t *testing.T, url string, body []byte, signatures ...string) answer {
	t.Helper()
	client := &http.Client{Timeout: 60 * time.Second, Transport: new(http.Transport)}
	// do not use DisableKeepAlives: it makes the server close the connection without waiting
	// for bytes in transit, and the client may lose the response
	defer client.CloseIdleConnections()
	got, err := send(t.Context(), client, url, body, int64(len(body)), signatures...)
	require.NoError(t, err)
	return got
}

func event(id string) []byte {
	return fmt.Appendf(nil, `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"%s"}`, id)
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(content)
}

// The method logged waits until the log of Caddy contains the argument `text`.
func (c *caddy) logged(text string) {
	c.t.Helper()
	waitFor(c.t, "a line with "+text, c.process, func() bool { return strings.Contains(c.output.String(), text) })
}

// replaceEach replaces, for each pair, the first string of the pair by the second one. If the
// argument `text` does not contain the first string, the test fails.
func replaceEach(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		require.Contains(t, text, pairs[i])
		text = strings.ReplaceAll(text, pairs[i], pairs[i+1])
	}
	return text
}

// The function "needs" skips a test if one of the programs is not installed.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(program + " is not installed")
		}
	}
}

// killHard kills Caddy, like a crash.
func killHard(c *caddy) {
	_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
	<-c.exited
}
