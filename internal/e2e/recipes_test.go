//go:build unix

package e2e

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// recipes returns the README and docs/recipes.md.
func recipes(t *testing.T) string {
	t.Helper()
	return readFile(t, "../../README.md") + "\n" + readFile(t, "../../docs/recipes.md")
}

// section returns the text under a heading. The heading must stand exactly once in
// README.md and docs/recipes.md together.
func section(t *testing.T, heading string) string {
	t.Helper()
	parts := strings.Split(recipes(t), "\n### "+heading+"\n")
	require.Len(t, parts, 2, "the heading %q stands once in README.md and docs/recipes.md", heading)
	section, _, _ := strings.Cut(parts[1], "\n### ")
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// recipe returns the Caddyfile under a heading, split into its global options and its site.
// The replacements adapt the Caddyfile to the test: for example, the site gets its own port.
// The Caddyfile must have the old text of each replacement.
func recipe(t *testing.T, heading string, replacements ...string) (options, site string) {
	t.Helper()
	replacements = append([]string{"example.com {", "http://:{{port}} {"}, replacements...)
	return split(replaceEach(t, block(t, heading, "caddyfile"), replacements...))
}

// split returns the global options of a Caddyfile, without the braces, and its sites.
func split(caddyfile string) (options, sites string) {
	for rest := caddyfile; ; {
		line, after, _ := strings.Cut(rest, "\n")
		switch {
		case line == "{":
			options, sites, _ = strings.Cut(after, "\n}\n")
			return options, sites
		case line != "" && !strings.HasPrefix(line, "#"):
			return "", caddyfile
		}
		rest = after
	}
}

func webhookURL(c *caddy, path string) string { return "http://" + c.addr + path }

func TestRecipeNothingLost(t *testing.T) { //nolint:tparallel // its subtests share a Caddy
	t.Parallel()
	b := newBackend(t, good)
	options, site := recipe(t, "Nothing verified gets lost", "localhost:9000", b.addr, "read_timeout 10s 1024", "read_timeout 1s 1024")
	c := startCaddy(t, options, site)
	body := event("doc_1")
	assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
	require.Len(t, b.records(), 1)
	assert.Equal(t, body, b.records()[0].Body)

	t.Run("while the backend restarts", func(t *testing.T) {
		b.close()
		answered := make(chan int)
		go func() {
			got, err := send(context.Background(), http.DefaultClient, webhookURL(c, "/webhook"), body, int64(len(body)), sign(secret, body))
			if err != nil {
				t.Error(err)
			}
			answered <- got.status
		}()
		time.Sleep(time.Second)
		b.listen()
		assert.Equal(t, 200, <-answered)
		assert.Len(t, b.records(), 2)
	})
	t.Run("a path that no route takes", func(t *testing.T) {
		assert.Equal(t, 404, post(t, webhookURL(c, "/webhok"), body, sign(secret, body)).status)
		assert.Len(t, b.records(), 2)
	})
	t.Run("a client that stops sending", func(t *testing.T) {
		began := time.Now()
		status := rawStatus(t, c.addr, "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 84\r\nInkit-Signature: "+sign(secret, body)+"\r\n\r\n{")
		assert.Equal(t, 408, status)
		assert.Less(t, time.Since(began), 5*time.Second)
	})
}

func TestRecipeSeveralWebhooks(t *testing.T) {
	t.Parallel()
	root, php := startPHP(t, `<?php echo $_SERVER['HTTP_IDEMPOTENCY_KEY'] . ' ' . file_get_contents('php://input');`)
	documents := newBackend(t, good)
	options, site := recipe(t, "Several webhooks with their own secrets, and PHP",
		"localhost:9000", documents.addr, "/srv/www", root, "unix//run/php/php-fpm.sock", php, "handle /mail.php", "handle /index.php")
	c := startCaddy(t, options, site, "INKIT_DOCUMENTS_SECRET=d", "INKIT_MAIL_SECRET=m")
	body := event("doc_1")
	for _, tt := range []struct {
		path, key string
		status    int
	}{
		{"/documents", "d", 200},
		{"/index.php", "m", 200},
		{"/documents", "m", 401},
		{"/index.php", "d", 401},
		{"/other", "d", 404},
	} {
		got := post(t, webhookURL(c, tt.path), body, sign(tt.key, body))
		assert.Equal(t, tt.status, got.status, "%s signed with %s", tt.path, tt.key)
		if tt.path == "/index.php" && tt.status == 200 {
			key, received, _ := strings.Cut(got.body, " ")
			assert.Equal(t, string(body), received)
			assert.NotEmpty(t, key)
		}
	}
	assert.Len(t, documents.records(), 1)
}

func TestRecipeRouteByEvent(t *testing.T) {
	t.Parallel()
	others, deleted := newBackend(t, good), newBackend(t, good)
	options, site := recipe(t, "Route by event", "localhost:9000", others.addr, "localhost:9001", deleted.addr)
	c := startCaddy(t, options, site)
	for _, body := range []string{
		`{"event_type":"DOCUMENT_DELETED","resource_id":"1"}`,
		`{"event_type":"FOLDER_DELETED","resource_id":"2"}`,
		`{"event_type":"MAIL_CREATE_FAILED","resource_id":"3"}`,
		`{"event_type":"DOCUMENT_PDF_ACCESS","resource_id":"4"}`,
		`{"event_type":"MAGIC_LINK_ACCESS","resource_id":"5"}`,
		`not JSON`,
	} {
		got := post(t, webhookURL(c, "/webhook"), []byte(body), sign(secret, []byte(body)))
		assert.Equal(t, 200, got.status, body)
		assert.Equal(t, strings.Contains(body, "_FAILED"), got.body == "noted", body)
	}
	assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), []byte(`{"event_type":"MAIL_CREATE_FAILED"}`), sign("wrong", nil)).status)
	kinds := func(b *backend) (kinds []string) {
		for _, r := range b.records() {
			kinds = append(kinds, r.Header.Get("X-Kind"))
		}
		return kinds
	}
	assert.Equal(t, []string{"document", "other"}, kinds(deleted))
	assert.Equal(t, []string{"document", "other", "other"}, kinds(others))
}

