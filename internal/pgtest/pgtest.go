//go:build linux

// Package pgtest runs PostgreSQL and pgbouncer for a test.
package pgtest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// Password is the password of the role postgres.
const Password = "c0nf1d3nt1al-pw"

// program returns the path of one of PostgreSQL's programs, and skips the test if the program
// is not installed.
func program(t testing.TB, name string) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if len(found) == 0 {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
		t.Skip(name + " of PostgreSQL is not installed")
	}
	slices.Sort(found)
	return found[len(found)-1]
}

// Server is a PostgreSQL server with its own folder. It stops at the end of the test.
type Server struct {
	Dir  string
	Port string

	t       testing.TB
	options []string

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
	output *buffer
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// unprivileged makes cmd run as the user postgres if the test runs as root, because PostgreSQL
// refuses to run as root. It gives dir and the files in dir to the user postgres.
func unprivileged(t testing.TB, cmd *exec.Cmd, dir string) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Getuid() != 0 {
		return
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Skip("PostgreSQL refuses to run as root, and there is no user postgres")
	}
	uid, err := strconv.Atoi(u.Uid)
	require.NoError(t, err)
	gid, err := strconv.Atoi(u.Gid)
	require.NoError(t, err)
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	cmd.Dir = dir
	require.NoError(t, os.Chown(dir, uid, gid))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, entry := range entries { // the files that the test has written
		require.NoError(t, os.Chown(filepath.Join(dir, entry.Name()), uid, gid))
	}
}

func newDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgtest") // the user postgres has no access to t.TempDir
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

var lastPort atomic.Uint32

// Each test process starts at another port, so that two processes do not try the same port.
func init() { lastPort.Store(uint32(os.Getpid()*97) % 10_000) }

// freePort returns a port on which nothing listens. It returns each port only once, because a stopped
// server keeps its port. The ports are below those that the end-to-end tests use.
func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+lastPort.Add(1)%10_000))
		if err != nil {
			continue
		}
		addr := l.Addr().String()
		require.NoError(t, l.Close())
		for { // wait, because a program that a parallel test starts may inherit the listener for a moment
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				_, port, _ := net.SplitHostPort(addr)
				return port
			}
			conn.Close()
			time.Sleep(time.Millisecond)
		}
	}
	require.FailNow(t, "no port is free")
	return ""
}

