//go:build unix

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// secretFile is a file with a secret. A rename replaces the file.
type secretFile struct {
	t    *testing.T
	path string
}

func newSecretFile(t *testing.T, value string) secretFile {
	t.Helper()
	f := secretFile{t, t.TempDir() + "/secret"}
	f.replace(value)
	return f
}

func (f secretFile) replace(value string) {
	f.t.Helper()
	require.NoError(f.t, os.Rename(writeFile(f.t, f.path+".new", value+"\n"), f.path))
}

// rotating is a Caddy whose secrets are in files, with a backend and a client.
type rotating struct {
	t      *testing.T
	c      *caddy
	b      *backend
	client *http.Client
}

func newRotating(t *testing.T, files ...secretFile) *rotating {
	t.Helper()
	b := newBackend(t, good)
	var secrets strings.Builder
	for i, f := range files {
		fmt.Fprintf(&secrets, "\t\tsecret {file.%s} name file%d\n", f.path, i+1)
	}
	c := startCaddy(t, "", "http://:{{port}} {\n\tinkit_webhook {\n"+secrets.String()+"\t}\n\treverse_proxy "+b.addr+"\n}\n")
	client := &http.Client{Timeout: time.Minute, Transport: new(http.Transport)}
	t.Cleanup(client.CloseIdleConnections)
	return &rotating{t, c, b, client}
}

func (r *rotating) status(key, id string) int {
	body := event(id)
	got, err := send(context.Background(), r.client, webhookURL(r.c, "/"), body, int64(len(body)), sign(key, body))
	assert.NoError(r.t, err)
	return got.status
}

// The method "until" signs events with the secret `key`, and sends 50 of them a second. It stops
// at the first response with the given status, and returns the time from its start to its stop.
func (r *rotating) until(key string, status int, limit time.Duration) time.Duration {
	r.t.Helper()
	began := time.Now()
	ticker := time.NewTicker(time.Second / 50)
	defer ticker.Stop()
	for range ticker.C {
		got := r.status(key, "doc")
		took := time.Since(began)
		if got == status {
			return took
		}
		if took > limit {
			require.Failf(r.t, "too late", "no event signed with %s gets status %d within %v", key, status, limit)
		}
	}
	return 0
}

