package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a program and all of its child processes. The program listens on addr.
type process struct {
	cmd    *exec.Cmd
	addr   string
	exited chan struct{}
}

func startProcess(cmd *exec.Cmd, addr string) (*process, error) {
	var output strings.Builder
	cmd.Stderr = &output
	// bench finds the children of the program by its process group; Pdeathsig ends the program with bench
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd, addr, make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
			time.Sleep(300 * time.Millisecond) // until all of its children have started
			return p, nil
		}
		select {
		case <-p.exited:
			deadline = time.Now()
		default:
		}
	}
	p.stop()
	return nil, fmt.Errorf("does not answer: %s", output.String())
}

// stop ends the program, then its children.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.exited
}

// The method "each" calls f for every process of the group, with the fields of /proc/<pid>/stat
// from the third field on.
func (p *process) each(f func(pid string, stat []string)) error {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, path := range stats {
		content, err := os.ReadFile(path)
		if err != nil {
			continue // the process has ended
		}
		// the second field is a name in parentheses, and the name may contain spaces and parentheses
		stat := strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))
		if stat[2] == strconv.Itoa(p.cmd.Process.Pid) {
			f(strings.Split(path, "/")[2], stat)
		}
	}
	return nil
}

// cpu returns the processor time that the group has used. It includes the time of
// children that have ended.
func (p *process) cpu() (time.Duration, error) {
	ticks := 0
	err := p.each(func(_ string, stat []string) {
		for _, field := range stat[11:15] { // utime, stime, cutime, cstime
			n, _ := strconv.Atoi(field)
			ticks += n
		}
	})
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux that Go knows
	return time.Duration(ticks) * tick, err
}

// memory returns the sum of a field of /proc/<pid>/status over the group, in bytes.
func (p *process) memory(field string) (sum int64, err error) {
	err = p.each(func(pid string, _ []string) {
		status, _ := os.ReadFile("/proc/" + pid + "/status")
		_, rest, _ := strings.Cut(string(status), "\n"+field+":")
		kib, _ := strconv.ParseInt(strings.TrimSpace(strings.SplitN(rest, "kB", 2)[0]), 10, 64)
		sum += kib << 10
	})
	if err == nil && sum == 0 {
		err = errors.New("no process is left")
	}
	return sum, err
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// startBackend starts a server that reads each request to its end, and answers 200.
func startBackend() (addr string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err == nil {
			fmt.Fprintln(w, n)
		}
	})}
	go func() { panic(server.Serve(l)) }()
	return l.Addr().String(), nil
}

// raiseFileLimit raises the limit of open files, for bench and the programs that it starts.
func raiseFileLimit() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Cur >= 10_000 {
		return nil
	}
	if limit.Max < 10_000 {
		return fmt.Errorf("at most %d files can be open: raise ulimit -n to 10000", limit.Max)
	}
	limit.Cur = limit.Max
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}
