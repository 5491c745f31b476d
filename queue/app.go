package queue

import (
	"fmt"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(App{})
}

// queues has the open queues by database and name, and databases has the open databases.
// During a reload, the old and the new configuration share them.
var (
	queues    = caddy.NewUsagePool()
	databases = caddy.NewUsagePool()
)

// App starts and stops the queues of a configuration. It has no settings. The inkit_queue
// handlers load the app.
type App struct {
	ctx      caddy.Context
	logger   *zap.Logger
	handlers []*Handler // one for each name
	queues   []*queue   // the queues of handlers, in the same order; empty before Start
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
	a.ctx, a.logger = ctx, ctx.Logger()
	return nil
}

// register adds a handler. If the app already has a handler with this name and these settings,
// register adds nothing: a site with two listeners has each handler twice. If the app has a
// handler with this name and other settings, register returns an error.
func (a *App) register(h *Handler) error {
	i := slices.IndexFunc(a.handlers, func(other *Handler) bool { return other.Name == h.Name })
	if i < 0 {
		a.handlers = append(a.handlers, h)
	} else if a.handlers[i].config != h.config {
		return fmt.Errorf("name: two queues are called %s, and have different settings", h.Name)
	}
	return nil
}

// Start opens the queues and starts their deliveries. It does not wait for the databases and
// never fails: if a database is broken, Caddy still serves the sites.
func (a *App) Start() error {
	for _, h := range a.handlers {
		q := h.acquire()
		q.attach(h)
		a.queues = append(a.queues, q)
	}
	return nil
}

// Stop prevents new attempts by this configuration. Running attempts go on. If Caddy exits,
// the attempts that are still running after the grace period of the HTTP servers are
// cancelled. The event of a cancelled attempt is due immediately.
func (a *App) Stop() error {
	var grace time.Duration // 0 means no limit
	if app, err := a.ctx.AppIfConfigured("http"); err == nil && caddy.Exiting() {
		grace = time.Duration(app.(*caddyhttp.App).GracePeriod)
	}
	for i, q := range a.queues {
		q.detach(a.handlers[i])
		if grace > 0 {
			time.AfterFunc(grace, q.cutOff)
		}
	}
	return nil
}

// Cleanup releases the queues. If Caddy exits, Cleanup waits until the queues are closed.
func (a *App) Cleanup() error {
	for i, q := range a.queues {
		q.detach(a.handlers[i]) // after a failed reload, Caddy may not call Stop
		q.release()
	}
	if caddy.Exiting() {
		for _, q := range a.queues {
			<-q.closed
		}
	}
	return nil
}

// Queues implements operator.Queues.
func (a *App) Queues() (all []operator.Queue) {
	for _, h := range a.handlers {
		q := h.acquire()
		all = append(all, operator.Queue{
			Name: q.name, Database: q.db.opener.Key(), History: time.Duration(*h.History),
			Store: q.db.writer.Store, Down: func() time.Time { return q.breaker.Backend().Down }, Wake: q.schedule.Wake,
		})
		q.release()
	}
	return all
}

// Interface guard
var _ operator.Queues = (*App)(nil)
