package page

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

//go:embed templates
var files embed.FS

//go:embed page.css
var stylesheet []byte

// templates has a template for each view, and the template of the frame around every view.
var templates = template.Must(template.New("").Funcs(words).ParseFS(files, "templates/*.html"))

// views has the functions that show a view, by the last word of the path.
var views = map[string]func(*visit) error{
	"":         (*visit).overview,
	"events":   (*visit).list,
	"event":    (*visit).event,
	"page.css": (*visit).css,
}

// visit is one request of a user, with its response.
type visit struct {
	h    *Handler
	w    http.ResponseWriter
	r    *http.Request
	user string
	now  time.Time
}

// frame has the data that each template gets.
type frame struct {
	User     string
	ReadOnly bool
	Title    string
	Done     string // the result of the last action
	Trouble  error
	View     any
}

// render writes a response with the template of this name. The argument `trouble` is an error
// that the page shows, or nil. The argument `view` has the data of the view.
func (v *visit) render(status int, name, title string, trouble error, view any) error {
	turn, err := v.h.turn(v.r.Context())
	if err != nil {
		return caddyhttp.Error(http.StatusServiceUnavailable, err)
	}
	query := v.r.URL.Query()
	f := frame{v.user, v.h.ReadOnly, title, done(query.Get("done"), query.Get("n"), query.Has("more")), trouble, view}
	var page bytes.Buffer
	err = templates.ExecuteTemplate(&page, name+".html", f)
	turn() // before the response is written, because the client may be slow
	if err != nil {
		return err
	}
	return v.write(status, "text/html; charset=utf-8", page.Bytes())
}

func (v *visit) write(status int, kind string, content []byte) error {
	v.w.Header().Set("Content-Type", kind)
	v.w.WriteHeader(status)
	_, err := v.w.Write(content)
	return err
}

func (v *visit) css() error { return v.write(http.StatusOK, "text/css; charset=utf-8", stylesheet) }

// message writes a page with a title and one text.
func (v *visit) message(status int, title, text string) error {
	return v.render(status, "message", title, nil, text)
}

// shownDatabase is a database in the overview.
type shownDatabase struct {
	*database
	look
	Picture picture
}

func (v *visit) overview() error {
	view := struct {
		Databases []shownDatabase
		Still     bool // no automatic reload
	}{Still: v.r.URL.Query().Has("still")}
	refresh := "10; url=./"
	for _, d := range v.h.databases() {
		l := v.h.look(d)
		view.Databases = append(view.Databases, shownDatabase{d, l, newPicture(l.Status)})
		if l.At.IsZero() {
			refresh = "1; url=./"
		}
	}
	if !view.Still {
		v.w.Header().Set("Refresh", refresh)
	}
	return v.render(http.StatusOK, "overview", "Overview", nil, view)
}

func (v *visit) list() error {
	view := struct {
		Filter filter
		Queues []operator.Queue
		Events []*store.Record
		Next   string    // the link to more events
		Until  time.Time // the time in the position where a slow search stopped
		Kept   bool      // whether the list has events that can be changed
	}{Filter: newFilter(v.r.URL.Query()), Queues: v.h.queues.Queues()}
	f, err := view.Filter.toStore(v.now)
	if err != nil {
		return v.render(http.StatusBadRequest, "list", "Events", err, view)
	}
	page, err := v.h.search(v.r.Context(), f, false)
	view.Events = page.Records
	view.Kept = slices.ContainsFunc(page.Records, func(r *store.Record) bool { return r.State != store.History })
	if page.Next != "" {
		view.Next = view.Filter.From(page.Next)
		if len(page.Records) < pageSize {
			view.Until = store.TimeOf(page.Next)
		}
	}
	status := http.StatusOK
	if err != nil && len(page.Records) == 0 {
		status = http.StatusServiceUnavailable
	}
	return v.render(status, "list", "Events", err, view)
}

func (v *visit) event() error {
	id := v.r.URL.Query().Get("id")
	page, err := v.h.search(v.r.Context(), store.Filter{IDs: []string{id}, States: operator.States["all"], Limit: 1}, true)
	switch {
	case len(page.Records) > 0:
	case err != nil:
		return v.render(http.StatusServiceUnavailable, "message", "The event cannot be read", err, "")
	default:
		return v.message(http.StatusNotFound, "There is no event with this id",
			"It was dropped, or its delivery is older than the history, or it was never in this database.")
	}
	view := struct {
		Event   *store.Record
		Request *request.Request
		Body    body
	}{Event: page.Records[0]}
	if view.Event.State != store.History {
		stored, damage := request.Decode(view.Event)
		if damage != nil {
			err = errors.Join(err, fmt.Errorf("the request cannot be shown: %w", damage))
		} else {
			stored.Redact()
			view.Request, view.Body = stored, newBody(stored.Body)
		}
	}
	title := "Event " + cmp.Or(request.Printable(view.Event.ResourceID), view.Event.ID)
	return v.render(http.StatusOK, "event", shorten(80, title), err, view)
}