// Start creates a database cluster and starts it, with options such as "fsync=off".
func Start(t testing.TB, options ...string) *Server {
	t.Helper()
	initdb := program(t, "initdb")
	s := &Server{t: t, Dir: newDir(t), options: options}
	password := filepath.Join(s.Dir, "password")
	require.NoError(t, os.WriteFile(password, []byte(Password), 0o600))
	cmd := exec.Command(initdb, "-D", s.data(), "-U", "postgres", "--pwfile", password, "-A", "scram-sha-256", "-E", "UTF8", "--locale", "C", "--no-sync")
	unprivileged(t, cmd, s.Dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	s.Run()
	return s
}

// Standby starts a standby of the server. From now on, each commit waits until it is on the
// disks of the server and of the standby.
func (s *Server) Standby(t testing.TB) *Server {
	t.Helper()
	standby := &Server{t: t, Dir: newDir(t), options: s.options}
	cmd := exec.Command(program(t, "pg_basebackup"), "-D", standby.data(), "-R", "-X", "stream", "-c", "fast", "--no-sync",
		"-d", s.DSN("postgres"))
	unprivileged(t, cmd, standby.Dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	standby.Run()
	s.Exec(t, "postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
	for deadline := time.Now().Add(30 * time.Second); s.Query(t, "postgres", "SELECT count(*)::text FROM pg_stat_replication WHERE sync_state = 'sync'") != "1"; time.Sleep(20 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "the standby does not follow: %s", standby.Log())
	}
	return standby
}

func (s *Server) data() string { return filepath.Join(s.Dir, "data") }

// Run starts the server, and waits until it accepts connections.
func (s *Server) Run() {
	s.t.Helper()
	if s.Port == "" {
		s.Port = freePort(s.t)
		s.t.Cleanup(s.Kill)
	}
	args := slices.Grow([]string{"-D", s.data(), "-p", s.Port, "-h", "127.0.0.1", "-k", s.Dir}, 2*len(s.options))
	for _, option := range s.options {
		args = append(args, "-c", option)
	}
	cmd := exec.Command(program(s.t, "postgres"), args...)
	unprivileged(s.t, cmd, s.Dir)
	output, exited := new(buffer), make(chan struct{})
	cmd.Stdout, cmd.Stderr = output, output
	require.NoError(s.t, cmd.Start())
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	s.mu.Lock()
	s.cmd, s.exited, s.output = cmd, exited, output
	s.mu.Unlock()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		conn, err := pgx.Connect(ctx, s.DSN("postgres"))
		cancel()
		if err == nil {
			_ = conn.Close(context.Background())
			return
		}
		select {
		case <-exited:
			require.FailNow(s.t, "PostgreSQL ends", output.String())
		default:
		}
		require.True(s.t, time.Now().Before(deadline), "PostgreSQL does not answer: %v\n%s", err, output)
	}
}

// Log returns the server's log since its last start.
func (s *Server) Log() string { return s.output.String() }

// Stop shuts the server down as an operator does, and disconnects its clients.
func (s *Server) Stop() {
	_ = s.cmd.Process.Signal(syscall.SIGINT)
	<-s.exited
}

// Kill kills all processes of the server at once.
func (s *Server) Kill() {
	for _, pid := range s.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-s.exited
	for _, pid := range s.processes() { // processes that started during the loop above
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// Signal sends a signal to all processes of the server.
func (s *Server) Signal(signal syscall.Signal) {
	for _, pid := range s.processes() {
		_ = syscall.Kill(pid, signal)
	}
}

// processes returns the server's process and its child processes. Each child has its own
// process group, so one signal to a group cannot reach all.
func (s *Server) processes() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	server := s.cmd.Process.Pid
	pids := []int{server}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		content, _ := os.ReadFile(stat)
		// the content begins with: pid (name) state ppid
		_, rest, ok := strings.Cut(string(content), ") ")
		if fields := strings.Fields(rest); ok && len(fields) > 1 && fields[1] == strconv.Itoa(server) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// DSN returns the connection string of a database for the role postgres.
func (s *Server) DSN(database string) string {
	return fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%s/%s?sslmode=disable", Password, s.Port, database)
}

// Exec runs statements, each in its own transaction.
func (s *Server) Exec(t testing.TB, database string, statements ...string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.DSN(database))
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	for _, statement := range statements {
		_, err := conn.Exec(t.Context(), statement)
		require.NoError(t, err, statement)
	}
}

// Query returns the single value of a statement as text.
func (s *Server) Query(t testing.TB, database, statement string, args ...any) string {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), s.DSN(database))
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	var value string
	require.NoError(t, conn.QueryRow(context.Background(), statement, args...).Scan(&value), statement)
	return value
}

// Mount creates the folder dir for the server, and mounts a new file system of this size there.
func (s *Server) Mount(t testing.TB, dir, size string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting takes root")
	}
	require.NoError(t, os.Mkdir(dir, 0o755))
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "none", dir).CombinedOutput()
	if err != nil {
		t.Skipf("mounting fails here: %s", out)
	}
	t.Cleanup(func() {
		s.Kill()
		require.NoError(t, exec.Command("umount", dir).Run())
	})
	unprivileged(t, new(exec.Cmd), dir)
}

var databases struct {
	sync.Mutex
	last int
}

// NewDatabase creates a database, and returns its name.
func (s *Server) NewDatabase(t testing.TB) string {
	t.Helper()
	databases.Lock() // PostgreSQL makes only one copy of a template at a time
	defer databases.Unlock()
	databases.last++
	name := fmt.Sprintf("test%d", databases.last)
	s.Exec(t, "postgres", "CREATE DATABASE "+name)
	return name
}

// Bouncer starts pgbouncer in front of the server, in transaction mode, and returns its
// port.
func (s *Server) Bouncer(t testing.TB) (port string) {
	t.Helper()
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		if path = "/usr/sbin/pgbouncer"; !exists(path) {
			t.Skip("pgbouncer is not installed")
		}
	}
	dir, port := newDir(t), freePort(t)
	users := filepath.Join(dir, "users.txt")
	require.NoError(t, os.WriteFile(users, []byte(`"postgres" "`+Password+"\"\n"), 0o600))
	config := filepath.Join(dir, "pgbouncer.ini")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = scram-sha-256
auth_file = %s
pool_mode = transaction
default_pool_size = 3
`, s.Port, port, users), 0o600))
	cmd := exec.Command(path, config)
	unprivileged(t, cmd, dir)
	output, exited := new(buffer), make(chan struct{})
	cmd.Stdout, cmd.Stderr = output, output
	require.NoError(t, cmd.Start())
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			require.NoError(t, conn.Close())
			return port
		}
		require.True(t, time.Now().Before(deadline), "pgbouncer does not listen: %s", output)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
