package queue

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	printed, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	require.NoError(t, err)
	defer printed.Close()
	stdout := os.Stdout
	os.Stdout = printed
	defer func() { os.Stdout = stdout }()
	cmd := &cobra.Command{Use: "inkit-queue", SilenceErrors: true}
	caddycmd.Commands()["inkit-queue"].CobraFunc(cmd)
	cmd.SetArgs(args)
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	runErr := cmd.ExecuteContext(t.Context())
	text, err := os.ReadFile(printed.Name())
	require.NoError(t, err)
	return string(text), runErr
}

// The function "kept" creates a database with four events: due, due later, dead, in an attempt.
func kept(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "queue.db")
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	b := &store.Batch{Owner: "another process"}
	for i, id := range []string{"i1-due", "i2-later", "i3-dead", "i4-leased"} {
		r, e := arrived(t, "http://example.com/webhook", body, func(r *http.Request) {
			r.Header = http.Header{
				"Inkit-Signature": {"s1gnature"}, "Authorization": {"cr3dential"}, "Proxy-Authorization": {"cr3dential"}, "Cookie": {"cr3dential"},
				"Content-Type": {"application/json"},
			}
		})
		a := &addition{request: newRequest(r, e), rec: &store.Record{
			ID: id, Queue: "default", Received: time.Date(2026, 11, 25, 6, 30, i, 0, time.UTC), EventType: e.Type(), ResourceID: e.ResourceID(),
		}}
		require.NoError(t, a.seal())
		switch id {
		case "i2-later":
			a.rec.Attempts, a.rec.LastError = 3, "status 500: \x1b[31mno"
		case "i3-dead", "i4-leased":
			a.rec.Attempts, a.rec.Lease = 1, time.Hour
		}
		b.Add = append(b.Add, a.rec)
	}
	b.Finish = []store.Finish{
		{ID: "i2-later", Queue: "default", Outcome: store.Later, After: time.Hour},
		{ID: "i3-dead", Queue: "default", Outcome: store.SetAside, LastError: "status 404"},
	}
	b.History = []*store.Record{{
		ID: "0-d1", Queue: "default", Received: time.Date(2026, 11, 25, 6, 31, 0, 0, time.UTC), Finished: time.Date(2026, 11, 25, 6, 32, 0, 0, time.UTC),
		EventType: "DOCUMENT_CREATE_FINISHED", ResourceID: "doc_2N0X2g4f3b1JJU75fqzDZs", Attempts: 2, Status: 204,
	}}
	b.Copied = store.Rows{Table: "once", Rows: [][]any{{"default", []byte("digest"), "0-key", time.Now().Add(time.Hour).UnixMilli(), 0}}}
	require.NoError(t, s.Apply(t.Context(), b))
	require.NoError(t, s.Close())
	return path
}

func states(t *testing.T, path string) map[string]string {
	t.Helper()
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	all := make(map[string]string)
	storetest.Select(t, s, store.Filter{}, func(r *store.Record) {
		all[r.ID] = r.State
	})
	return all
}

// The function "due" returns the time at which each event is due, formatted as in the commands.
func due(t *testing.T, path string) map[string]string {
	t.Helper()
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	defer s.Close()
	all := make(map[string]string)
	storetest.Select(t, s, store.Filter{}, func(r *store.Record) {
		all[r.ID] = r.Due.UTC().Format(time.RFC3339)
	})
	return all
}

