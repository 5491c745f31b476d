package e2e

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The value of a secret shows nowhere, whatever the log level: not in the admin
// API, the saved configuration, the metrics, the log or a response.
func TestSecretsShowNowhere(t *testing.T) {
	const next = "the_next_secret"
	b := newBackend(t, modeGood)
	file := writeFile(t, t.TempDir()+"/next", next+"\n")
	c := startCaddy(t, "\tdebug", `http://:{{port}} {
	log
	inkit_webhook {
		secret {env.INKIT_WEBHOOK_SECRET} current
		secret {file.`+file+`} next
	}
	reverse_proxy `+b.addr+`
}
`)
	body := event("doc_1")
	var responses strings.Builder
	for _, signature := range []string{sign(secret, body), sign(next, body), sign("wrong", body), "malformed", ""} {
		got := post(t, webhookURL(c, "/"), body, signature)
		responses.WriteString(got.body)
		for _, values := range got.header {
			responses.WriteString(strings.Join(values, ""))
		}
	}
	require.Len(t, b.records(), 2)

	config := c.get("http://" + c.admin + "/config/")
	autosave := readFile(t, c.path("caddy/autosave.json"))
	for _, configured := range []string{config, autosave} {
		assert.Contains(t, configured, "{env.INKIT_WEBHOOK_SECRET}")
		assert.Contains(t, configured, "{file."+file+"}")
	}
	log := c.output.String()
	assert.Contains(t, log, "verified webhook", "the level is debug")
	ours := ""
	for line := range strings.Lines(log) {
		if strings.Contains(line, "http.handlers.inkit_webhook") {
			ours += line
		}
	}
	for _, confidential := range []string{secret, next} {
		for _, text := range []string{config, autosave, log, responses.String(), c.get("http://" + c.admin + "/metrics")} {
			assert.NotContains(t, text, confidential)
		}
	}
	for _, confidential := range []string{sign(secret, body), sign("wrong", body), "resource_id"} {
		assert.NotContains(t, ours, confidential)
	}
}

// A secret file that is replaced while Caddy runs takes effect by itself.
func TestSecretFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	replace := func(value string) {
		require.NoError(t, os.Rename(writeFile(t, dir+"/new", value+"\n"), dir+"/secret"))
	}
	replace("first")
	b := newBackend(t, modeGood)
	c := startCaddy(t, "", strings.ReplaceAll(strings.Replace(bareSite, "{env.INKIT_WEBHOOK_SECRET}", "{file."+dir+"/secret}", 1), "UPSTREAMS", b.addr))
	body := event("doc_1")
	status := func(key string) int { return post(t, webhookURL(c, "/"), body, sign(key, body)).status }
	assert.Equal(t, 200, status("first"))
	time.Sleep(time.Second)
	replace("second")
	assert.Equal(t, 200, status("second"), "the first event that the new secret signed")
	assert.Equal(t, 401, status("first"))
	require.NoError(t, os.Remove(dir+"/secret"))
	time.Sleep(time.Second)
	assert.Equal(t, 401, status(""))
	assert.Equal(t, 200, status("second"), "the last good value stays")
}

func TestMetricsOutliveReloads(t *testing.T) {
	b := newBackend(t, modeGood)
	site := strings.ReplaceAll(bareSite, "UPSTREAMS", b.addr)
	c := startCaddy(t, "", site)
	metrics := func() string { return c.get("http://" + c.admin + "/metrics") }
	assert.Contains(t, metrics(), `caddy_inkit_webhook_requests_total{outcome="verified",secret="1"} 0`, "there from the start")
	body := event("doc_1")
	for range 3 {
		assert.Equal(t, 200, post(t, webhookURL(c, "/"), body, sign(secret, body)).status)
		assert.Equal(t, 401, post(t, webhookURL(c, "/"), body).status)
		c.reload()
	}
	assert.Contains(t, metrics(), `caddy_inkit_webhook_requests_total{outcome="verified",secret="1"} 3`)
	assert.Contains(t, metrics(), `caddy_inkit_webhook_requests_total{outcome="signature_missing",secret=""} 3`)
}

func TestCommandSignsLikeOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	dir := t.TempDir()
	writeFile(t, dir+"/secret", secret+"\n")
	for range 20 {
		content := make([]byte, rand.IntN(10_000))
		for i := range content {
			content[i] = byte(rand.Uint32())
		}
		file := writeFile(t, dir+"/body", string(content))
		want, err := exec.Command(openssl, "dgst", "-sha256", "-hmac", secret, "-r", file).Output()
		require.NoError(t, err)
		got, err := exec.Command(caddyPath, "inkit-webhook", "sign", "--secret-file", dir+"/secret", file).Output()
		require.NoError(t, err)
		signature := strings.Fields(string(want))[0]
		assert.Equal(t, signature+"\n", string(got))

		out, err := exec.Command(caddyPath, "inkit-webhook", "verify", "--secret-file", dir+"/secret", "--signature", signature, file).Output()
		require.NoError(t, err)
		assert.Equal(t, dir+"/secret\n", string(out))
		out, err = exec.Command(caddyPath, "inkit-webhook", "verify", "--secret-file", dir+"/secret", "--signature", strings.ToUpper(signature), file).Output()
		require.Error(t, err)
		assert.Contains(t, string(out), "upper-case")
	}
}
