//go:build unix

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// postLater posts an event in another goroutine. The channel gets the status of the response,
// or 0 if there is none.
func postLater(t *testing.T, url string, body []byte) (status chan int) {
	t.Helper()
	status = make(chan int, 1)
	go func() {
		got, _ := send(t.Context(), new(http.Client), url, body, int64(len(body)), sign(secret, body))
		status <- got.status
	}()
	return status
}

// TestRecipeSignatureInLogs: with both filters, no log has a signature. If one filter is
// missing, a log has a signature. The test uses a proxy directly behind the guard, and a proxy
// in a queue.
func TestRecipeSignatureInLogs(t *testing.T) {
	t.Parallel()
	const filter = "\t\tformat filter {\n\t\t\trequest>headers>Inkit-Signature delete\n\t\t}\n"
	for _, tt := range []struct {
		name                       string
		queue, own, access, debug  bool // the parts in use: a queue, a filter for Caddy's own log, a filter for the access log, level DEBUG
		inOwn, inFailure, inAccess bool // where the signature appears: in Caddy's own log while the queue has room, in Caddy's own log when an event is refused, in the access log
	}{
		{name: "a proxy, both filters", own: true, access: true},
		{name: "a proxy, both filters, level DEBUG", own: true, access: true, debug: true},
		{name: "a proxy, no filter of Caddy's own log", access: true, inFailure: true},
		{name: "a proxy, no filter of the access log", own: true, inAccess: true},
		{name: "a queue, both filters", queue: true, own: true, access: true},
		{name: "a queue, both filters, level DEBUG", queue: true, own: true, access: true, debug: true},
		{name: "a queue, no filter of Caddy's own log", queue: true, access: true, inFailure: true},
		{name: "a queue, no filter of Caddy's own log, level DEBUG", queue: true, access: true, debug: true, inOwn: true, inFailure: true},
		{name: "a queue, no filter of the access log", queue: true, own: true, inAccess: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			options, site := recipe(t, "Keep the signature out of the logs", "localhost:9000", freeAddr(t), "/var/log/caddy", "{{dir}}",
				"inkit_queue {\n", "inkit_queue {\n\t\t\tstore sqlite {{dir}}/events.db\n\t\t\tmax_events 1\n")
			require.Contains(t, options, filter)
			require.Contains(t, site, filter)
			if !tt.own {
				options = strings.Replace(options, filter, "\t\tlevel INFO\n", 1)
			}
			if tt.debug {
				options = strings.Replace(options, "\tlog {\n", "\tlog {\n\t\tlevel DEBUG\n", 1)
				options = strings.Replace(options, "\t\tlevel INFO\n", "", 1)
			}
			if !tt.access {
				site = strings.Replace(site, filter, "", 1)
			}
			if !tt.queue {
				before, rest, found := strings.Cut(site, "\t\tinkit_queue {")
				require.True(t, found)
				proxy := rest[strings.Index(rest, "reverse_proxy"):]
				proxy, after, _ := strings.Cut(proxy, "\n")
				site = before + proxy + after[strings.Index(after, "\n\t\t}\n")+len("\n\t\t}\n"):]
			}
			c := startCaddy(t, options, site)
			body := event("doc_1")
			signature := sign(secret, body)
			status := http.StatusBadGateway
			if tt.queue {
				assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, signature).status)
				waitFor(t, "it is attempted again", c.process, func() bool {
					return regexp.MustCompile(`caddy_inkit_queue_attempts_total{queue="default",result="unreachable"} ([2-9]|\d\d)`).
						MatchString(c.get("http://" + c.admin + "/metrics"))
				})
				assert.Equal(t, tt.inOwn, strings.Contains(c.output.String(), signature), "Caddy's own log, while the queue has room")
				assert.Equal(t, tt.debug, strings.Contains(c.output.String(), "upstream roundtrip"))
				assert.NotContains(t, c.output.String(), "http.log.error")
				status = http.StatusServiceUnavailable // the queue has no room now
			}
			assert.Equal(t, status, post(t, webhookURL(c, "/webhook"), body, signature).status)
			access := func() string {
				content, _ := os.ReadFile(c.path("access.log"))
				return string(content)
			}
			waitFor(t, "both logs have it", c.process, func() bool {
				return strings.Contains(c.output.String(), "http.log.error") && strings.Contains(access(), fmt.Sprintf(`"status":%d`, status))
			})
			assert.Contains(t, access(), `"Content-Length"`, "other fields are there")
			assert.Equal(t, tt.inFailure, strings.Contains(c.output.String(), signature), "Caddy's own log")
			assert.Equal(t, tt.inAccess, strings.Contains(access(), signature), "the access log")
		})
	}
}

