package queue

import (
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(App{})
}

// App opens and closes the databases of the queues in a configuration. There is
// nothing in it to configure: a handler brings it along.
type App struct {
	ctx      caddy.Context
	logger   *zap.Logger
	handlers []*Handler
	configs  map[string]string // by name

	grace <-chan struct{} // closed when deliveries in flight have had their time
}

// CaddyModule returns the Caddy module information.
func (App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "inkit_queue",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision sets up the app.
func (a *App) Provision(ctx caddy.Context) error {
	a.ctx, a.logger, a.configs = ctx, ctx.Logger(), make(map[string]string)
	return nil
}

// register notes a handler. A site with two listeners has its handlers twice, so that
// two of one name are fine if they are the same.
func (a *App) register(h *Handler, config string) error {
	if other, ok := a.configs[h.Name]; ok && other != config {
		return fmt.Errorf("name: two queues are called %s, and have different settings", h.Name)
	}
	a.configs[h.Name] = config
	a.handlers = append(a.handlers, h)
	return nil
}

// Start opens the databases, or finds them open, and has the queues deliver. It does
// not wait for that, and never fails: whatever is wrong with a database, the sites are
// served.
func (a *App) Start() error {
	for _, h := range a.handlers {
		s := acquire(h)
		s.queue.attach(h)
		h.shared.Store(s)
	}
	return nil
}

// Stop has the queues deliver no more for this configuration. What is in flight goes
// on, and if Caddy ends, has as long for that as the requests of the HTTP servers.
func (a *App) Stop() error {
	if app, err := a.ctx.AppIfConfigured("http"); err == nil && app.(*caddyhttp.App).GracePeriod > 0 {
		grace := make(chan struct{})
		time.AfterFunc(time.Duration(app.(*caddyhttp.App).GracePeriod), func() { close(grace) })
		a.grace = grace
	}
	for _, h := range a.handlers {
		h.shared.Load().queue.detach(h)
	}
	return nil
}

// databases are those in use, by the key of their store.
var databases = caddy.NewUsagePool()

// Destruct closes the database. Its queues are closed.
func (d *database) Destruct() error {
	d.close()
	return nil
}

// shared is a queue that handlers share, those of one configuration and of the next.
type shared struct {
	queue  *queue
	opener Opener
	users  int // guarded by the database
}

// acquire returns the queue of a handler. It is to be released.
func acquire(h *Handler) *shared {
	opener, name := h.opener, h.Name
	value, loaded, _ := databases.LoadOrNew(opener.Key(), func() (caddy.Destructor, error) {
		return newDatabase(opener, h.app.logger), nil
	})
	d := value.(*database)
	if !loaded {
		d.start()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.queues[name]
	if !ok {
		s = &shared{queue: newQueue(name, d, h.Concurrency), opener: opener}
		d.queues[name] = s
		delete(d.strange, name)
	}
	s.users++
	return s
}

// enterLate has a request use the queue of a handler that has none: it was cleaned up
// already, or is not started yet. The queue does not deliver for this handler what it
// keeps for longer. leave is to be called when the request is through.
func enterLate(h *Handler) (q *queue, leave func()) {
	s := acquire(h)
	s.queue.enter() // which succeeds, since nobody closes what is in use
	d := s.queue.db
	d.mu.Lock()
	others := s.users > 1
	if others { // the last of whom waits for this request, also when Caddy ends
		s.users--
	}
	d.mu.Unlock()
	if others {
		_, _ = databases.Delete(s.opener.Key())
		return s.queue, s.queue.leave
	}
	return s.queue, func() {
		s.queue.leave()
		s.release(h.app, false)
	}
}

// release gives up the queue. The last one to do so closes it: at once if Caddy ends,
// and otherwise when what is in flight has ended.
func (s *shared) release(a *App, exiting bool) {
	d := s.queue.db
	d.mu.Lock()
	s.users--
	last := s.users == 0
	if last {
		delete(d.queues, s.queue.name)
		d.strange[s.queue.name] = true // as the line below says
	}
	pending := d.counts[[2]string{s.queue.name, statePending}].Events
	d.mu.Unlock()

	end := func(grace <-chan struct{}) {
		if last {
			s.queue.close(grace)
			d.forget(s.queue.name)
		}
		_, _ = databases.Delete(s.opener.Key())
	}
	if exiting {
		end(a.grace)
		return
	}
	if last && pending > 0 {
		a.logger.Warn("a queue is no longer configured: its events stay", zap.String("queue", s.queue.name), zap.Int("pending", pending),
			zap.String("database", s.opener.Key()))
	}
	go end(nil) // after a reload, what is in flight has all the time of an attempt
}

// Interface guards
var (
	_ caddy.App         = (*App)(nil)
	_ caddy.Provisioner = (*App)(nil)
)
