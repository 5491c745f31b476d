package queue

import (
	"context"
	"errors"
	"fmt"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "inkit-queue",
		Short: "Lists, shows, retries, drops and moves the events of a queue, and pauses it",
		Long: `
Works on the database of inkit_queue, whether Caddy runs or not. It does not use the
admin endpoint. Run it as Caddy's user: no other user can read the SQLite file.

Without --db and --config, the database is inkit_queue.db in Caddy's data directory.
With --config, the command works on all databases in the configuration.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Args = cobra.NoArgs // otherwise an unknown command prints the help, with status 0
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			var o origin
			flags := cmd.PersistentFlags()
			flags.StringVar(&o.db, "db", "", "SQLite file")
			flags.StringVar(&o.config, "config", "", "Configuration file that names the database")
			flags.StringVar(&o.adapter, "adapter", "", "Config adapter of that file, if the file name does not show it")
			cmd.MarkFlagsMutuallyExclusive("db", "config")
			cmd.AddCommand(listCommand(&o), showCommand(&o), retryCommand(&o), dropCommand(&o), statusCommand(&o),
				pauseCommand(&o), resumeCommand(&o), migrateCommand(&o), moveCommand(&o))
			for _, sub := range cmd.Commands() {
				sub.SilenceUsage = true
				sub.RunE = interruptible(sub.RunE)
			}
		},
	})
}

func migrateCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:     "migrate --config <file>",
		Short:   "Prints the SQL that creates the tables in PostgreSQL, if Caddy's role may not do this",
		Example: `  caddy inkit-queue migrate --config Caddyfile | psql -d inkit`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			targets, err := o.targets(cmd.Context())
			sql := ""
			for _, d := range targets {
				sql += d.opener.Migration()
			}
			if err == nil && sql == "" {
				err = errors.New("no queue of the configuration is in PostgreSQL")
			}
			fmt.Print(sql)
			return err
		},
	}
}

func moveCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "move [--from <file>] --config <file> | --db <file>",
		Short: "Moves events from SQLite into the database of a configuration",
		Long: `
Moves all events from an SQLite file into another database. If the command is
interrupted, run it again: no event is lost. Events that are being delivered stay in
the file. The history, the keys of once, and a pause are copied.
`,
		Example: `  caddy inkit-queue move --config Caddyfile`,
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().String("from", "", "SQLite file (default: the one in Caddy's data directory)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		targets, err := o.targets(cmd.Context())
		if err != nil {
			return err
		}
		if len(targets) > 1 {
			return errors.New("the configuration names several databases: move needs a configuration with one")
		}
		o.create = true
		return (&origin{db: *file}).each(cmd.Context(), func(from *target) error {
			return o.each(cmd.Context(), func(to *target) error {
				if sqlite.Same(from.Store, to.Store) { // the copy would change nothing, and the drop would delete all events
					return errors.New("this is the database of --from: name another one with --config or --db")
				}
				return move(cmd.Context(), from, to)
			})
		})
	}
	return cmd
}

// move copies one page of events at a time, and then drops this page from the source.
// Events with a running attempt stay. An interruption takes effect between two pages.
func move(ctx context.Context, from, to store.Store) error {
	moved := 0
	err := store.Copy(ctx, to, from, true, func(ids []string) error {
		_, err := from.Drop(context.WithoutCancel(ctx), store.Filter{IDs: ids})
		moved += len(ids)
		return err
	})
	fmt.Printf("events moved: %d\n", moved)
	if err != nil {
		return err
	}
	left, err := from.Counts(ctx)
	for _, c := range left {
		fmt.Printf("events left, because Caddy is delivering them: %d (run this again later)\n", c.Events)
	}
	return err
}