// TestRecipeSignatureInDatabase: with the recipe, no file of the database has the signature,
// while an event is pending and after its delivery. The backend does not get the signature.
// Without the recipe, the database has the signature. The access log always has it.
func TestRecipeSignatureInDatabase(t *testing.T) {
	t.Parallel()
	const line = "\t\trequest_header -Inkit-Signature\n"
	for _, with := range []bool{true, false} {
		t.Run(map[bool]string{true: "with the line", false: "without the line"}[with], func(t *testing.T) {
			t.Parallel()
			signatures := make(chan []string, 100)
			answer := inTurn(500)
			b := newScripted(t, func(n int, r *http.Request) int {
				signatures <- r.Header["Inkit-Signature"]
				return answer(n, r)
			})
			options, site := recipe(t, "Keep the signature out of the database", "localhost:9000", b.addr,
				"inkit_queue {\n", "inkit_queue {\n\t\t\tstore sqlite {{dir}}/queue/events.db\n")
			require.Contains(t, site, line)
			if !with {
				site = strings.Replace(site, line, "", 1)
			}
			c := startCaddy(t, "\tlog access {\n\t\toutput stderr\n\t\tinclude http.log.access\n\t}\n"+options, strings.Replace(site, "{\n", "{\n\tlog\n", 1))
			body := event("doc_in_the_database")
			signature := sign(secret, body)
			var want []string // the expected signature in the backend's request
			if !with {
				want = []string{signature}
			}
			assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, signature).status)
			assert.Equal(t, want, <-signatures, "in the first attempt")

			// the test reads the files as they are after a crash
			killHard(c)
			database := func() (content string) {
				files, err := filepath.Glob(c.path("queue/*"))
				require.NoError(t, err)
				require.NotEmpty(t, files)
				for _, file := range files {
					content += readFile(t, file)
				}
				return content
			}
			stored := database()
			assert.Contains(t, stored, "doc_in_the_database", "the event is pending")
			assert.Equal(t, !with, strings.Contains(stored, signature))
			waitFor(t, "the access log has the line", nil, func() bool { return strings.Contains(c.output.String(), "handled request") })
			assert.Contains(t, c.output.String(), signature, "which request_header does not change")

			c.start()
			waitFor(t, "the event is delivered", c.process, func() bool { return len(b.records()) >= 2 })
			assert.Equal(t, want, <-signatures, "in the second attempt")
			assert.Equal(t, body, b.records()[1].Body)
			c.stop(t, syscall.SIGINT)
			assert.Equal(t, !with, strings.Contains(database(), signature), "what is left after the delivery")
			assert.Len(t, b.records(), 2)
		})
	}
}

func TestRecipeSignatureInLogsOfPHP(t *testing.T) {
	t.Parallel()
	const line = "env>HTTP_INKIT_SIGNATURE delete"
	require.Contains(t, section(t, "Keep the signature out of the logs"), "`"+line+"`")
	require.Contains(t, readFile(t, "../../examples/php/Caddyfile"), "\t\t\t"+line+"\n")
	const filter = "request>headers>Inkit-Signature delete\n"
	for name, inTheLog := range map[string]bool{filter: true, filter + "\t\t\t" + line + "\n": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root, addr := startPHP(t, "verified")
			options, site := recipe(t, "Keep the signature out of the logs", "reverse_proxy localhost:9000", "rewrite * /index.php\n\t\t\t\troot "+root+"\n\t\t\t\tphp_fastcgi "+addr,
				"/var/log/caddy", "{{dir}}", "inkit_queue {\n", "inkit_queue {\n\t\t\tstore sqlite {{dir}}/events.db\n")
			options = strings.Replace(options, filter, name, 1)
			c := startCaddy(t, strings.Replace(options, "\tlog {\n", "\tlog {\n\t\tlevel DEBUG\n", 1), site)
			body := event("doc_1")
			signature := sign(secret, body)
			assert.Equal(t, "verified", post(t, webhookURL(c, "/webhook"), body, signature).body)
			waitFor(t, "the attempt is in the log", c.process, func() bool { return strings.Contains(c.output.String(), "HTTP_IDEMPOTENCY_KEY") })
			assert.Equal(t, inTheLog, strings.Contains(c.output.String(), signature))
		})
	}
}