// TestHandleErrors: the errors reach the error routes, and no handler writes a second header.
func TestHandleErrors(t *testing.T) {
	const heading = "Error page, and an allow-list of addresses"
	b := newBackend(t, good)
	options, site := recipe(t, heading, "localhost:9000", b.addr, "192.0.2.0/24", "127.0.0.0/8")
	c := startCaddy(t, options, site)
	body := event("doc_1")
	assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	got := post(t, webhookURL(c, "/webhook"), body, sign("wrong", body))
	assert.Equal(t, 401, got.status)
	id, found := strings.CutPrefix(got.body, "This is for Inkit alone: signature_mismatch ")
	assert.True(t, found, got.body)
	require.NotEmpty(t, id)
	c.logged(`"err_id":"` + id + `"`) // the error page shows this id
	assert.Equal(t, "Inkit-Signature", got.header.Get("WWW-Authenticate"))
	got = post(t, webhookURL(c, "/webhook"), make([]byte, 70_000), sign(secret, body))
	assert.Equal(t, 413, got.status)
	assert.Equal(t, "413 Request Entity Too Large", got.body)
	b.close()
	got = post(t, webhookURL(c, "/webhook"), body, sign(secret, body))
	assert.Equal(t, 502, got.status)
	assert.Equal(t, "502 Bad Gateway", got.body)
	assert.NotContains(t, c.output.String(), "superfluous")

	t.Run("from an address that is not listed", func(t *testing.T) {
		options, site := recipe(t, heading, "localhost:9000", b.addr)
		c := startCaddy(t, options, site)
		got := post(t, webhookURL(c, "/webhook"), body, sign(secret, body))
		assert.Equal(t, 403, got.status)
		assert.Equal(t, 403, post(t, webhookURL(c, "/webhook"), body).status, "before the signature is looked at")
		assert.Equal(t, "403 Forbidden", got.body)
	})
}

