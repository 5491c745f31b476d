package page

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

// selection is the events to change: the events with these ids, or all that match the filter.
type selection struct {
	IDs    []string
	Filter filter
	From   string // "event" for a form on the page of an event
}

// selection reads a form. It returns false if the form selects no event.
func (v *visit) selection() (s selection, f store.Filter, ok bool, err error) {
	form := v.r.PostForm
	s = selection{IDs: form["id"], Filter: newFilter(form), From: form.Get("from")}
	if s.IDs != nil {
		return s, store.Filter{IDs: s.IDs}, true, nil
	}
	f, err = s.Filter.toStore(v.now)
	f.After, f.Newest = "", false
	if f.States = states[""]; s.Filter.State == store.Pending || s.Filter.State == store.Dead {
		f.States = states[s.Filter.State]
	}
	return s, f, form.Get("matching") == "yes" && s.Filter.State != store.History, err
}

// back redirects the browser to a view, which shows the result of the action.
func (v *visit) back(to, code string, c changed) error {
	if !strings.Contains(to, "?") {
		to += "?"
	}
	to += "&done=" + code + "&n=" + strconv.Itoa(c.n)
	if c.more {
		to += "&more"
	}
	v.w.Header().Set("Location", strings.Replace(to, "?&", "?", 1))
	v.w.WriteHeader(http.StatusSeeOther)
	return nil
}

// log logs also an action that failed, because it may have changed some events.
func (v *visit) log(action, queue string, n int, err error) {
	v.h.logger.Info("an operator has changed the queue", zap.String("user", v.user), zap.String("action", action),
		zap.String("queue", queue), zap.Int("events", n), zap.Error(err))
}

// apply changes events, logs the change, and redirects the browser to the view in to.
func (v *visit) apply(action, code, to string, f store.Filter, change func(store.Store, context.Context, store.Filter) (int, error)) error {
	c, err := v.h.change(v.r.Context(), f, change)
	v.log(action, cmp.Or(strings.Join(c.queues, ","), f.Queue), c.n, err)
	if err != nil && (f.IDs == nil || c.n < len(f.IDs)) {
		return v.render(http.StatusServiceUnavailable, "message", "Not all events were changed", err, done(code, strconv.Itoa(c.n), false))
	}
	return v.back(to, code, c)
}

func (v *visit) retry() error {
	s, f, ok, err := v.selection()
	to := s.Filter.Link()
	if s.From == "event" && len(s.IDs) == 1 {
		to = "event?" + url.Values{"id": s.IDs}.Encode()
	}
	switch {
	case err != nil:
		return v.render(http.StatusBadRequest, "message", "That form cannot be read", err, "")
	case !ok:
		return v.back(to, "none", changed{})
	}
	return v.apply("retry", "retried", to, f, store.Store.Retry)
}

// question is the view that asks the user to confirm a drop.
type question struct {
	selection
	Fixed filter // the filter of the events to drop
	Count int
	More  bool // more than Count events match
	Again bool // the number has changed since the user was asked
}

// Counted returns the number of events for the form, so that drop can compare it later.
func (q question) Counted() string {
	if q.More {
		return "more"
	}
	return strconv.Itoa(q.Count)
}

// drop asks the user to confirm. The form sends back the number of events. If the filter
// then selects another number of events, for example with other last errors, drop asks again.
func (v *visit) drop() error {
	s, f, ok, err := v.selection()
	switch {
	case err != nil:
		return v.render(http.StatusBadRequest, "message", "That form cannot be read", err, "")
	case !ok:
		return v.back(s.Filter.Link(), "none", changed{})
	}
	view := question{selection: s, Fixed: s.Filter.fix(v.now)}
	if s.IDs == nil && (f.Until.IsZero() || f.Until.After(v.now)) {
		f.Until = v.now
	}
	if view.Count, view.More, err = v.h.count(v.r.Context(), f); err != nil && (s.IDs == nil || view.Count < len(s.IDs)) {
		return v.render(http.StatusServiceUnavailable, "message", "The events cannot be counted", err, "")
	}
	if form := v.r.PostForm; form.Get("sure") == "yes" {
		view.Filter.Until = form.Get("before") // what the user typed, without the fixed time
		if s.IDs != nil || form.Get("count") == view.Counted() {
			return v.apply("drop", "dropped", view.Filter.Link(), f, store.Store.Drop)
		}
		view.Again = true
	}
	return v.render(http.StatusOK, "drop", "Drop events?", nil, view)
}

// pause pauses or resumes a queue.
func (v *visit) pause(paused bool) error {
	action, code := "resume", "resumed"
	if paused {
		action, code = "pause", "paused"
	}
	d, q, ok := v.h.find(v.r.PostForm.Get("queue"))
	if !ok {
		return v.message(http.StatusNotFound, "There is no such queue", "It is not in the configuration of this Caddy.")
	}
	ctx, cancel := context.WithTimeout(v.r.Context(), searchTimeout)
	defer cancel()
	s, err := d.store()
	if err == nil {
		var changed bool
		if changed, err = s.Pause(ctx, q.Name, paused); err == nil && !changed {
			code = "same"
		}
	}
	v.log(action, q.Name, 0, err)
	if err != nil {
		return v.render(http.StatusServiceUnavailable, "message", "The queue could not be changed", err, "")
	}
	d.wake()
	v.h.forget()
	return v.back("./", code, changed{})
}
