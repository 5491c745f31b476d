//go:build unix

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestExamples runs each folder of examples as its README says: its backend, its
// Caddyfile, and the command that sends an event.
func TestExamples(t *testing.T) {
	phpFPM, _ := filepath.Glob("/usr/sbin/php-fpm*")
	for _, tt := range []struct {
		name, needs, path string
		status            int
		command           func(t *testing.T, dir, addr string) *exec.Cmd
	}{
		{"php", strings.Join(append(phpFPM, "php-fpm")[:1], ""), "/index.php", 200, func(t *testing.T, dir, addr string) *exec.Cmd {
			t.Helper()
			config := writeFile(t, filepath.Join(t.TempDir(), "php-fpm.conf"), fmt.Sprintf(
				"[global]\nerror_log = /dev/stderr\ndaemonize = no\n[www]\nlisten = %s\npm = static\npm.max_children = 2\nclear_env = no\nuser = %d\ngroup = %d\n", addr, os.Getuid(), os.Getgid()))
			return exec.Command(phpFPM[0], "--allow-to-run-as-root", "--nodaemonize", "--fpm-config", config)
		}},
		{"python", "gunicorn", "/webhook", 204, func(_ *testing.T, _, addr string) *exec.Cmd {
			return exec.Command("gunicorn", "--bind", addr, "--keep-alive", "75", "app:app")
		}},
		{"node", "node", "/webhook", 204, func(_ *testing.T, _, _ string) *exec.Cmd {
			return exec.Command("node", "server.js")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := exec.LookPath(tt.needs); err != nil {
				t.Skip(tt.needs + " is not installed")
			}
			dir, err := filepath.Abs("../../examples/" + tt.name)
			require.NoError(t, err)
			addr := freeAddr(t)
			events := filepath.Join(t.TempDir(), "events")
			cmd := tt.command(t, dir, addr)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "EVENTS="+events, "PORT="+port(addr), "PYTHONDONTWRITEBYTECODE=1")
			p := start(t, cmd)
			upstream := "localhost:" + port(addr)
			waitFor(t, tt.name+" listens", p, listening(upstream))

			site := strings.Replace(readFile(t, dir+"/Caddyfile"), "http://localhost:8080 {", "http://localhost:{{port}} {", 1)
			c := startCaddy(t, "", site, "UPSTREAM="+upstream, "SITE_ROOT="+dir)
			var want []string
			for i := range 50 {
				id := fmt.Sprintf("doc_%d", i)
				url := "http://localhost:" + port(c.addr) + tt.path
				body := event(id)
				assert.Equal(t, tt.status, post(t, url, body, sign(secret, body)).status)
				body = event("forged")
				assert.Equal(t, 401, post(t, url, body, sign("wrong", body)).status)
				want = append(want, "DOCUMENT_CREATE_FINISHED "+id)
			}
			var got []string
			keys := make(map[string]bool)
			for line := range strings.Lines(readFile(t, events)) {
				i := strings.LastIndex(line, " ")
				got = append(got, line[:i])
				keys[line[i:]] = true
			}
			assert.Equal(t, want, got)
			assert.Len(t, keys, len(want), "each delivery has a key of its own")
		})
	}
}