func TestRecipeLogs(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	options, site := recipe(t, "Logs and traces", "localhost:9000", b.addr, "output file rejections.log", "output file {{dir}}/rejections.log")
	options = strings.Replace(options, "\tlog {\n", "\tlog {\n\t\tlevel DEBUG\n", 1)
	c := startCaddy(t, options, site, "OTEL_TRACES_EXPORTER=none")
	body := event("doc_logged")
	good, bad := sign(secret, body), sign("wrong", body)
	assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, good).status)
	for range 50 {
		assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, bad).status)
	}
	b.close()
	assert.Equal(t, 502, post(t, webhookURL(c, "/webhook"), body, good).status)
	c.logged(`"resource_id":"doc_logged"`)
	output := c.output.String()
	assert.Contains(t, output, `"event_type":"DOCUMENT_CREATE_FINISHED"`)
	assert.Contains(t, output, "upstream roundtrip", "the debug lines are there")
	rejections := readFile(t, c.path("rejections.log"))
	lines := strings.Count(rejections, "rejected webhook")
	assert.Positive(t, lines)
	assert.Less(t, lines, 50, "sampled")
	for _, log := range []string{rejections, output} {
		for _, confidential := range []string{good, bad, secret} {
			assert.NotContains(t, log, confidential)
		}
	}
}

// TestRecipeJSON loads the JSON into a running Caddy. The JSON must not request a
// certificate, because Caddy would add its own CA to the trusted CAs of this machine.
func TestRecipeJSON(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	_, block, found := strings.Cut(section(t, "JSON"), "```json\n")
	require.True(t, found)
	block, _, _ = strings.Cut(block, "```\n")
	c := startCaddy(t, "", "http://:{{port}} {\n\terror 404\n}\n")
	for _, replacement := range [][2]string{
		{"{\n\t\"apps\"", `{"admin": {"listen": "` + c.admin + `"}, "apps"`},                                // otherwise the admin endpoint moves to port 2019
		{`"listen": [":443"]`, `"automatic_https": {"disable": true}, "listen": [":` + port(c.addr) + `"]`}, // no certificate
		{`"host": ["example.com"]`, `"host": ["127.0.0.1"]`},
		{`"/var/lib/caddy/`, `"` + c.dir + `/`},
		{"localhost:9000", b.addr},
	} {
		require.Equal(t, 1, strings.Count(block, replacement[0]), replacement[0])
		block = strings.Replace(block, replacement[0], replacement[1], 1)
	}
	resp, err := http.Post("http://"+c.admin+"/load", "application/json", strings.NewReader(block))
	require.NoError(t, err)
	problem, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	require.NoError(t, err)
	require.Equal(t, 200, resp.StatusCode, "%s", problem)
	c.settled()
	body := event("doc_1")
	assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
	assert.Equal(t, 404, post(t, webhookURL(c, "/webhok"), body, sign(secret, body)).status)
	require.Len(t, b.records(), 1)
	assert.Equal(t, body, b.records()[0].Body)
	waitFor(t, "the database is open", c.process, func() bool { // the event above did not need the database
		_, err := os.Stat(c.path("inkit_queue.db-reserve")) // Caddy creates this file last
		return err == nil
	})
	for _, suffix := range []string{"", "-wal", "-shm", "-reserve"} {
		info, err := os.Stat(c.path("inkit_queue.db" + suffix))
		require.NoError(t, err)
		assert.Equal(t, os.FileMode(0o600), info.Mode(), "nobody else may read %s", suffix)
	}
}

