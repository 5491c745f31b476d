package queue

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestListFilters(t *testing.T) {
	path := kept(t)
	for _, tt := range []struct{ name, args, want string }{
		{"no filter", "", "i1-due i2-later i3-dead i4-leased"},
		{"one state", "--state pending", "i1-due i2-later i4-leased"},
		{"two states", "--state dead --state delivered", "0-d1 i3-dead"},
		{"all events of a resource", "--state all --resource doc_2N0X2g4f3b1JJU75fqzDZs", "0-d1 i1-due i2-later i3-dead i4-leased"},
		{"another resource", "--state all --resource doc_2", ""},
		{"a type", "--type DOCUMENT_CREATE_FINISHED", "i1-due i2-later i3-dead i4-leased"},
		{"another type", "--type DOCUMENT", ""},
		{"an error", "--error 404", "i3-dead"},
		{"since", "--since 1h --state delivered", ""},
		{"until", "--until 1h --state delivered", "0-d1"},
		{"a limit", "--limit 2", "i1-due i2-later"},
		{"a limit of one", "--limit 1 --state all", "0-d1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := run(t, append([]string{"list", "--json", "--db", path}, strings.Fields(tt.args)...)...)
			require.NoError(t, err)
			var found []string
			for _, id := range regexp.MustCompile(`"id":"([^"]*)"`).FindAllStringSubmatch(got, -1) {
				found = append(found, id[1])
			}
			assert.Equal(t, tt.want, strings.Join(found, " "))
		})
	}
	got, err := run(t, "list", "--state", "delivered", "--json", "--db", path)
	require.NoError(t, err)
	const delivered = `{"id":"0-d1","queue":"default","state":"delivered","received":"2026-11-25T06:31:00Z","event_type":"DOCUMENT_CREATE_FINISHED",` +
		`"resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs","attempts":2,"finished":"2026-11-25T06:32:00Z","status":204}`
	assert.JSONEq(t, delivered, got)
	shown, err := run(t, "show", "0-d1", "--db", path)
	require.NoError(t, err)
	assert.JSONEq(t, delivered, shown)
}

func TestStatus(t *testing.T) {
	path := kept(t)
	got, err := run(t, "status", "--db", path)
	require.NoError(t, err)
	got = regexp.MustCompile(`for \d+ s`).ReplaceAllString(got, "for 0 s")
	assert.Regexp(t, `^default, in sqlite `+regexp.QuoteMeta(path)+` \(0\.\d MB\)\n$`, got[:strings.Index(got, "\n")+1])
	assert.Equal(t, []string{
		"  pending      3, the oldest for 0 s, the next attempt is due now",
		"  dead         1",
		"  delivered    0 in the last hour, 0 in the last day",
		"  duplicates   0",
		"  last errors  1 times status 404",
		"               1 times status 500: \uFFFD[31mno", "",
	}, strings.Split(got, "\n")[1:])
	got, err = run(t, "pause", "--db", path)
	require.NoError(t, err)
	assert.Equal(t, "default is paused\n", got)
	got, err = run(t, "status", "--db", path)
	require.NoError(t, err)
	assert.Regexp(t, `\n  paused       for \d+ s\n`, got)

	got, err = run(t, "status", "--json", "--db", path)
	require.NoError(t, err)
	var object map[string]any
	require.NoError(t, json.Unmarshal([]byte(got), &object))
	for _, changes := range []string{"size", "oldest_age_seconds", "next_attempt", "paused"} {
		assert.Contains(t, object, changes)
		delete(object, changes)
	}
	assert.Equal(t, map[string]any{
		"queue": "default", "database": "sqlite " + path, "pending": 3.0, "dead": 1.0, "delivered_hour": 0.0, "delivered_day": 0.0, "duplicates": 0.0,
		"errors": []any{map[string]any{"error": "status 404", "events": 1.0}, map[string]any{"error": "status 500: \x1b[31mno", "events": 1.0}},
	}, object)
}

func TestPauseAndResume(t *testing.T) {
	path := kept(t)
	config := filepath.Join(t.TempDir(), "Caddyfile")
	require.NoError(t, os.WriteFile(config, []byte(":8080 {\ninkit_queue {\nname orders\nstore sqlite "+path+"\ndeliver {\nreverse_proxy localhost:9000\n}\n}\n}\n"), 0o600))
	empty := filepath.Join(t.TempDir(), "queue.db")
	s, err := (&sqlite.SQLite{Path: empty}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	const none = "neither the database nor a configuration has this queue: check its name, or add --config"
	for _, step := range []struct{ name, args, want, message string }{
		{"resume a queue that is not paused", "resume default --db " + path, "default is no longer paused\n", ""},
		{"pause a queue", "pause default --db " + path, "default is paused\n", ""},
		{"pause the queue again", "pause default --db " + path, "default is paused\n", ""},
		{"pause all queues of the configuration and the database", "pause --config " + config, "default is paused\norders is paused\n", ""},
		{"pause an unknown queue", "pause other --config " + config, "", none},
		{"pause two queues", "pause default orders --db " + path, "", "accepts at most 1 arg(s), received 2"},
		{"pause in an empty database", "pause --db " + empty, "", none},
		{"resume all queues", "resume --db " + path, "default is no longer paused\norders is no longer paused\n", ""},
	} {
		got, err := run(t, strings.Fields(step.args)...)
		if step.message == "" {
			require.NoError(t, err, step.name)
		} else {
			require.EqualError(t, err, step.message, step.name)
		}
		assert.Equal(t, step.want, got, step.name)
	}
}

// Ctrl-C ends a command after a page of events. The other events stay as they are.
func TestInterruptedCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "queue.db")
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	b := &store.Batch{}
	for i := range 1000 {
		b.Add = append(b.Add, &store.Record{ID: fmt.Sprint(i), Queue: "default", Received: time.Now(), Request: []byte("x"), Checksum: []byte("x")})
	}
	require.NoError(t, s.Apply(t.Context(), b))
	ctx, cancel := context.WithCancel(t.Context())
	steps := 0
	cmd := &cobra.Command{SilenceErrors: true, SilenceUsage: true, RunE: interruptible(func(cmd *cobra.Command, _ []string) error {
		_, err := (&origin{db: path}).change(cmd, nil, store.Filter{}, func(s store.Store, ctx context.Context, f store.Filter) (int, error) {
			if steps++; steps == 3 {
				cancel()
			}
			return s.Drop(ctx, f)
		})
		return err
	})}
	cmd.SetArgs([]string{})
	require.EqualError(t, cmd.ExecuteContext(ctx), "interrupted: the other events are unchanged")
	assert.Equal(t, 3, steps)
	status, err := s.Status(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 1000-3*operator.Step, status.Queues[0].Pending)
}
