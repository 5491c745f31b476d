//go:build unix

package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// record is a complete request, as the backend received it.
type record struct {
	Body           []byte
	SHA256         string
	ContentLength  int64
	Chunked        bool
	IdempotencyKey []string
	Header         http.Header
	Query          string
	Note           string `json:",omitempty"`
}

// backend is a process that records each complete request, and then answers 200 with the
// hash of the body. It is this test binary with a variable in its environment.
type backend struct {
	*process
	t    *testing.T
	addr string
	mode string
	file string
}

// The modes of a backend. Most of them are faults. The records survive a fault.
const (
	modeGood        = "good"
	modeDropReused  = "drop-reused"  // closes a connection when the second request has arrived
	modeDropHeader  = "drop-header"  // closes a connection when the header of the second request has arrived
	modeResetRandom = "reset-random" // resets one connection in three, before or after it records the request
	modeDieReading  = "die-reading"  // exits while it reads the body, one time in two
	modeDieWriting  = "die-writing"  // exits in the middle of the response, one time in two
	modeDiscard     = "discard"      // reads each request, and records nothing
	modeUpgrade     = "upgrade"      // changes to any requested protocol, and records all bytes
	modeHang        = "hang"         // records the arrival of a request, never answers, and records its end
	modeEarly413    = "early-413"    // answers a request with ?early before it reads the body
)

func newBackend(t *testing.T, mode string) *backend {
	t.Helper()
	b := &backend{t: t, addr: freeAddr(t), mode: mode, file: t.TempDir() + "/records"}
	b.start()
	return b
}

func (b *backend) start() {
	b.t.Helper()
	b.run()
	waitFor(b.t, "the backend listens", b.process, listening(b.addr))
}

// run starts the process. It does not wait until the process listens, because the process
// may take an event and die before the test looks.
func (b *backend) run() {
	b.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "E2E_BACKEND="+b.mode, "E2E_ADDR="+b.addr, "E2E_RECORDS="+b.file)
	b.process = start(b.t, cmd)
}

func (b *backend) kill() {
	b.t.Helper()
	_ = b.cmd.Process.Signal(syscall.SIGKILL)
	<-b.exited
}

func (b *backend) records() (records []record) {
	b.t.Helper()
	file, err := os.Open(b.file)
	require.NoError(b.t, err)
	defer file.Close()
	decoder := json.NewDecoder(bufio.NewReader(file))
	for {
		var r record
		err := decoder.Decode(&r)
		if err == io.EOF {
			return records
		}
		require.NoError(b.t, err)
		records = append(records, r)
	}
}

// runBackend is the main function of a backend process.
func runBackend() {
	mode := os.Getenv("E2E_BACKEND")
	file, err := os.OpenFile(os.Getenv("E2E_RECORDS"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	var mu sync.Mutex
	write := func(r *http.Request, body []byte, note string) string {
		sum := sha256.Sum256(body)
		line, err := json.Marshal(record{
			Note: note, Body: body, SHA256: hex.EncodeToString(sum[:]), ContentLength: r.ContentLength,
			Chunked: len(r.TransferEncoding) > 0, IdempotencyKey: r.Header["Idempotency-Key"], Header: r.Header, Query: r.URL.RawQuery,
		})
		if err != nil {
			panic(err)
		}
		mu.Lock()
		defer mu.Unlock()
		// one write with O_APPEND: the file never has a part of a record
		if _, err := file.Write(append(line, '\n')); err != nil {
			panic(err)
		}
		return hex.EncodeToString(sum[:])
	}
	hangUp := func(w http.ResponseWriter, reset bool) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		if reset {
			_ = conn.(*net.TCPConn).SetLinger(0)
		}
		conn.Close()
	}

	type connKey struct{}
	server := &http.Server{
		Addr: os.Getenv("E2E_ADDR"),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, new(int))
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests := r.Context().Value(connKey{}).(*int)
			*requests++
			switch {
			case mode == modeDropReused && *requests > 1:
				_, _ = io.Copy(io.Discard, r.Body)
				hangUp(w, false)
				return
			case mode == modeDropHeader && *requests > 1:
				hangUp(w, false)
				return
			case mode == modeResetRandom && rand.IntN(6) == 0:
				hangUp(w, true)
				return
			case mode == modeDieReading && rand.IntN(2) == 0:
				_, _ = io.ReadFull(r.Body, make([]byte, 10))
				os.Exit(1)
			case mode == modeUpgrade && r.Header.Get("Upgrade") != "":
				conn, buffered, err := w.(http.Hijacker).Hijack()
				if err != nil {
					panic(err)
				}
				fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
				tunnel, _ := io.ReadAll(buffered)
				write(r, tunnel, "tunnel")
				return
			case mode == modeHang:
				body, _ := io.ReadAll(r.Body)
				write(r, body, "arrived")
				<-r.Context().Done()
				write(r, nil, "gone")
				return
			case mode == modeEarly413 && strings.Contains(r.URL.RawQuery, "early"):
				w.WriteHeader(http.StatusRequestEntityTooLarge)
				return
			}
			if mode == modeDiscard {
				_, _ = io.Copy(io.Discard, r.Body)
				return
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			sum := write(r, body, "")
			switch {
			case mode == modeResetRandom && rand.IntN(6) == 0:
				hangUp(w, true)
				return
			case mode == modeDieWriting && rand.IntN(2) == 0:
				conn, _, _ := w.(http.Hijacker).Hijack()
				fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Le")
				os.Exit(1)
			}
			fmt.Fprint(w, sum)
		}),
	}
	panic(server.ListenAndServe())
}
