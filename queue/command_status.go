package queue

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

// shownStatus is a queue as the command status shows it.
type shownStatus struct {
	Queue         string             `json:"queue"`
	Database      string             `json:"database"`
	Size          int64              `json:"size"` // of the database, in bytes
	Pending       int                `json:"pending"`
	Dead          int                `json:"dead"`
	OldestSeconds int                `json:"oldest_age_seconds"`
	NextAttempt   string             `json:"next_attempt,omitempty"`
	Paused        string             `json:"paused,omitempty"` // since when
	DeliveredHour int                `json:"delivered_hour"`
	DeliveredDay  int                `json:"delivered_day"`
	Duplicates    int                `json:"duplicates"`
	Errors        []store.ErrorCount `json:"errors"`
}

func statusCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--json] [--db <file> | --config <file>]",
		Short: "Shows how each queue is",
		Long: `
Shows for each queue how many events are pending and dead, when the next attempt is
due, whether the queue is paused, how many events were delivered, by the history,
and the most frequent last errors. With more than 20,000 events, the errors are
those of the oldest 10,000 and the newest 10,000.
`,
		Example: `  caddy inkit-queue status --config /etc/caddy/Caddyfile`,
		Args:    cobra.NoArgs,
	}
	asJSON := cmd.Flags().Bool("json", false, "One JSON object a line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return o.each(cmd.Context(), func(s store.Store) error {
			found, err := s.Status(cmd.Context(), o.names[o.key]...)
			if err != nil {
				return err
			}
			for _, q := range found.Queues {
				if *asJSON {
					err = json.NewEncoder(os.Stdout).Encode(newStatus(q, o.key, found.Size))
				} else {
					err = printStatus(q, o.key, found.Size)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	return cmd
}

func newStatus(q store.QueueStatus, database string, size int64) shownStatus {
	s := shownStatus{
		Queue: q.Queue, Database: database, Size: size, Pending: q.Pending, Dead: q.Dead, OldestSeconds: int(q.Oldest.Seconds()),
		DeliveredHour: q.LastHour, DeliveredDay: q.LastDay, Duplicates: q.Duplicates, Errors: slices.Concat([]store.ErrorCount{}, q.Errors),
	}
	if q.Pending > 0 {
		s.NextAttempt = time.Now().Add(q.Next).UTC().Format(time.RFC3339)
	}
	if !q.Paused.IsZero() {
		s.Paused = q.Paused.UTC().Format(time.RFC3339)
	}
	return s
}

func printStatus(q store.QueueStatus, database string, size int64) error {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(table, "  %s\t%s\n", name, request.Printable(fmt.Sprintf(format, args...)))
	}
	fmt.Fprintf(table, "%s, in %s (%.1f MB)\n", request.Printable(q.Queue), request.Printable(database), float64(size)/1e6)
	if !q.Paused.IsZero() {
		line("paused", "for %s", words(time.Since(q.Paused)))
	}
	if q.Pending > 0 {
		next := "due now"
		if q.Next > 0 {
			next = "due in " + words(q.Next)
		}
		line("pending", "%d, the oldest for %s, the next attempt is %s", q.Pending, words(q.Oldest), next)
	} else {
		line("pending", "0")
	}
	line("dead", "%d", q.Dead)
	line("delivered", "%d in the last hour, %d in the last day", q.LastHour, q.LastDay)
	line("duplicates", "%d", q.Duplicates)
	name := "last errors"
	for _, e := range q.Errors {
		line(name, "%d times %s", e.Events, e.Error)
		name = ""
	}
	return table.Flush()
}

func pauseCommand(o *origin) *cobra.Command {
	return pausing(o, true, &cobra.Command{
		Use:   "pause [<queue>] [--db <file> | --config <file>]",
		Short: "Pauses a queue: events are stored, without attempts",
		Long: `
Pauses a queue, or all queues: events are stored and answered 200, without attempts.
Running attempts go on. All Caddys on the database pause within two seconds, and so
do Caddys that start later, until you run resume.
`,
		Example: `  caddy inkit-queue pause`,
	})
}

func resumeCommand(o *origin) *cobra.Command {
	return pausing(o, false, &cobra.Command{
		Use:     "resume [<queue>] [--db <file> | --config <file>]",
		Short:   "Ends a pause",
		Long:    "\nEnds the pause of a queue, or of all of them. Events are attempted within two seconds.\n",
		Example: `  caddy inkit-queue resume`,
	})
}

func pausing(o *origin, paused bool, cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.MaximumNArgs(1)
	done, already := "paused", "paused already"
	if !paused {
		done, already = "no longer paused", "not paused"
	}
	cmd.RunE = func(cmd *cobra.Command, wanted []string) error {
		found := 0
		err := o.each(cmd.Context(), func(s store.Store) error {
			known, err := s.Status(cmd.Context(), o.names[o.key]...)
			if err != nil {
				return err
			}
			for _, q := range known.Queues {
				if len(wanted) == 1 && wanted[0] != q.Queue {
					continue
				}
				found++
				changed, err := s.Pause(cmd.Context(), q.Queue, paused)
				if err != nil {
					return err
				}
				say := already
				if changed {
					say = done
				}
				fmt.Println(request.Printable(q.Queue), "is", say)
			}
			return nil
		})
		switch {
		case err != nil || found > 0:
			return err
		case len(wanted) == 1:
			return fmt.Errorf("there is no queue %s: name its configuration with --config", request.Printable(wanted[0]))
		}
		return errors.New("there is no queue in the database yet: name its configuration with --config")
	}
	return cmd
}