func TestRecipeRetryByStatus(t *testing.T) {
	t.Parallel()
	const heading = "Retry what the backend answers 502, 503 or 504"
	const byStatus = "\t\t\tlb_retry_match {\n\t\t\t\texpression `{http.reverse_proxy.status_code} in [502, 503, 504]`\n\t\t\t}\n"
	for _, tt := range []struct {
		name     string
		status   func(int, *http.Request) int
		without  string // the missing part of the recipe
		requests int
		want     int
	}{
		{name: "four kinds of trouble", status: inTurn(503, 502, 504, 0), requests: 5, want: 200},
		{name: "trouble that is not named", status: inTurn(500), requests: 1, want: 500},
		{name: "trouble, and no matcher for the status", status: inTurn(503), without: byStatus, requests: 1, want: 503},
		{name: "an error on an open connection, and no matcher for it", status: inTurn(0), without: "\t\t\tlb_retry_match {\n\t\t\t\tmethod POST\n\t\t\t}\n", requests: 1, want: 502},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newScripted(t, tt.status)
			options, site := recipe(t, heading, "localhost:9000", b.addr, "250ms", "10ms", tt.without, "")
			c := startCaddy(t, options, site)
			body := event("doc_1")
			assert.Equal(t, tt.want, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
			requests := b.records()
			require.Len(t, requests, tt.requests)
			for _, r := range requests {
				assert.Equal(t, body, r.Body)
				assert.Equal(t, requests[0].IdempotencyKey, r.IdempotencyKey)
			}
		})
	}
	t.Run("trouble for longer than lb_try_duration", func(t *testing.T) {
		t.Parallel()
		b := newScripted(t, always(503))
		options, site := recipe(t, heading, "localhost:9000", b.addr, "250ms", "50ms", "lb_try_duration 30s", "lb_try_duration 500ms")
		c := startCaddy(t, options, site)
		body := event("doc_1")
		assert.Equal(t, 503, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		assert.Greater(t, len(b.records()), 2)
	})
	t.Run("while nothing listens", func(t *testing.T) {
		t.Parallel()
		b := newBackend(t, good)
		options, site := recipe(t, heading, "localhost:9000", b.addr, byStatus, "", "method POST", "method GET")
		c := startCaddy(t, "\tdebug", site)
		require.Empty(t, options)
		b.close()
		body := event("doc_1")
		done := postLater(t, webhookURL(c, "/webhook"), body)
		waitFor(t, "it is tried", c.process, func() bool { return strings.Contains(c.output.String(), "upstream roundtrip") })
		b.listen()
		assert.Equal(t, 200, <-done, "whatever the matchers say")
	})
}

// TestRequestBuffers: the proxy keeps a body for a retry if the body is smaller than the
// option request_buffers.
func TestRequestBuffers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		buffers         string
		length          int
		whole, answered int // how often the backend gets the complete body, and Caddy's status
	}{
		{"128KiB", 64 << 10, 2, 200},
		{"64KiB", 64<<10 - 1, 2, 200},
		{"64KiB", 64 << 10, 1, 502},
	} {
		t.Run(fmt.Sprintf("%d bytes in %s", tt.length, tt.buffers), func(t *testing.T) {
			t.Parallel()
			b := newScripted(t, inTurn(0))
			options, site := recipe(t, "Retry what the backend answers 502, 503 or 504", "localhost:9000", b.addr,
				"128KiB", tt.buffers, "lb_try_duration 30s", "lb_try_duration 1s", "250ms", "100ms")
			c := startCaddy(t, options, site)
			body := append(event("doc_1"), strings.Repeat(" ", tt.length-len(event("doc_1")))...)
			assert.Equal(t, tt.answered, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
			whole := 0
			for _, r := range b.records() {
				if len(r.Body) == len(body) {
					whole++
				}
			}
			assert.Equal(t, tt.whole, whole)
		})
	}
}

