//go:build unix

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// example is a copy of a folder of examples. Free ports replace the ports in its files and
// commands.
type example struct {
	t                      *testing.T
	dir                    string
	env                    []string
	site, upstream         string // addresses
	replacer               *strings.Replacer
	backend, caddy, sender string // the commands of the README
}

func newExample(t *testing.T, name string) *example {
	t.Helper()
	e := &example{t: t, dir: t.TempDir(), site: freeAddr(t), upstream: freeAddr(t)}
	e.replacer = strings.NewReplacer(
		"localhost:8080", "localhost:"+port(e.site), "localhost:9000", e.upstream,
		"listen(9000, 'localhost')", "listen("+port(e.upstream)+", '127.0.0.1')",
	)
	from := "../../examples/" + name
	files, err := os.ReadDir(from)
	require.NoError(t, err)
	for _, file := range files {
		content := e.replacer.Replace(readFile(t, filepath.Join(from, file.Name())))
		if file.Name() == "Caddyfile" {
			require.Equal(t, 1, strings.Count(content, "\n{\n"), "the global options")
			content = strings.Replace(content, "\n{\n", fmt.Sprintf("\n{\n\tadmin %s\n", freeAddr(t)), 1)
		}
		require.NoError(t, os.WriteFile(filepath.Join(e.dir, file.Name()), []byte(content), 0o644)) //nolint:gosec // PHP runs as another user
	}
	blocks := docBlocks(t, from+"/README.md", "sh")
	require.Len(t, blocks, 4, "what to install, and three commands")
	e.backend, e.caddy, e.sender = blocks[1].text, blocks[2].text, blocks[3].text
	bin := t.TempDir()
	require.NoError(t, os.Symlink(caddyPath, bin+"/caddy"))
	home := t.TempDir()
	e.env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1",
		"HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_DATA_HOME="+home)
	return e
}

func (e *example) command(text string) *exec.Cmd {
	cmd := exec.Command("sh", "-c", "exec env "+e.replacer.Replace(text))
	cmd.Dir, cmd.Env = e.dir, e.env
	return cmd
}

// send runs the command that sends an event, and returns its output.
func (e *example) send(resource, secret string) string {
	e.t.Helper()
	require.Contains(e.t, e.sender, "=demo ")
	require.Contains(e.t, e.sender, "doc_1")
	text := strings.NewReplacer("=demo ", "="+secret+" ", "doc_1", resource).Replace(e.sender)
	out, _ := e.command(text).Output() // the command fails for status 401
	return string(out)
}

// url returns the URL in the command that sends an event.
func (e *example) url() string {
	fields := strings.Fields(e.replacer.Replace(e.sender))
	return fields[len(fields)-1]
}

func (e *example) list() string {
	e.t.Helper()
	out, err := e.command("caddy inkit-queue list").Output()
	require.NoError(e.t, err)
	return string(out)
}

func (e *example) startBackend() *process {
	e.t.Helper()
	p := start(e.t, e.command(e.backend))
	waitFor(e.t, "the backend listens", p, listening(e.upstream))
	return p
}

// backends has the example backends, each with the required program and the response.
var backends = []struct {
	name, needs, answer string
}{
	{"php", "php-fpm8.2", "200 OK"},
	{"python", "gunicorn", "204 No Content"},
	{"node", "node", "204 No Content"},
}

func backendExample(t *testing.T, name, program string) *example {
	t.Helper()
	needs(t, program)
	e := newExample(t, name)
	if name == "php" && os.Getuid() == 0 { // php-fpm refuses to run as root
		e.backend = strings.TrimSpace(e.backend) + " --allow-to-run-as-root"
		config := strings.Replace(readFile(t, e.dir+"/php-fpm.conf"), "[inkit]\n", "[inkit]\nuser = root\ngroup = root\n", 1)
		writeFile(t, e.dir+"/php-fpm.conf", config)
	}
	return e
}

