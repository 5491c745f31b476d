// Package queue stores verified webhooks from inkit_webhook until the backend accepts them.
// It is a Caddy HTTP handler, http.handlers.inkit_queue, with an app that needs no
// configuration. A build with this package includes inkit_webhook.
package queue

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path"
	"regexp"
	"slices"
	"time"

	"github.com/google/uuid"
	_ "github.com/inkit-webhooks/caddy-inkit-webhook" // the guard that verifies the events
	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue/page" // the web page for operators
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/postgres" // the store in PostgreSQL
	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"   // the default store, in an SQLite file
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(Handler{})
}

const (
	defaultName       = "default"
	maxAttemptTimeout = caddy.Duration(time.Hour)
)

// Handler stores verified webhooks in a database until the backend accepts them.
//
// Put `inkit_webhook` in front of this handler. Without a verified event, an error with HTTP
// status 500 is returned, and nothing is stored. The `routes` make the first attempt. The
// event is written to the database if that attempt fails or takes longer than 25 ms. If the
// backend accepts the event, the sender gets the backend's response. If the attempt fails, or
// takes longer than `answer_after`, the sender gets status 200 as soon as the event is on the
// disk. Caddy then makes further attempts. The wait before each attempt is about the age of
// the event, but at least a second and about five minutes at most. Only status 2xx counts as
// accepted. All attempts have the same `Idempotency-Key`.
//
// No event is stored if the disk is full or `max_events` are pending. If the backend accepts
// an event that is not stored, the sender gets the backend's response. If not, an error with
// HTTP status 503 and a `Retry-After` field is returned. No sender gets 2xx for an event that
// is neither on the disk nor accepted.
//
// In the `routes`, use the placeholders of `inkit_webhook` and these placeholders:
//
// Placeholder | Description
// ------------|-------------
// `{http.inkit_queue.id}` | The id of the event in the database and in the log
// `{http.inkit_queue.attempt}` | The number of the attempt, starting at `1`
// `{http.inkit_queue.received}` | The time when the event arrived, such as `2026-11-25T06:30:00Z`
type Handler struct {
	// The name of the queue, for logs, metrics and the database. Handlers with the same
	// name must have the same settings. Default: `default`.
	Name string `json:"name,omitempty"`

	// The database for the events. Default: `{"module": "sqlite"}`, a file in Caddy's data
	// directory.
	StoreRaw json.RawMessage `json:"store,omitempty" caddy:"namespace=inkit_queue.stores inline_key=module"`

	// How long the sender waits for the backend before it gets status 200 for a stored event.
	// With 0, the sender does not wait for the backend. Default: `5s`.
	AnswerAfter *caddy.Duration `json:"answer_after,omitempty"`

	// How long one attempt may take, at most `1h`. Default: `30s`.
	AttemptTimeout caddy.Duration `json:"attempt_timeout,omitempty"`

	// The age of an event after which a failed attempt is the last attempt: the event is then dead.
	// A dead event stays in the database until an operator retries or drops it. Default: `5d`.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// How many events may be pending. While so many are pending, no new event is stored.
	// Default: `1000000`.
	MaxEvents int `json:"max_events,omitempty"`

	// How many attempts may run at the same time. With two or more, a quarter of
	// them is only for new events. Default: `16`.
	Concurrency int `json:"concurrency,omitempty"`

	// How long the history keeps a delivered event: its id, type, resource, times and status,
	// but not the request. The history has at most about `max_events` rows. With 0, the
	// history is empty. Default: `7d`.
	History *caddy.Duration `json:"history,omitempty"`

	// The event types that should occur only once for each resource, with `*` as a wildcard. If
	// several events of these types have identical bodies with a `resource_id`, only the first
	// is delivered. The others are answered with status 200. Default: none.
	Once []string `json:"once,omitempty"`

	// How long the queue remembers an event whose type is in `once`, to recognize an event
	// with an identical body. Default: `30d`.
	Remember caddy.Duration `json:"remember,omitempty"`

	// The handlers that deliver an event, such as `reverse_proxy`. Required.
	Routes caddyhttp.RouteList `json:"routes,omitempty"`

	opener store.Opener
	server *caddyhttp.Server
	logger *zap.Logger
	app    *App
	config string // all settings, as JSON, with route groups numbered from 0
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.inkit_queue",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets the defaults, and registers this handler with the app. It opens no database.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	h.server, _ = ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	h.Name = cmp.Or(h.Name, defaultName)
	h.AnswerAfter = cmp.Or(h.AnswerAfter, new(caddy.Duration(5*time.Second)))
	h.AttemptTimeout = cmp.Or(h.AttemptTimeout, caddy.Duration(30*time.Second))
	h.MaxAge = cmp.Or(h.MaxAge, caddy.Duration(5*24*time.Hour))
	h.MaxEvents = cmp.Or(h.MaxEvents, 1_000_000)
	h.Concurrency = cmp.Or(h.Concurrency, 16)
	h.History = cmp.Or(h.History, new(caddy.Duration(7*24*time.Hour)))
	h.Remember = cmp.Or(h.Remember, caddy.Duration(30*24*time.Hour))
	config, _ := json.Marshal(h) // before LoadModule, which deletes the JSON of the module
	numbers := make(map[string]string)
	h.config = groupForm.ReplaceAllStringFunc(string(config), func(group string) string {
		numbers[group] = cmp.Or(numbers[group], fmt.Sprint("group ", len(numbers)))
		return numbers[group]
	})
	var err error
	if h.opener, err = h.loadStore(ctx); err != nil {
		return err
	}
	if err := h.Routes.Provision(ctx); err != nil {
		return fmt.Errorf("routes: %w", err)
	}
	app, err := ctx.App("inkit_queue")
	if err != nil {
		return err
	}
	h.app = app.(*App)
	if err := ctx.GetMetricsRegistry().Register(metrics); err != nil && !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		return err
	}
	return h.app.register(h)
}

