package queue

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func adapt(t *testing.T, input string) (string, error) {
	t.Helper()
	out, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return "", err
	}
	assert.Empty(t, warnings, "the input must also be formatted")
	var pretty bytes.Buffer
	require.NoError(t, json.Indent(&pretty, out, "", "\t"))
	return pretty.String(), nil
}

// Each golden file has a Caddyfile, a line of dashes, and the JSON of the Caddyfile.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			input, want, found := strings.Cut(string(content), "----------\n")
			require.True(t, found, "no line of dashes")
			got, err := adapt(t, input)
			require.NoError(t, err)
			assert.Equal(t, strings.TrimSpace(want), got)
		})
	}
}

func TestCaddyfileErrors(t *testing.T) {
	const (
		deliver  = "deliver: is required, with at least one directive, at Caddyfile:"
		proxy    = "\ndeliver {\nreverse_proxy localhost:9000\n}"
		takesOne = "%s: takes one duration, such as 30s, at Caddyfile:3"
	)
	queue := func(lines string) string { return "inkit_queue {\n" + lines + proxy + "\n}" }
	for _, tt := range []struct{ name, directive, message string }{
		{"no block", "inkit_queue", deliver},
		{"an empty block", "inkit_queue {\n}", deliver},
		{"no deliver", "inkit_queue {\nname a\n}", deliver},
		{"an empty deliver", "inkit_queue {\ndeliver {\n}\n}", deliver},
		{"deliver without a block", "inkit_queue {\ndeliver\n}", deliver},
		{"a word on the line", "inkit_queue documents {\n}", "inkit_queue: takes only a block, at Caddyfile:2"},
		{"a matcher and a word", "inkit_queue /hook documents {\n}", "inkit_queue: takes only a block, at Caddyfile:2"},
		{"an unknown option", queue("retries 3"), "inkit_queue: does not know the option retries, at Caddyfile:3"},
		{"a known option with capital letters", queue("Max_Age 5d"), "inkit_queue: does not know the option Max_Age, at Caddyfile:3"},
		{"an unknown directive in deliver", "inkit_queue {\ndeliver {\nproxy_pass x\n}\n}", "unrecognized directive: proxy_pass"},

		{"name repeated", queue("name a\nname a"), "name: must not be repeated, at Caddyfile:4"},
		{"store repeated", queue("store sqlite\nstore sqlite"), "store: must not be repeated, at Caddyfile:4"},
		{"answer_after repeated", queue("answer_after 1s\nanswer_after 1s"), "answer_after: must not be repeated, at Caddyfile:4"},
		{"attempt_timeout repeated", queue("attempt_timeout 1s\nattempt_timeout 1s"), "attempt_timeout: must not be repeated, at Caddyfile:4"},
		{"max_age repeated", queue("max_age 1s\nmax_age 1s"), "max_age: must not be repeated, at Caddyfile:4"},
		{"max_events repeated", queue("max_events 1\nmax_events 1"), "max_events: must not be repeated, at Caddyfile:4"},
		{"concurrency repeated", queue("concurrency 1\nconcurrency 1"), "concurrency: must not be repeated, at Caddyfile:4"},
		{"history repeated", queue("history 1d\nhistory 1d"), "history: must not be repeated, at Caddyfile:4"},
		{"once repeated", queue("once A\nonce B"), "once: must not be repeated, at Caddyfile:4"},
		{"remember repeated", queue("remember 1d\nremember 1d"), "remember: must not be repeated, at Caddyfile:4"},
		{"a negative history", queue("history -1s"), strings.ReplaceAll(takesOne, "%s", "history")},
		{"remember of 0", queue("remember 0"), strings.ReplaceAll(takesOne, "%s", "remember")},
		{"once without a type", queue("once"), "once: takes one or more event types, at Caddyfile:3"},
		{"deliver repeated", queue("name a" + proxy), "deliver: must not be repeated, at Caddyfile:7"},

		{"name without a name", queue("name"), "name: takes one name, at Caddyfile:3"},
		{"name with two names", queue("name a b"), "name: takes one name, at Caddyfile:3"},
		{"an empty name", queue(`name ""`), "name: takes one name, at Caddyfile:3"},
		{"store without a kind", queue("store"), "store: needs the kind of the database first, such as sqlite or postgres, at Caddyfile:3"},
		{"an unknown store", queue("store mysql"), "store: getting module named 'inkit_queue.stores.mysql': module not registered: inkit_queue.stores.mysql, at Caddyfile:3"},
		{"a connection string in place of a kind", queue("store postgres://u:c0nf1d3nt1al@h/d"), "store: needs the kind of the database first, such as sqlite or postgres, at Caddyfile:3"},
		{"a path in place of a kind", queue("store /var/lib/c0nf1d3nt1al.db"), "store: needs the kind of the database first, such as sqlite or postgres, at Caddyfile:3"},
		{"sqlite with two paths", queue("store sqlite /a /b"), "store: sqlite takes at most one argument, the path, at Caddyfile:3"},
		{"sqlite with a block", queue("store sqlite {\npath /a\n}"), "store: sqlite takes at most one argument, the path, at Caddyfile:4"},

		{"answer_after without a duration", queue("answer_after"), strings.ReplaceAll(takesOne, "%s", "answer_after")},
		{"answer_after with two durations", queue("answer_after 1s 2s"), strings.ReplaceAll(takesOne, "%s", "answer_after")},
		{"a negative answer_after", queue("answer_after -1s"), strings.ReplaceAll(takesOne, "%s", "answer_after")},
		{"answer_after without a unit", queue("answer_after 5"), strings.ReplaceAll(takesOne, "%s", "answer_after")},
		{"answer_after off", queue("answer_after off"), strings.ReplaceAll(takesOne, "%s", "answer_after")},
		{"attempt_timeout of 0", queue("attempt_timeout 0s"), strings.ReplaceAll(takesOne, "%s", "attempt_timeout")},
		{"a negative attempt_timeout", queue("attempt_timeout -1s"), strings.ReplaceAll(takesOne, "%s", "attempt_timeout")},
		{"attempt_timeout without a duration", queue("attempt_timeout"), strings.ReplaceAll(takesOne, "%s", "attempt_timeout")},
		{"max_age of 0", queue("max_age 0"), strings.ReplaceAll(takesOne, "%s", "max_age")},
		{"max_age of 5 days in words", queue("max_age 5 days"), strings.ReplaceAll(takesOne, "%s", "max_age")},
		{"a max_age that is not a duration", queue("max_age long"), strings.ReplaceAll(takesOne, "%s", "max_age")},
		{"max_events without a number", queue("max_events"), "max_events: takes one number above 0, at Caddyfile:3"},
		{"max_events of 0", queue("max_events 0"), "max_events: takes one number above 0, at Caddyfile:3"},
		{"a negative max_events", queue("max_events -1"), "max_events: takes one number above 0, at Caddyfile:3"},
		{"max_events in thousands", queue("max_events 10k"), "max_events: takes one number above 0, at Caddyfile:3"},
		{"a max_events that is too large for an integer", queue("max_events 99999999999999999999"), "max_events: takes one number above 0, at Caddyfile:3"},
		{"concurrency without a number", queue("concurrency"), "concurrency: takes one number above 0, at Caddyfile:3"},
		{"concurrency of 0", queue("concurrency 0"), "concurrency: takes one number above 0, at Caddyfile:3"},
		{"concurrency with two numbers", queue("concurrency 1 2"), "concurrency: takes one number above 0, at Caddyfile:3"},
		{"a concurrency that is not a number", queue("concurrency many"), "concurrency: takes one number above 0, at Caddyfile:3"},
		{"a block after name", queue("name a {\nconcurrency 1\n}"), "inkit_queue: does not know the option {, at Caddyfile:3"},
		{"a block after max_age", queue("max_age 5d {\nconcurrency 1\n}"), "inkit_queue: does not know the option {, at Caddyfile:3"},
		{"a word after deliver", "inkit_queue {\ndeliver localhost:9000 {\nreverse_proxy localhost:9000\n}\n}", "wrong argument count or unexpected line ending after 'localhost:9000', at Caddyfile:3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := adapt(t, ":8080 {\n"+tt.directive+"\n}\n")
			require.ErrorContains(t, err, tt.message)
			assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		})
	}
}