// TestExamples follows the README of each folder in examples: it starts the backend and
// Caddy, sends events, and stops the backend for a time.
func TestExamples(t *testing.T) {
	t.Parallel()
	for _, tt := range backends {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := backendExample(t, tt.name, tt.needs)
			readme := readFile(t, "../../examples/"+tt.name+"/README.md")
			require.Contains(t, readme, "It prints `"+tt.answer+"`")
			backend := e.startBackend()
			caddy := start(t, e.command(e.caddy))
			waitFor(t, "Caddy listens", caddy, listening(e.site))

			// the command inkit-webhook send is slow to start, so the test posts most events itself
			lines := []string{"DOCUMENT_CREATE_FINISHED doc_command", "DOCUMENT_CREATE_FINISHED doc_kept_command"}
			sendMore := func(name, answer string) {
				for i := range 20 {
					resource := fmt.Sprint(name, i)
					lines = append(lines, "DOCUMENT_CREATE_FINISHED "+resource)
					body := event(resource)
					got := post(t, e.url(), body, sign("demo", body))
					assert.Equal(t, answer, fmt.Sprint(got.status, " ", http.StatusText(got.status)))
				}
			}
			assert.Equal(t, tt.answer+"\n", e.send("doc_command", "demo"))
			sendMore("doc_", tt.answer)
			require.Contains(t, readme, "`401 Unauthorized`")
			assert.Equal(t, "401 Unauthorized\n", e.send("doc_forged", "wrong"))
			backend.stop(t, syscall.SIGINT)
			output := backend.output.String()

			require.Contains(t, readme, "it is `200 OK`")
			assert.Equal(t, "200 OK\n", e.send("doc_kept_command", "demo"))
			sendMore("doc_kept_", "200 OK")
			require.Contains(t, readme, "`caddy inkit-queue list`")
			assert.Equal(t, 21, strings.Count(e.list(), " doc_kept_"))
			backend = e.startBackend()
			waitFor(t, "what was kept is delivered", caddy, func() bool { return !strings.Contains(e.list(), "doc_kept_") })
			backend.stop(t, syscall.SIGINT)
			output += backend.output.String()

			keys := make(map[string]bool)
			for _, line := range lines {
				require.Equal(t, 1, strings.Count(output, line+" "), "%s is there once:\n%s", line, output)
				_, key, _ := strings.Cut(output, line+" ")
				key, _, _ = strings.Cut(key, "\n")
				require.NotEmpty(t, key)
				keys[key] = true
			}
			assert.Len(t, keys, len(lines), "each event has a key of its own")
			assert.NotContains(t, output, "doc_forged")
		})
	}
}

// TestExamplesLoseNothing stops each backend under load: for a second, or for half a minute if
// the run is a long one. Each event that was answered 2xx must arrive.
func TestExamplesLoseNothing(t *testing.T) {
	t.Parallel()
	outage := time.Duration(size(30, 1)) * time.Second
	for _, tt := range backends {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := backendExample(t, tt.name, tt.needs)
			backend := e.startBackend()
			caddy := start(t, e.command(e.caddy))
			waitFor(t, "Caddy listens", caddy, listening(e.site))

			ctx, cancel := context.WithCancel(t.Context())
			var mu sync.Mutex
			var accepted []string
			refused := make(map[string]int)
			var senders sync.WaitGroup
			for sender := range 8 {
				client := &http.Client{Timeout: 20 * time.Second, Transport: new(http.Transport)}
				t.Cleanup(client.CloseIdleConnections)
				senders.Go(func() {
					for i := 0; ctx.Err() == nil; i++ {
						resource := fmt.Sprintf("load_%d_%d", sender, i)
						body := event(resource)
						got, err := send(t.Context(), client, e.url(), body, int64(len(body)), sign("demo", body))
						mu.Lock()
						if err == nil && got.status/100 == 2 {
							accepted = append(accepted, resource)
						} else {
							refused[fmt.Sprint(got.status, err)]++
						}
						mu.Unlock()
						time.Sleep(20 * time.Millisecond)
					}
				})
			}
			accepts := func(more int) {
				t.Helper()
				mu.Lock()
				before := len(accepted)
				mu.Unlock()
				waitFor(t, "events are accepted", caddy, func() bool {
					mu.Lock()
					defer mu.Unlock()
					return len(accepted) >= before+more
				})
			}
			accepts(50)
			backend.stop(t, syscall.SIGTERM)
			output := backend.output.String()
			time.Sleep(outage)
			accepts(50)
			backend = e.startBackend()
			accepts(50)
			cancel()
			senders.Wait()
			// before the next attempt, an event waits about as long as its age
			for deadline := time.Now().Add(20*time.Second + 2*outage); strings.Contains(e.list(), " load_") && time.Now().Before(deadline); {
				time.Sleep(100 * time.Millisecond)
			}
			backend.stop(t, syscall.SIGTERM)
			output += backend.output.String()

			lost, doubles := 0, 0
			for _, resource := range accepted {
				switch n := strings.Count(output, " "+resource+" "); n {
				case 0:
					lost++
				default:
					doubles += n - 1
				}
			}
			t.Logf("%d events were answered 2xx: %d lost, %d twice, %v refused", len(accepted), lost, doubles, refused)
			assert.Zero(t, lost)
			assert.Empty(t, refused)
		})
	}
}

