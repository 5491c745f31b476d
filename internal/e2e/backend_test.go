//go:build unix

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// backend is a server that records its requests and the events that it has accepted. The
// method close also closes all connections, as if the process were killed.
type backend struct {
	t      *testing.T
	addr   string
	answer func(b *backend, w http.ResponseWriter, r *http.Request)
	status func(id string, attempt int) int // the status with which take answers
	quiet  bool                             // if true, the method take records no requests

	mu       sync.Mutex
	server   *http.Server
	listener net.Listener
	received []record
	taken    map[string]int
	takenAt  map[string]time.Time // when the event was first accepted
	attempts map[string]int
	ids      map[string]string          // the id of the event in the queue
	keys     map[string]map[string]bool // the values of Idempotency-Key for each request of the sender
	times    []time.Time                // when the attempts began
	current  map[string]bool            // events with a running attempt
	atOnce   []string                   // events with two attempts in parallel
	now      int                        // running attempts
	most     int                        // the largest value of now
}

// record is a complete request.
type record struct {
	Body           []byte
	ContentLength  int64
	Chunked        bool
	IdempotencyKey []string
	Header         http.Header
	Target, Query  string // such as POST /webhook
}

func newBackend(t *testing.T, answer func(b *backend, w http.ResponseWriter, r *http.Request)) *backend {
	t.Helper()
	b := &backend{
		t: t, addr: freeAddr(t), answer: answer, taken: make(map[string]int), takenAt: make(map[string]time.Time),
		attempts: make(map[string]int), ids: make(map[string]string), current: make(map[string]bool), keys: make(map[string]map[string]bool),
	}
	b.listen()
	t.Cleanup(b.close)
	return b
}

// listen starts the server, also again after the method close.
func (b *backend) listen() {
	b.t.Helper()
	var listener net.Listener
	if !assert.Eventually(b.t, func() bool { // a parallel test may start a program, and this program may hold the old listener for a moment
		var err error
		listener, err = net.Listen("tcp", b.addr)
		return err == nil
	}, 10*time.Second, time.Millisecond) {
		return
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { b.answer(b, w, r) })}
	b.mu.Lock()
	b.server, b.listener = server, listener
	b.mu.Unlock()
	go func() { _ = server.Serve(listener) }()
}

func (b *backend) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	_ = b.listener.Close() // the server may not know the listener yet
	_ = b.server.Close()
}

// record reads a request, and records it if it is complete. It returns the body and the
// number of recorded requests.
func (b *backend) record(r *http.Request) (body []byte, n int) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.received = append(b.received, record{
		Body: body, ContentLength: r.ContentLength, Chunked: len(r.TransferEncoding) > 0,
		IdempotencyKey: r.Header["Idempotency-Key"], Header: r.Header, Target: r.Method + " " + r.URL.Path, Query: r.URL.RawQuery,
	})
	return body, len(b.received)
}

func (b *backend) records() []record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.received)
}

// good is the answer of a backend to each request: 200, and the hash of the body.
func good(b *backend, w http.ResponseWriter, r *http.Request) {
	body, _ := b.record(r)
	fmt.Fprintf(w, "%x", sha256.Sum256(body))
}

// dropReused answers the first request on a connection, and closes the connection at the second
// request: after the body of that request if `whole` is true, otherwise after its header.
func dropReused(whole bool) func(b *backend, w http.ResponseWriter, r *http.Request) {
	var used sync.Map
	return func(b *backend, w http.ResponseWriter, r *http.Request) {
		if _, again := used.LoadOrStore(r.RemoteAddr, true); !again {
			good(b, w, r)
			return
		}
		if whole {
			_, _ = io.Copy(io.Discard, r.Body)
		}
		hijack(w).Close()
	}
}

func hijack(w http.ResponseWriter) *net.TCPConn {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	return conn.(*net.TCPConn)
}

// newScripted starts a backend. The function `status` returns the HTTP status of the response to
// the n-th request. The first n is 1. If `status` returns 0, the backend closes the connection
// without a response.
func newScripted(t *testing.T, status func(n int, r *http.Request) int) *backend {
	t.Helper()
	return newBackend(t, func(b *backend, w http.ResponseWriter, r *http.Request) {
		_, n := b.record(r)
		code := status(n, r)
		if code == 0 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(code)
	})
}

