// Package page is the web page of the queues for an operator. It shows the events with their last
// errors, and has buttons to retry and drop events and to pause queues. It is a Caddy HTTP handler,
// http.handlers.inkit_queue_page, that reads the databases of the queues in the same Caddy.
package page

import (
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(Handler{})
}

const (
	// maxForm is the maximum size of a POST's body. warnInterval is the pause between two
	// log lines about requests without a user.
	maxForm      = 64 << 10
	warnInterval = time.Minute

	defaultUser = "{http.auth.user.id}"
)

// headers are the header fields of every response. With these fields, the browser loads nothing
// from other sites, runs no script, stores no copy, and does not show the page in a frame.
var headers = map[string]string{
	"Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
	"Cache-Control":           "no-store",
	"Referrer-Policy":         "no-referrer",
	"X-Content-Type-Options":  "nosniff",
}

// Handler shows the queues of this Caddy to an operator, who can retry and drop events,
// and pause queues.
//
// It does not authenticate users. A handler in front, such as `http_basic` authentication, must
// authenticate them. For a request without a user, an error with HTTP status 403 is returned.
// At most once a minute, a log line gives the reason.
//
// It works under every path: only the word after the last slash selects the view, and all
// links are relative. You can serve it under a prefix, and strip the prefix or not.
type Handler struct {
	// The placeholder with the name of the user. A placeholder that a client can set, such
	// as `{http.request.header.Remote-User}`, is safe only if a proxy in front or
	// `forward_auth` always replaces its value. Default: `{http.auth.user.id}`.
	User string `json:"user,omitempty"`

	// Whether the page only shows events and queues, and refuses changes. Default: `false`.
	ReadOnly bool `json:"read_only,omitempty"`

	queues     operator.Queues
	logger     *zap.Logger
	protection *http.CrossOriginProtection
	shared     *shared
}

// shared is the state that requests share.
type shared struct {
	turn    chan struct{}
	warning rate.Sometimes // for the log line about a request without a user

	mu    sync.Mutex
	looks map[string]*look // by the key of the database
}

func newShared() *shared {
	return &shared{turn: make(chan struct{}, 1), warning: rate.Sometimes{Interval: warnInterval}, looks: make(map[string]*look)}
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.inkit_queue_page",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets the defaults, and finds the app that has the queues.
func (h *Handler) Provision(ctx caddy.Context) error {
	if h.User == "" {
		h.User = defaultUser
	}
	h.logger = ctx.Logger()
	h.protection = http.NewCrossOriginProtection()
	h.shared = newShared()
	app, err := ctx.App("inkit_queue")
	if err != nil {
		return err
	}
	h.queues = app.(operator.Queues)
	return nil
}

// userForm matches one placeholder of a request. Any other placeholder, such as {env.HOME},
// has the same value for all clients, so it would let everybody in.
var userForm = regexp.MustCompile(`^\{http\.[^\s{}\\]+\}$`)

// Validate refuses a user that does not depend on the request.
func (h *Handler) Validate() error {
	if !userForm.MatchString(h.User) {
		return errors.New("user: must be one placeholder of the request, such as {http.auth.user.id}")
	}
	return nil
}

// ServeHTTP serves the page. It never calls the next handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	for field, value := range headers {
		w.Header().Set(field, value)
	}
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	user, _ := repl.GetString(strings.Trim(h.User, "{}"))
	if user = request.Printable(strings.TrimSpace(user)); user == "" {
		h.shared.warning.Do(func() {
			h.logger.Warn("refused a request without a user: inkit_queue_page needs a directive in front that authenticates, such as basic_auth",
				zap.String("user", h.User))
		})
		return caddyhttp.Error(http.StatusForbidden,
			errors.New("no user: put a directive that authenticates users, such as basic_auth, before inkit_queue_page"))
	}
	if err := h.protection.Check(r); err != nil {
		return caddyhttp.Error(http.StatusForbidden, err)
	}
	v := &visit{h: h, w: w, r: r, user: user, now: time.Now()}
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	serve, methods := views[name], []string{http.MethodGet, http.MethodHead}
	if changes[name] != nil {
		serve, methods = changes[name], []string{http.MethodPost}
	}
	switch {
	case serve == nil:
		return v.message(http.StatusNotFound, "There is no such page", "")
	case !slices.Contains(methods, r.Method):
		allowed := strings.Join(methods, ", ")
		w.Header().Set("Allow", allowed)
		return v.message(http.StatusMethodNotAllowed, "This address accepts only "+allowed, "")
	case r.Method == http.MethodPost && h.ReadOnly:
		return v.message(http.StatusForbidden, "This page is read-only", "")
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); errors.As(err, new(*http.MaxBytesError)) {
		return v.message(http.StatusRequestEntityTooLarge, "The form is too large", "Select fewer events.")
	} else if err != nil {
		return v.message(http.StatusBadRequest, "The form is incomplete or malformed", "")
	}
	return serve(v)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
