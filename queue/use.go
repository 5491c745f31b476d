package queue

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// queues has the open queues by database and name, and databases has the open databases.
// During a reload, the old and the new configuration share them.
var (
	queues    = caddy.NewUsagePool()
	databases = caddy.NewUsagePool()
)

// use is a handler's reference to its queue, from the start of the app until Cleanup. After
// Cleanup, the handler still gets requests on connections from before the reload. So each
// request has a reference too. The release of the last reference closes the queue.
type use struct {
	h         *Handler
	queue     atomic.Pointer[queue] // nil before the start and after Cleanup
	grace     time.Duration         // for running attempts when Caddy stops; 0 means no limit
	started   chan struct{}         // closed by open
	requests  sync.RWMutex          // read-locked by each request
	releasing sync.WaitGroup        // for the releases of cleanup
	leaving   sync.WaitGroup        // for the releases of requests
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

// release releases the reference from acquire, and then calls then. The last release waits
// for the running attempts, and closes the queue.
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
// returns nil if the start takes too long.
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

// cleanup releases the queue when the configuration ends.
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

// end releases the queue when Caddy stops. It waits for the last request and for running
// attempts. If an attempt is cancelled, its event is due immediately.
func (u *use) end() {
	if u.grace > 0 {
		defer time.AfterFunc(u.grace, u.queue.Load().cutOff).Stop()
	}
	u.queue.Store(nil)
	u.requests.Lock() // never unlocked: no request may begin now
	_, _ = queues.Delete(u.key())
}
