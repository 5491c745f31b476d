package queue

import (
	"errors"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
)

// filterUsage has the filter options for the usage line of a command.
const filterUsage = "[--state pending|dead|delivered|all]... [--type <type>] [--resource <id>] [--error <text>] [--since <duration>] [--until <duration>]"

var anyState = []string{store.Pending, store.Dead, store.History}

// newFilter adds the options of a filter to a command.
func newFilter(cmd *cobra.Command) *store.Filter {
	filter := new(store.Filter)
	option := func(name, usage string, set func(value string) error) {
		cmd.Flags().Func(name, usage, func(value string) error {
			if value == "" { // an unset variable of a script must not select all events
				return errors.New("must not be empty")
			}
			return set(value)
		})
	}
	option("state", "Only this `state`: pending, dead, delivered or all (default: pending and dead)", func(state string) error {
		switch state {
		case store.Pending, store.Dead, store.History:
			filter.States = append(filter.States, state)
		case "all":
			filter.States = append(filter.States, anyState...)
		default:
			return errors.New("must be pending, dead, delivered or all")
		}
		return nil
	})
	option("type", "Only this event `type`", func(v string) error { filter.Type = v; return nil })
	option("resource", "Only the events of the resource with this `id`", func(v string) error { filter.Resource = v; return nil })
	option("error", "Only events whose last error contains this `text`", func(v string) error { filter.Error = v; return nil })
	option("since", "Only events that arrived within this `duration`, such as 2h or 3d", ago(&filter.Since))
	option("until", "Only events that arrived longer ago than this `duration`", ago(&filter.Until))
	return filter
}

// ago returns a function that parses a duration and sets the time to now minus the duration.
func ago(to *time.Time) func(string) error {
	return func(duration string) error {
		d, err := caddy.ParseDuration(duration)
		if err != nil || d < 0 {
			return errors.New("takes a duration, such as 2h or 3d")
		}
		*to = time.Now().Add(-d)
		return nil
	}
}
