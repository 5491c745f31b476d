package queue

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/spf13/cobra"
)

// errEnough ends a search that has found as many events as the command `list` should print.
var errEnough = errors.New("enough events")

func listCommand(o *origin) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list " + filterUsage + " [--limit <number>] [--json] [--db <file> | --config <file>]",
		Short:   "Lists the stored events, oldest first. With --state delivered, lists the history",
		Example: `  caddy inkit-queue list --state all --resource doc_1`,
		Args:    cobra.NoArgs,
	}
	filter := newFilter(cmd)
	left := cmd.Flags().Int("limit", 0, "Maximum number of events, 0 for all")
	asJSON := cmd.Flags().Bool("json", false, "Print one JSON object per line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		err := o.each(cmd.Context(), func(d *target) error {
			table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			write := func(r *store.Record) error { return json.NewEncoder(os.Stdout).Encode(newListed(r)) }
			if !*asJSON {
				fmt.Fprintln(table, "ID\tSTATE\tAGE\tEVENT TYPE\tRESOURCE ID\tATTEMPTS\tNEXT ATTEMPT\tLAST ERROR")
				write = func(r *store.Record) error { return printRow(table, r) }
			}
			filter.Limit = *left
			err := store.Each(cmd.Context(), d, *filter, func(page []*store.Record) error {
				for _, r := range page {
					if err := write(r); err != nil {
						return err
					}
					if *left--; *left == 0 {
						return errEnough
					}
				}
				return nil
			})
			return errors.Join(err, table.Flush())
		})
		if errors.Is(err, errEnough) {
			return nil
		}
		return err
	}
	return cmd
}

func printRow(table io.Writer, r *store.Record) error {
	next := ""
	if r.State == store.Pending {
		next = operator.Until(time.Until(r.Due))
	}
	row := fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s",
		r.ID, r.State, operator.Age(time.Since(r.Received)), r.EventType, r.ResourceID, r.Attempts, next, r.LastError)
	_, err := fmt.Fprintln(table, request.Printable(row, '\t'))
	return err
}

// listed is the JSON of an event in the output of the commands list and show.
type listed struct {
	ID          string    `json:"id"`
	Queue       string    `json:"queue"`
	State       string    `json:"state"`
	Received    time.Time `json:"received"`
	EventType   string    `json:"event_type"`
	ResourceID  string    `json:"resource_id"`
	Attempts    int       `json:"attempts"`
	NextAttempt time.Time `json:"next_attempt,omitzero"` // of a pending event; during an attempt, the end of the lease
	LastError   string    `json:"last_error,omitempty"`
	Finished    time.Time `json:"finished,omitzero"` // of a delivered event
	Status      int       `json:"status,omitempty"`  // of a delivered event

	Request *request.Request `json:"request,omitempty"` // only the command `show` prints it
}

func newListed(r *store.Record) listed {
	l := listed{
		ID: r.ID, Queue: r.Queue, State: r.State, Received: seconds(r.Received), EventType: r.EventType, ResourceID: r.ResourceID,
		Attempts: r.Attempts, LastError: r.LastError, Finished: seconds(r.Finished), Status: r.Status,
	}
	if r.State == store.Pending {
		l.NextAttempt = seconds(r.Due)
	}
	return l
}

func showCommand(o *origin) *cobra.Command {
	return &cobra.Command{
		Use:   "show <id> [--db <file> | --config <file>]",
		Short: "Shows an event with its request",
		Long: `
Shows an event: its state, its last error, and the request with its header fields
and its body. It hides the signature and credentials, because they allow a replay, and
replaces control characters. A delivered event has no request.
`,
		Example: `  caddy inkit-queue show 019ac5b2-7c7e-7cc8-a1d6-1a9c6f0d8f52`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			return o.eachID(cmd, ids, func(s store.Store, one store.Filter) (int, error) {
				page, err := s.Search(cmd.Context(), one, true)
				if err != nil || len(page.Records) == 0 {
					return 0, err
				}
				return 1, show(page.Records[0])
			})
		},
	}
}

func show(r *store.Record) error {
	shown := newListed(r)
	body := ""
	if r.State != store.History {
		stored, err := request.Decode(r)
		if err != nil {
			return fmt.Errorf("%s: %w", r.ID, err)
		}
		stored.Redact()
		shown.Request = stored
		body = "\n" + strings.TrimSuffix(request.Printable(string(stored.Body), '\n', '\t'), "\n") + "\n"
	}
	head, err := json.MarshalIndent(shown, "", "  ")
	fmt.Printf("%s\n%s", request.Printable(string(head), '\n'), body)
	return err
}

// seconds returns a time for JSON, in UTC and without fractions of a second.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
