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

// use is the use that one handler makes of its queue, from the start of the app until its
// Cleanup. Even after that, a handler gets requests on connections that were open before a
// reload. So each request uses the queue too, and the last user closes it.
type use struct {
	h         *Handler
	queue     atomic.Pointer[queue] // nil before the start and after Cleanup
	grace     time.Duration         // that attempts under way have when Caddy ends, 0 for all of their time
	started   chan struct{}         // closed by open
	requests  sync.RWMutex          // each request has it for reading
	releasing sync.WaitGroup        // what cleanup has begun
	leaving   sync.WaitGroup        // what requests have begun
}

func newUse(h *Handler) *use { return &use{h: h, started: make(chan struct{})} }

func (u *use) key() string { return u.h.opener.Key() + "\x00" + u.h.Name }

// acquire opens the queue, or finds it open. It does not wait for the database.
func (u *use) acquire() *queue {
	value, _, _ := queues.LoadOrNew(u.key(), func() (caddy.Destructor, error) {
		return newQueue(u.h.Name, u.h.opener, u.h.app.logger), nil
	})
	return value.(*queue)
}

// release ends what acquire began. The last user closes the queue, when the attempts under
// way have ended.
func (u *use) release(by *sync.WaitGroup, then func()) {
	by.Go(func() {
		_, _ = queues.Delete(u.key())
		then()
	})
}

// open is for the start of the app.
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

// end gives up the queue because Caddy ends: it waits for the last request and for the
// attempts under way. Events whose attempts are cut off are due at once.
func (u *use) end() {
	if u.grace > 0 {
		defer time.AfterFunc(u.grace, u.queue.Load().cutOff).Stop()
	}
	u.queue.Store(nil)
	u.requests.Lock() // for good: a request that comes now would not end
	_, _ = queues.Delete(u.key())
}
