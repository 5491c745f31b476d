package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

func listCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list " + filterUsage + " [--limit <number>] [--json] [--db <file> | --config <file>]",
		Short: "Lists the stored events, the oldest first",
		Long: `
Lists the stored events, the oldest first: a line for each, or with --json an object
for each. With --state delivered or all, it lists delivered events from the history.
`,
		Example: `  caddy inkit-queue list --state all --resource doc_1`,
		Args:    cobra.NoArgs,
	}
	flags := newFilterFlags(cmd)
	limit := cmd.Flags().Int("limit", 0, "How many at most (default: all)")
	asJSON := cmd.Flags().Bool("json", false, "One JSON object a line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		filter, err := flags.filter()
		if err != nil {
			return err
		}
		table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		headed, left := *asJSON, *limit
		err = o.each(cmd.Context(), func(s store.Store) error {
			if !headed {
				headed = true
				fmt.Fprintln(table, "ID\tSTATE\tAGE\tEVENT TYPE\tRESOURCE ID\tATTEMPTS\tNEXT ATTEMPT\tLAST ERROR")
			}
			return list(cmd.Context(), s, filter, *limit > 0, &left, func(r *store.Record) error {
				if *asJSON {
					return json.NewEncoder(os.Stdout).Encode(newListed(r))
				}
				_, err := fmt.Fprintln(table, request.Printable(strings.Join(row(r), "\t"), '\t'))
				return err
			})
		})
		return errors.Join(err, table.Flush())
	}
	return cmd
}

// errEnough ends a list.
var errEnough = errors.New("enough events are listed")