// TestQuickStart runs example.Caddyfile, and the commands in its comment and in the README.
func TestQuickStart(t *testing.T) {
	needs(t, "openssl", "curl", "sh")
	example := readFile(t, "../../example.Caddyfile")
	options, site, page := exampleSites(t)
	require.Contains(t, options, "log")
	c := startCaddy(t, options, site, "INKIT_WEBHOOK_SECRET=demo")

	var fromExample strings.Builder
	for line := range strings.Lines(example) {
		if command, ok := strings.CutPrefix(line, "#\t"); ok && !strings.Contains(command, "go run") {
			fromExample.WriteString(command)
		}
	}
	_, fromREADME, found := strings.Cut(readFile(t, "../../README.md"), "```sh\nbody=")
	require.True(t, found)
	fromREADME, _, _ = strings.Cut("body="+fromREADME, "```")
	for name, script := range map[string]string{"example.Caddyfile": fromExample.String(), "README.md": fromREADME} {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, script, "localhost:8080")
			script = strings.ReplaceAll(script, "localhost:8080", c.addr)
			script = strings.Replace(script, "curl ", "curl -sS -H 'Host: localhost' ", 1)
			out, err := exec.Command("sh", "-ec", script).CombinedOutput()
			require.NoError(t, err, "%s", out)
			assert.Contains(t, string(out), "HTTP/1.1 200 OK")
			assert.Contains(t, string(out), "\r\n\r\nverified DOCUMENT_CREATE_FINISHED doc_1")

			changed := strings.Replace(script, "Inkit-Signature: $signature", "Inkit-Signature: $(echo $signature | tr 0-9a-f 1-9a-f0)", 1)
			require.NotEqual(t, script, changed)
			out, err = exec.Command("sh", "-ec", changed).CombinedOutput()
			require.NoError(t, err, "%s", out)
			assert.Contains(t, string(out), "HTTP/1.1 401 Unauthorized")
		})
	}
	t.Run("send", func(t *testing.T) {
		cmd := exec.Command(caddyPath, "inkit-webhook", "send", "--resource-id", "doc_1", "http://localhost:"+port(c.addr)+"/webhook")
		cmd.Env = c.env
		out, err := cmd.Output()
		require.NoError(t, err)
		assert.Equal(t, "200 OK\nverified DOCUMENT_CREATE_FINISHED doc_1\n", string(out))
		cmd = exec.Command(caddyPath, "inkit-webhook", "send", "--resource-id", "doc_1", "http://localhost:"+port(c.addr)+"/webhook")
		cmd.Env = append(c.env, "INKIT_WEBHOOK_SECRET=wrong")
		out, err = cmd.Output()
		require.Error(t, err)
		assert.Equal(t, "401 Unauthorized\n", string(out))
	})
	t.Run("the page", func(t *testing.T) {
		_, path, found := strings.Cut(readFile(t, "../../README.md"), "http://localhost:8081/")
		require.True(t, found)
		path, _, _ = strings.Cut(path, ",")
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+page+"/"+path, nil)
		require.NoError(t, err)
		r.Host = "localhost"
		waitFor(t, "the page asks for a password", c.process, func() bool {
			res, err := http.DefaultClient.Do(r)
			return err == nil && res.Body.Close() == nil && res.StatusCode == http.StatusUnauthorized
		})
		r.SetBasicAuth("demo", "demo")
		waitFor(t, "the page shows the event", c.process, func() bool {
			res, err := http.DefaultClient.Do(r)
			require.NoError(t, err)
			defer res.Body.Close()
			content, err := io.ReadAll(res.Body)
			require.NoError(t, err)
			return res.StatusCode == http.StatusOK && strings.Contains(string(content), "<bdi>doc_1</bdi>")
		})
	})
}

// exampleSites returns example.Caddyfile, adapted to the test, and the address of its page.
func exampleSites(t *testing.T) (options, sites, page string) {
	t.Helper()
	page = freeAddr(t)
	example := readFile(t, "../../example.Caddyfile")
	options, sites = split(replaceEach(t, example, "\nhttp://localhost:8080 {", "\nhttp://localhost:{{port}} {", "\nhttp://localhost:8081 {", "\nhttp://localhost:"+port(page)+" {"))
	return options, sites, page
}
