package queue

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// queues are the open queues, by database and name, and databases the open databases. The
// configuration before a reload shares them with the one after it.
var (
	queues    = caddy.NewUsagePool()
	databases = caddy.NewUsagePool()
)

// use is a handler's reference to its queue, from the start of the app until Cleanup. Even
// after that, a handler gets requests on connections that were open before a reload. So
// each request has a reference too, and the last one to go closes the queue.
type use struct {
	h         *Handler
	queue     atomic.Pointer[queue] // nil before the start and after Cleanup
	grace     time.Duration         // for running attempts when Caddy stops, 0 for no limit
	started   chan struct{}         // closed by open
	requests  sync.RWMutex          // read-locked by each request
	releasing sync.WaitGroup        // releases begun by cleanup
	leaving   sync.WaitGroup        // releases begun by requests
}

func newUse(h *Handler) *use { return &use{h: h, started: make(chan struct{})} }

func (u *use) key() string { return u.h.opener.Key() + "\x00" + u.h.Name }

// acquire returns the queue, and opens it if needed. It does not wait for the database.
func (u *use) acquire() *queue {
	value, _, _ := queues.LoadOrNew(u.key(), func() (caddy.Destructor, error) {
		return newQueue(u.h.Name, u.h.opener, u.h.app.logger), nil
	})
	return value.(*queue)
}

// release gives back the reference of acquire. The last one closes the queue, when the
// running attempts have ended.
func (u *use) release(by *sync.WaitGroup, then func()) {
	by.Go(func() {
		_, _ = queues.Delete(u.key())
		then()
	})
}

// open attaches the handler when the app starts.
func (u *use) open() {
	q := u.acquire()
	q.attach(u.h)
	u.queue.Store(q)
	close(u.started)
}

// detach ends the delivery by this handler.
func (u *use) detach(grace time.Duration) {
	u.grace = grace
	if q := u.queue.Load(); q != nil {
		q.detach(u.h)
	}
}

// enter returns the queue for one request, until leave. It waits for the app to start, and
// returns nil if that takes too long.
func (u *use) enter() *queue {
	select {
	case <-u.started:
	case <-time.After(storeWait):
		return nil
	}
	u.requests.RLock()
	q := u.acquire()
	q.lend(u.h)
	return q
}

func (u *use) leave() { u.release(&u.leaving, u.requests.RUnlock) }

// cleanup gives up the queue.
func (u *use) cleanup() {
	switch {
	case u.queue.Load() == nil:
	case caddy.Exiting():
		u.end()
	default:
		u.queue.Store(nil)
		u.release(&u.releasing, func() {})
	}
}

// end gives up the queue when Caddy stops: it waits for the last request and for running
// attempts. If an attempt is cancelled, its event is due at once.
func (u *use) end() {
	if u.grace > 0 {
		defer time.AfterFunc(u.grace, u.queue.Load().cutOff).Stop()
	}
	u.queue.Store(nil)
	u.requests.Lock() // never unlocked: no request may begin now
	_, _ = queues.Delete(u.key())
}