func TestRecipeOneBackendIsDown(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, duration string
		most           int
	}{
		{"with fail_duration", "fail_duration 10s", 1},
		{"without", "fail_duration 0", 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			down, good := newScripted(t, always(0)), newScripted(t, always(200))
			options, site := recipe(t, "Several backends, and one is down", "localhost:9000", down.addr, "localhost:9001", good.addr,
				"fail_duration 10s", tt.duration, "lb_try_interval 250ms", "lb_try_interval 10ms")
			c := startCaddy(t, options, site)
			const events = 30
			for i := range events {
				body := event(fmt.Sprintf("doc_%d", i))
				assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
			}
			assert.Len(t, good.records(), events)
			tries := len(down.records())
			t.Logf("%d tries of the one that is down", tries)
			assert.LessOrEqual(t, tries, tt.most)
			if tt.most > 1 {
				assert.Greater(t, tries, 3, "again and again")
			}
		})
	}
}

func TestRecipeSpareBackend(t *testing.T) {
	t.Parallel()
	const heading = "A spare backend"
	body := event("doc_1")
	for name, addr := range map[string]string{"that fails": newScripted(t, always(500)).addr, "that is down": freeAddr(t)} {
		t.Run("beside one "+name, func(t *testing.T) {
			t.Parallel()
			spare := newScripted(t, always(200))
			options, site := recipe(t, heading, "localhost:9000", addr, "localhost:9001", spare.addr)
			c := startCaddy(t, options, site)
			assert.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
			assert.Equal(t, 404, post(t, webhookURL(c, "/other"), body, sign(secret, body)).status)
			assert.Empty(t, spare.records())
			assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
			requests := spare.records()
			require.Len(t, requests, 1)
			assert.Equal(t, body, requests[0].Body)
			assert.Len(t, requests[0].IdempotencyKey, 1)
		})
	}
	t.Run("that is not needed", func(t *testing.T) {
		t.Parallel()
		b, spare := newScripted(t, always(200)), newScripted(t, always(200))
		options, site := recipe(t, heading, "localhost:9000", b.addr, "localhost:9001", spare.addr)
		c := startCaddy(t, options, site)
		assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		assert.Len(t, b.records(), 1)
		assert.Empty(t, spare.records())
	})
	t.Run("in handle_response, where it gets no body", func(t *testing.T) {
		t.Parallel()
		b, spare := newScripted(t, always(500)), newScripted(t, always(200))
		options, site := recipe(t, heading, "localhost:9000", b.addr, "localhost:9001", spare.addr, "error 502", "reverse_proxy "+spare.addr, "handle_errors 502 503 504", "handle_errors 413")
		c := startCaddy(t, options, site)
		assert.Equal(t, 502, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		assert.Len(t, b.records(), 1)
		for _, r := range spare.records() {
			assert.Empty(t, r.Body)
		}
	})
}

func TestRecipeBackendThatHangs(t *testing.T) {
	t.Parallel()
	const heading = "A backend that hangs"
	body := event("doc_1")
	hangs := func(t *testing.T, begin bool) *backend {
		end := make(chan struct{})
		b := newBackend(t, func(b *backend, w http.ResponseWriter, r *http.Request) {
			b.record(r)
			if begin {
				w.Header().Set("Content-Length", "2")
				_, _ = io.WriteString(w, "o")
				_ = http.NewResponseController(w).Flush()
			}
			<-end
		})
		t.Cleanup(func() { close(end) })
		return b
	}
	t.Run("before its answer", func(t *testing.T) {
		t.Parallel()
		options, site := recipe(t, heading, "localhost:9000", hangs(t, false).addr, "response_header_timeout 20s", "response_header_timeout 500ms")
		c := startCaddy(t, options, site)
		began := time.Now()
		assert.Equal(t, 504, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
		assert.Less(t, time.Since(began), 10*time.Second)
	})
	t.Run("in the middle of its answer", func(t *testing.T) {
		t.Parallel()
		options, site := recipe(t, heading, "localhost:9000", hangs(t, true).addr, "\tread_timeout 20s", "\tread_timeout 500ms")
		c := startCaddy(t, options, site)
		began := time.Now()
		_, err := send(t.Context(), new(http.Client), webhookURL(c, "/webhook"), body, int64(len(body)), sign(secret, body))
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "the sender sees that the answer is not whole")
		assert.Less(t, time.Since(began), 10*time.Second)
	})
	t.Run("while Caddy is stopped", func(t *testing.T) {
		t.Parallel()
		b := hangs(t, false)
		options, site := recipe(t, heading, "localhost:9000", b.addr, "grace_period 30s", "grace_period 500ms")
		c := startCaddy(t, options, site)
		done := postLater(t, webhookURL(c, "/webhook"), body)
		waitFor(t, "the event is with the backend", c.process, func() bool { return len(b.records()) == 1 })
		began := time.Now()
		c.stop(t, syscall.SIGTERM)
		assert.Less(t, time.Since(began), 8*time.Second)
		<-done
	})
}

func TestRecipeHealthChecks(t *testing.T) {
	t.Parallel()
	health := func(code int) func(int, *http.Request) int {
		return func(_ int, r *http.Request) int {
			if r.URL.Path == "/health" {
				return code
			}
			return 200
		}
	}
	ill, well := newScripted(t, health(503)), newScripted(t, health(200))
	options, site := recipe(t, "Health checks", "localhost:9000", ill.addr, "localhost:9001", well.addr)
	c := startCaddy(t, options, site)
	assert.Equal(t, "ok", c.get(webhookURL(c, "/healthz")))
	resp, err := http.Get(webhookURL(c, "/webhook"))
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, 405, resp.StatusCode)
	waitFor(t, "both were asked", c.process, func() bool { return len(ill.records()) > 0 && len(well.records()) > 0 })
	waitFor(t, "one is known to be ill", c.process, func() bool { return strings.Contains(c.output.String(), "status code out of tolerances") })
	for i := range 20 {
		body := event(fmt.Sprintf("doc_%d", i))
		assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	}
	for _, r := range ill.records() {
		assert.Equal(t, "GET /health", r.Target)
	}
}