// loadStore returns the module of the database, and does not open the database.
func (h *Handler) loadStore(ctx caddy.Context) (store.Opener, error) {
	if h.StoreRaw == nil {
		h.StoreRaw = json.RawMessage(`{"module":"sqlite"}`)
	}
	module, err := ctx.LoadModule(h, "StoreRaw")
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return module.(store.Opener), nil
}

var (
	nameForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	onceForm = regexp.MustCompile(`^[A-Za-z0-9_*]+$`)

	// The Caddyfile adapter counts the route groups of all sites. So if two sites import the same
	// snippet, their groups have different names.
	groupForm = regexp.MustCompile(`"group":"group\d+"`)
)

// Validate refuses invalid settings.
func (h *Handler) Validate() error {
	for word, number := range map[string]int64{
		"answer_after": int64(*h.AnswerAfter), "attempt_timeout": int64(h.AttemptTimeout), "max_age": int64(h.MaxAge),
		"max_events": int64(h.MaxEvents), "concurrency": int64(h.Concurrency), "history": int64(*h.History), "remember": int64(h.Remember),
	} {
		if number < 0 {
			return fmt.Errorf("%s: must not be negative", word)
		}
	}
	if h.AttemptTimeout > maxAttemptTimeout {
		return errors.New("attempt_timeout: must not be longer than 1h")
	}
	if !nameForm.MatchString(h.Name) {
		return errors.New("name must have 1 to 64 characters: letters, digits, '.', '_' or '-'")
	}
	if len(h.Routes) == 0 {
		return errors.New("routes: at least one is required")
	}
	if slices.ContainsFunc(h.Once, func(pattern string) bool { return !onceForm.MatchString(pattern) }) {
		return errors.New("once: an event type must be letters, digits, '_' and '*'")
	}
	return nil
}

// isOnce reports whether the option `once` lists an event type.
func (h *Handler) isOnce(eventType string) bool {
	return slices.ContainsFunc(h.Once, func(pattern string) bool {
		match, _ := path.Match(pattern, eventType)
		return match
	})
}

// ServeHTTP stores and delivers the event of a request. The next handler is not called.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	e := event.FromContext(r.Context())
	if e == nil {
		return caddyhttp.Error(http.StatusInternalServerError, errors.New("there is no verified event: inkit_webhook must come before inkit_queue"))
	}
	q := h.acquire()
	defer q.release()
	record := &store.Record{
		ID: uuid.Must(uuid.NewV7()).String(), Queue: h.Name, State: store.Pending, Received: time.Now(),
		EventType: e.Type(), ResourceID: e.ResourceID(),
	}
	if record.ResourceID != "" && h.isOnce(record.EventType) {
		digest := sha256.Sum256(e.Body)
		record.Digest, record.Remember = digest[:], time.Duration(h.Remember)
	}
	return newArrival(q, h, newRequest(r, e), record).answer(w)
}

// acquire returns the queue of the handler, and opens the queue if it is not open. It does not
// wait for the database. Each call takes a reference, and the release of the last reference
// closes the queue. Each request has a reference of its own, because requests can arrive
// before the app starts, and on open connections after the app has stopped.
func (h *Handler) acquire() *queue {
	key := h.opener.Key() + "\x00" + h.Name
	value, _, _ := queues.LoadOrNew(key, func() (caddy.Destructor, error) {
		return newQueue(key, h), nil
	})
	return value.(*queue)
}