// With the function "always", a backend of newScripted gives each request the same status.
func always(code int) func(int, *http.Request) int {
	return func(int, *http.Request) int { return code }
}

// With inTurn, a backend of newScripted gives one code after the other, and then always 200.
func inTurn(codes ...int) func(int, *http.Request) int {
	return func(n int, _ *http.Request) int {
		if n <= len(codes) {
			return codes[n-1]
		}
		return http.StatusOK
	}
}

// newTaker starts a backend that records events. The function `status` returns the HTTP status of
// the backend's response to an attempt.
func newTaker(t *testing.T, status func(id string, attempt int) int) *backend {
	t.Helper()
	b := newBackend(t, (*backend).take)
	b.status = status
	return b
}

// With the function "all", a backend of newTaker accepts each event after 2 ms.
func all(string, int) int {
	time.Sleep(2 * time.Millisecond)
	return http.StatusOK
}

func (b *backend) take(w http.ResponseWriter, r *http.Request) {
	var e struct {
		ResourceID string `json:"resource_id"`
		Sent       int    `json:"sent"` // how often the sender has sent it
	}
	if body, err := io.ReadAll(r.Body); err != nil || json.Unmarshal(body, &e) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if b.quiet {
		w.WriteHeader(b.status(e.ResourceID, 1))
		return
	}
	b.mu.Lock()
	b.ids[e.ResourceID] = r.Header.Get("Inkit-Queue-Id")
	if b.current[e.ResourceID] {
		b.atOnce = append(b.atOnce, e.ResourceID)
	}
	b.current[e.ResourceID] = true
	b.attempts[e.ResourceID]++
	attempt := b.attempts[e.ResourceID]
	sent := fmt.Sprint(e.ResourceID, " ", e.Sent)
	if b.keys[sent] == nil {
		b.keys[sent] = make(map[string]bool)
	}
	b.keys[sent][r.Header.Get("Idempotency-Key")] = true
	b.times = append(b.times, time.Now())
	b.now++
	b.most = max(b.most, b.now)
	b.mu.Unlock()
	status := b.status(e.ResourceID, attempt)
	b.mu.Lock()
	b.now--
	delete(b.current, e.ResourceID)
	if status == http.StatusOK {
		if b.taken[e.ResourceID]++; b.taken[e.ResourceID] == 1 {
			b.takenAt[e.ResourceID] = time.Now()
		}
	}
	b.mu.Unlock()
	w.WriteHeader(status)
}

// snapshot returns the number of events with at least one attempt, the number of running
// attempts, and the largest number of attempts that ran in parallel.
func (b *backend) snapshot() (s struct{ events, now, most int }) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s.events, s.now, s.most = len(b.attempts), b.now, b.most
	return s
}

// The method "of" returns how often the queue attempted an event, and how often the backend
// accepted the event.
func (b *backend) of(id string) (e struct{ attempts, taken int }) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.attempts, e.taken = b.attempts[id], b.taken[id]
	return e
}

// idOf returns the queue's id of an event, from the header of the last attempt.
func (b *backend) idOf(id string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ids[id]
}

// The method "missing" returns the ids of the events that the backend has not accepted.
func (b *backend) missing(ids []string) (missing []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range ids {
		if b.taken[id] == 0 {
			missing = append(missing, id)
		}
	}
	return missing
}

// hasAll waits until the backend has accepted all events. It asserts that all attempts for one
// request of the sender have one Idempotency-Key. It returns the number of repeated deliveries.
func (b *backend) hasAll(t *testing.T, ids []string, within time.Duration) (doubles int) {
	t.Helper()
	require.NotEmpty(t, ids)
	began := time.Now()
	for len(b.missing(ids)) > 0 && time.Since(began) < within {
		time.Sleep(50 * time.Millisecond)
	}
	missing := b.missing(ids)
	require.Empty(t, missing[:min(10, len(missing))], "%d of %d events that were answered 2xx are lost", len(missing), len(ids))
	b.mu.Lock()
	defer b.mu.Unlock()
	for sent, keys := range b.keys {
		require.Len(t, keys, 1, sent)
		require.NotContains(t, keys, "", sent)
	}
	for _, id := range ids {
		doubles += b.taken[id] - 1
	}
	t.Logf("%d events were answered 2xx: 0 lost, %d taken twice, the last %v after the last was accepted", len(ids), doubles, time.Since(began).Round(time.Millisecond))
	return doubles
}
