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

// App starts and stops the queues of a configuration. There is nothing in it to
// configure: a handler brings it along.
type App struct {
	ctx      caddy.Context
	logger   *zap.Logger
	handlers []*Handler
	configs  map[string]string // by name
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

// register notes a handler. A site with two listeners has its handlers twice: two handlers
// may have one name if they are the same.
func (a *App) register(h *Handler, config string) error {
	if other, ok := a.configs[h.Name]; ok && other != config {
		return fmt.Errorf("name: two queues are called %s, and have different settings", h.Name)
	}
	a.configs[h.Name] = config
	a.handlers = append(a.handlers, h)
	return nil
}

// Start opens the queues, or finds them open, and has them deliver. It does not wait for
// the databases and never fails: whatever is wrong with a database, the sites are served.
func (a *App) Start() error {
	for _, h := range a.handlers {
		h.use.open()
	}
	return nil
}

// Stop has the queues make no more attempts by this configuration. Attempts under way go
// on. If Caddy ends, they have as long as the requests of the HTTP servers.
func (a *App) Stop() error {
	var grace time.Duration
	if app, err := a.ctx.AppIfConfigured("http"); err == nil {
		grace = time.Duration(app.(*caddyhttp.App).GracePeriod)
	}
	for _, h := range a.handlers {
		h.use.detach(grace)
	}
	return nil
}
