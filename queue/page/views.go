package page

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"html/template"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/live"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// refreshAfter is the time between two reloads of the overview, in seconds.
const refreshAfter = 10

//go:embed templates
var files embed.FS

//go:embed page.css
var stylesheet []byte

// templates has the views, each inside frame.html.
var templates = parseTemplates("overview", "list", "event", "drop", "message")

func parseTemplates(names ...string) map[string]*template.Template {
	all := make(map[string]*template.Template)
	frame := template.Must(template.New("frame.html").Funcs(words).ParseFS(files, "templates/frame.html"))
	for _, name := range names {
		all[name] = template.Must(template.Must(frame.Clone()).ParseFS(files, "templates/"+name+".html"))
	}
	return all
}

// visit is one request of a user, with its response.
type visit struct {
	h    *Handler
	w    http.ResponseWriter
	r    *http.Request
	user string
	now  time.Time
}

// find returns the function that shows a view, or the function that makes a change.
func (v *visit) find(name string) (show, change func() error) {
	switch name {
	case "":
		return v.overview, nil
	case "events":
		return v.list, nil
	case "event":
		return v.event, nil
	case "page.css":
		return v.css, nil
	case "retry":
		return nil, v.retry
	case "drop":
		return nil, v.drop
	case "pause":
		return nil, func() error { return v.pause(true) }
	case "resume":
		return nil, func() error { return v.pause(false) }
	}
	return nil, nil
}

// frame has the data of frame.html.
type frame struct {
	User     string
	ReadOnly bool
	Title    string
	Done     string // the result of the last action
	Troubles string // the errors
	View     any
}

// render writes a view.
func (v *visit) render(status int, name, title string, trouble error, view any) error {
	turn, err := v.h.turn(v.r.Context())
	if err != nil {
		return caddyhttp.Error(http.StatusServiceUnavailable, err)
	}
	query := v.r.URL.Query()
	f := frame{User: v.user, ReadOnly: v.h.ReadOnly, Title: title, Troubles: shown(trouble), View: view}
	f.Done = done(query.Get("done"), query.Get("n"), query.Has("more"))
	var page bytes.Buffer
	err = templates[name].ExecuteTemplate(&page, "frame.html", f)
	turn() // before the response is written, because the client may be slow
	if err != nil {
		return err
	}
	return v.write(status, "text/html; charset=utf-8", page.Bytes())
}

func (v *visit) write(status int, kind string, content []byte) error {
	v.w.Header().Set("Content-Type", kind)
	v.w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	v.w.WriteHeader(status)
	_, err := v.w.Write(content)
	if errors.Is(err, http.ErrBodyNotAllowed) { // a HEAD request
		err = nil
	}
	return err
}

func (v *visit) css() error { return v.write(http.StatusOK, "text/css; charset=utf-8", stylesheet) }

// message writes a page with a title and one text.
func (v *visit) message(status int, title, text string) error {
	return v.render(status, "message", title, nil, text)
}

// shownQueue is a queue in the overview. If the queue is not configured, only its numbers
// are known.
type shownQueue struct {
	store.QueueStatus
	Configured bool
	Down       time.Time
	History    time.Duration
	Errors     []shownError
}

type shownError struct {
	store.ErrorCount
	Link string
}

// Link returns the link to the events of the queue in a state.
func (q shownQueue) Link(state string) string {
	return filter{Queue: q.Queue, State: state}.Link()
}

type shownDatabase struct {
	Key     string
	Size    int64
	At      time.Time // of the last look
	Looking bool      // the first look has not ended: the numbers are not known yet
	Trouble string
	Queues  []shownQueue
	Picture picture
}

func (v *visit) overview() error {
	view := struct {
		Databases []shownDatabase
		Still     bool // no automatic reload
		Seconds   int
	}{Still: v.r.URL.Query().Has("still"), Seconds: refreshAfter}
	refresh := refreshAfter
	for _, d := range v.h.databases() {
		status, at, err := v.h.status(v.r.Context(), d)
		view.Databases = append(view.Databases, v.database(d, status, at, err))
		if errors.Is(err, errLooking) {
			refresh = 1
		}
	}
	if !view.Still {
		v.w.Header().Set("Refresh", strconv.Itoa(refresh)+"; url=./")
	}
	return v.render(http.StatusOK, "overview", "Overview", nil, view)
}