func TestRecipePHPInAFolder(t *testing.T) {
	t.Parallel()
	root, php := startPHP(t, `<?php echo 'wrong script';`)
	require.NoError(t, os.Mkdir(root+"/webhook", 0o755))
	require.NoError(t, os.WriteFile(root+"/webhook/index.php", []byte(`<?php echo file_get_contents('php://input');`), 0o644))
	body := event("doc_1")
	for _, tt := range []struct {
		name, rewrite string
		statuses      map[string]int
	}{
		{"with the rewrite", "rewrite * /webhook/index.php", map[string]int{"/webhook": 200, "/webhook/": 200, "/webhook/index.php": 200, "/": 404}},
		{"without", "", map[string]int{"/webhook": 308}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			options, site := recipe(t, "PHP in a folder", "/srv/www", root, "unix//run/php/php-fpm.sock", php, "rewrite * /webhook/index.php", tt.rewrite)
			c := startCaddy(t, options, site)
			client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
			for path, status := range tt.statuses {
				got, err := send(t.Context(), client, webhookURL(c, path), body, int64(len(body)), sign(secret, body))
				require.NoError(t, err)
				assert.Equal(t, status, got.status, path)
				if status == 200 {
					assert.Equal(t, string(body), got.body, path)
				}
				got, err = send(t.Context(), client, webhookURL(c, path), body, int64(len(body)), sign("wrong", body))
				require.NoError(t, err)
				if path != "/" {
					assert.Equal(t, 401, got.status, path)
				}
			}
		})
	}
}

