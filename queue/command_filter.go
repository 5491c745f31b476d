package queue

import (
	"errors"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

// filterUsage has the filter options for the usage line of a command.
const filterUsage = "[--state pending|dead|delivered|all]... [--type <type>] [--resource <id>] [--error <text>] [--since <duration>] [--until <duration>]"

// newFilter adds the options of a filter to a command.
func newFilter(cmd *cobra.Command) *store.Filter {
	filter := new(store.Filter)
	for name, usage := range map[string]string{
		"state":    "Only this `state`: pending, dead, delivered or all (default: pending and dead)",
		"type":     "Only this event `type`",
		"resource": "Only the events of the resource with this `id`",
		"error":    "Only events whose last error contains this `text`",
		"since":    "Only events that arrived within this `duration`, such as 2h or 3d",
		"until":    "Only events that arrived longer ago than this `duration`",
	} {
		cmd.Flags().Func(name, usage, func(text string) error {
			if text == "" { // an unset variable of a script must not select all events
				return errors.New("must not be empty")
			}
			return operator.Set(filter, name, text, time.Now())
		})
	}
	return filter
}