func TestList(t *testing.T) {
	path := kept(t)
	at := due(t, path)
	const event = "DOCUMENT_CREATE_FINISHED  doc_2N0X2g4f3b1JJU75fqzDZs"
	table := []string{
		"ID         STATE    AGE     EVENT TYPE                RESOURCE ID                 ATTEMPTS  NEXT ATTEMPT  LAST ERROR",
		"i1-due     pending  3 days  " + event + "  0         now           ",
		"i2-later   pending  3 days  " + event + "  3         in 59 min     status 500: \uFFFD[31mno",
		"i3-dead    dead     3 days  " + event + "  1                       status 404",
		"i4-leased  pending  3 days  " + event + "  1         in 59 min     ",
	}
	object := func(id, state, received string, attempts int, more string) string {
		return fmt.Sprintf(`{"id":"%s","queue":"default","state":"%s","received":"2026-11-25T06:30:%sZ","event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs","attempts":%d%s}`,
			id, state, received, attempts, more)
	}
	next := func(id string) string { return `,"next_attempt":"` + at[id] + `"` }
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"all events", nil, table},
		{"dead events", []string{"--state", "dead"}, []string{
			"ID       STATE  AGE     EVENT TYPE                RESOURCE ID                 ATTEMPTS  NEXT ATTEMPT  LAST ERROR",
			"i3-dead  dead   3 days  " + event + "  1                       status 404",
		}},
		{"as JSON", []string{"--json"}, []string{
			object("i1-due", "pending", "00", 0, next("i1-due")),
			object("i2-later", "pending", "01", 3, next("i2-later")+`,"last_error":"status 500: \u001b[31mno"`),
			object("i3-dead", "dead", "02", 1, `,"last_error":"status 404"`),
			object("i4-leased", "pending", "03", 1, next("i4-leased")),
		}},
		{"dead events as JSON", []string{"--state", "dead", "--json"}, []string{object("i3-dead", "dead", "02", 1, `,"last_error":"status 404"`)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := run(t, append([]string{"list", "--db", path}, tt.args...)...)
			require.NoError(t, err)
			got = regexp.MustCompile(`\b\d+ days  DOC`).ReplaceAllString(got, "3 days  DOC") // the age depends on the date of the test run
			assert.Equal(t, strings.Join(tt.want, "\n")+"\n", got)
		})
	}
}

func TestListOfNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "queue.db")
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	got, err := run(t, "list", "--db", path)
	require.NoError(t, err)
	assert.Equal(t, "ID  STATE  AGE  EVENT TYPE  RESOURCE ID  ATTEMPTS  NEXT ATTEMPT  LAST ERROR\n", got)
	got, err = run(t, "list", "--json", "--db", path)
	require.NoError(t, err)
	assert.Empty(t, got)
}

func TestShow(t *testing.T) {
	path := kept(t)
	got, err := run(t, "show", "i3-dead", "--db", path)
	require.NoError(t, err)
	shown, shownBody, found := strings.Cut(got, "\n\n")
	require.True(t, found)
	assert.Equal(t, []string{body, ""}, strings.Split(shownBody, "\n"))
	var object map[string]any
	require.NoError(t, json.Unmarshal([]byte(shown), &object))
	request := object["request"].(map[string]any)
	delete(object, "request")
	assert.Equal(t, map[string]any{
		"id": "i3-dead", "queue": "default", "state": "dead", "received": "2026-11-25T06:30:02Z", "event_type": "DOCUMENT_CREATE_FINISHED",
		"resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs", "attempts": 1.0, "last_error": "status 404",
	}, object)
	assert.Equal(t, map[string]any{
		"Inkit-Signature": []any{"REDACTED"}, "Authorization": []any{"REDACTED"}, "Proxy-Authorization": []any{"REDACTED"}, "Cookie": []any{"REDACTED"},
		"Content-Type": []any{"application/json"},
	}, request["header"])
	assert.NotContains(t, got, "s1gnature")
	assert.NotContains(t, got, "cr3dential")
}

