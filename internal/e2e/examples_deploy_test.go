//go:build unix

package e2e

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// These tests have no container engine, no cluster and no systemd. They run the Caddyfiles,
// the backend and Prometheus. They run the commands of each README outside a container.
// examples/test checks the manifests.

// deployed is a Caddy with the Caddyfile of a container. The method `shell` runs scripts outside
// a container.
type deployed struct {
	*caddy
	metrics, secretFile string
}

// deploy starts Caddy with the Caddyfile of an example, which has sites at :8080 and :9180.
func deploy(t *testing.T, caddyfile, secretPath string, pairs ...string) *deployed {
	t.Helper()
	d := &deployed{caddy: newCaddy(t, "", ""), metrics: freeAddr(t)}
	d.secretFile = writeFile(t, d.path("secret"), "demo")
	_, site, found := strings.Cut("\n"+caddyfile, "\n{\n") // after the comment
	require.True(t, found)
	pairs = append([]string{
		"http://:8080 {", "http://:" + port(d.addr) + " {",
		"http://:9180 {", "http://:" + port(d.metrics) + " {",
		"{file." + secretPath + "}", "{file." + d.secretFile + "}",
	}, pairs...)
	site = replaceEach(t, site, pairs...)
	options, site, found := strings.Cut(site, "\n}\n")
	require.True(t, found)
	d.configure(options, site)
	d.start()
	return d
}

// shell runs a script with a replacement for the program docker or kubectl.
func (d *deployed) shell(program, standIn, script string) string {
	d.t.Helper()
	bin := d.t.TempDir()
	require.NoError(d.t, os.Symlink(caddyPath, bin+"/caddy"))
	require.NoError(d.t, os.WriteFile(bin+"/"+program, []byte("#!/bin/sh\n"+standIn+"\n"), 0o700))
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Env = d.dir, append(d.env, "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	require.NoError(d.t, err, "%s\n%s", script, out)
	return string(out)
}

func TestDockerExample(t *testing.T) {
	t.Parallel()
	needs(t, "python3", "prometheus", "curl")
	const from = "../../examples/docker/"
	upstream := freeAddr(t)
	d := deploy(t, readFile(t, from+"caddy/Caddyfile"), "/run/secrets/inkit_webhook", "backend:9000", upstream)
	script := writeFile(t, d.path("backend.py"), replaceEach(t, readFile(t, from+"backend.py"), `("0.0.0.0", 9000)`, `("127.0.0.1", `+port(upstream)+`)`))
	startBackend := func() *process {
		p := start(t, exec.Command("python3", script))
		waitFor(t, "the backend listens", p, listening(upstream))
		return p
	}
	backend := startBackend()
	control := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stop":
			backend.stop(t, syscall.SIGTERM)
		case "/start":
			backend = startBackend()
		}
	}))
	t.Cleanup(control.Close)
	// the replacement knows "docker compose exec caddy <command>" and "docker compose stop|start backend"
	docker := `case "$1 $2 $3" in
"compose exec caddy") shift 3; exec "$@";;
"compose stop backend"|"compose start backend") curl -fsS "` + control.URL + `/$2";;
*) exit 99;;
esac`
	blocks := docBlocks(t, from+"README.md", "sh")
	require.Len(t, blocks, 4)
	run := func(text string) string {
		return d.shell("docker", docker, replaceEach(t, text, "/run/secrets/inkit_webhook", d.secretFile, "localhost:8080", d.addr))
	}
	assert.Equal(t, "printf %s demo > inkit_webhook.secret\n", blocks[0].text)
	assert.Equal(t, "204 No Content\n", run(blocks[2].text))
	waitFor(t, "the backend has printed it", backend, func() bool {
		return strings.Contains(backend.output.String(), "DOCUMENT_CREATE_FINISHED doc_1 ")
	})
	out := run(blocks[3].text)
	assert.True(t, strings.HasPrefix(out, "200 OK\n"), out)
	assert.Contains(t, out, " doc_2 ", "it is in the list")
	waitFor(t, "it arrives when the backend is back", d.process, func() bool {
		return strings.Contains(backend.output.String(), "DOCUMENT_CREATE_FINISHED doc_2 ")
	})

	alerts, err := filepath.Abs("../../examples/monitoring/alerts.yml")
	require.NoError(t, err)
	config := writeFile(t, d.path("prometheus.yml"), replaceEach(t, readFile(t, from+"prometheus.yml"),
		"caddy:9180", d.metrics, "scrape_interval: 15s", "scrape_interval: 1s", "alerts.yml", alerts))
	addr := freeAddr(t)
	prometheus := start(t, exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+d.path("tsdb"), "--web.listen-address="+addr))
	waitFor(t, "Prometheus has what the dashboard shows", prometheus, func() bool {
		if !listening(addr)() {
			return false
		}
		var answer struct {
			Data struct {
				Result []struct {
					Value [2]any
				}
			}
		}
		err := json.Unmarshal([]byte(d.get("http://"+addr+`/api/v1/query?query=caddy_inkit_webhook_requests_total{outcome="verified"}`)), &answer)
		return err == nil && len(answer.Data.Result) == 1 && answer.Data.Result[0].Value[1] == "2"
	})
	assert.Contains(t, d.get("http://"+addr+"/api/v1/rules"), "InkitWebhook", "the alerts are loaded")
}