func TestSecretFileIsReplacedUnderLoad(t *testing.T) {
	t.Parallel()
	t.Run("a new secret is accepted with its first event", func(t *testing.T) {
		t.Parallel()
		file := newSecretFile(t, "secret_0")
		r := newRotating(t, file)
		var worst time.Duration
		for i := range 10 {
			current, next := fmt.Sprintf("secret_%d", i), fmt.Sprintf("secret_%d", i+1)
			for range 1 + rand.IntN(30) {
				assert.Equal(t, 200, r.status(current, "doc"))
				time.Sleep(time.Second / 50)
			}
			file.replace(next)
			began := time.Now()
			assert.Equal(t, 200, r.status(next, "doc"), "the very first event")
			worst = max(worst, time.Since(began))
			assert.Equal(t, 200, r.status(current, "doc"), "and one that was under way")
		}
		t.Logf("10 swaps: the slowest took %v", worst)
		assert.Less(t, worst, 2*time.Second)
	})
	t.Run("a withdrawn secret is refused within 15 s, though nobody uses the new one", func(t *testing.T) {
		t.Parallel()
		file := newSecretFile(t, "old")
		r := newRotating(t, file)
		assert.Equal(t, 200, r.status("old", "doc"))
		file.replace("new")
		took := r.until("old", 401, 15*time.Second)
		t.Logf("refused after %v", took)
		assert.Equal(t, 200, r.status("new", "doc"))
	})
	// The recipe: write the new secret into the unused file, and keep the current secret. Inkit
	// signs with the new secret only after Caddy knows it.
	t.Run("with both listed, no event is refused", func(t *testing.T) {
		t.Parallel()
		files := []secretFile{newSecretFile(t, "secret_0"), newSecretFile(t, "unused")}
		r := newRotating(t, files...)
		var current atomic.Value
		current.Store("secret_0")
		swaps := size(10, 2)
		var events, refused atomic.Int64
		swapped := make(chan struct{})
		go func() {
			defer close(swapped)
			for i := range swaps {
				time.Sleep(2 * time.Second)
				next := fmt.Sprintf("secret_%d", i+1)
				files[(i+1)%2].replace(next)
				r.until(next, 200, 2*time.Second) // wait until Caddy accepts the new secret
				current.Store(next)
			}
		}()
		ticker := time.NewTicker(time.Second / 50)
		defer ticker.Stop()
		var wg sync.WaitGroup
		for range ticker.C {
			i := events.Add(1)
			wg.Go(func() {
				if r.status(current.Load().(string), fmt.Sprintf("counted_%d", i)) != 200 {
					refused.Add(1)
				}
			})
			if i >= int64(200*swaps) {
				break
			}
		}
		wg.Wait()
		<-swapped
		assert.Zero(t, refused.Load())
		recorded := 0
		for _, record := range r.b.records() {
			if strings.Contains(string(record.Body), "counted_") {
				recorded++
			}
		}
		assert.Equal(t, 200*swaps, recorded)
		t.Logf("%d events over %d swaps, %d refused", events.Load(), swaps, refused.Load())
	})
	for name, breakIt := range map[string]func(t *testing.T, path string){
		"emptied": func(t *testing.T, path string) { writeFile(t, path, "") },
		"removed": func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
	} {
		t.Run("the last good secret stays when the file is "+name, func(t *testing.T) {
			t.Parallel()
			file := newSecretFile(t, "good")
			r := newRotating(t, file)
			breakIt(t, file.path)
			for range 12 * 2 { // longer than the 10 s for which Caddy accepts a previous value
				time.Sleep(time.Second / 4)
				assert.Equal(t, 200, r.status("good", "doc"))
				assert.Equal(t, 401, r.status("", "doc"), "the empty key")
			}
			assert.Equal(t, 1, strings.Count(r.c.output.String(), `"msg":"cannot reload secrets: the last good ones stay in use, repair this before Caddy restarts"`), "one line a minute")
			assert.NotContains(t, r.c.get("http://"+r.c.admin+"/metrics"), `caddy_inkit_webhook_secret_reloads_total{result="failed",webhook=""} 0`)
			file.replace("better")
			r.until("better", 200, 2*time.Second)
		})
	}
}