func TestRecipeAddressesBehindAProxy(t *testing.T) {
	t.Parallel()
	body := event("doc_1")
	for _, tt := range []struct {
		name, strict string
		forged       int
	}{
		{"strict", "\t\ttrusted_proxies_strict\n", 403},
		{"not strict", "", 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newScripted(t, always(200))
			options, site := recipe(t, "Addresses behind a proxy", "localhost:9000", b.addr, "static 10.0.0.0/8", "static 127.0.0.0/8", "\t\ttrusted_proxies_strict\n", tt.strict)
			c := startCaddy(t, options, site)
			for addresses, status := range map[string]int{
				"192.0.2.7":              200,
				"2001:db8::7":            200,
				"203.0.113.9":            403,
				"":                       403,
				"192.0.2.7, 203.0.113.9": tt.forged, // the proxy added the second address
			} {
				req, err := http.NewRequest(http.MethodPost, webhookURL(c, "/webhook"), strings.NewReader(string(body)))
				require.NoError(t, err)
				req.Header.Set("Inkit-Signature", sign(secret, body))
				if addresses != "" {
					req.Header.Set("X-Forwarded-For", addresses)
				}
				resp, err := http.DefaultClient.Do(req)
				require.NoError(t, err)
				resp.Body.Close()
				assert.Equal(t, status, resp.StatusCode, addresses)
			}
		})
	}
}

// block returns the code block of a language under a heading.
func block(t *testing.T, heading, language string) string {
	t.Helper()
	_, block, found := strings.Cut(section(t, heading), "```"+language+"\n")
	require.True(t, found, "no %s under %q", language, heading)
	block, _, _ = strings.Cut(block, "```\n")
	return block
}

// startFront starts nginx or HAProxy with the configuration of docs/recipes.md. The
// replacements change this configuration.
func startFront(t *testing.T, program string, replacements ...string) (addr string) {
	t.Helper()
	needs(t, program)
	addr = freeAddr(t)
	listen := map[string]string{"nginx": "listen 8080", "haproxy": "bind :8080"}[program]
	replacements = append([]string{listen, strings.Replace(strings.Replace(listen, "8080", addr, 1), ":127", "127", 1)}, replacements...)
	config := replaceEach(t, block(t, "A proxy or load balancer in front", program), replacements...)
	if program == "nginx" {
		startNginx(t, addr, config)
		return addr
	}
	p := start(t, exec.Command(program, "-db", "-f", writeFile(t, t.TempDir()+"/haproxy.cfg",
		"defaults\n\tmode http\n\ttimeout connect 1s\n\ttimeout client 20s\n\ttimeout server 20s\n"+config)))
	waitFor(t, "HAProxy listens", p, listening(addr))
	return addr
}

// startNginx starts nginx. config is the text in the block "http" of its configuration.
func startNginx(t *testing.T, addr, config string) *process {
	t.Helper()
	needs(t, "nginx")
	dir, user, paths := t.TempDir(), "", ""
	if os.Geteuid() == 0 { // or else a worker of another user has no way into the folder
		user = "user root root;"
	}
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		paths += kind + "_temp_path " + dir + "/" + kind + ";\n"
	}
	p := start(t, exec.Command("nginx", "-p", dir, "-e", "stderr", "-c", writeFile(t, dir+"/nginx.conf",
		user+"daemon off;\npid "+dir+"/nginx.pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n"+paths+config+"}\n")))
	waitFor(t, "nginx listens", p, listening(addr))
	return p
}

// frontSite returns a site with two webhooks. The backend of one webhook has trouble.
func frontSite(good, bad string) string {
	return `http://:{{port}} {
	handle /healthz {
		respond "ok"
	}
	handle /good {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		reverse_proxy ` + good + `
	}
	handle /bad {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		reverse_proxy ` + bad + `
	}
	error 404
}
`
}