// TestPHPPool runs php-fpm with pool.conf, like a service of Debian. It checks the socket and
// the log that the README describes.
func TestPHPPool(t *testing.T) {
	t.Parallel()
	const fpm = "/usr/sbin/php-fpm8.2"
	if _, err := os.Stat(fpm); err != nil || os.Getuid() != 0 {
		t.Skip("needs php-fpm of Debian 12, and root")
	}
	other, err := user.Lookup("nobody") // in place of the user caddy
	require.NoError(t, err)
	group, err := user.LookupGroupId(other.Gid)
	require.NoError(t, err)
	for _, tt := range []struct {
		name   string
		catch  bool
		logged bool
	}{
		{"as it is", true, true},
		{"without catch_workers_output", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := newExample(t, "php")
			socket := e.dir + "/inkit.sock"
			pool := readFile(t, e.dir+"/pool.conf")
			for _, pair := range [][2]string{
				{"\nlisten = /run/php/inkit.sock\n", "\nlisten = " + socket + "\n"},
				{"\nlisten.owner = caddy\n", "\nlisten.owner = nobody\n"},
				{"\nlisten.group = caddy\n", "\nlisten.group = " + group.Name + "\n"},
			} {
				require.Contains(t, pool, pair[0])
				pool = strings.Replace(pool, pair[0], pair[1], 1)
			}
			if !tt.catch {
				require.Contains(t, pool, "\ncatch_workers_output = yes\n")
				pool = strings.Replace(pool, "\ncatch_workers_output = yes\n", "\n", 1)
			}
			log := e.dir + "/php8.2-fpm.log"
			config := writeFile(t, e.dir+"/global.conf", "[global]\nerror_log = "+log+"\n"+pool)
			p := start(t, exec.Command(fpm, "--nodaemonize", "--fpm-config", config))
			waitFor(t, "the socket is for caddy alone", p, func() bool {
				info, err := os.Stat(socket)
				return err == nil && info.Mode().Perm() == 0o660 && strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Uid)) == other.Uid
			})

			const line = "php_fastcgi unix//run/php/inkit.sock"
			require.Contains(t, readFile(t, e.dir+"/README.md"), "`"+line+"`")
			site := readFile(t, e.dir+"/Caddyfile")
			require.Contains(t, site, "php_fastcgi "+e.upstream)
			site = strings.Replace(site, "php_fastcgi "+e.upstream, strings.Replace(line, "/run/php/inkit.sock", socket, 1), 1)
			writeFile(t, e.dir+"/Caddyfile", site)
			for _, dir := range []string{e.dir, filepath.Dir(e.dir)} {
				require.NoError(t, os.Chmod(dir, 0o755)) //nolint:gosec // www-data reads index.php there
			}
			caddy := start(t, e.command(e.caddy))
			waitFor(t, "Caddy listens", caddy, listening(e.site))
			assert.Equal(t, "200 OK\n", e.send("doc_1", "demo"))
			out, err := e.command("caddy inkit-queue list").Output()
			require.NoError(t, err)
			assert.NotContains(t, string(out), "doc_1", "PHP has taken it")
			p.stop(t, syscall.SIGINT)
			assert.Equal(t, tt.logged, strings.Contains(readFile(t, log), "\nDOCUMENT_CREATE_FINISHED doc_1 "), readFile(t, log))
		})
	}
}
