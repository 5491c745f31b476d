package queue

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"

	"github.com/caddyserver/caddy/v2"
)

// selectStep is how many events retry and drop change in one transaction. It is small, so
// that no event of a running Caddy waits for long.
const selectStep = 100

// filterUsage is the filters in the usage of a command.
const filterUsage = "[--state pending|dead|delivered|all]... [--type <type>] [--resource <id>] [--error <text>] [--since <duration>] [--until <duration>]"

// filterFlags are the options of a command that select events.
type filterFlags struct {
	states                                  []string
	dead                                    bool
	eventType, resource, part, since, until string
}

func newFilterFlags(cmd *cobra.Command) *filterFlags {
	f, flags := new(filterFlags), cmd.Flags()
	flags.StringArrayVar(&f.states, "state", nil, "Only this state: pending, dead, delivered or all (default: pending and dead)")
	flags.BoolVar(&f.dead, "dead", false, "The same as --state dead")
	flags.StringVar(&f.eventType, "type", "", "Only this event type")
	flags.StringVar(&f.resource, "resource", "", "Only the events of this resource")
	flags.StringVar(&f.part, "error", "", "Only events whose last error contains this text")
	flags.StringVar(&f.since, "since", "", "Only events that arrived within this time, such as 2h or 3d")
	flags.StringVar(&f.until, "until", "", "Only events that arrived longer ago")
	cmd.PreRunE = func(*cobra.Command, []string) error { // such as an unset variable of a script
		for _, name := range []string{"type", "resource", "error", "since", "until"} {
			if flag := flags.Lookup(name); flag.Changed && flag.Value.String() == "" {
				return fmt.Errorf("--%s: must not be empty", name)
			}
		}
		return nil
	}
	return f
}

// given reports whether there is any of them.
func (f *filterFlags) given() bool {
	return f.dead || len(f.states) > 0 || f.eventType+f.resource+f.part+f.since+f.until != ""
}

func (f *filterFlags) filter() (filter store.Filter, err error) {
	filter = store.Filter{Type: f.eventType, Resource: f.resource, Error: f.part}
	if f.dead {
		filter.States = []string{store.Dead}
	}
	for _, state := range f.states {
		switch state {
		case store.Pending, store.Dead, store.History:
			filter.States = append(filter.States, state)
		case "all":
			filter.States = append(filter.States, store.Pending, store.Dead, store.History)
		default:
			return filter, errors.New("--state: must be pending, dead, delivered or all")
		}
	}
	if filter.Since, err = ago("--since", f.since); err == nil {
		filter.Until, err = ago("--until", f.until)
	}
	return filter, err
}

// ago returns the time a duration before now.
func ago(flag, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	d, err := caddy.ParseDuration(text)
	if err != nil || d < 0 {
		return time.Time{}, fmt.Errorf("%s: takes a duration, such as 2h or 3d", flag)
	}
	return time.Now().Add(-d), nil
}

// idsOrFilter refuses a command with both ids and a filter, or with neither.
func (f *filterFlags) idsOrFilter(_ *cobra.Command, ids []string) error {
	if f.given() == (len(ids) > 0) {
		return errors.New("takes either events by their ids, or a filter such as --state dead")
	}
	return nil
}

// change calls f with the ids of the events that a filter selects, selectStep at a time.
// It returns how many f has changed, and how many there were. An interruption takes effect
// between two calls.
func change(ctx context.Context, s store.Store, filter store.Filter, what string, f func(context.Context, store.Filter) (int, error)) (changed, all int, err error) {
	var p progress
	defer p.end()
	err = store.Each(ctx, s, filter, false, func(page []*store.Record) error {
		for some := range slices.Chunk(page, selectStep) {
			if err := ctx.Err(); err != nil {
				return err
			}
			part := filter
			part.IDs = idsOf(some)
			n, err := f(context.WithoutCancel(ctx), part)
			changed, all = changed+n, all+len(some)
			if err != nil {
				return err
			}
			p.show("%d events are %s", changed, what)
		}
		return nil
	})
	return changed, all, interrupted(ctx, err)
}

func idsOf(records []*store.Record) []string {
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = r.ID
	}
	return ids
}

// interruptible returns a context that Ctrl-C ends.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}

// interrupted replaces the error of the last step if the command was interrupted.
func interrupted(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return errors.New("interrupted: the other events are unchanged")
	}
	return err
}

// progress is a line on a terminal that shows the progress of long work.
type progress struct {
	shown time.Time
	width int
}

func (p *progress) show(format string, args ...any) {
	info, err := os.Stderr.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 || time.Since(p.shown) < time.Second/4 {
		return
	}
	line := fmt.Sprintf(format, args...)
	fmt.Fprintf(os.Stderr, "\r%-*s", p.width, line)
	p.shown, p.width = time.Now(), len(line)
}

// end clears the line.
func (p *progress) end() {
	if p.width > 0 {
		fmt.Fprint(os.Stderr, "\r"+strings.Repeat(" ", p.width)+"\r")
	}
}

// words returns a duration as people say it.
func words(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, d/time.Second))
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}
