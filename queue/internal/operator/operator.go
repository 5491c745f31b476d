// Package operator has the interface through which the page uses the running Caddy. It also
// has the code that the page and the commands share: for the filters that an operator types,
// for changes of events, and for the text of a duration.
package operator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	"github.com/caddyserver/caddy/v2"
)

// Queue is a queue of the running Caddy.
type Queue struct {
	Name     string
	Database string        // the key of the database, without credentials
	History  time.Duration // how long the history keeps an event, 0 for no history

	// Store returns the database, or nil with the reason why it is not open.
	Store func() (store.Store, error)

	// Down returns the time since which the backend counts as down, zero if it is up.
	Down func() time.Time

	// Wake makes the queue check for due events and for a pause.
	Wake func()
}

// Queues is the interface to the app of inkit_queue. The page needs an interface, because the
// package of the app imports the package of the page.
type Queues interface {
	// Queues returns the queues of the app's configuration.
	Queues() []Queue
}

// States has, for each word that a person can type as a state, the states that the word selects.
var States = map[string][]string{
	store.Pending: {store.Pending},
	store.Dead:    {store.Dead},
	store.History: {store.History},
	"all":         {store.Pending, store.Dead, store.History},
}

// An Action, such as store.Store.Retry, changes the events that a filter selects. It returns the
// number of changed events.
type Action func(store.Store, context.Context, store.Filter) (int, error)

// Step is how many events change in one transaction. It is small, because a new event may
// have to wait for the transaction.
const Step = 100

// InSteps searches the events that a filter selects, in pages of at most Step events. For each
// page, it calls f with the page, and with a filter that selects only the events of the page.
func InSteps(ctx context.Context, s store.Store, filter store.Filter, f func(page []*store.Record, step store.Filter) error) error {
	filter.Limit = Step
	return store.Each(ctx, s, filter, func(page []*store.Record) error {
		step := filter
		step.IDs = nil
		for _, r := range page {
			step.IDs = append(step.IDs, r.ID)
		}
		return f(page, step)
	})
}

// Set sets a field of a filter from the text that a person typed. After two calls with different
// states, the filter selects both states.
func Set(filter *store.Filter, field, text string, now time.Time) (err error) {
	switch field {
	case "queue":
		filter.Queue = text
	case "state":
		if States[text] == nil {
			return errors.New("must be pending, dead, delivered or all")
		}
		filter.States = append(filter.States, States[text]...)
	case "type":
		filter.Type = text
	case "resource":
		filter.Resource = text
	case "error":
		filter.Error = text
	case "since":
		filter.Since, err = parseTime(text, now)
	case "until":
		filter.Until, err = parseTime(text, now)
	}
	return err
}

// parseTime returns the time that a text means: a duration before now, or a date.
func parseTime(text string, now time.Time) (time.Time, error) {
	if ago, err := caddy.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04:05 UTC", "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil && !t.IsZero() {
			return t, nil
		}
	}
	return time.Time{}, errors.New("must be a duration before now, such as 2h or 3d, or a date in UTC, such as 2026-11-28 09:30")
}

// Age returns a duration in one unit, such as 5 min.
func Age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", max(0, d/time.Second))
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

// Until returns "now", or a text such as "in 5 min". An attempt is due after the duration `d`.
func Until(d time.Duration) string {
	if d <= 0 {
		return "now"
	}
	return "in " + Age(d)
}