// TestRecipeInFront: nginx and HAProxy run with the configuration of the document. They lose
// no event and send no event twice, even if one of two Caddys is dead, or a backend has
// trouble.
func TestRecipeInFront(t *testing.T) {
	t.Parallel()
	body := event("doc_1")
	for _, program := range []string{"nginx", "haproxy"} {
		t.Run(program, func(t *testing.T) {
			t.Parallel()
			good, bad := newScripted(t, always(200)), newScripted(t, always(503))
			c := startCaddy(t, "", frontSite(good.addr, bad.addr))
			front := startFront(t, program, "10.0.0.11:80", c.addr, "10.0.0.12:80", freeAddr(t))
			const events = 20
			for i := range events {
				body := event(fmt.Sprintf("doc_%d", i))
				assert.Equal(t, 503, post(t, "http://"+front+"/bad", body, sign(secret, body)).status)
				assert.Equal(t, 200, post(t, "http://"+front+"/good", body, sign(secret, body)).status)
			}
			assert.Len(t, good.records(), events)
			assert.Len(t, bad.records(), events)
		})
	}
	for _, program := range []string{"nginx", "haproxy"} {
		t.Run(program+" before guards that take an event and do not answer", func(t *testing.T) {
			t.Parallel()
			drops := func(_ int, r *http.Request) int {
				if r.URL.Path == "/healthz" {
					return 200
				}
				return 0
			}
			one, two := newScripted(t, drops), newScripted(t, drops)
			front := startFront(t, program, "10.0.0.11:80", one.addr, "10.0.0.12:80", two.addr)
			assert.Equal(t, 502, post(t, "http://"+front+"/good", body, sign(secret, body)).status)
			sent := 0
			for _, r := range append(one.records(), two.records()...) {
				if r.Target == "POST /good" {
					sent++
				}
			}
			assert.Equal(t, 1, sent)
		})
	}
	for name, tt := range map[string]struct {
		maxFails string
		status   int
	}{
		"nginx before guards whose backend hangs":             {" max_fails=0;", 200},
		"nginx before guards whose backend hangs, by default": {";", 502},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			end := make(chan struct{})
			defer close(end) // Caddy waits for these requests when it stops
			good := newScripted(t, always(200))
			bad := newScripted(t, func(int, *http.Request) int { <-end; return 200 })
			site := frontSite(good.addr, bad.addr)
			one, two := startCaddy(t, "", site), startCaddy(t, "", site)
			front := startFront(t, "nginx", "10.0.0.11:80", one.addr, "10.0.0.12:80", two.addr, " max_fails=0;", tt.maxFails,
				"\tlocation / {", "\tproxy_read_timeout 1s;\n\tlocation / {")
			for _, status := range []chan int{postLater(t, "http://"+front+"/bad", body), postLater(t, "http://"+front+"/bad", body)} {
				assert.Equal(t, 504, <-status)
			}
			assert.Equal(t, tt.status, post(t, "http://"+front+"/good", body, sign(secret, body)).status)
		})
	}
	// the document warns of these cases
	for _, tt := range []struct {
		name, program string
		replacements  []string
	}{
		{"nginx that sends again", "nginx", []string{"\tlocation / {", "\tproxy_next_upstream http_503 non_idempotent;\n\tlocation / {"}},
		{"HAProxy that sends again", "haproxy", []string{"option redispatch", "option redispatch\n\tretry-on 503"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			bad := newScripted(t, inTurn(503))
			site := frontSite(bad.addr, bad.addr)
			one, two := startCaddy(t, "", site), startCaddy(t, "", site)
			front := startFront(t, tt.program, append([]string{"10.0.0.11:80", one.addr, "10.0.0.12:80", two.addr}, tt.replacements...)...)
			assert.Equal(t, 200, post(t, "http://"+front+"/bad", body, sign(secret, body)).status)
			requests := bad.records()
			require.Len(t, requests, 2)
			assert.NotEqual(t, requests[0].IdempotencyKey, requests[1].IdempotencyKey)
		})
	}
	t.Run("HAProxy that observes", func(t *testing.T) {
		t.Parallel()
		good, bad := newScripted(t, always(200)), newScripted(t, always(503))
		site := frontSite(good.addr, bad.addr)
		one, two := startCaddy(t, "", site), startCaddy(t, "", site)
		front := startFront(t, "haproxy", "10.0.0.11:80 check", one.addr+" check inter 30s observe layer7 error-limit 3 on-error mark-down",
			"10.0.0.12:80 check", two.addr+" check inter 30s observe layer7 error-limit 3 on-error mark-down")
		for range 20 {
			post(t, "http://"+front+"/bad", body, sign(secret, body))
		}
		assert.Equal(t, 503, post(t, "http://"+front+"/good", body, sign(secret, body)).status)
		assert.Empty(t, good.records())
	})
}