func TestRetryAndDrop(t *testing.T) {
	all := map[string]string{"i1-due": "pending", "i2-later": "pending", "i3-dead": "dead", "i4-leased": "pending"}
	with := func(changes map[string]string) map[string]string {
		states := maps.Clone(all)
		for id, state := range changes {
			if states[id] = state; state == "" {
				delete(states, id)
			}
		}
		return states
	}
	for _, tt := range []struct {
		name, args, printed, message string
		states                       map[string]string
	}{
		{"retry a dead event", "retry i3-dead", "events due: 1\n", "", with(map[string]string{"i3-dead": "pending"})},
		{"retry all dead events", "retry --state dead", "events due: 1\n", "", with(map[string]string{"i3-dead": "pending"})},
		{"retry a pending event", "retry i2-later", "events due: 1\n", "", all},
		{"retry an event that is being delivered", "retry i4-leased", "events due: 0\n", "not changed, because unknown, delivered or being delivered: i4-leased", all},
		{"retry a known and an unknown event", "retry none i3-dead", "events due: 1\n", "not changed, because unknown, delivered or being delivered: none", with(map[string]string{"i3-dead": "pending"})},
		{"retry without ids and filter", "retry", "", "needs either the ids of events, or a filter such as --state dead", all},
		{"retry with ids and a filter", "retry i3-dead --state dead", "", "needs either the ids of events, or a filter such as --state dead", all},
		{"drop an event", "drop i1-due", "events dropped: 1\n", "", with(map[string]string{"i1-due": ""})},
		{"drop two events", "drop i3-dead i1-due", "events dropped: 2\n", "", with(map[string]string{"i1-due": "", "i3-dead": ""})},
		{"drop an unknown event", "drop none", "events dropped: 0\n", "there is no event to drop: none", all},
		{"drop a known and two unknown events", "drop none i1-due other", "events dropped: 1\n", "there is no event to drop: none, other", with(map[string]string{"i1-due": ""})},
		{"drop without ids and filter", "drop", "", "needs either the ids of events, or a filter such as --state dead", all},
		{"retry by a filter", "retry --error 500:", "events due: 1\n", "", all},
		{
			"retry by a filter that also selects an event in delivery", "retry --state pending --type DOCUMENT_CREATE_FINISHED",
			"events due: 2\n", "", all,
		},
		{"retry by a filter that selects nothing", "retry --resource none", "events due: 0\n", "", all},
		{"drop by an empty filter", "drop --state pending --resource= --yes", "", `invalid argument "" for "--resource" flag: must not be empty`, all},
		{"retry a delivered event", "retry 0-d1", "events due: 0\n", "not changed, because unknown, delivered or being delivered: 0-d1", all},
		{"drop by a filter, without --yes", "drop --state dead", "", "would drop 1 events: add --yes to drop them", all},
		{"drop by a filter", "drop --state dead --yes", "events dropped: 1\n", "", with(map[string]string{"i3-dead": ""})},
		{"drop by a filter that selects nothing", "drop --type none --yes", "events dropped: 0\n", "", all},
		{"drop by time", "drop --until 1h --state delivered --yes", "events dropped: 1\n", "", all},
		{"drop by a time that selects nothing", "drop --until 100h --yes", "events dropped: 0\n", "", all},
		{"drop a delivered event", "drop 0-d1", "events dropped: 1\n", "", all},
		{"drop a delivered event without a history row", "drop 0-key", "events dropped: 1\n", "", all},
		{"retry a delivered event without a history row", "retry 0-key", "events due: 0\n", "not changed, because unknown, delivered or being delivered: 0-key", all},
		{"drop by ids and a filter", "drop i1-due --type none --yes", "", "needs either the ids of events, or a filter such as --state dead", all},
		{"an unknown state", "drop --state lost --yes", "", `invalid argument "lost" for "--state" flag: must be pending, dead, delivered or all`, all},
		{"an invalid time", "retry --since yesterday", "", `invalid argument "yesterday" for "--since" flag: must be a duration before now, such as 2h or 3d, or a date in UTC, such as 2026-11-28 09:30`, all},
		{"a time in the future", "list --until -2h", "", `invalid argument "-2h" for "--until" flag: must be a duration before now, such as 2h or 3d, or a date in UTC, such as 2026-11-28 09:30`, all},
		{"show an unknown event", "show none", "", "there is no event to show: none", all},
		{"show an id with an escape sequence of a terminal", "show \x1b[2J", "", "there is no event to show: \uFFFD[2J", all},
		{"an unknown command", "remove i1-due", "", `unknown command "remove" for "inkit-queue"`, all},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := kept(t)
			got, err := run(t, append(strings.Fields(tt.args), "--db", path)...)
			if tt.message == "" {
				require.NoError(t, err)
			} else {
				require.EqualError(t, err, tt.message)
			}
			assert.Equal(t, tt.printed, got)
			assert.Equal(t, tt.states, states(t, path))
		})
	}
}

// The command "drop" takes more ids than one SQL statement can have.
func TestManyIDs(t *testing.T) {
	path := kept(t)
	args := []string{"drop", "i1-due", "--db", path}
	for i := range 2 * store.MaxPage {
		args = append(args, fmt.Sprint("none-", i))
	}
	got, err := run(t, args...)
	require.ErrorContains(t, err, "there is no event to drop: none-0, none-1, ")
	assert.NotContains(t, err.Error(), "SQL")
	assert.Equal(t, "events dropped: 1\n", got)
}

// The command "list" reads page after page of events.
func TestListOfMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "queue.db")
	s, err := (&sqlite.SQLite{Path: path}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	const events = 2500
	b := &store.Batch{}
	for i := range events {
		b.Add = append(b.Add, &store.Record{ID: fmt.Sprintf("%04d", i), Queue: "default", Received: time.Now(), Request: []byte("x"), Checksum: []byte("x")})
	}
	require.NoError(t, s.Apply(t.Context(), b))
	require.NoError(t, s.Close())
	got, err := run(t, "list", "--json", "--db", path)
	require.NoError(t, err)
	i := 0
	for line := range strings.Lines(got) {
		require.Contains(t, line, fmt.Sprintf(`"id":"%04d"`, i))
		i++
	}
	assert.Equal(t, events, i)
}

