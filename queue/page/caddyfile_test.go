package page

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func TestCaddyfile(t *testing.T) {
	for _, tt := range []struct{ name, directives, handlers, err string }{
		{"nothing", "inkit_queue_page", `{"handler":"inkit_queue_page"}`, ""},
		{"an empty block", "inkit_queue_page {\n}", `{"handler":"inkit_queue_page"}`, ""},
		{"all options", "inkit_queue_page {\nuser {header.Remote-User}\nread_only\n}", `{"handler":"inkit_queue_page","read_only":true,"user":"{http.request.header.Remote-User}"}`, ""},
		{"after a directive that rejects requests", "inkit_queue_page\nerror 404", `{"handler":"error","status_code":404},{"handler":"inkit_queue_page"}`, ""},
		{"before a proxy", "reverse_proxy localhost:9000\ninkit_queue_page", `{"handler":"inkit_queue_page"},{"handler":"reverse_proxy","upstreams":[{"dial":"localhost:9000"}]}`, ""},

		{"a word on the line", "inkit_queue_page ops", "", "inkit_queue_page: takes only a block, at Caddyfile:2"},
		{"an unknown option", "inkit_queue_page {\nrefresh 5s\n}", "", "inkit_queue_page: does not know the option refresh, at Caddyfile:3"},
		{"user without a placeholder", "inkit_queue_page {\nuser\n}", "", "user: takes one placeholder of the request, such as {http.auth.user.id}, at Caddyfile:3"},
		{"user with two placeholders", "inkit_queue_page {\nuser {http.auth.user.id} {http.auth.user.id}\n}", "", "user: takes one placeholder of the request, such as {http.auth.user.id}, at Caddyfile:3"},
		{"user with a text", "inkit_queue_page {\nuser alice\n}", "", "user: takes one placeholder of the request, such as {http.auth.user.id}, at Caddyfile:3"},
		{"user with the same value for all clients", "inkit_queue_page {\nuser {env.HOME}\n}", "", "user: takes one placeholder of the request, such as {http.auth.user.id}, at Caddyfile:3"},
		{"user repeated", "inkit_queue_page {\nuser {http.auth.user.id}\nuser {http.auth.user.id}\n}", "", "user: must not be repeated, at Caddyfile:4"},
		{"read_only repeated", "inkit_queue_page {\n" + strings.Repeat("read_only\n", 2) + "}", "", "read_only: must not be repeated, at Caddyfile:4"},
		{"read_only with a word", "inkit_queue_page {\nread_only off\n}", "", "read_only: takes no argument, at Caddyfile:3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(":80 {\n"+tt.directives+"\n}\n"), map[string]any{"filename": "Caddyfile"})
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			assert.Contains(t, string(out), `{"handle":[`+tt.handlers+`]}`)
		})
	}
}

// A Caddy with this package, but without the package of the queue, refuses to load the page.
func TestPageWithoutTheQueueBuiltIn(t *testing.T) {
	var config caddy.Config
	require.NoError(t, json.Unmarshal([]byte(`{"admin":{"disabled":true},"apps":{"http":{"servers":{"a":{"routes":[{"handle":[{"handler":"inkit_queue_page"}]}]}}}}}`), &config))
	err := caddy.Validate(&config)
	require.ErrorContains(t, err, "unknown module: inkit_queue")
}
