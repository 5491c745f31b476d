package queue

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

// changeStep is how many events retry and drop change in one transaction. A small
// transaction does not block the running Caddy for long.
const changeStep = 100

func retryCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retry <id>... | " + filterUsage + " [--db <file> | --config <file>]",
		Short: "Makes Caddy retry events immediately",
		Long: `
Makes events pending and due, as if they had arrived just now: dead events are
attempted for max_age again. A running Caddy sees the change within a few
seconds. Events that are being delivered do not change.
`,
		Example: `  caddy inkit-queue retry --state dead --since 2h`,
	}
	filter := newFilter(cmd)
	cmd.Args = idsOrFilter(filter)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		return o.change(cmd.Context(), ids, *filter, "due", store.Store.Retry)
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
		if *yes || len(ids) > 0 {
			return o.change(cmd.Context(), ids, *filter, "dropped", store.Store.Drop)
		}
		would := 0
		err := o.each(cmd.Context(), func(d *target) error {
			return store.Each(cmd.Context(), d, *filter, func(page []*store.Record) error { would += len(page); return nil })
		})
		if err == nil {
			err = fmt.Errorf("would drop %d events: add --yes to drop them", would)
		}
		return err
	}
	return cmd
}

// idsOrFilter requires either ids or a filter, and refuses both.
func idsOrFilter(filter *store.Filter) cobra.PositionalArgs {
	return func(_ *cobra.Command, ids []string) error {
		if given := !reflect.DeepEqual(filter, new(store.Filter)); given == (len(ids) > 0) {
			return errors.New("needs either the ids of events, or a filter such as --state dead")
		}
		return nil
	}
}

// change calls f for the events with these ids. Without ids, it calls f for the events of
// the filter, a few at a time. It prints how many events f has changed.
func (o *origin) change(ctx context.Context, ids []string, filter store.Filter, done string, f func(store.Store, context.Context, store.Filter) (int, error)) error {
	var p progress
	changed := 0
	step := func(s store.Store, part store.Filter) (int, error) { // an interruption never stops a transaction
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := f(s, context.WithoutCancel(ctx), part)
		changed += n
		p.show("events %s: %d", done, changed)
		return n, err
	}
	var err error
	if len(ids) > 0 {
		err = o.eachID(ctx, ids, step)
	} else {
		filter.Limit = changeStep
		err = o.each(ctx, func(d *target) error {
			return store.Each(ctx, d, filter, func(page []*store.Record) error {
				part := filter
				part.IDs = idsOf(page)
				_, err := step(d, part)
				return err
			})
		})
	}
	fmt.Printf("events %s: %d\n", done, changed)
	return err
}

// eachID calls f for each id with one database after the other, until f returns 1 for this
// id. It returns an error for each id for which f returns 0 with every database.
func (o *origin) eachID(ctx context.Context, ids []string, f func(store.Store, store.Filter) (int, error)) error {
	unchanged := make(map[string]error)
	for _, id := range ids {
		unchanged[id] = fmt.Errorf("there is no event %s", request.Printable(id))
	}
	err := o.each(ctx, func(d *target) error {
		for id := range unchanged {
			one := store.Filter{IDs: []string{id}, States: anyState}
			n, err := f(d, one)
			if err != nil {
				return err
			}
			if n > 0 {
				delete(unchanged, id)
				continue
			}
			page, err := d.Search(ctx, one, false)
			if err != nil {
				return err
			}
			for _, r := range page.Records {
				unchanged[id] = fmt.Errorf("%s is being delivered", id)
				if r.State == store.History {
					unchanged[id] = fmt.Errorf("%s cannot be retried: it was delivered, and its request is deleted", id)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var all []error
	for _, id := range slices.Sorted(maps.Keys(unchanged)) {
		all = append(all, unchanged[id])
	}
	return errors.Join(all...)
}

func idsOf(records []*store.Record) []string {
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = r.ID
	}
	return ids
}

// interruptible lets Ctrl-C end a command between two of its transactions.
func interruptible(cmd *cobra.Command) *cobra.Command {
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		err := run(cmd, args)
		if err != nil && ctx.Err() != nil {
			return errors.New("interrupted: the other events are unchanged")
		}
		return err
	}
	return cmd
}

// progress is a line that a long command shows on a terminal. The summary overwrites all of
// it, because its number has as many digits or more.
type progress struct{ shown time.Time }

func (p *progress) show(format string, args ...any) {
	info, err := os.Stderr.Stat()
	if err == nil && info.Mode()&os.ModeCharDevice != 0 && time.Since(p.shown) > time.Second/4 {
		fmt.Fprintf(os.Stderr, format+"\r", args...)
		p.shown = time.Now()
	}
}