// TestReloadEndsTries: a reload ends the retries of reverse_proxy, but not those of a queue.
func TestReloadEndsTries(t *testing.T) {
	t.Parallel()
	require.Contains(t, section(t, "Reload"), "immediately answers 502")
	body := event("doc_1")
	b := newBackend(t, good)
	b.close()
	site := `http://:{{port}} {
	handle /proxy {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		reverse_proxy ` + b.addr + ` {
			lb_try_duration 1m
			lb_try_interval 100ms
		}
	}
	handle /queue {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			store sqlite {{dir}}/events.db
			answer_after 0
			deliver {
				reverse_proxy ` + b.addr + `
			}
		}
	}
	error 404
}
`
	c := startCaddy(t, "debug", site)
	answered := postLater(t, webhookURL(c, "/proxy"), body)
	waitFor(t, "the proxy tries", c.process, func() bool { return strings.Contains(c.output.String(), "upstream roundtrip") })
	assert.Equal(t, 200, post(t, webhookURL(c, "/queue"), body, sign(secret, body)).status)
	c.reload()
	assert.Equal(t, 502, <-answered)
	b.listen()
	waitFor(t, "the event of the queue is delivered", c.process, func() bool { return len(b.records()) > 0 })
	require.Len(t, b.records(), 1)
}

// TestWhatCaddyExpands checks the two warnings under the heading "What Caddy expands".
func TestWhatCaddyExpands(t *testing.T) {
	t.Parallel()
	t.Run("templates", func(t *testing.T) {
		t.Parallel()
		require.Contains(t, section(t, "What Caddy expands"), `{{env "INKIT_WEBHOOK_SECRET"}}`)
		body := []byte("{\"event_type\":\"X\",\"resource_id\":\"{{env `INKIT_WEBHOOK_SECRET`}}\"}")
		for before, answer := range map[string]string{"templates": secret, "": "{{env `INKIT_WEBHOOK_SECRET`}}"} {
			c := startCaddy(t, "", `http://:{{port}} {
	inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	`+before+`
	respond {http.inkit_webhook.resource_id}
}
`)
			assert.Equal(t, answer, post(t, webhookURL(c, "/"), body, sign(secret, body)).body)
		}
	})
	for _, tt := range []struct {
		name, secret, value string
		set                 bool
		accepts             string // the secret that Caddy uses, or empty if the configuration does not load
	}{
		{"a value", "{$S}", "one", true, ""},
		{"a value, in quotes", `"{$S}"`, "one", true, "one"},
		{"no value", "{$S}", "", false, ""},
		{"no value, in quotes", `"{$S}"`, "", false, ""},
		{"a space", "{$S}", "one two", true, ""},
		{"a space, in quotes", `"{$S}"`, "one two", true, "one two"},
		{"a space, from env", "{env.S}", "one two", true, "one two"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			env := []string(nil)
			if tt.set {
				env = []string{"S=" + tt.value}
			}
			c := newCaddy(t, "", "http://:{{port}} {\n\tinkit_webhook {\n\t\tsecret "+tt.secret+" name blue\n\t}\n\trespond ok\n}\n", env...)
			cmd := exec.Command(caddyPath, "validate", "--config", c.path("Caddyfile"), "--adapter", "caddyfile")
			cmd.Env = c.env
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out[max(0, len(out)-200):])
			if tt.accepts == "" {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			c.start()
			body := event("doc_1")
			assert.Equal(t, 200, post(t, webhookURL(c, "/"), body, sign(tt.accepts, body)).status)
		})
	}
}
