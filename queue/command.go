package queue

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

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

// origin has the options that select the databases of a command.
type origin struct {
	db, config, adapter string
	create              bool // whether to create a missing database; if false, a missing database is an error
}

// target is a database that a command works on.
type target struct {
	store.Store // nil unless the database is open
	opener      store.Opener
	queues      []string // the queues in the configuration
}

// targets returns the databases that the options select, and each database only once.
func (o *origin) targets(ctx context.Context) (found []*target, err error) {
	caddyCtx, _ := caddy.NewContext(caddy.Context{Context: ctx}) // never cancelled: a command ends soon
	configs := []json.RawMessage{json.RawMessage(`{}`)}
	switch {
	case o.db != "":
		configs[0], _ = json.Marshal(map[string]any{"store": map[string]string{"module": "sqlite", "path": o.db}})
	case o.config != "":
		config, _, _, err := caddycmd.LoadConfig(o.config, o.adapter)
		if err != nil {
			return nil, err
		}
		configs = queueConfigs(config)
	}
	for _, config := range configs {
		h := new(Handler)
		if err := json.Unmarshal(config, h); err != nil {
			return nil, err
		}
		opener, err := h.loadStore(caddyCtx)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(found, func(d *target) bool { return d.opener.Key() == opener.Key() })
		if i < 0 {
			i, found = len(found), append(found, &target{opener: opener})
		}
		if o.config != "" {
			found[i].queues = append(found[i].queues, cmp.Or(h.Name, defaultName))
		}
	}
	if len(found) == 0 {
		return nil, errors.New("there is no inkit_queue in the configuration")
	}
	return found, nil
}

// queueConfigs returns the JSON of all handlers of this module in a configuration.
func queueConfigs(config json.RawMessage) (found []json.RawMessage) {
	var object map[string]json.RawMessage
	var list []json.RawMessage
	if json.Unmarshal(config, &list) != nil {
		_ = json.Unmarshal(config, &object)
	}
	if string(object["handler"]) == `"inkit_queue"` {
		found = append(found, config)
	}
	for _, value := range list {
		found = append(found, queueConfigs(value)...)
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		found = append(found, queueConfigs(object[key])...)
	}
	return found
}

// The method "each" opens one database after the other. It calls f with the open database, and
// closes the database before it opens another. After an error, it opens no other database.
func (o *origin) each(ctx context.Context, f func(*target) error) error {
	targets, err := o.targets(ctx)
	for _, d := range targets {
		d.Store, err = d.opener.Open(ctx, store.Opening{Logger: caddy.Log(), Command: true, Existing: !o.create})
		if err != nil {
			return fmt.Errorf("%s: %w", d.opener.Key(), err)
		}
		if err = errors.Join(f(d), d.Close()); err != nil {
			return err
		}
	}
	return err
}

func migrateCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:     "migrate --config <file>",
		Short:   "Prints the SQL that creates the tables in PostgreSQL, if Caddy's role may not do this",
		Example: `  caddy inkit-queue migrate --config Caddyfile | psql -d inkit`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			targets, err := o.targets(cmd.Context())
			printed := 0
			for _, d := range targets {
				n, _ := fmt.Print(d.opener.Migration())
				printed += n
			}
			if err == nil && printed == 0 {
				err = errors.New("no queue in the configuration uses PostgreSQL")
			}
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
				if sqlite.Same(from.Store, to.Store) { // copying would change nothing, and dropping would delete all events
					return errors.New("this is the database of --from: name another one with --config or --db")
				}
				return move(cmd.Context(), from, to)
			})
		})
	}
	return cmd
}

// move copies one page of events at a time, and then drops this page from the source. Events
// with a running attempt stay in the source. An interruption takes effect between two pages.
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