// These errors appear only when Caddy loads the configuration.
func TestLoadErrors(t *testing.T) {
	with := func(change func(h *Handler)) *Handler {
		h := &Handler{Name: "a", Routes: rawRoutes(`{"handler":"static_response"}`)}
		change(h)
		return h
	}
	const nameForm = "name must have 1 to 64 characters: letters, digits, '.', '_' or '-'"
	for _, tt := range []struct {
		name    string
		message string // empty if the configuration loads
		h       []*Handler
	}{
		{"all defaults", "", []*Handler{with(func(*Handler) {})}},
		{"two handlers with one name and the same settings", "", []*Handler{with(func(*Handler) {}), with(func(*Handler) {})}},
		{"an explicit default equals the default", "", []*Handler{
			with(func(*Handler) {}),
			with(func(h *Handler) {
				h.Concurrency, h.MaxEvents, h.AnswerAfter = 16, 1_000_000, duration(5*time.Second)
			}),
		}},
		{"two names with different settings", "", []*Handler{with(func(*Handler) {}), with(func(h *Handler) { h.Name, h.Concurrency = "b", 1 })}},
		{"the same snippet in two sites, with other numbers of the groups", "", []*Handler{
			with(func(h *Handler) { h.Routes[0].Group = "group2" }), with(func(h *Handler) { h.Routes[0].Group = "group7" }),
		}},
		{"other groups of routes", "name: two queues are called a, and have different settings", []*Handler{
			with(func(h *Handler) {
				h.Routes = append(h.Routes, h.Routes[0])
				h.Routes[0].Group, h.Routes[1].Group = "group1", "group1"
			}),
			with(func(h *Handler) {
				h.Routes = append(h.Routes, h.Routes[0])
				h.Routes[0].Group, h.Routes[1].Group = "group1", "group2"
			}),
		}},
		{"the same name with another concurrency", "name: two queues are called a, and have different settings", []*Handler{
			with(func(*Handler) {}), with(func(h *Handler) { h.Concurrency = 1 }),
		}},
		{"the same name with another backend", "name: two queues are called a, and have different settings", []*Handler{
			with(func(*Handler) {}), with(func(h *Handler) { h.Routes = rawRoutes(`{"handler":"static_response","status_code":204}`) }),
		}},
		{"the same name with another store", "name: two queues are called a, and have different settings", []*Handler{
			with(func(*Handler) {}), with(func(h *Handler) { h.StoreRaw = sqliteAt("/nowhere/b.db") }),
		}},
		{"no routes", "routes: at least one is required", []*Handler{with(func(h *Handler) { h.Routes = nil })}},
		{"an unknown handler", "routes: ", []*Handler{with(func(h *Handler) { h.Routes = rawRoutes(`{"handler":"none"}`) })}},
		{"an unknown store", "store: ", []*Handler{with(func(h *Handler) { h.StoreRaw = json.RawMessage(`{"module":"mysql"}`) })}},
		{"a store with an unknown field", "store: ", []*Handler{with(func(h *Handler) { h.StoreRaw = json.RawMessage(`{"module":"sqlite","file":"/x"}`) })}},
		{"a name with a space", nameForm, []*Handler{with(func(h *Handler) { h.Name = "a b" })}},
		{"a name with a placeholder", nameForm, []*Handler{with(func(h *Handler) { h.Name = "{env.NAME}" })}},
		{"a name of 65 characters", nameForm, []*Handler{with(func(h *Handler) { h.Name = strings.Repeat("a", 65) })}},
		{"a name of 64 characters", "", []*Handler{with(func(h *Handler) { h.Name = strings.Repeat("a", 64) })}},
		{"a name that ends in a line break", nameForm, []*Handler{with(func(h *Handler) { h.Name = "a\n" })}},
		{"a negative answer_after", "answer_after: must not be negative", []*Handler{with(func(h *Handler) { h.AnswerAfter = duration(-1) })}},
		{"answer_after of 0", "", []*Handler{with(func(h *Handler) { h.AnswerAfter = duration(0) })}},
		{"a negative attempt_timeout", "attempt_timeout: must not be negative", []*Handler{with(func(h *Handler) { h.AttemptTimeout = -1 })}},
		{"an attempt_timeout of more than an hour", "attempt_timeout: must not be longer than 1h", []*Handler{with(func(h *Handler) { h.AttemptTimeout = caddy.Duration(time.Hour + 1) })}},
		{"an attempt_timeout of an hour", "", []*Handler{with(func(h *Handler) { h.AttemptTimeout = caddy.Duration(time.Hour) })}},
		{"a negative max_age", "max_age: must not be negative", []*Handler{with(func(h *Handler) { h.MaxAge = -1 })}},
		{"a negative max_events", "max_events: must not be negative", []*Handler{with(func(h *Handler) { h.MaxEvents = -1 })}},
		{"a negative concurrency", "concurrency: must not be negative", []*Handler{with(func(h *Handler) { h.Concurrency = -1 })}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := provision(t, tt.h...)
			if tt.message == "" {
				require.NoError(t, err)
				c.end()
				return
			}
			require.ErrorContains(t, err, tt.message)
		})
	}
}

