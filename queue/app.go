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

// App starts and stops the queues of a configuration. It has no settings: the
// inkit_queue handlers load it.
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

// register adds a handler. A site with two listeners has its handlers twice, so two
// handlers may have the same name if their settings are the same.
func (a *App) register(h *Handler, config string) error {
	if other, ok := a.configs[h.Name]; ok && other != config {
		return fmt.Errorf("name: two queues are called %s, and have different settings", h.Name)
	}
	a.configs[h.Name] = config
	a.handlers = append(a.handlers, h)
	return nil
}

// Start opens the queues and starts their deliveries. It does not wait for the databases and
// never fails: if a database is broken, Caddy still serves the sites.
func (a *App) Start() error {
	for _, h := range a.handlers {
		h.use.open()
	}
	return nil
}

// Stop prevents new attempts by this configuration. Running attempts go on. If Caddy
// stops, they get the grace period of the HTTP servers.
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
