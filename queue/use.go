package queue

import (
	"context"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// queues are the open queues, by database and name, and databases the open databases. The
// configuration before a reload shares them with the one after it.
var (
	queues    = caddy.NewUsagePool()
	databases = caddy.NewUsagePool()
)

// use is the use that one handler makes of its queue. After a reload, a handler still gets
// requests on connections that were open, even after its Cleanup. So a request that comes
// later opens the queue again, and the last one gives it up.
type use struct {
	h *Handler

	mu       sync.Mutex
	queue    *queue
	started  chan struct{} // closed by open
	requests int
	idle     *sync.Cond // requests is 0
	cleaned  bool

	releasing sync.WaitGroup // what releaseLocked has begun
}

func newUse(h *Handler) *use {
	u := &use{h: h, started: make(chan struct{})}
	u.idle = sync.NewCond(&u.mu)
	return u
}

func (u *use) key() string { return u.h.opener.Key() + "\x00" + u.h.Name }

// acquire opens the queue, or finds it open. It does not wait for the database.
func (u *use) acquireLocked() {
	value, _, _ := queues.LoadOrNew(u.key(), func() (caddy.Destructor, error) {
		return newQueue(u.h.Name, u.h.opener, u.h.app.logger), nil
	})
	u.queue = value.(*queue)
}

// open is for the start of the app.
func (u *use) open() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.acquireLocked()
	u.queue.attach(u.h)
	close(u.started)
}

// detach ends the delivery by this handler.
func (u *use) detach(grace time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.queue != nil {
		u.queue.detach(u.h, grace)
	}
}

// enter returns the queue for one request, until leave. It waits for the app to start, and
// returns nil if that takes too long.
func (u *use) enter(ctx context.Context) *queue {
	select {
	case <-u.started:
	default:
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWait)
		defer cancel()
		select {
		case <-u.started:
		case <-wait.Done():
			return nil
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.requests++
	if u.queue == nil {
		u.acquireLocked()
		u.queue.lend(u.h)
	}
	return u.queue
}

func (u *use) leave() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.requests--; u.requests > 0 {
		return
	}
	u.idle.Broadcast()
	if u.cleaned && !caddy.Exiting() {
		u.releaseLocked()
	}
}

// cleanup gives up the queue when the last request is through.
func (u *use) cleanup() {
	if caddy.Exiting() {
		u.end()
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.cleaned = true; u.requests == 0 {
		u.releaseLocked()
	}
}

// end gives up the queue because Caddy ends: it waits for the last request and for the
// attempts under way.
func (u *use) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.queue == nil {
		return
	}
	defer u.queue.cutOffAfterGrace()()
	for u.requests > 0 {
		u.idle.Wait()
	}
	_, _ = queues.Delete(u.key())
	u.queue = nil
}

// releaseLocked gives up the queue. The last handler that does so closes it, when the
// attempts under way have ended.
func (u *use) releaseLocked() {
	if u.queue != nil {
		u.queue = nil
		u.releasing.Go(func() { _, _ = queues.Delete(u.key()) })
	}
}