// TestRecipeSecretFiles uses files with the layouts of Docker, Kubernetes and systemd.
func TestRecipeSecretFiles(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	site := func(t *testing.T, line string) string {
		t.Helper()
		require.Contains(t, recipes(t), "`"+line+"`", "the line is in the recipes")
		return "http://:{{port}} {\n\t" + line + "\n\treverse_proxy " + b.addr + "\n}\n"
	}
	status := func(c *caddy, key string) int {
		body := event("doc_1")
		return post(t, webhookURL(c, "/"), body, sign(key, body)).status
	}

	t.Run("Docker", func(t *testing.T) {
		t.Parallel()
		// Docker makes one file for each secret. All users can read the file.
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(dir+"/inkit_webhook", []byte(secret), 0o444))
		c := startCaddy(t, "", strings.Replace(site(t, "inkit_webhook {file./run/secrets/inkit_webhook}"), "/run/secrets", dir, 1))
		assert.Equal(t, 200, status(c, secret))
		assert.Equal(t, 401, status(c, "wrong"))
	})
	t.Run("Kubernetes", func(t *testing.T) {
		t.Parallel()
		// Kubernetes links "secret" to "..data/secret", and "..data" to a folder "..<time>". An update
		// creates a new folder and a new link to it. Then it renames the new link to "..data".
		dir := t.TempDir()
		update := func(version, value string) {
			require.NoError(t, os.Mkdir(dir+"/.."+version, 0o755))
			writeFile(t, dir+"/.."+version+"/secret", value)
			require.NoError(t, os.Symlink(".."+version, dir+"/..data_tmp"))
			require.NoError(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
		}
		update("2026_11_24_1", "first")
		require.NoError(t, os.Symlink("..data/secret", dir+"/secret"))
		c := startCaddy(t, "", strings.Replace(site(t, "inkit_webhook {file./etc/inkit/secret}"), "/etc/inkit", dir, 1))
		assert.Equal(t, 200, status(c, "first"))
		update("2026_11_24_2", "second")
		require.NoError(t, os.RemoveAll(dir+"/..2026_11_24_1"))
		assert.Equal(t, 200, status(c, "second"), "without a reload")
		waitFor(t, "the first secret is refused", c.process, func() bool { return status(c, "first") == 401 })
	})
	t.Run("systemd", func(t *testing.T) {
		t.Parallel()
		// systemd makes a folder that only the service may open. The variable
		// CREDENTIALS_DIRECTORY has the path of the folder.
		dir := t.TempDir() + "/caddy.service"
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.WriteFile(dir+"/inkit_webhook", []byte(secret+"\n"), 0o400))
		require.NoError(t, os.Chmod(dir, 0o500))
		t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
		c := startCaddy(t, "", site(t, "inkit_webhook {file.{$CREDENTIALS_DIRECTORY}/inkit_webhook}"), "CREDENTIALS_DIRECTORY="+dir)
		assert.Equal(t, 200, status(c, secret))
		assert.NotContains(t, c.get("http://"+c.admin+"/config/"), secret)
	})
}

// TestRecipeRotation runs a rotation with the Caddyfile, the files and the commands of the
// recipe.
func TestRecipeRotation(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	dir := t.TempDir() + "/inkit"
	blocks := strings.Split(section(t, "Rotate a secret"), "```sh\n")
	require.Len(t, blocks, 4, "once, the new secret, and the old one")
	command := func(block, line int, stdin string) {
		t.Helper()
		shown := strings.Split(blocks[block], "\n")[line]
		// the test runs the command as its own user, not as root
		script := strings.NewReplacer("sudo ", "", " -o root -g caddy", fmt.Sprintf(" -g %d", os.Getgid()), "/etc/caddy/inkit", dir).Replace(shown)
		cmd := exec.Command("sh", "-ec", script)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s\n%s", script, out)
	}
	command(1, 0, "")
	command(1, 1, "old_secret\n")
	command(1, 2, "")
	for name, want := range map[string]os.FileMode{dir: 0o750 | os.ModeDir | os.ModeSetgid, dir + "/blue": 0o640, dir + "/green": 0o640} {
		info, err := os.Stat(name)
		require.NoError(t, err)
		assert.Equal(t, want, info.Mode(), name)
	}

	options, site := recipe(t, "Rotate a secret", "localhost:9000", b.addr, "/etc/caddy/inkit", dir)
	c := startCaddy(t, options, site)
	status := func(key string) int {
		body := event("doc_1")
		return post(t, webhookURL(c, "/webhook"), body, sign(key, body)).status
	}
	metric := func(name string) string {
		_, rest, _ := strings.Cut(c.get("http://"+c.admin+"/metrics"), fmt.Sprintf(`outcome="verified",secret=%q,webhook=""} `, name))
		value, _, _ := strings.Cut(rest, "\n")
		return value
	}
	assert.Equal(t, 200, status("old_secret"))

	// an incorrectly pasted secret changes nothing, and the log has the line from the recipe
	command(2, 0, " new_secret\n")
	command(2, 1, "")
	assert.Equal(t, 401, status("new_secret"))
	assert.Equal(t, 200, status("old_secret"))
	for _, said := range []string{"cannot reload secrets: the last good ones stay in use, repair this before Caddy restarts", "secret green: must not start or end with white space"} {
		assert.Contains(t, section(t, "Rotate a secret"), "`"+said+"`")
		waitFor(t, "the log says: "+said, c.process, func() bool { return strings.Contains(c.output.String(), said) })
	}

	command(2, 0, "new_secret\n")
	command(2, 1, "")
	assert.Equal(t, 200, status("new_secret"), "the first event that Inkit signs with it")
	assert.Equal(t, 200, status("old_secret"), "and one that was under way")
	assert.Equal(t, []string{"3", "1"}, []string{metric("blue"), metric("green")})

	command(3, 0, "")
	command(3, 1, "")
	waitFor(t, "the old secret is refused", c.process, func() bool { time.Sleep(100 * time.Millisecond); return status("old_secret") == 401 })
	assert.Equal(t, 200, status("new_secret"))
}

