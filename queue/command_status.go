package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

func statusCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--json] [--db <file> | --config <file>]",
		Short: "Shows the state of each queue",
		Long: `
Shows the state of each queue. The numbers of delivered events come from the history.
With more than 20,000 events, the errors are those of the oldest and newest 10,000.
`,
		Example: `  caddy inkit-queue status --config /etc/caddy/Caddyfile`,
		Args:    cobra.NoArgs,
	}
	asJSON := cmd.Flags().Bool("json", false, "Print one JSON object per line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return o.eachQueue(cmd.Context(), func(d *target, q store.QueueStatus, size int64) error {
			if *asJSON {
				return encodeStatus(q, d.opener.Key(), size)
			}
			printStatus(q, d.opener.Key(), size)
			return nil
		})
	}
	return cmd
}

// eachQueue calls f for each queue, with its status and the size of its database.
func (o *origin) eachQueue(ctx context.Context, f func(d *target, q store.QueueStatus, size int64) error) error {
	return o.each(ctx, func(d *target) error {
		status, err := d.Status(ctx, d.queues...)
		if err != nil {
			return err
		}
		for _, q := range status.Queues {
			if err := f(d, q, status.Size); err != nil {
				return err
			}
		}
		return nil
	})
}

func encodeStatus(q store.QueueStatus, database string, size int64) error {
	status := map[string]any{
		"queue": q.Queue, "database": database, "size": size, "pending": q.Pending, "dead": q.Dead, "oldest_age_seconds": int(q.Oldest.Seconds()),
		"delivered_hour": q.Delivered[23], "delivered_day": q.Delivered.Sum(), "duplicates": q.Duplicates, "errors": append([]store.ErrorCount{}, q.Errors...),
	}
	if q.Pending > 0 {
		status["next_attempt"] = seconds(time.Now().Add(q.Next))
	}
	if !q.Paused.IsZero() {
		status["paused"] = seconds(q.Paused)
	}
	return json.NewEncoder(os.Stdout).Encode(status)
}

func printStatus(q store.QueueStatus, database string, size int64) {
	line := func(name, format string, args ...any) {
		fmt.Printf("  %-11s  %s\n", name, request.Printable(fmt.Sprintf(format, args...)))
	}
	fmt.Printf("%s, in %s (%.1f MB)\n", request.Printable(q.Queue), request.Printable(database), float64(size)/1e6)
	if !q.Paused.IsZero() {
		line("paused", "for %s", operator.Age(time.Since(q.Paused)))
	}
	if q.Pending > 0 {
		line("pending", "%d, the oldest for %s, the next attempt is due %s", q.Pending, operator.Age(q.Oldest), operator.Until(q.Next))
	} else {
		line("pending", "0")
	}
	line("dead", "%d", q.Dead)
	line("delivered", "%d in the last hour, %d in the last day", q.Delivered[23], q.Delivered.Sum())
	line("duplicates", "%d", q.Duplicates)
	name := "last errors"
	for _, e := range q.Errors {
		line(name, "%d times %s", e.Events, e.Error)
		name = ""
	}
}

func pauseCommand(o *origin) *cobra.Command {
	return pausing(o, true, "is paused", &cobra.Command{
		Use:   "pause [<queue>] [--db <file> | --config <file>]",
		Short: "Pauses a queue: events are stored, without attempts",
		Long: `
Pauses a queue, or all queues: events are stored and answered 200, without attempts.
Running attempts go on. All Caddys on the database pause within two seconds. Caddys
that start later are paused too, until you run resume.
`,
		Example: `  caddy inkit-queue pause`,
	})
}

func resumeCommand(o *origin) *cobra.Command {
	return pausing(o, false, "is no longer paused", &cobra.Command{
		Use:     "resume [<queue>] [--db <file> | --config <file>]",
		Short:   "Ends the pause of a queue, or of all queues",
		Example: `  caddy inkit-queue resume`,
	})
}

func pausing(o *origin, paused bool, done string, cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.MaximumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, wanted []string) error {
		found := false
		err := o.eachQueue(cmd.Context(), func(d *target, q store.QueueStatus, _ int64) error {
			if len(wanted) > 0 && wanted[0] != q.Queue {
				return nil
			}
			_, err := d.Pause(cmd.Context(), q.Queue, paused)
			if found = true; err == nil {
				fmt.Println(request.Printable(q.Queue), done)
			}
			return err
		})
		if err == nil && !found {
			err = errors.New("neither the database nor a configuration has this queue: check its name, or add --config")
		}
		return err
	}
	return cmd
}
