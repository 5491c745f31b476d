//go:build unix

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// With the log filter of the recipe "Logs and traces", no log shows secrets or signatures, not
// even at level DEBUG.
func TestNothingConfidentialShows(t *testing.T) {
	t.Parallel()
	const next = "the_next_secret"
	b := newBackend(t, good)
	file := writeFile(t, t.TempDir()+"/next", next+"\n")
	options, site := recipe(t, "Logs and traces", "localhost:9000", b.addr, "output file rejections.log", "output file {{dir}}/rejections.log",
		"inkit_webhook {env.INKIT_WEBHOOK_SECRET}", "inkit_webhook {env.INKIT_WEBHOOK_SECRET} {\n\t\t\tname hook\n\t\t\tsecret {file."+file+"} name next\n\t\t}")
	options = strings.NewReplacer(
		"\tlog {\n", "\tlog {\n\t\toutput file {{dir}}/log\n\t\tlevel DEBUG\n",
		"\tlog rejections {\n", "\tlog rejections {\n\t\tlevel DEBUG\n",
		"thereafter 100\n", "thereafter 1\n", // no sampling
	).Replace(options)
	c := startCaddy(t, options+"\n\tmetrics", site, "OTEL_TRACES_EXPORTER=none")

	requests := size(10_000, 2000)
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
		got, err := send(context.Background(), client, webhookURL(c, "/webhook"), body, int64(len(body)), signatures...)
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
	assert.Contains(t, metrics, `caddy_inkit_webhook_requests_total{outcome="verified",secret="next",webhook="hook"}`)
	log := readFile(t, c.path("log")) + readFile(t, c.path("rejections.log")) + c.output.String()
	require.Positive(t, strings.Count(log, "upstream roundtrip"), "the lines are there that print header fields")
	ours := 0
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"logger":"http.handlers.inkit_webhook"`) {
			ours++
			assert.Contains(t, line, `"webhook":"hook"`)
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

// inParallel calls f with each number from 0 to n-1, several numbers in parallel.
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

// TestMetrics: Caddy counts the requests of each webhook by outcome, and the verified events
// also by secret. Reloads do not reset the counters.
func TestMetrics(t *testing.T) {
	t.Parallel()
	for _, option := range []string{"", "\tmetrics"} {
		t.Run(map[string]string{"": "without the metrics option", "\tmetrics": "with the metrics option"}[option], func(t *testing.T) {
			t.Parallel()
			b := newBackend(t, good)
			c := startCaddy(t, option, `http://:{{port}} {
	handle /documents {
		inkit_webhook {
			name documents
			secret "documents_secret" name documents
		}
		reverse_proxy `+b.addr+`
	}
	handle /mail {
		inkit_webhook {
			name mail
			secret "mail_old" name mail-old
			secret "mail_new" name mail-new
		}
		reverse_proxy `+b.addr+`
	}
}
`)
			count := func(outcome, secret, webhook string) string {
				line := fmt.Sprintf("\ncaddy_inkit_webhook_requests_total{outcome=%q,secret=%q,webhook=%q} ", outcome, secret, webhook)
				_, rest, found := strings.Cut(c.get("http://"+c.admin+"/metrics"), line)
				require.True(t, found, line)
				value, _, _ := strings.Cut(rest, "\n")
				return value
			}
			assert.Equal(t, "0", count("verified", "mail-new", "mail"), "there from the start")
			body := event("doc_1")
			large := make([]byte, 70_000)
			reloads := 5
			if raceEnabled {
				reloads = 3 // with the race detector, the command takes a second to start
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
				// Caddy is still stopping the previous server, and connections to that server
				// end without a response: see TestReloadUnderLoad
				time.Sleep(300 * time.Millisecond)
			}
			for _, tt := range []struct {
				outcome, secret, webhook string
				want                     int
			}{
				{"verified", "documents", "documents", 2 * reloads},
				{"verified", "mail-old", "mail", 0},
				{"verified", "mail-new", "mail", reloads},
				{"method_not_allowed", "", "mail", reloads},
				{"signature_missing", "", "mail", reloads},
				{"signature_malformed", "", "mail", reloads},
				{"body_too_large", "", "mail", reloads},
				{"body_unreadable", "", "mail", reloads},
				{"signature_mismatch", "", "mail", reloads},
				{"signature_mismatch", "", "documents", 0},
			} {
				assert.Equal(t, fmt.Sprint(tt.want), count(tt.outcome, tt.secret, tt.webhook), "%s %s %s", tt.outcome, tt.secret, tt.webhook)
			}
			metrics := c.get("http://" + c.admin + "/metrics")
			assert.Contains(t, metrics, fmt.Sprintf("\ncaddy_inkit_webhook_deliveries_total{result=\"accepted\",webhook=\"documents\"} %d\n", 2*reloads))
			assert.Contains(t, metrics, "\ncaddy_inkit_webhook_deliveries_total{result=\"failed\",webhook=\"mail\"} 0\n")

			b.close()
			assert.Equal(t, 502, post(t, webhookURL(c, "/mail"), body, sign("mail_new", body)).status)
			assert.Contains(t, c.get("http://"+c.admin+"/metrics"), "\ncaddy_inkit_webhook_deliveries_total{result=\"failed\",webhook=\"mail\"} 1\n", "what was verified and not delivered")
		})
	}
}

// TestRecipeTraces makes Caddy print its spans, with an exporter of OpenTelemetry.
func TestRecipeTraces(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	options, site := recipe(t, "Logs and traces", "localhost:9000", b.addr, "output file rejections.log", "output file {{dir}}/rejections.log")
	c := startCaddy(t, options, site, "OTEL_TRACES_EXPORTER=console", "OTEL_BSP_SCHEDULE_DELAY=50")
	body := event("doc_traced")
	assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
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