func (v *visit) database(d *database, status store.Status, at time.Time, err error) shownDatabase {
	shownDB := shownDatabase{Key: d.key, Size: status.Size, At: at, Looking: errors.Is(err, errLooking), Picture: newPicture(status)}
	if !shownDB.Looking {
		shownDB.Trouble = shown(err)
	}
	if err != nil { // show only what is known without the database
		for _, q := range d.queues {
			shownDB.Queues = append(shownDB.Queues, shownQueue{QueueStatus: store.QueueStatus{Queue: q.Name}, Configured: true, Down: q.Down()})
		}
		return shownDB
	}
	for _, s := range status.Queues {
		q := shownQueue{QueueStatus: s}
		if i := slices.IndexFunc(d.queues, func(q live.Queue) bool { return q.Name == s.Queue }); i >= 0 {
			q.Configured, q.Down, q.History = true, d.queues[i].Down(), d.queues[i].History
		}
		for _, e := range s.Errors {
			q.Errors = append(q.Errors, shownError{e, filter{Queue: s.Queue, Error: e.Error}.Link()})
		}
		shownDB.Queues = append(shownDB.Queues, q)
	}
	return shownDB
}

// shownEvent is an event in a list, or in its own view.
type shownEvent struct {
	*store.Record
	now time.Time
}

func (e shownEvent) Link() string { return "event?" + url.Values{"id": {e.ID}}.Encode() }

// Trying reports whether an attempt is in progress.
func (e shownEvent) Trying() bool { return e.LeasedUntil.After(e.now) }

// Overdue reports whether the next attempt waits for its turn or for the backend.
func (e shownEvent) Overdue() bool { return !e.Due.After(e.now) }

// Kept reports whether the event can be retried and dropped.
func (e shownEvent) Kept() bool { return e.State != store.History }

func (v *visit) list() error {
	view := struct {
		Filter filter
		Queues []string
		Events []shownEvent
		Next   string    // the link to more events
		Until  time.Time // how far the search got, if it took too long
		Kept   bool      // whether the list has events that can be changed
	}{Filter: newFilter(v.r.URL.Query())}
	for _, d := range v.h.databases() {
		for _, q := range d.queues {
			view.Queues = append(view.Queues, q.Name)
		}
	}
	f, err := view.Filter.toStore(v.now)
	if err != nil {
		return v.render(http.StatusBadRequest, "list", "Events", err, view)
	}
	page, err := v.h.search(v.r.Context(), f, false)
	for _, r := range page.Records {
		view.Events = append(view.Events, shownEvent{r, v.now})
		view.Kept = view.Kept || r.State != store.History
	}
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
	page, err := v.h.search(v.r.Context(), store.Filter{IDs: []string{id}, States: states["all"], Limit: 1}, true)
	if len(page.Records) == 0 {
		if err != nil {
			return v.render(http.StatusServiceUnavailable, "message", "The event cannot be read", err, "")
		}
		return v.message(http.StatusNotFound, "There is no event with this id",
			"It was dropped, or its delivery is older than the history, or it was never in this database.")
	}
	view := struct {
		Event   shownEvent
		Request *request.Request
		Fields  []string // the sorted names of the header fields
		Body    body
		Trouble string
	}{Event: shownEvent{page.Records[0], v.now}}
	if view.Event.Kept() {
		stored, err := request.Decode(view.Event.Record)
		if err != nil {
			view.Trouble = shown(err)
		} else {
			stored.Redact()
			view.Request, view.Body = stored, newBody(stored.Body)
			view.Fields = slices.Sorted(maps.Keys(stored.Header))
		}
	}
	title := "Event " + cmp.Or(request.Printable(view.Event.ResourceID), view.Event.ID)
	return v.render(http.StatusOK, "event", shorten(80, title), err, view)
}
