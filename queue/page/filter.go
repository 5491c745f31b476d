package page

import (
	"errors"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2"
)

// filter is the filter of a list. The URL and the forms use the names of fields.
type filter struct {
	Queue, State, Type, Resource, Error, Since, Until, Order, After string
}

// fields returns the fields by their names in the URL and in forms.
func (f *filter) fields() map[string]*string {
	return map[string]*string{
		"queue": &f.Queue, "state": &f.State, "type": &f.Type, "resource": &f.Resource, "error": &f.Error,
		"since": &f.Since, "until": &f.Until, "order": &f.Order, "after": &f.After,
	}
}

func newFilter(v url.Values) (f filter) {
	for name, field := range f.fields() {
		*field = strings.TrimSpace(strings.ToValidUTF8(v.Get(name), string(unicode.ReplacementChar)))
	}
	return f
}

// Values returns the fields that are set.
func (f filter) Values() url.Values {
	v := make(url.Values)
	for name, field := range f.fields() {
		if *field != "" {
			v.Set(name, *field)
		}
	}
	return v
}

// Link returns the link to the list.
func (f filter) Link() string { return "events?" + f.Values().Encode() }

// From returns the link to the events after a position in the list.
func (f filter) From(after string) string {
	f.After = after
	return f.Link()
}

// Narrow reports whether the filter has any condition.
func (f filter) Narrow() bool {
	f.Order, f.After = "", ""
	return f != filter{}
}

// states maps the word in a filter to the states of the events.
var states = map[string][]string{
	"":            {store.Pending, store.Dead},
	store.Pending: {store.Pending},
	store.Dead:    {store.Dead},
	store.History: {store.History},
	"all":         {store.Pending, store.Dead, store.History},
}

// toStore returns the filter for the store.
func (f filter) toStore(now time.Time) (store.Filter, error) {
	s := store.Filter{
		Queue: f.Queue, Type: f.Type, Resource: f.Resource, Error: f.Error, After: f.After, Newest: f.Order != "oldest",
	}
	var known bool
	if s.States, known = states[f.State]; !known {
		return s, errors.New("state: must be pending, dead, delivered or all")
	}
	var err, untilErr error
	s.Since, err = parseTime(f.Since, now)
	if s.Until, untilErr = parseTime(f.Until, now); err == nil {
		err = untilErr
	}
	return s, err
}

// fix replaces relative times by absolute times, and excludes events that arrive after now.
// So the form selects the events that the user saw, also when it is sent later.
func (f filter) fix(now time.Time) filter {
	since, _ := parseTime(f.Since, now)
	until, _ := parseTime(f.Until, now)
	if !since.IsZero() {
		f.Since = since.UTC().Format(time.RFC3339Nano)
	}
	if until.IsZero() || until.After(now) {
		until = now
	}
	f.Until = until.UTC().Format(time.RFC3339Nano)
	return f
}

// parseTime parses a time, or a duration before now.
func parseTime(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := caddy.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04:05 UTC", "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil && !t.IsZero() {
			return t, nil
		}
	}
	return time.Time{}, errors.New("since and until: must be a duration before now, such as 2h or 3d, or a date in UTC, such as 2026-11-28 09:30")
}
