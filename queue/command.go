package queue

import (
	"context"
	"errors"
	"fmt"

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
		Short: "Lists, shows, retries, drops and moves the events of a queue, and pauses it",
		Long: `
Works on the database of inkit_queue, whether Caddy runs or not, and without its
admin endpoint. Run it as Caddy's user: no other user can read the SQLite file.

Without --db and --config, the database is inkit_queue.db in Caddy's data directory.
With --config, it works on all databases in the configuration.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Args = cobra.NoArgs // otherwise an unknown command prints the help, with status 0
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			var o origin
			flags := cmd.PersistentFlags()
			flags.StringVar(&o.db, "db", "", "File of SQLite")
			flags.StringVar(&o.config, "config", "", "Configuration file that names the database")
			flags.StringVar(&o.adapter, "adapter", "", "Config adapter of that file, if its name does not tell")
			cmd.MarkFlagsMutuallyExclusive("db", "config")
			cmd.AddCommand(listCommand(&o), showCommand(&o), retryCommand(&o), dropCommand(&o),
				statusCommand(&o), pauseCommand(&o), resumeCommand(&o), migrateCommand(&o), moveCommand(&o))
			for _, sub := range cmd.Commands() {
				sub.SilenceUsage = true
			}
		},
	})
}

func migrateCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "migrate [--print] [--db <file> | --config <file>]",
		Short: "Makes the tables of a database",
		Long: `
Makes the tables of the database. Caddy does this too when it starts. With --print,
it only prints the SQL for PostgreSQL: run that with another role if Caddy's role
may not make tables.
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
Moves all events from an SQLite file into the database of the configuration. If the
command is interrupted, run it again: no event is lost. Events that are being
delivered stay in the file. The history, the keys of once, and a pause are copied.
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
			return errors.New("the configuration names several databases: move needs a configuration with one")
		}
		return o.each(cmd.Context(), func(to store.Store) error {
			return (&origin{db: *file}).each(cmd.Context(), func(from store.Store) error {
				if sqlite.Same(from, to) { // copying would do nothing, and dropping would delete all
					return errors.New("the configuration names the same database as --from: change the configuration first")
				}
				ctx, stop := interruptible(cmd.Context())
				defer stop()
				moved, left, err := move(ctx, from, to)
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

// move copies a page, and drops its events. It leaves events with a running attempt. An
// interruption takes effect between two pages.
func move(ctx context.Context, from, to store.Store) (moved, left int, err error) {
	var p progress
	defer p.end()
	err = store.Copy(ctx, to, from, true, func(ids []string) error {
		_, err := from.Drop(context.WithoutCancel(ctx), store.Filter{IDs: ids})
		moved += len(ids)
		p.show("%d events are moved", moved)
		return err
	})
	if err != nil {
		return moved, 0, interrupted(ctx, err)
	}
	counts, err := from.Counts(ctx)
	for _, c := range counts {
		left += c.Events
	}
	return moved, left, err
}