func TestModules(t *testing.T) {
	for id, module := range map[string]caddy.Module{
		"http.handlers.inkit_queue": new(Handler), "inkit_queue": new(App), "inkit_queue.stores.sqlite": new(sqlite.SQLite),
	} {
		info, err := caddy.GetModule(id)
		require.NoError(t, err)
		assert.IsType(t, module, info.New())
	}
}

func TestPostgresCaddyfile(t *testing.T) {
	t.Setenv("QUEUE_DSN", "postgres://role:c0nf1d3nt1al@host/database")
	t.Setenv("QUEUE_BROKEN", "postgres://role:c0nf1d3nt1al@host:c0nf1d3nt1al/database")
	for name, tt := range map[string]struct {
		store, want string // the JSON, or a part of the error
	}{
		"a placeholder":              {"store postgres {env.QUEUE_DSN}", `{"dsn":"{env.QUEUE_DSN}","module":"postgres"}`},
		"a placeholder and a schema": {"store postgres {env.QUEUE_DSN} {\n schema inkit\n }", `{"dsn":"{env.QUEUE_DSN}","module":"postgres","schema":"inkit"}`},
		"a text in the block":        {"store postgres {\n dsn postgres://c0nf1d3nt1al@host/database\n }", `{"dsn":"postgres://c0nf1d3nt1al@host/database","module":"postgres"}`},
		"a text in quotes":           {"store postgres {\n dsn \"host=host password=c0nf1d3nt1al\"\n }", `{"dsn":"host=host password=c0nf1d3nt1al","module":"postgres"}`},

		"no connection string":                  {"store postgres", "dsn: is required"},
		"a text without a block":                {"store postgres postgres://c0nf1d3nt1al@host/database", "store: postgres takes one placeholder in braces"},
		"a text in place of the kind":           {"store postgres://c0nf1d3nt1al@host/database", "store: needs the kind of the database first, such as sqlite or postgres"},
		"two placeholders":                      {"store postgres {env.QUEUE_DSN} {env.c0nf1d3nt1al}", "store: postgres takes one placeholder in braces"},
		"a connection string twice":             {"store postgres {env.QUEUE_DSN} {\n dsn c0nf1d3nt1al\n }", "dsn: must not be repeated"},
		"spaces without quotes":                 {"store postgres {\n dsn host=host password=c0nf1d3nt1al\n }", "dsn: takes one value, in quotes"},
		"an unknown word":                       {"store postgres {env.QUEUE_DSN} {\n c0nf1d3nt1al\n }", "store: postgres takes only dsn and schema"},
		"an unset variable":                     {"store postgres {env.c0nf1d3nt1al}", "dsn: environment variable is unset or empty"},
		"a missing file":                        {"store postgres {file./c0nf1d3nt1al}", "dsn: file cannot be read: no such file or directory"},
		"an invalid connection string":          {"store postgres {\n dsn postgres//c0nf1d3nt1al@host\n }", "dsn: is not a valid connection string of PostgreSQL"},
		"a URL without a colon":                 {"store postgres {\n dsn postgres//role:c0nf1d3nt1al@host/database?sslmode=disable\n }", "dsn: is not a valid connection string"},
		"a password with an @ in a URL":         {"store postgres {\n dsn postgres://role:c0nf1d3nt1al@c0nf1d3nt1al@host/database\n }", "dsn: is not a valid connection string"},
		"a password with a / in a URL":          {"store postgres {\n dsn postgres://role:1/c0nf1d3nt1al@host/database\n }", "dsn: is not a valid connection string"},
		"a password with an @ and a / in a URL": {"store postgres {\n dsn postgres://role:x@y/c0nf1d3nt1al@host/database\n }", "dsn: is not a valid connection string"},
		"a schema with a question mark":         {"store postgres {\n dsn host=host\n schema who?\n }", "schema: must not contain ', ?, { or }"},
		"an invalid port":                       {"store postgres {env.QUEUE_BROKEN}", "dsn: is not a valid connection string"},
		"a missing certificate":                 {"store postgres {\n dsn \"host=c0nf1d3nt1al sslmode=verify-full sslrootcert=/c0nf1d3nt1al\"\n }", "dsn: names a file that cannot be read: no such file or directory"},
		"an invalid sslmode":                    {"store postgres {\n dsn \"host=c0nf1d3nt1al sslmode=c0nf1d3nt1al\"\n }", "dsn: is not a valid connection string"},
		"a placeholder within a text":           {"store postgres {\n dsn postgres://role:{env.c0nf1d3nt1al}@host/database\n }", "dsn: must be either one placeholder and nothing else"},
		"a placeholder of a shell":              {"store postgres {\n dsn ${c0nf1d3nt1al}\n }", "dsn: is not a valid connection string"},
	} {
		t.Run(name, func(t *testing.T) {
			adapter := caddyconfig.GetAdapter("caddyfile")
			config, _, err := adapter.Adapt([]byte("http://localhost:1\nroute {\ninkit_queue {\n"+tt.store+"\ndeliver {\nrespond 200\n}\n}\n}\n"), nil)
			if err == nil {
				var c caddy.Config
				require.NoError(t, json.Unmarshal(config, &c))
				err = caddy.Validate(&c)
			}
			if strings.HasPrefix(tt.want, "{") {
				require.NoError(t, err)
				assert.Contains(t, string(config), `"store":`+tt.want)
				return
			}
			require.ErrorContains(t, err, tt.want)
			assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		})
	}
}
