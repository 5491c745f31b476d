package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The values of secrets and the signatures show nowhere, whatever the log level,
// as long as the filter is in place that the README recommends.
func TestNothingConfidentialShows(t *testing.T) {
	const next = "the_next_secret"
	b := newBackend(t, modeGood)
	file := writeFile(t, t.TempDir()+"/next", next+"\n")
	options, site := recipe(t, "Logs and traces", "localhost:9000", b.addr, "output file rejections.log", "output file {{dir}}/rejections.log",
		"inkit_webhook {env.INKIT_WEBHOOK_SECRET}", "inkit_webhook {env.INKIT_WEBHOOK_SECRET} {\n\t\tsecret {file."+file+"} next\n\t}")
	options = strings.NewReplacer(
		"\tlog {\n", "\tlog {\n\t\toutput file {{dir}}/log\n\t\tlevel DEBUG\n",
		"\tlog rejections {\n", "\tlog rejections {\n\t\tlevel DEBUG\n",
		"thereafter 100\n", "thereafter 1\n", // all of them
	).Replace(options)
	c := startCaddy(t, options+"\n\tmetrics", site, "OTEL_TRACES_EXPORTER=none")

	requests := 10_000
	if raceEnabled {
		requests = 3000 // the run without it has the figures
	}
	var responses lockedBuffer
	var statuses [600]atomic.Int64
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxConnsPerHost: 16, MaxIdleConnsPerHost: 16}}
	defer client.CloseIdleConnections()
	inParallel(16, requests, func(i int) {
		body := event(fmt.Sprintf("doc_%d", i))
		signatures := [][]string{
			{sign(secret, body)},
			{sign(next, body)},
			{sign("wrong", body)},
			{"sha256=" + sign(secret, body)},
			{sign(secret, body), sign(next, body)},
			nil,
		}[i%6]
		if i%100 == 0 {
			body = append(body, make([]byte, 70_000)...)
		}
		got, err := send(context.Background(), client, webhookURL(c, "/"), body, int64(len(body)), signatures...)
		if err != nil {
			t.Error(err)
			return
		}
		statuses[got.status].Add(1)
		fmt.Fprint(&responses, got.body, got.header)
	})
	t.Logf("%d requests: %d answered 200, %d 401, %d 413", requests, statuses[200].Load(), statuses[401].Load(), statuses[413].Load())
	assert.EqualValues(t, requests, statuses[200].Load()+statuses[401].Load()+statuses[413].Load())
	for _, status := range []int{200, 401, 413} {
		assert.Positive(t, statuses[status].Load(), status)
	}
	require.Len(t, b.records(), int(statuses[200].Load()))

	config := c.get("http://" + c.admin + "/config/")
	autosave := readFile(t, c.path("caddy/autosave.json"))
	for _, configured := range []string{config, autosave} {
		assert.Contains(t, configured, "{env.INKIT_WEBHOOK_SECRET}")
		assert.Contains(t, configured, "{file."+file+"}")
	}
	metrics := c.get("http://" + c.admin + "/metrics")
	assert.Contains(t, metrics, `caddy_inkit_webhook_requests_total{outcome="verified",secret="next"}`)
	log := readFile(t, c.path("log")) + readFile(t, c.path("rejections.log")) + c.output.String()
	require.Positive(t, strings.Count(log, "upstream roundtrip"), "the lines are there that print header fields")
	ours := 0
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"logger":"http.handlers.inkit_webhook"`) {
			ours++
			if strings.Contains(line, "resource_id") {
				t.Fatal("a body shows in a line of ours")
			}
		}
	}
	assert.Equal(t, requests, ours, "a line for each request")
	for _, confidential := range []string{secret, next} {
		for name, text := range map[string]string{
			"config": config, "autosave.json": autosave, "log": log, "responses": responses.String(), "metrics": metrics,
		} {
			if strings.Contains(text, confidential) {
				t.Errorf("a secret shows in %s", name)
			}
		}
	}
	signatures := make(map[string]bool)
	for i := range requests {
		for _, key := range []string{secret, next, "wrong"} {
			signatures[sign(key, event(fmt.Sprintf("doc_%d", i)))] = true
		}
	}
	for _, digits := range regexp.MustCompile(`[0-9a-f]{64}`).FindAllString(log, -1) {
		if signatures[digits] {
			t.Fatal("a signature shows in the log")
		}
	}
}

// inParallel calls f for 0 to n-1.
func inParallel(workers, n int, f func(i int)) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// secretFile is a file with a secret that is replaced as a whole, by a rename.
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

// rotating is a site with secrets in files, on which 50 events a second arrive.
type rotating struct {
	t      *testing.T
	c      *caddy
	b      *backend
	client *http.Client
}

func newRotating(t *testing.T, files ...secretFile) *rotating {
	t.Helper()
	b := newBackend(t, modeGood)
	var secrets strings.Builder
	for i, f := range files {
		fmt.Fprintf(&secrets, "\t\tsecret {file.%s} file%d\n", f.path, i+1)
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

// until sends 50 events a second that are signed with key until one gets status,
// and returns how long that took.
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
	t.Run("a new secret is accepted within a second", func(t *testing.T) {
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
			worst = max(worst, r.until(next, 200, 2*time.Second))
			assert.Equal(t, 401, r.status(current, "doc"), "the old one is out with it")
		}
		t.Logf("10 swaps: the slowest took %v", worst)
		// a second, and the time to the next of 50 events a second
		assert.Less(t, worst, time.Second+100*time.Millisecond)
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
	// The recipe: the new secret goes into the file that is not in use, and the one
	// in use stays. Inkit signs with the new one when Caddy knows it.
	t.Run("with both listed, no event is refused over ten swaps", func(t *testing.T) {
		t.Parallel()
		files := []secretFile{newSecretFile(t, "secret_0"), newSecretFile(t, "unused")}
		r := newRotating(t, files...)
		var current atomic.Value
		current.Store("secret_0")
		var events, refused atomic.Int64
		swapped := make(chan struct{})
		go func() {
			defer close(swapped)
			for i := range 10 {
				time.Sleep(2 * time.Second)
				next := fmt.Sprintf("secret_%d", i+1)
				files[(i+1)%2].replace(next)
				r.until(next, 200, 2*time.Second) // one trial event, which is not counted
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
			if i >= 2000 {
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
		assert.Equal(t, 2000, recorded)
		t.Logf("%d events over 10 swaps, %d refused", events.Load(), refused.Load())
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
			for range 12 * 4 { // beyond the 10 s after which a matching secret is read again
				time.Sleep(time.Second / 4)
				assert.Equal(t, 200, r.status("good", "doc"))
				assert.Equal(t, 401, r.status("", "doc"), "the empty key")
			}
			assert.Equal(t, 1, strings.Count(r.c.output.String(), `"msg":"reading secrets again, the last good values stay in use"`), "one line a minute")
			assert.Contains(t, r.c.get("http://"+r.c.admin+"/metrics"), `caddy_inkit_webhook_secret_reloads_total{result="failed"} 1`)
			file.replace("better")
			r.until("better", 200, 2*time.Second)
		})
	}
}

// TestRecipeSecretFiles has files as Docker, Kubernetes and systemd lay them out.
func TestRecipeSecretFiles(t *testing.T) {
	b := newBackend(t, modeGood)
	site := func(t *testing.T, line string) string {
		t.Helper()
		require.Contains(t, readFile(t, "../../README.md"), "`"+line+"`", "the line is in the README")
		return "http://:{{port}} {\n\t" + line + "\n\treverse_proxy " + b.addr + "\n}\n"
	}
	status := func(c *caddy, key string) int {
		body := event("doc_1")
		return post(t, webhookURL(c, "/"), body, sign(key, body)).status
	}

	t.Run("Docker", func(t *testing.T) {
		// a file of its own that all may read, under the name of the secret
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(dir+"/inkit_webhook", []byte(secret), 0o444))
		c := startCaddy(t, "", strings.Replace(site(t, "inkit_webhook {file./run/secrets/inkit_webhook}"), "/run/secrets", dir, 1))
		assert.Equal(t, 200, status(c, secret))
		assert.Equal(t, 401, status(c, "wrong"))
	})
	t.Run("Kubernetes", func(t *testing.T) {
		// secret -> ..data/secret, ..data -> ..<time>: an update makes a new folder, and
		// moves a new link over ..data
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
		time.Sleep(time.Second)
		assert.Equal(t, 200, status(c, "second"), "without a reload")
		assert.Equal(t, 401, status(c, "first"))
	})
	t.Run("systemd", func(t *testing.T) {
		// a folder that only the service may open, whose path is in the environment
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

// TestMetrics: every outcome is counted, for two sites by the names of their
// secrets, and reloads change nothing.
func TestMetrics(t *testing.T) {
	t.Parallel()
	for _, option := range []string{"", "\tmetrics"} {
		t.Run(map[string]string{"": "without the metrics option", "\tmetrics": "with the metrics option"}[option], func(t *testing.T) {
			t.Parallel()
			b := newBackend(t, modeGood)
			c := startCaddy(t, option, `http://:{{port}} {
	handle /documents {
		inkit_webhook {
			secret documents_secret documents
		}
		reverse_proxy `+b.addr+`
	}
	handle /mail {
		inkit_webhook {
			secret mail_old mail-old
			secret mail_new mail-new
		}
		reverse_proxy `+b.addr+`
	}
}
`)
			count := func(outcome, secret string) string {
				line := fmt.Sprintf("\ncaddy_inkit_webhook_requests_total{outcome=%q,secret=%q} ", outcome, secret)
				_, rest, found := strings.Cut(c.get("http://"+c.admin+"/metrics"), line)
				require.True(t, found, line)
				value, _, _ := strings.Cut(rest, "\n")
				return value
			}
			assert.Equal(t, "0", count("verified", "mail-new"), "there from the start")
			body := event("doc_1")
			large := make([]byte, 70_000)
			reloads := 20
			if raceEnabled {
				reloads = 3 // the command takes a second to start with the race detector
			}
			for range reloads {
				for range 2 {
					assert.Equal(t, 200, post(t, webhookURL(c, "/documents"), body, sign("documents_secret", body)).status)
				}
				assert.Equal(t, 200, post(t, webhookURL(c, "/mail"), body, sign("mail_new", body)).status)
				assert.Equal(t, 401, post(t, webhookURL(c, "/mail"), body, sign("documents_secret", body)).status)
				assert.Equal(t, 401, post(t, webhookURL(c, "/mail"), body).status)
				assert.Equal(t, 401, post(t, webhookURL(c, "/mail"), body, "x").status)
				assert.Equal(t, 413, post(t, webhookURL(c, "/mail"), large, sign("mail_new", large)).status)
				assert.Equal(t, 405, rawStatus(t, c.addr, "GET /mail HTTP/1.1\r\nHost: x\r\n\r\n"))
				assert.Equal(t, 400, rawStatus(t, c.addr, "POST /mail HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nInkit-Signature: "+sign("mail_new", body)+"\r\n\r\nzz\r\n"))
				c.reload()
				// Caddy goes on to stop the previous server, and a connection that
				// this one took meanwhile ends without an answer: TestReloadUnderLoad
				time.Sleep(300 * time.Millisecond)
			}
			for _, tt := range []struct {
				outcome, secret string
				want            int
			}{
				{"verified", "documents", 2 * reloads},
				{"verified", "mail-old", 0},
				{"verified", "mail-new", reloads},
				{"method_not_allowed", "", reloads},
				{"signature_missing", "", reloads},
				{"signature_malformed", "", reloads},
				{"body_too_large", "", reloads},
				{"body_unreadable", "", reloads},
				{"signature_mismatch", "", reloads},
			} {
				assert.Equal(t, fmt.Sprint(tt.want), count(tt.outcome, tt.secret), "%s %s", tt.outcome, tt.secret)
			}
		})
	}
}

// TestRecipeTraces has Caddy print its spans, for which OpenTelemetry has an exporter.
func TestRecipeTraces(t *testing.T) {
	b := newBackend(t, modeGood)
	options, site := recipe(t, "Logs and traces", "localhost:9000", b.addr, "output file rejections.log", "output file {{dir}}/rejections.log")
	c := startCaddy(t, options, site, "OTEL_TRACES_EXPORTER=console", "OTEL_BSP_SCHEDULE_DELAY=50")
	body := event("doc_traced")
	assert.Equal(t, 200, post(t, webhookURL(c, "/"), body, sign(secret, body)).status)
	assert.Equal(t, 401, post(t, webhookURL(c, "/"), body, sign("wrong", body)).status)
	attribute := func(key, value string) func() bool {
		return func() bool {
			output := strings.Join(strings.Fields(c.output.String()), "")
			return strings.Contains(output, `{"Key":"`+key+`","Value":{"Type":"STRING","Value":"`+value+`"}}`)
		}
	}
	waitFor(t, "the outcome of the verified event on its span", c.process, attribute("inkit_webhook.outcome", "verified"))
	waitFor(t, "its type", c.process, attribute("inkit_webhook.event_type", "DOCUMENT_CREATE_FINISHED"))
	waitFor(t, "the outcome of the rejected one", c.process, attribute("inkit_webhook.outcome", "signature_mismatch"))
	waitFor(t, "which has no type", c.process, attribute("inkit_webhook.event_type", ""))
}

// TestRecipeRotation plays the walk through a rotation with the Caddyfile, the
// files and the commands of the README.
func TestRecipeRotation(t *testing.T) {
	t.Parallel()
	b := newBackend(t, modeGood)
	dir := t.TempDir()
	writeFile(t, dir+"/blue", "old_secret\n")
	writeFile(t, dir+"/green", "anything that nobody knows\n")
	options, site := recipe(t, "Rotate a secret", "localhost:9000", b.addr, "/etc/caddy/inkit", dir)
	c := startCaddy(t, options, site)
	status := func(key string) int {
		body := event("doc_1")
		return post(t, webhookURL(c, "/webhook"), body, sign(key, body)).status
	}
	metric := func(name string) string {
		_, rest, _ := strings.Cut(c.get("http://"+c.admin+"/metrics"), fmt.Sprintf(`outcome="verified",secret=%q} `, name))
		value, _, _ := strings.Cut(rest, "\n")
		return value
	}
	assert.Equal(t, 200, status("old_secret"))
	time.Sleep(time.Second)
	command := func(i int, stdin string) {
		_, section, _ := strings.Cut(readFile(t, "../../README.md"), "\n### Rotate a secret\n")
		_, block, _ := strings.Cut(section, "```sh\n")
		cmd := exec.Command("sh", "-ec", strings.NewReplacer("/etc/caddy/inkit", dir).Replace(strings.Split(block, "\n")[i]))
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	command(0, "new_secret\n")
	assert.Equal(t, 200, status("new_secret"), "the first event that Inkit signs with it")
	assert.Equal(t, 200, status("old_secret"), "and one that was under way")
	assert.Equal(t, []string{"2", "1"}, []string{metric("blue"), metric("green")})

	command(1, "")
	waitFor(t, "the old secret is refused", c.process, func() bool { time.Sleep(100 * time.Millisecond); return status("old_secret") == 401 })
	assert.Equal(t, 200, status("new_secret"))
}