// The command "move" creates the target database.
func TestMoveToAnotherFile(t *testing.T) {
	from, to := kept(t), filepath.Join(t.TempDir(), "new.db")
	config := filepath.Join(t.TempDir(), "Caddyfile")
	require.NoError(t, os.WriteFile(config, []byte(":8080 {\ninkit_queue {\nstore sqlite "+to+"\ndeliver {\nreverse_proxy localhost:9000\n}\n}\n}\n"), 0o600))
	got, err := run(t, "move", "--from", from, "--config", config)
	require.NoError(t, err)
	assert.Equal(t, "events moved: 3\nevents left, because Caddy is delivering them: 1 (run this again later)\n", got)
	assert.Equal(t, map[string]string{"i1-due": "pending", "i2-later": "pending", "i3-dead": "dead"}, states(t, to))
	assert.Equal(t, map[string]string{"i4-leased": "pending"}, states(t, from))

	third := filepath.Join(t.TempDir(), "third.db")
	got, err = run(t, "move", "--from", to, "--db", third)
	require.NoError(t, err)
	assert.Equal(t, "events moved: 3\n", got)
	assert.Empty(t, states(t, to))
	for _, same := range []string{third, filepath.Join(filepath.Dir(third), "..", filepath.Base(filepath.Dir(third)), "third.db")} {
		_, err = run(t, "move", "--from", third, "--db", same)
		require.EqualError(t, err, "this is the database of --from: name another one with --config or --db")
	}
	assert.Len(t, states(t, third), 3)
}

// A command creates no database, and does not change the file of another program.
func TestCommandOnNoDatabase(t *testing.T) {
	dir := t.TempDir()
	none := filepath.Join(dir, "none.db")
	_, err := run(t, "list", "--db", none)
	require.EqualError(t, err, "sqlite "+none+": this database file does not exist: name another one with --db")
	assert.NoFileExists(t, none)

	other := filepath.Join(dir, "other.txt")
	require.NoError(t, os.WriteFile(other, []byte(strings.Repeat("not a database. ", 1000)), 0o600))
	_, err = run(t, "list", "--db", other)
	require.ErrorContains(t, err, "sqlite "+other+": ")
	content, err := os.ReadFile(other)
	require.NoError(t, err)
	assert.Equal(t, strings.Repeat("not a database. ", 1000), string(content))
}

// With --config, a command opens each database of the configuration only one time.
func TestCommandOnAConfiguration(t *testing.T) {
	first, second := kept(t), kept(t)
	queue := func(name, path string) string {
		return "inkit_queue /" + name + " {\nname " + name + "\nstore sqlite " + path + "\ndeliver {\nreverse_proxy localhost:9000\n}\n}\n"
	}
	config := filepath.Join(t.TempDir(), "Caddyfile")
	require.NoError(t, os.WriteFile(config, []byte(":8080 {\nroute {\n"+queue("a", first)+queue("b", first)+queue("c", second)+"}\n}\n"), 0o600))
	got, err := run(t, "list", "--json", "--config", config)
	require.NoError(t, err)
	assert.Equal(t, 8, strings.Count(got, "\n"))
	got, err = run(t, "list", "--json", "--limit", "5", "--config", config)
	require.NoError(t, err)
	assert.Equal(t, 5, strings.Count(got, "\n"))
	require.NoError(t, os.WriteFile(config+".one", []byte(":8080 {\nroute {\n"+queue("a", first)+"}\n}\n"), 0o600))
	_, err = run(t, "drop", "i1-due", "--adapter", "caddyfile", "--config", config+".one")
	require.NoError(t, err)
	got, err = run(t, "drop", "i1-due", "none", "i3-dead", "--config", config)
	require.EqualError(t, err, "there is no event to drop: none", "i1-due is in the second database")
	assert.Equal(t, "events dropped: 2\n", got)

	require.NoError(t, os.WriteFile(config, []byte(":8080 {\nrespond x\n}\n"), 0o600))
	_, err = run(t, "list", "--config", config)
	require.EqualError(t, err, "there is no inkit_queue in the configuration")
	_, err = run(t, "list", "--config", config, "--db", first)
	require.ErrorContains(t, err, "[config db]")
}
