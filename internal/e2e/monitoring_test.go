//go:build unix

package e2e

import (
	"encoding/json"
	"fmt"
	"math"
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

// TestAlertRules runs the tests of the rules, and then runs them with broken rules. The tests
// must fail for each broken rule, because each alert has a case in which it fires and a case
// in which it does not.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	needs(t, "promtool")
	run := func(dir string, args ...string) (string, error) {
		cmd := exec.Command("promtool", args...)
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
	// the function "broken" returns the output of the tests for rules with changed expressions
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
	for i := 1; i < 7; i += 2 { // remove a line with an operator, and the line after it
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

// TestMonitoringDoc: docs/monitoring.md names every alert and metric, and the alert rule in
// docs/monitoring.md fires.
func TestMonitoringDoc(t *testing.T) {
	t.Parallel()
	doc := readFile(t, "../../docs/monitoring.md")
	alerts := regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(readFile(t, monitoring+"/alerts.yml"), -1)
	require.NotEmpty(t, alerts)
	for _, alert := range alerts {
		assert.Contains(t, doc, "\n| `"+alert[1]+"` |")
	}
	c := startCaddy(t, "", strings.NewReplacer("{{file}}", newSecretFile(t, "from_file").path, "{{db}}", "{{dir}}/events.db", "{{down}}", freeAddr(t)).Replace(monitored))
	metrics := regexp.MustCompile(`# TYPE (caddy_inkit_\w+) `).FindAllStringSubmatch(c.get("http://"+c.admin+"/metrics"), -1)
	require.NotEmpty(t, metrics)
	for _, metric := range metrics {
		assert.Contains(t, doc, "\n| `"+metric[1]+"` |")
	}

	needs(t, "promtool")
	_, rule, found := strings.Cut(doc, "```yaml\n")
	require.True(t, found)
	rule, _, _ = strings.Cut(rule, "```")
	dir := t.TempDir()
	writeFile(t, dir+"/rules.yml", "groups:\n- name: caddy\n  rules:\n  "+strings.ReplaceAll(rule, "\n", "\n  "))
	writeFile(t, dir+"/test.yml", `
rule_files: [rules.yml]
tests:
- interval: 15s
  input_series:
  - series: 'up{job="caddy", instance="a"}'
    values: 1x8 0x40
  - series: 'up{job="caddy", instance="b"}'
    values: 1x8 0x2 1x40
  alert_rule_test:
  - {alertname: CaddyDown, eval_time: 4m}
  - {alertname: CaddyDown, eval_time: 5m, exp_alerts: [{exp_labels: {job: caddy, instance: a}}]}
`)
	cmd := exec.Command("promtool", "test", "rules", "test.yml")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// monitored is the site of two Caddys that a Prometheus scrapes. It has two webhooks with a
// queue behind each. Both Caddys use one database. The backend of the queue "documents"
// is down. The backend of the queue "mail" fails for the event "bad".
const monitored = `
http://:{{port}} {
	handle /documents {
		inkit_webhook {
			name documents
			secret {env.INKIT_WEBHOOK_SECRET} name old
			secret {file.{{file}}} name new
		}
		inkit_queue {
			name documents
			store sqlite {{db}}
			deliver {
				reverse_proxy {{down}}
			}
		}
	}
	handle /mail {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET} {
			name mail
		}
		@refused vars {http.inkit_webhook.resource_id} refused
		respond @refused 403
		inkit_queue {
			name mail
			store sqlite {{db}}
			max_age 1s
			deliver {
				@bad vars {http.inkit_webhook.resource_id} bad
				respond @bad 500
				respond "taken"
			}
		}
	}
	error 404
}
`

type panel struct {
	Type, Title string
	GridPos     struct{ X, Y, W, H int }
	FieldConfig struct {
		Defaults struct {
			Unit     string
			Decimals *int
			Custom   struct{ LineInterpolation string }
		}
	}
	Targets []struct{ Expr, LegendFormat string }
}

type prometheus struct {
	*process
	t    *testing.T
	addr string
}

// startPrometheus starts a Prometheus that scrapes Caddys, with the example's configuration.
func startPrometheus(t *testing.T, caddys ...*caddy) *prometheus {
	t.Helper()
	needs(t, "prometheus")
	p := &prometheus{t: t, addr: freeAddr(t)}
	var targets []string
	for _, c := range caddys {
		targets = append(targets, c.admin)
	}
	dir, config := t.TempDir(), readFile(t, monitoring+"/prometheus.yml")
	config = replaceEach(t, config, "scrape_interval: 15s", "scrape_interval: 1s", "[localhost:2019]", "["+strings.Join(targets, ", ")+"]")
	writeFile(t, dir+"/alerts.yml", readFile(t, monitoring+"/alerts.yml"))
	p.process = start(t, exec.Command("prometheus", "--config.file="+writeFile(t, dir+"/prometheus.yml", config),
		"--storage.tsdb.path="+dir+"/data", "--web.listen-address="+p.addr))
	waitFor(t, "Prometheus is ready", p.process, func() bool {
		resp, err := http.Get("http://" + p.addr + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return p
}

// series is a series in the result of a query.
type series struct {
	labels map[string]string
	value  float64
}

// query evaluates an expression at the time `at`.
func (p *prometheus) query(at time.Time, expr string) (result []series) {
	p.t.Helper()
	resp, err := http.PostForm("http://"+p.addr+"/api/v1/query", url.Values{"query": {expr}, "time": {at.Format(time.RFC3339Nano)}})
	require.NoError(p.t, err)
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	require.NoError(p.t, json.NewDecoder(resp.Body).Decode(&answer))
	require.Equal(p.t, "success", answer.Status, "%s: %s", expr, answer.Error)
	for _, r := range answer.Data.Result {
		value, err := strconv.ParseFloat(fmt.Sprint(r.Value[1]), 64)
		require.NoError(p.t, err)
		result = append(result, series{r.Metric, value})
	}
	return result
}

// The method "when" waits for a time at which each expression has the value 2. It returns
// this time, which is at least two seconds ago, so that all scrapes of that time have ended.
func (p *prometheus) when(what string, exprs ...string) (at time.Time) {
	p.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		at = time.Now().Add(-2 * time.Second)
		missing := ""
		for _, expr := range exprs {
			if result := p.query(at, expr); len(result) != 1 || result[0].value != 2 {
				missing = expr
				break
			}
		}
		if missing == "" {
			return at
		}
		require.False(p.t, time.Now().After(deadline), "%s does not happen: %s", what, missing)
		time.Sleep(100 * time.Millisecond)
	}
}

// TestDashboard sends the panels' queries to a Prometheus that scrapes two Caddys.
func TestDashboard(t *testing.T) {
	t.Parallel()
	file := newSecretFile(t, "from_file")
	site := strings.NewReplacer("{{file}}", file.path, "{{db}}", t.TempDir()+"/events.db", "{{down}}", freeAddr(t)).Replace(monitored)
	c := startCaddy(t, "\tmetrics", site)
	other := startCaddy(t, "\tmetrics", site)
	p := startPrometheus(t, c, other)
	const bothUp = "count(up == 1)"
	before := p.when("Prometheus has read both more than once", bothUp, "count(count_over_time(up[1m]) > 2)")
	for _, tt := range []struct {
		c             *caddy
		path, id, key string
		status        int
	}{
		{c, "/documents", "doc_1", secret, 200},
		{c, "/documents", "doc_2", secret, 200},
		{c, "/documents", "doc_3", secret, 200},
		{c, "/documents", "doc_4", "from_file", 200},
		{c, "/documents", "doc_5", "from_file", 200},
		{c, "/documents", "doc_6", "wrong", 401},
		{other, "/documents", "doc_7", "wrong", 401},
		{c, "/mail", "mail_1", secret, 200},
		{other, "/mail", "mail_2", secret, 200},
		{c, "/mail", "bad", secret, 200},
		{c, "/mail", "refused", secret, 403},
	} {
		body := event(tt.id)
		require.Equal(t, tt.status, post(t, webhookURL(tt.c, tt.path), body, sign(tt.key, body)).status, tt.id)
	}
	require.Equal(t, 401, post(t, webhookURL(c, "/documents"), event("doc_8")).status)
	now := p.when("both show what waits and what is dead", bothUp,
		`count(caddy_inkit_queue_events{queue="documents", state="pending"} == 5)`,
		`count(caddy_inkit_queue_events{queue="mail", state="dead"} == 1)`,
		`count(caddy_inkit_queue_oldest_age_seconds{queue="documents"} > 1)`,
		// increase() extrapolates: after fewer than 15 scrapes, its result is wrong by more
		// than a tenth
		`count(count_over_time(up[1m]) > 14)`)

	// want has, for each panel, the legends of its lines and their values; a panel must not have
	// other lines
	one, two := " "+c.admin, " "+other.admin
	type lines map[string]float64
	const some = -1 // 1 or more
	want := map[string]lines{
		"Verified, last day": {"documents": 5, "mail": 4},
		"Rejected, last day": {"documents": 3, "mail": 0},
		"Pending now":        {"documents" + one: 5, "documents" + two: 5, "mail" + one: 0, "mail" + two: 0},
		"Dead now":           {"documents" + one: 0, "documents" + two: 0, "mail" + one: 1, "mail" + two: 1},
		"Oldest pending":     {"documents" + one: some, "documents" + two: some, "mail" + one: 0, "mail" + two: 0},
		"Backend":            {"documents" + one: 1, "documents" + two: some, "mail" + one: 0, "mail" + two: 0},
		"Requests by outcome, last hour": {
			"documents verified": 5, "documents signature_mismatch": 2, "documents signature_missing": 1, "mail verified": 4,
		},
		"Deliveries, last hour": {
			"documents accepted": 5, "documents refused": 0, "documents failed": 0, "documents unhandled": 0,
			"mail accepted": 3, "mail refused": 1, "mail failed": 0, "mail unhandled": 0,
		},
		"Share per secret, last day":  {"documents old": 0.6, "documents new": 0.4, "mail 1": 1},
		"Events per secret, last day": {"documents old": 3, "documents new": 2, "mail 1": 4},
		"Secrets reloaded, last hour": {
			"documents changed": 0, "documents unchanged": some, "documents failed": 0, "mail changed": 0, "mail unchanged": 0, "mail failed": 0,
		},
		"Attempts, last hour": {
			"documents delivered": 0, "documents failed": 0, "documents unreachable": some,
			"mail delivered": 2, "mail failed": some, "mail unreachable": 0,
		},
		"Kept, last hour": {
			"documents stored": 5, "documents delivered": 0, "documents duplicate": 0, "documents refused": 0, "documents failed": 0,
			"mail stored": some, "mail delivered": some, "mail duplicate": 0, "mail refused": 0, "mail failed": 0,
		},
		"Time until an event is durable": {"documents": some, "mail": some},
	}
	want["Pending events"], want["Dead events"] = want["Pending now"], want["Dead now"]
	want["Age of the oldest pending event"] = want["Oldest pending"]

	var dashboard struct{ Panels []panel }
	require.NoError(t, json.Unmarshal([]byte(readFile(t, filepath.Join(monitoring, "dashboard.json"))), &dashboard))
	assert.Len(t, dashboard.Panels, len(want))
	cells := make(map[[2]int]string)
	for _, panel := range dashboard.Panels {
		require.Contains(t, want, panel.Title)
		for x := range panel.GridPos.W {
			for y := range panel.GridPos.H {
				cell := [2]int{panel.GridPos.X + x, panel.GridPos.Y + y}
				assert.Empty(t, cells[cell], "%s lies on another panel", panel.Title)
				assert.Less(t, cell[0], 24, panel.Title)
				cells[cell] = panel.Title
			}
		}
		defaults := panel.FieldConfig.Defaults
		count := defaults.Unit == "none"
		if count {
			require.NotNil(t, defaults.Decimals, panel.Title)
			assert.Zero(t, *defaults.Decimals, panel.Title)
		}
		if panel.Type == "timeseries" {
			assert.Equal(t, "stepAfter", defaults.Custom.LineInterpolation, panel.Title)
		}
		require.Len(t, panel.Targets, 1, panel.Title)
		// the function "shown" returns the lines that the panel shows at the time `at`; `choice` is
		// the chosen webhook and queue
		shown := func(at time.Time, choice string) lines {
			got := make(lines)
			target := panel.Targets[0]
			for _, s := range p.query(at, strings.NewReplacer("$webhook", choice, "$queue", choice).Replace(target.Expr)) {
				legend := target.LegendFormat
				for name, value := range s.labels {
					legend = strings.ReplaceAll(legend, "{{"+name+"}}", value)
				}
				require.NotContains(t, got, legend, "two lines of %s have one name", panel.Title)
				require.False(t, math.IsNaN(s.value), "%s: %s is not a number", panel.Title, legend)
				if count {
					require.Equal(t, math.Trunc(s.value), s.value, "%s: %s", panel.Title, legend) //nolint:testifylint // exactly a whole number
				}
				got[legend] = s.value
			}
			return got
		}
		right := func(got, want lines, when string) {
			t.Helper()
			for line, value := range want {
				if assert.Contains(t, got, line, "%s %s", panel.Title, when); value == some {
					continue
				}
				assert.InDelta(t, value, got[line], 1e-9, "%s %s: %s", panel.Title, when, line)
			}
			assert.Len(t, got, len(want), "%s %s: %v", panel.Title, when, got)
		}
		all := shown(now, ".*")
		t.Logf("%s: %v", panel.Title, all)
		right(all, want[panel.Title], "with all")
		only := make(lines)
		for line, value := range want[panel.Title] {
			if strings.HasPrefix(line, "documents") {
				only[line] = value
			}
		}
		right(shown(now, "documents"), only, "with one chosen")
		switch panel.Title {
		case "Oldest pending":
			assert.Greater(t, all["documents"+one], 1.0)
		case "Secrets reloaded, last hour":
			assert.Positive(t, all["documents unchanged"])
		case "Attempts, last hour":
			assert.GreaterOrEqual(t, all["documents unreachable"], 5.0)
			assert.GreaterOrEqual(t, all["mail failed"], 2.0)
		case "Kept, last hour":
			assert.InDelta(t, 3, all["mail stored"]+all["mail delivered"], 0)
		case "Time until an event is durable":
			assert.Positive(t, all["documents"])
		}

		// before the first event
		none := make(lines)
		switch panel.Title {
		case "Share per secret, last day", "Requests by outcome, last hour", "Time until an event is durable":
		default:
			for line := range want[panel.Title] {
				none[line] = 0
			}
		}
		right(shown(before, ".*"), none, "before the first event")

		// the panel must still show events after 23 hours, because after a rotation an operator
		// looks at it long after the last event
		if strings.HasSuffix(panel.Title, "last day") {
			right(shown(now.Add(23*time.Hour), ".*"), want[panel.Title], "after 23 hours")
		}
		assert.Empty(t, shown(now.Add(25*time.Hour), ".*"), panel.Title)
	}

	// in Caddy's own metrics, the label "handler" names the first handler of the route: here "subroute"
	for _, metric := range []string{"caddy_http_request_duration_seconds_count", "caddy_http_request_size_bytes_count", "caddy_http_response_duration_seconds_count"} {
		assert.NotEmpty(t, p.query(now, metric+`{handler="subroute"}`), metric)
		assert.Empty(t, p.query(now, metric+`{handler="inkit_webhook"}`), metric)
	}

	t.Run("the script draws it", func(t *testing.T) {
		t.Parallel()
		if exec.Command("/usr/bin/python3", "-c", "import matplotlib").Run() != nil {
			t.Skip("Matplotlib is not installed")
		}
		picture := t.TempDir() + "/dashboard.png"
		out, err := exec.Command(monitoring+"/picture", "http://"+p.addr, picture, "0.02").CombinedOutput()
		require.NoError(t, err, "%s", out)
		for _, path := range []string{picture, "../../docs/dashboard.png"} {
			content := readFile(t, path)
			assert.True(t, strings.HasPrefix(content, "\x89PNG"), path)
			assert.Less(t, len(content), 200_000, path)
		}
	})
}
