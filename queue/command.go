package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "inkit-queue",
		Short: "Lists, shows, retries, drops and moves the events of a queue",
		Long: `
Works on the database of inkit_queue, whether Caddy runs or not, and without its
admin endpoint. Run it as the user that Caddy runs as: nobody else can read the
file of SQLite.

Without --db and --config, the database is inkit_queue.db in Caddy's data directory.
With --config, it is each of those that the configuration names.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Args = cobra.NoArgs // or else an unknown command prints the help, with status 0
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			var o origin
			flags := cmd.PersistentFlags()
			flags.StringVar(&o.db, "db", "", "File of SQLite")
			flags.StringVar(&o.config, "config", "", "Configuration file that names the database")
			flags.StringVar(&o.adapter, "adapter", "", "Config adapter of that file, if its name does not tell")
			cmd.MarkFlagsMutuallyExclusive("db", "config")
			cmd.AddCommand(listCommand(&o), showCommand(&o), retryCommand(&o), dropCommand(&o), migrateCommand(&o), moveCommand(&o))
			for _, sub := range cmd.Commands() {
				sub.SilenceUsage = true
			}
		},
	})
}

func listCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list [--dead] [--json] [--db <file> | --config <file>]",
		Short: "Lists the events that are kept, the oldest first",
		Long: `
Lists the events that are kept, the oldest first: a line for each, or with --json
an object for each. An event that was delivered is not there any more.
`,
		Example: `  caddy inkit-queue list --dead`,
		Args:    cobra.NoArgs,
	}
	dead := cmd.Flags().Bool("dead", false, "Only the dead ones")
	asJSON := cmd.Flags().Bool("json", false, "One JSON object a line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		encoder := json.NewEncoder(os.Stdout)
		headed := *asJSON
		var filter store.Filter
		if *dead {
			filter.States = []string{store.Dead}
		}
		err := o.each(cmd.Context(), func(s store.Store) error {
			if !headed {
				headed = true
				fmt.Fprintln(table, "ID\tSTATE\tRECEIVED\tEVENT TYPE\tRESOURCE ID\tATTEMPTS\tNEXT ATTEMPT\tLAST ERROR")
			}
			return store.Each(cmd.Context(), s, filter, false, func(page []*store.Record) error {
				for _, r := range page {
					l := newListed(r)
					row := []string{l.ID, l.State, l.Received, l.EventType, l.ResourceID, fmt.Sprint(l.Attempts), l.NextAttempt, l.LastError}
					var err error
					if *asJSON {
						err = encoder.Encode(l)
					} else {
						_, err = fmt.Fprintln(table, request.Printable(strings.Join(row, "\t"), '\t'))
					}
					if err != nil {
						return err
					}
				}
				return nil
			})
		})
		return errors.Join(err, table.Flush())
	}
	return cmd
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
	NextAttempt string `json:"next_attempt,omitempty"` // of a pending one; while it is delivered, should that fail to end
	LastError   string `json:"last_error,omitempty"`
}

func newListed(r *store.Record) listed {
	l := listed{
		ID: r.ID, Queue: r.Queue, State: r.State, Received: r.Received.UTC().Format(time.RFC3339),
		EventType: r.EventType, ResourceID: r.ResourceID, Attempts: r.Attempts, LastError: r.LastError,
	}
	if r.State == store.Pending {
		l.NextAttempt = r.Due.UTC().Format(time.RFC3339)
	}
	return l
}

func showCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:   "show <id> [--db <file> | --config <file>]",
		Short: "Shows an event with its request",
		Long: `
