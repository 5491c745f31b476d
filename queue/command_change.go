package queue

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"syscall"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

func retryCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retry <id>... | " + filterUsage + " [--db <file> | --config <file>]",
		Short: "Makes Caddy retry events immediately",
		Long: `
Makes events pending and due, as if they had arrived just now: dead events are
attempted for max_age again. A running Caddy sees the change within a few
seconds. Events that are being delivered, or that were delivered, do not change.
`,
		Example: `  caddy inkit-queue retry --state dead --since 2h`,
	}
	filter := newFilter(cmd)
	cmd.Args = idsOrFilter(filter)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		changed, err := o.change(cmd, ids, *filter, store.Store.Retry)
		fmt.Printf("events due: %d\n", changed)
		return err
	}
	return cmd
}

func dropCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drop <id>... | " + filterUsage + " [--yes] [--db <file> | --config <file>]",
		Short: "Deletes events for good",
		Long: `
Deletes events. You cannot undo this. A running delivery goes on. A filter needs
--yes; ids do not. A delivered event is deleted from the history. If the sender
sends a deleted event of a type in once again, it is delivered.
`,
		Example: `  caddy inkit-queue drop --state dead --error "status 410" --yes`,
	}
	filter := newFilter(cmd)
	yes := cmd.Flags().Bool("yes", false, "Delete the events that the filter selects")
	cmd.Args = idsOrFilter(filter)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if !*yes && len(ids) == 0 {
			would, err := o.change(cmd, nil, *filter, func(_ store.Store, _ context.Context, f store.Filter) (int, error) { return len(f.IDs), nil })
			if err == nil {
				err = fmt.Errorf("would drop %d events: add --yes to drop them", would)
			}
			return err
		}
		changed, err := o.change(cmd, ids, *filter, store.Store.Drop)
		fmt.Printf("events dropped: %d\n", changed)
		return err
	}
	return cmd
}

// filterUsage has the filter options for the usage line of a command.
const filterUsage = "[--state pending|dead|delivered|all]... [--type <type>] [--resource <id>] [--error <text>] [--since <duration>] [--until <duration>]"

// newFilter adds the options of a filter to a command, and returns the filter that they set.
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

// idsOrFilter requires either the ids of events or a filter, and refuses both together.
func idsOrFilter(filter *store.Filter) cobra.PositionalArgs {
	return func(_ *cobra.Command, ids []string) error {
		if given := !reflect.DeepEqual(filter, new(store.Filter)); given == (len(ids) > 0) {
			return errors.New("needs either the ids of events, or a filter such as --state dead")
		}
		return nil
	}
}

// change calls f for the events with these ids. Without ids, it calls f for the events of
// the filter, a few at a time. It returns how many events f has changed, also after an error.
func (o *origin) change(cmd *cobra.Command, ids []string, filter store.Filter, f operator.Action) (changed int, err error) {
	ctx := cmd.Context()
	step := func(s store.Store, part store.Filter) (int, error) { // an interruption never stops a transaction
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := f(s, context.WithoutCancel(ctx), part)
		changed += n
		return n, err
	}
	if len(ids) > 0 {
		err = o.eachID(cmd, ids, step)
		return changed, err
	}
	err = o.each(ctx, func(d *target) error {
		return operator.InSteps(ctx, d, filter, func(_ []*store.Record, part store.Filter) error {
			_, err := step(d, part)
			return err
		})
	})
	return changed, err
}

// eachID calls f for each id in one database after the other. If f returns 1, the database has the
// event, and eachID skips this id in the next databases. If f returns 0 for an id in every
// database, eachID returns an error.
func (o *origin) eachID(cmd *cobra.Command, ids []string, f func(store.Store, store.Filter) (int, error)) error {
	err := o.each(cmd.Context(), func(d *target) error {
		var left []string
		for _, id := range ids {
			n, err := f(d, store.Filter{IDs: []string{id}, States: operator.States["all"]})
			if err != nil {
				return err
			}
			if n == 0 {
				left = append(left, id)
			}
		}
		ids = left
		return nil
	})
	if err != nil || len(ids) == 0 {
		return err
	}
	left := request.Printable(strings.Join(ids, ", "))
	if cmd.Name() == "retry" {
		return fmt.Errorf("not changed, because unknown, delivered or being delivered: %s", left)
	}
	return fmt.Errorf("there is no event to %s: %s", cmd.Name(), left)
}

// interruptible lets Ctrl-C end a command between two of its transactions.
func interruptible(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		err := run(cmd, args)
		if err != nil && ctx.Err() != nil {
			return errors.New("interrupted: the other events are unchanged")
		}
		return err
	}
}