func TestKubernetesExample(t *testing.T) {
	t.Parallel()
	const from = "../../examples/kubernetes/"
	_, text, found := strings.Cut(readFile(t, from+"inkit.yaml"), "\n  Caddyfile: |\n")
	require.True(t, found)
	text, _, found = strings.Cut(text, "\n---\n")
	require.True(t, found)
	var caddyfile strings.Builder
	for line := range strings.Lines(text + "\n") {
		caddyfile.WriteString(strings.TrimPrefix(line, "    "))
	}
	formatted, err := exec.Command(caddyPath, "fmt", writeFile(t, t.TempDir()+"/Caddyfile", caddyfile.String())).Output()
	require.NoError(t, err)
	assert.Equal(t, string(formatted), caddyfile.String(), "it is formatted")

	backend, status := newStatus(t, http.StatusServiceUnavailable)
	d := deploy(t, caddyfile.String(), "/etc/inkit/secret", "backend:9000", backend.addr, "shutdown_delay 5s", "shutdown_delay 1s")
	healthy := func() int {
		resp, err := http.Get("http://" + d.addr + "/healthz")
		require.NoError(t, err)
		resp.Body.Close()
		return resp.StatusCode
	}
	assert.Equal(t, http.StatusNoContent, healthy(), "while the backend is away")
	blocks := docBlocks(t, from+"README.md", "sh")
	require.Len(t, blocks, 2)
	// the replacement knows "kubectl exec inkit-0 -- <command>"
	out := d.shell("kubectl", `[ "$1 $2 $3" = "exec inkit-0 --" ] && shift 3 && exec "$@"`,
		replaceEach(t, blocks[1].text, "/etc/inkit/secret", d.secretFile, "localhost:8080", d.addr))
	assert.True(t, strings.HasPrefix(out, "200 OK\n"), out)
	assert.Contains(t, out, " doc_test ", "it is in the list")
	assert.Contains(t, d.get("http://"+d.metrics+"/metrics"), `caddy_inkit_queue_events{queue="default",state="pending"}`)
	status.Store(http.StatusOK)
	waitFor(t, "it is delivered", d.process, func() bool { return backend.of("doc_test").taken > 0 })
}

func TestSystemdExample(t *testing.T) {
	t.Parallel()
	const from = "../../examples/systemd/"
	dropIn := readFile(t, from+"override.conf")

	t.Run("the drop-in", func(t *testing.T) {
		t.Parallel()
		needs(t, "systemd-analyze")
		verify := func(t *testing.T, dropIn string) string {
			t.Helper()
			dir := t.TempDir()
			require.NoError(t, os.Mkdir(dir+"/caddy.service.d", 0o700))
			writeFile(t, dir+"/caddy.service.d/override.conf", dropIn)
			writeFile(t, dir+"/caddy.service", `[Unit]
Description=Caddy
After=network.target network-online.target
Requires=network-online.target

[Service]
Type=notify
User=caddy
Group=caddy
ExecStart=`+caddyPath+` run --environ --config /etc/caddy/Caddyfile
ExecReload=`+caddyPath+` reload --config /etc/caddy/Caddyfile --force
TimeoutStopSec=5s
LimitNOFILE=1048576
PrivateTmp=true
ProtectSystem=full
AmbientCapabilities=CAP_NET_ADMIN CAP_NET_BIND_SERVICE

[Install]
WantedBy=multi-user.target
`)
			cmd := exec.Command("systemd-analyze", "verify", dir+"/caddy.service")
			cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			return string(out)
		}
		assert.NotContains(t, verify(t, dropIn), "override.conf")
		for _, wrong := range [][2]string{
			{"TimeoutStopSec=30s", "TimeoutStopSecs=30s"},
			{"TimeoutStopSec=30s", "TimeoutStopSec=30 parsecs"},
			{"LoadCredential=inkit_webhook:/etc", "LoadCredential=inkit_webhook:etc"},
			{"StateDirectory=caddy", "StateDirectory=/var/lib/caddy"},
		} {
			require.Contains(t, dropIn, wrong[0])
			assert.Contains(t, verify(t, strings.Replace(dropIn, wrong[0], wrong[1], 1)), "override.conf", "%s is found to be wrong", wrong[1])
		}
	})

	t.Run("the Caddyfile", func(t *testing.T) {
		t.Parallel()
		backend := newTaker(t, all)
		credentials := t.TempDir()
		writeFile(t, credentials+"/inkit_webhook", secret+"\n")
		options, site, found := strings.Cut(readFile(t, from+"Caddyfile"), "\n}\n")
		require.True(t, found)
		_, options, found = strings.Cut(options, "{\n")
		require.True(t, found)
		require.Contains(t, options, "grace_period 20s")
		require.Contains(t, dropIn, "\nTimeoutStopSec=30s\n", "which is more")
		require.Contains(t, dropIn, "\nLoadCredential=inkit_webhook:")
		site = replaceEach(t, site, "example.com {", "http://:{{port}} {", "localhost:9000", backend.addr)
		c := startCaddy(t, options, site, "CREDENTIALS_DIRECTORY="+credentials)
		body := event("doc_1")
		assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
		assert.Positive(t, backend.of("doc_1").taken)
		// copied from the README
		const validate = "CREDENTIALS_DIRECTORY=/etc/caddy caddy validate --config /etc/caddy/Caddyfile"
		require.Contains(t, readFile(t, from+"README.md"), "`sudo "+validate+"`")
		cmd := exec.Command(caddyPath, "validate", "--config", from+"Caddyfile")
		cmd.Env = append(c.env, "CREDENTIALS_DIRECTORY="+credentials)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
}