// TestRotationsUnderLoad rotates the only secret. The sender signs with the new secret as soon
// as the file has this secret. Inkit cannot use the secret earlier.
func TestRotationsUnderLoad(t *testing.T) {
	t.Parallel()
	t.Run("60 events at once after each of 12 rotations", func(t *testing.T) {
		t.Parallel()
		file := newSecretFile(t, "secret_0")
		r := newRotating(t, file)
		var refused atomic.Int64
		for i := range 12 {
			key := fmt.Sprintf("secret_%d", i+1)
			file.replace(key)
			inParallel(60, 60, func(int) {
				if r.status(key, "doc") != 200 {
					refused.Add(1)
				}
			})
		}
		t.Logf("%d of 720 refused", refused.Load())
		assert.Zero(t, refused.Load())
	})

	swaps := size(10, 3)
	for name, newSwap := range map[string]func(t *testing.T) (path string, swap func(value string)){
		"by a link, as Kubernetes does": func(t *testing.T) (string, func(string)) {
			dir, version := t.TempDir(), 0
			swap := func(value string) {
				version++
				require.NoError(t, os.Mkdir(fmt.Sprintf("%s/..%d", dir, version), 0o755))
				writeFile(t, fmt.Sprintf("%s/..%d/secret", dir, version), value)
				require.NoError(t, os.Symlink(fmt.Sprintf("..%d", version), dir+"/..data_tmp"))
				require.NoError(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
			}
			swap("secret_0")
			require.NoError(t, os.Symlink("..data/secret", dir+"/secret"))
			return dir + "/secret", swap
		},
		"in place, with a pause in the middle": func(t *testing.T) (string, func(string)) {
			path := writeFile(t, t.TempDir()+"/secret", "secret_0")
			return path, func(value string) {
				file, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
				require.NoError(t, err)
				defer file.Close()
				_, err = file.WriteString(value[:len(value)/2])
				require.NoError(t, err)
				time.Sleep(300 * time.Millisecond)
				_, err = file.WriteString(value[len(value)/2:])
				require.NoError(t, err)
			}
		},
	} {
		t.Run("a swap each 3 s "+name+", with forged events beside", func(t *testing.T) {
			t.Parallel()
			path, swap := newSwap(t)
			r := newRotating(t, secretFile{t, path})
			var key atomic.Value
			key.Store("secret_0")
			var sent, refused, forged, letIn atomic.Int64
			stop := make(chan struct{})
			var wg sync.WaitGroup
			every := func(interval time.Duration, f func()) {
				wg.Go(func() {
					ticker := time.NewTicker(interval)
					defer ticker.Stop()
					for {
						select {
						case <-stop:
							return
						case <-ticker.C:
							wg.Go(f)
						}
					}
				})
			}
			every(time.Second/50, func() {
				sent.Add(1)
				if r.status(key.Load().(string), "doc") != 200 {
					refused.Add(1)
				}
			})
			every(time.Second/10, func() {
				forged.Add(1)
				if r.status("wrong", "doc") != 401 {
					letIn.Add(1)
				}
			})
			for i := range swaps {
				time.Sleep(3 * time.Second)
				next := fmt.Sprintf("secret_%d", i+1)
				swap(next)
				key.Store(next)
			}
			time.Sleep(3 * time.Second)
			close(stop)
			wg.Wait()
			t.Logf("%d of %d genuine events refused, %d of %d forged ones let in", refused.Load(), sent.Load(), letIn.Load(), forged.Load())
			assert.Zero(t, refused.Load())
			assert.Zero(t, letIn.Load())
		})
	}
}

// hang returns a wrapper for Caddy. After Caddy has opened the file `path` as many times as
// `opened` says, each further call that opens the file hangs, as on a dead file system.
func hang(t *testing.T, path string, opened int) (wrapper []string) {
	t.Helper()
	needs(t, "strace")
	if out, err := exec.Command("strace", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("this machine lets nobody trace: %s", out)
	}
	return []string{
		"strace", "-D", "-f", "-o", os.DevNull, "-P", path, "-e", "trace=openat",
		"-e", fmt.Sprintf("inject=openat:delay_enter=600s:when=%d+", opened+1),
	}
}

// release kills the tracer that makes a call of openat hang in the process p. While the tracer
// runs, p does not end, even after a kill.
func release(t *testing.T, p *process) {
	t.Helper()
	_, rest, _ := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)), "\nTracerPid:")
	tracer, err := strconv.Atoi(strings.Fields(rest)[0])
	require.NoError(t, err)
	require.Positive(t, tracer)
	require.NoError(t, syscall.Kill(tracer, syscall.SIGKILL))
	<-p.exited
}

