package page

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

// changes has the functions that change events or queues. The key of a function is the last
// word of the path of the request.
var changes = map[string]func(*visit) error{
	"retry":  (*visit).retry,
	"drop":   (*visit).drop,
	"pause":  func(v *visit) error { return v.pause("pause") },
	"resume": func(v *visit) error { return v.pause("resume") },
}

// selection returns a filter for the events that a form selects: the events with the ids in the
// form, or all events that match the filter in the form. If the user confirms a drop, the form has
// the time of the question. The durations in the filter count back from this time, so that the
// filter selects the events that the user saw.
func (v *visit) selection() (store.Filter, error) {
	form := v.r.PostForm
	if ids := form["id"]; ids != nil {
		return store.Filter{IDs: ids}, nil
	}
	if asked, err := time.Parse(time.RFC3339Nano, form.Get("asked")); err == nil && asked.Before(v.now) {
		v.now = asked
	}
	f, err := newFilter(form).toStore(v.now)
	f.After, f.Newest = "", false
	f.States = slices.DeleteFunc(f.States, func(state string) bool { return state == store.History })
	if err == nil && (form.Get("matching") != "yes" || f.States != nil && len(f.States) == 0) {
		err = errors.New("no event was selected")
	}
	return f, err
}

// back redirects the browser to a view, which shows the result of the action.
func (v *visit) back(view string, query url.Values, action string, c changed) error {
	query.Set("done", action)
	query.Set("n", strconv.Itoa(c.n))
	if c.more {
		query.Set("more", "yes")
	}
	v.w.Header().Set("Location", view+"?"+query.Encode())
	v.w.WriteHeader(http.StatusSeeOther)
	return nil
}

// log logs an action of the user. It also logs an action that failed, because that action may
// have changed some events.
func (v *visit) log(action, queue string, n int, err error) {
	v.h.logger.Info("an operator has changed the queue", zap.String("user", v.user), zap.String("action", action),
		zap.String("queue", queue), zap.Int("events", n), zap.Error(err))
}

// apply changes events, logs the change, and redirects the browser to the view that has the form.
func (v *visit) apply(action string, f store.Filter, change operator.Action) error {
	c, err := v.h.change(v.r.Context(), f, change)
	v.log(action, cmp.Or(strings.Join(c.queues, ","), f.Queue), c.n, err)
	if err != nil && (f.IDs == nil || c.n < len(f.IDs)) {
		return v.render(http.StatusServiceUnavailable, "message", "Not all events were changed", err, done(action, strconv.Itoa(c.n), false))
	}
	if v.r.PostForm.Get("from") == "event" {
		return v.back("event", url.Values{"id": f.IDs}, action, c)
	}
	return v.back("events", newFilter(v.r.PostForm).Values, action, c)
}

func (v *visit) retry() error {
	f, err := v.selection()
	if err != nil {
		return v.render(http.StatusBadRequest, "message", "Nothing was changed", err, "")
	}
	return v.apply("retry", f, store.Store.Retry)
}

// drop asks the user to confirm, and deletes the events after the user has confirmed. The form
// of the question contains the number of events. If the filter selects another number of events
// after the question, for example because last errors have changed, drop asks again.
func (v *visit) drop() error {
	f, err := v.selection()
	if err != nil {
		return v.render(http.StatusBadRequest, "message", "Nothing was changed", err, "")
	}
	count := events(len(f.IDs))
	if f.IDs == nil {
		if f.Until.IsZero() || f.Until.After(v.now) {
			f.Until = v.now
		}
		if count, err = v.h.count(v.r.Context(), f); err != nil {
			return v.render(http.StatusServiceUnavailable, "message", "The events cannot be counted", err, "")
		}
	}
	sure := v.r.PostForm.Get("sure")
	if sure == count {
		return v.apply("drop", f, store.Store.Drop)
	}
	return v.render(http.StatusOK, "drop", "Drop events?", nil, struct {
		IDs    []string
		Filter filter
		Asked  string
		Count  string
		Again  bool // the number has changed since the user was asked
	}{f.IDs, newFilter(v.r.PostForm), v.now.UTC().Format(time.RFC3339Nano), count, sure != ""})
}

// pause pauses or resumes a queue.
func (v *visit) pause(action string) error {
	name := v.r.PostForm.Get("queue")
	for _, d := range v.h.databases() {
		q := d.Live(name)
		if q == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(v.r.Context(), searchTimeout)
		defer cancel()
		s, err := d.store()
		if err == nil {
			_, err = s.Pause(ctx, name, action == "pause")
		}
		v.log(action, name, 0, err)
		if err != nil {
			return v.render(http.StatusServiceUnavailable, "message", "The queue could not be changed", err, "")
		}
		q.Wake()
		v.h.forget()
		return v.back("./", make(url.Values), action, changed{})
	}
	return v.message(http.StatusNotFound, "There is no such queue", "It is not in the configuration of this Caddy.")
}