Shows an event: its state, its last error, and the request with its header fields
and its body. What a replay would need, the signature and credentials, is left out,
and control characters are replaced.
`,
		Example: `  caddy inkit-queue show 019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return o.eachID(cmd.Context(), ids, func(_ store.Store, r *store.Record) error {
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
		Use:   "retry <id>... | --dead [--db <file> | --config <file>]",
		Short: "Has events attempted again at once",
		Long: `
Makes events pending and due, as if they had arrived just now: dead ones are
attempted for max_age again. A running Caddy sees it within a few seconds. One that
is being delivered is left alone.
`,
		Example: `  caddy inkit-queue retry --dead`,
	}
	dead := cmd.Flags().Bool("dead", false, "All dead events")
	cmd.Args = func(_ *cobra.Command, ids []string) error {
		if *dead == (len(ids) > 0) {
			return errors.New("takes either events by their ids, or --dead")
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if *dead {
			return o.each(cmd.Context(), func(s store.Store) error {
				n, err := s.Retry(cmd.Context(), store.Filter{States: []string{store.Dead}})
				if err == nil {
					fmt.Printf("%d dead events are pending\n", n)
				}
				return err
			})
		}
		return o.eachID(cmd.Context(), ids, func(s store.Store, r *store.Record) error {
			n, err := s.Retry(cmd.Context(), store.Filter{IDs: []string{r.ID}})
			switch {
			case err != nil:
				return err
			case n == 0:
				return fmt.Errorf("%s is being delivered", r.ID)
			}
			fmt.Println("pending", r.ID)
			return nil
		})
	}
	return cmd
}

func dropCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:   "drop <id>... [--db <file> | --config <file>]",
		Short: "Deletes events for good",
		Long: `
Deletes events, and prints what it has deleted. It does not ask, and nothing brings
them back. A delivery that is under way goes on.
`,
		Example: `  caddy inkit-queue drop 019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return o.eachID(cmd.Context(), ids, func(s store.Store, r *store.Record) error {
				n, err := s.Drop(cmd.Context(), store.Filter{IDs: []string{r.ID}})
				if n > 0 {
					fmt.Println("dropped", request.Printable(strings.TrimSpace(strings.Join([]string{r.ID, r.EventType, r.ResourceID}, " "))))
				}
				return err
			})
		},
	}
}

func migrateCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "migrate [--print] [--db <file> | --config <file>]",
		Short: "Makes the tables of a database",
		Long: `
Makes the tables of the database, which Caddy does too when it starts. With --print,
it shows the SQL for PostgreSQL, and connects to nothing: for a role that may make
tables, where that of Caddy may not.
`,
		Example: `  caddy inkit-queue migrate --print --config Caddyfile | psql -d inkit`,
		Args:    cobra.NoArgs,
	}
	show := cmd.Flags().Bool("print", false, "Show the SQL for PostgreSQL")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		openers, err := o.openers(cmd.Context())
		if err != nil {
			return err
		}
		shown := false
		for _, opener := range openers {
			if *show {
				migration := opener.Migration()
				shown = shown || migration != ""
				fmt.Print(migration)
				continue
			}
			s, err := opener.Open(cmd.Context(), store.Opening{Logger: caddy.Log(), Command: true})
			if err != nil {
				return fmt.Errorf("%s: %w", opener.Key(), err)
			}
			if err := s.Close(); err != nil {
				return err
			}
			fmt.Println("the tables are there:", request.Printable(opener.Key()))
		}
		if *show && !shown {
			return errors.New("no store of the configuration is in PostgreSQL")
		}
		return nil
	}
	return cmd
}

func moveCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "move [--from <file>] --config <file>",
		Short: "Moves events from SQLite into the database of a configuration",
		Long: `
Moves all events from a file of SQLite into the database that the configuration
names. An event is in the one or in the other, or for a moment in both: if the
command is cut short, run it again. One that is being delivered is left where it is.
The age of an event counts anew.
`,
		Example: `  caddy inkit-queue move --config Caddyfile`,
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().String("from", "", "File of SQLite (default: the default one)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.config == "" {
			return errors.New("--config is needed: it names the database to move to")
		}
		o.make = true
		openers, err := o.openers(cmd.Context())
		if err != nil {
			return err
		}
		if len(openers) > 1 {
			return errors.New("the configuration names several databases: it is not known which to move to")
		}
		return o.each(cmd.Context(), func(to store.Store) error {
			return (&origin{db: *file}).each(cmd.Context(), func(from store.Store) error {
				if sqlite.Same(from, to) { // to copy would do nothing, and to drop would delete all
					return errors.New("the configuration names the database that is to be moved from: change it first")
				}
				moved, left, err := move(cmd.Context(), from, to)
				fmt.Printf("%d events were moved\n", moved)
				if left > 0 {
					fmt.Printf("%d are being delivered, and were left: run this again when that has ended\n", left)
				}
				return err
			})
		})
	}
	return cmd
}

// move copies events a page at a time, and drops the page. It leaves those with an attempt
// under way.
func move(ctx context.Context, from, to store.Store) (moved, left int, err error) {
	err = store.Each(ctx, from, store.Filter{}, true, func(page []*store.Record) error {
		all := len(page)
		page = slices.DeleteFunc(page, func(r *store.Record) bool { return r.LeasedUntil.After(time.Now()) })
		left += all - len(page)
		if err := store.Copy(ctx, to, "move", page); err != nil || len(page) == 0 {
			return err
		}
		ids := make([]string, len(page))
		for i, r := range page {
			ids[i] = r.ID
		}
		_, err := from.Drop(ctx, store.Filter{IDs: ids})
		moved += len(page)
		return err
	})
	return moved, left, err
}
