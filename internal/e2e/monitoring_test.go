//go:build unix

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const monitoring = "../../examples/monitoring"

// TestAlertRules runs the rules' own tests, and then with every rule broken in one
// way: each alert has a case that fires and one that must not, so that they fail.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed")
	}
	run := func(dir string, args ...string) (string, error) {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts.test.yml"}, {"check", "config", "prometheus.yml"}} {
		out, err := run(monitoring, args...)
		require.NoError(t, err, out)
		assert.Contains(t, out, "SUCCESS")
	}

	rules := readFile(t, monitoring+"/alerts.yml")
	dir := t.TempDir()
	writeFile(t, dir+"/alerts.test.yml", readFile(t, monitoring+"/alerts.test.yml"))
	ruleForm := regexp.MustCompile(`(?s)- alert: (\w+)\n +(expr: .+?\n)        (?:for|labels):`)
	alerts := ruleForm.FindAllStringSubmatch(rules, -1)
	require.Len(t, alerts, strings.Count(rules, "- alert:"))
	linesOf := func(expr string) (lines []string) {
		for line := range strings.Lines(strings.TrimPrefix(strings.TrimPrefix(expr, "expr: "), "|\n")) {
			lines = append(lines, strings.TrimSpace(line))
		}
		return lines
	}
	// broken returns what the tests say of rules whose expressions are changed
	broken := func(change func(lines []string) []string) string {
		changed := rules
		for _, alert := range alerts {
			const indent = "\n          "
			require.Equal(t, 1, strings.Count(changed, alert[2]))
			changed = strings.Replace(changed, alert[2], "expr: |"+indent+strings.Join(change(linesOf(alert[2])), indent)+"\n", 1)
		}
		writeFile(t, dir+"/alerts.yml", changed)
		out, err := run(dir, "check", "rules", "alerts.yml")
		require.NoError(t, err, out)
		out, err = run(dir, "test", "rules", "alerts.test.yml")
		require.Error(t, err, "nothing fails")
		return out
	}
	never := broken(func([]string) []string { return []string{"vector(0) > 0"} })
	always := broken(func(lines []string) []string {
		return append(lines, "or", `label_replace(vector(1), "always", "yes", "", "")`)
	})
	for _, alert := range alerts {
		failed := `alertname: ` + alert[1] + `, time: \w+, \n +exp:\[`
		assert.Regexp(t, failed+`\n +0:`, never, "no case has %s fire", alert[1])
		assert.Regexp(t, failed+`\], \n`, always, "there is no case in which %s must not fire", alert[1])
	}
	for i := 1; i < 7; i += 2 { // the line of an operator, which is left out with the one that follows
		var without string
		for _, alert := range alerts {
			lines := linesOf(alert[2])
			if i >= len(lines) {
				continue
			}
			require.Contains(t, []string{"and", "or", "unless"}, lines[i])
			if without == "" {
				without = broken(func(lines []string) []string {
					if i < len(lines) {
						lines = slices.Delete(lines, i, i+2)
					}
					return lines
				})
			}
			assert.Contains(t, without, "alertname: "+alert[1]+",", "no case needs its %s", lines[i])
		}
	}
}

// TestDashboard asks a Prometheus, which scrapes a Caddy, what the panels ask.
func TestDashboard(t *testing.T) {
	t.Parallel()
	prometheus, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("prometheus is not installed")
	}
	b := newBackend(t, modeGood)
	file := newSecretFile(t, "from_file")
	c := startCaddy(t, "\tmetrics", `http://:{{port}} {
	inkit_webhook {
		secret {env.INKIT_WEBHOOK_SECRET} name old
		secret {file.`+file.path+`} name new
	}
	reverse_proxy `+b.addr+`
}
`)
	dir, addr := t.TempDir(), freeAddr(t)
	config := readFile(t, monitoring+"/prometheus.yml")
	for from, to := range map[string]string{"scrape_interval: 15s": "scrape_interval: 1s", "localhost:2019": c.admin} {
		require.Contains(t, config, from)
		config = strings.ReplaceAll(config, from, to)
	}
	writeFile(t, dir+"/alerts.yml", readFile(t, monitoring+"/alerts.yml"))
	p := start(t, exec.Command(prometheus, "--config.file="+writeFile(t, dir+"/prometheus.yml", config),
		"--storage.tsdb.path="+dir+"/data", "--web.listen-address="+addr))
	waitFor(t, "Prometheus is ready", p, func() bool {
		resp, err := http.Get("http://" + addr + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})

	type sample struct {
		Metric map[string]string
		Value  [2]any
	}
	query := func(expr string) []sample {
		body := c.get("http://" + addr + "/api/v1/query?query=" + url.QueryEscape(expr))
		var answer struct {
			Status, Error string
			Data          struct{ Result []sample }
		}
		require.NoError(t, json.Unmarshal([]byte(body), &answer), body)
		require.Equal(t, "success", answer.Status, answer.Error)
		return answer.Data.Result
	}
	value := func(s sample) float64 {
		f, err := strconv.ParseFloat(fmt.Sprint(s.Value[1]), 64)
		require.NoError(t, err)
		return f
	}
	waitFor(t, "Prometheus scrapes", p, func() bool { return len(query("up == 1")) > 0 })
	body := event("doc_1")
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		post(t, webhookURL(c, "/"), body, sign(secret, body))
		post(t, webhookURL(c, "/"), body, sign("from_file", body))
		post(t, webhookURL(c, "/"), body, sign("wrong", body))
		post(t, webhookURL(c, "/"), body)
	}

	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(readFile(t, filepath.Join(monitoring, "dashboard.json"))), &dashboard))
	want := map[string]map[string]float64{ // the least that a line must show, by its legend
		"Events by outcome":    {"verified": 1, "signature_mismatch": 1, "signature_missing": 1},
		"Share per secret":     {"old": 0.3, "new": 0.3},
		"Rejections by reason": {"signature_mismatch": 1, "signature_missing": 1},
		"Secrets read again":   {"unchanged": 1},
		"Verified events":      {"": 20},
	}
	assert.Len(t, dashboard.Panels, len(want))
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expr := strings.ReplaceAll(target.Expr, "$__rate_interval", "5s")
			label := strings.Trim(target.LegendFormat, "{}")
			got := make(map[string]float64)
			for _, s := range query(expr) {
				got[s.Metric[label]] = value(s)
			}
			for line, least := range want[panel.Title] {
				assert.GreaterOrEqual(t, got[line], least, "%s: %s: %v", panel.Title, line, got)
			}
			t.Logf("%s: %v", panel.Title, got)
		}
	}

	// what the README says of Caddy's own figures
	for _, metric := range []string{"caddy_http_request_duration_seconds_count", "caddy_http_request_size_bytes_count", "caddy_http_response_duration_seconds_count"} {
		require.Contains(t, readFile(t, "../../README.md"), `caddy_http_request_duration_seconds{handler="inkit_webhook"}`)
		assert.NotEmpty(t, query(metric+`{handler="inkit_webhook"}`), metric)
	}
}