func TestHungFileSystem(t *testing.T) {
	t.Parallel()
	site := func(b *backend) string {
		return "http://:{{port}} {\n\tinkit_webhook {\n\t\tsecret {file.{{dir}}/secret}\n\t}\n\treverse_proxy " + b.addr + "\n}\n"
	}
	b := newBackend(t, good)

	t.Run("while Caddy runs", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		path := writeFile(t, dir+"/secret", "good\n")
		c := newCaddy(t, "", strings.Replace(site(b), "{{dir}}", dir, 1))
		c.wrapper = hang(t, path, 1)
		c.start()
		client := &http.Client{Timeout: time.Minute}
		var slowest time.Duration
		for range 40 { // each event requests a reload of the secret, and the first reload never returns
			body := event("doc")
			began := time.Now()
			got, err := send(t.Context(), client, webhookURL(c, "/"), body, int64(len(body)), sign("good", body))
			require.NoError(t, err)
			assert.Equal(t, 200, got.status)
			slowest = max(slowest, time.Since(began))
			time.Sleep(20 * time.Millisecond)
		}
		t.Logf("the slowest of 40 genuine events took %v", slowest)
		assert.Less(t, slowest, 3*time.Second)
		began := time.Now()
		body := event("doc")
		got, err := send(t.Context(), client, webhookURL(c, "/"), body, int64(len(body)), sign("newer", body))
		require.NoError(t, err)
		assert.Equal(t, 401, got.status)
		t.Logf("one that does not match took %v", time.Since(began))
		assert.Less(t, time.Since(began), 5*time.Second)
		require.NoError(t, c.cmd.Process.Signal(syscall.SIGTERM))
		waitFor(t, "Caddy ends", nil, func() bool { return strings.Contains(c.output.String(), `"msg":"shutdown complete"`) })
		release(t, c.process)
		assert.Zero(t, c.cmd.ProcessState.ExitCode())
	})
	t.Run("while the configuration is loaded", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		path := writeFile(t, dir+"/secret", "good\n")
		c := newCaddy(t, "", strings.Replace(site(b), "{{dir}}", dir, 1))
		c.wrapper = hang(t, path, 0)
		c.run()
		began := time.Now()
		waitFor(t, "the load fails", nil, func() bool { return strings.Contains(c.output.String(), "secret 1: could not be read within 10 s") })
		assert.GreaterOrEqual(t, time.Since(began), 9*time.Second)
		release(t, c.process)
		assert.Equal(t, 1, c.cmd.ProcessState.ExitCode())
	})
}