// list calls f for the events that a filter selects. If limited, it stops after left events.
func list(ctx context.Context, s store.Store, filter store.Filter, limited bool, left *int, f func(*store.Record) error) error {
	if limited {
		filter.Limit = *left
	}
	err := store.Each(ctx, s, filter, false, func(page []*store.Record) error {
		for _, r := range page {
			if limited && *left == 0 {
				return errEnough
			}
			*left--
			if err := f(r); err != nil {
				return err
			}
		}
		if limited && *left == 0 {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// row returns the columns of an event in the table.
func row(r *store.Record) []string {
	next := ""
	if r.State == store.Pending {
		next = "now"
		if wait := time.Until(r.Due); wait > 0 {
			next = "in " + words(wait)
		}
	}
	return []string{r.ID, r.State, words(time.Since(r.Received)), r.EventType, r.ResourceID, fmt.Sprint(r.Attempts), next, r.LastError}
}

// listed is an event as the commands show it.
type listed struct {
	ID          string `json:"id"`
	Queue       string `json:"queue"`
	State       string `json:"state"`
	Received    string `json:"received"`
	EventType   string `json:"event_type"`
	ResourceID  string `json:"resource_id"`
	Attempts    int    `json:"attempts"`
	NextAttempt string `json:"next_attempt,omitempty"` // of a pending event; during an attempt, the end of its lease
	LastError   string `json:"last_error,omitempty"`
	Finished    string `json:"finished,omitempty"` // of a delivered event
	Status      int    `json:"status,omitempty"`   // likewise
}

func newListed(r *store.Record) listed {
	l := listed{
		ID: r.ID, Queue: r.Queue, State: r.State, Received: r.Received.UTC().Format(time.RFC3339),
		EventType: r.EventType, ResourceID: r.ResourceID, Attempts: r.Attempts, LastError: r.LastError, Status: r.Status,
	}
	switch r.State {
	case store.Pending:
		l.NextAttempt = r.Due.UTC().Format(time.RFC3339)
	case store.History:
		l.Finished = r.Finished.UTC().Format(time.RFC3339)
	}
	return l
}

func showCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:   "show <id> [--db <file> | --config <file>]",
		Short: "Shows an event with its request",
		Long: `
Shows an event: its state, its last error, and the request with its header fields
and its body. It leaves out the signature and credentials, which a replay would
need, and replaces control characters. A delivered event has no request.
`,
		Example: `  caddy inkit-queue show 019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return o.eachID(cmd.Context(), ids, func(_ store.Store, r *store.Record) error {
				if r.State == store.History {
					shown, err := json.MarshalIndent(newListed(r), "", "  ")
					fmt.Println(request.Printable(string(shown), '\n'))
					return err
				}
				stored, err := request.Decode(r)
				if err != nil {
					return fmt.Errorf("%s: %w", r.ID, err)
				}
				stored.Redact()
				shown, err := json.MarshalIndent(struct {
					listed
					Request *request.Request `json:"request"`
				}{newListed(r), stored}, "", "  ")
				if err != nil {
					return err
				}
				fmt.Printf("%s\n\n%s\n", request.Printable(string(shown), '\n'), strings.TrimSuffix(request.Printable(string(stored.Body), '\n', '\t'), "\n"))
				return nil
			})
		},
	}
}

func retryCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retry <id>... | " + filterUsage + " [--db <file> | --config <file>]",
		Short: "Makes Caddy attempt events again at once",
		Long: `
Makes events pending and due, as if they had arrived just now: dead events are
attempted for max_age again. A running Caddy sees it within a few seconds. Events
that are being delivered do not change.
`,
		Example: `  caddy inkit-queue retry --state dead --since 2h`,
	}
	flags := newFilterFlags(cmd)
	cmd.Args = flags.idsOrFilter
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if !flags.given() {
			return o.eachID(cmd.Context(), ids, retryOne(cmd.Context()))
		}
		filter, err := flags.filter()
		if err != nil {
			return err
		}
		ctx, stop := interruptible(cmd.Context())
		defer stop()
		return o.each(ctx, func(s store.Store) error {
			n, all, err := change(ctx, s, filter, "due", s.Retry)
			fmt.Printf("%d events are due\n", n)
			if n < all {
				fmt.Printf("%d are delivered, or being delivered, and were left\n", all-n)
			}
			return err
		})
	}
	return cmd
}

func retryOne(ctx context.Context) func(s store.Store, r *store.Record) error {
	return func(s store.Store, r *store.Record) error {
		if r.State == store.History {
			return fmt.Errorf("%s cannot be retried: it was delivered, and its request is deleted", r.ID)
		}
		n, err := s.Retry(ctx, store.Filter{IDs: []string{r.ID}})
		switch {
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("%s is being delivered", r.ID)
		}
		fmt.Println("pending", r.ID)
		return nil
	}
}

func dropCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drop <id>... | " + filterUsage + " [--yes] [--db <file> | --config <file>]",
		Short: "Deletes events for good",
		Long: `
Deletes events. With ids, it prints them. You cannot undo this. A running delivery goes on.
With ids, it does not ask; with a filter, it needs --yes. A delivered event is
deleted from the history. If an event of a type in once is sent again after that,
it is delivered.
`,
		Example: `  caddy inkit-queue drop --state dead --error "status 410" --yes`,
	}
	flags := newFilterFlags(cmd)
	yes := cmd.Flags().Bool("yes", false, "Delete the events that the filter selects")
	cmd.Args = flags.idsOrFilter
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if flags.given() {
			return dropFilter(cmd.Context(), o, flags, *yes)
		}
		o.forget = func(s store.Store, id string) (bool, error) { // its history is over, but not its key
			n, err := s.Drop(cmd.Context(), store.Filter{IDs: []string{id}, States: []string{store.History}})
			if n > 0 {
				fmt.Println("dropped", request.Printable(id))
			}
			return n > 0, err
		}
		return o.eachID(cmd.Context(), ids, func(s store.Store, r *store.Record) error {
			n, err := s.Drop(cmd.Context(), store.Filter{IDs: []string{r.ID}, States: []string{r.State}})
			if n > 0 {
				fmt.Println("dropped", request.Printable(strings.TrimSpace(strings.Join([]string{r.ID, r.EventType, r.ResourceID}, " "))))
			}
			return err
		})
	}
	return cmd
}

// dropFilter drops the events that a filter selects. Without yes, it only counts them.
func dropFilter(ctx context.Context, o *origin, flags *filterFlags, yes bool) error {
	filter, err := flags.filter()
	if err != nil {
		return err
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	would := 0
	err = o.each(ctx, func(s store.Store) error {
		if !yes {
			return store.Each(ctx, s, filter, false, func(page []*store.Record) error { would += len(page); return nil })
		}
		n, _, err := change(ctx, s, filter, "dropped", s.Drop)
		fmt.Printf("%d events are dropped\n", n)
		return err
	})
	if err == nil && !yes {
		err = fmt.Errorf("would drop %d events: add --yes to drop them", would)
	}
	return err
}
