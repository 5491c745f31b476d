//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestQueueAttemptsAreAlike makes the first attempt of each event fail, and kills Caddy. Then
// it compares the requests that the backend gets in the first and in the second attempt.
func TestQueueAttemptsAreAlike(t *testing.T) {
	rows := []struct {
		name, before, deliver string
		seen                  string // a part of the expected requests
	}{
		{"reverse_proxy", "", "reverse_proxy {{backend}}", "X-Forwarded-For: 203.0.113.9, 127.0.0.1\r\n"},
		{"reverse_proxy with other header fields", "", `reverse_proxy {{backend}} {
			header_up Host other.example.com
			header_up X-Up "{http.request.header.X-Custom} {http.reverse_proxy.upstream.hostport}"
			header_up -User-Agent
		}`, "X-Up: custom 127.0.0.1:"},
		{"placeholders of the request", "", `request_header X-Seen "{method} {host} {hostport} {uri} {http.request.orig_uri} {http.request.orig_uri.path} {path} {http.request.orig_uri.query} {query} {scheme} {remote_host} {remote_port} {client_ip} {http.request.proto} {http.request.header.X-Custom} {http.request.remote}"
			reverse_proxy {{backend}}`, "X-Seen: POST 127.0.0.1 127.0.0.1:{{port}} /{{path}}//a%20b/?x=1&y=%2F+z "},
		{"the address of the server", "", `request_header X-Seen "{http.request.local} {http.request.local.host} {http.request.local.port}"
			reverse_proxy {{backend}}`, "X-Seen: {{addr}} 127.0.0.1 {{port}}\r\n"},
		{"the body", "", `request_header X-Seen "{http.request.body}"
			reverse_proxy {{backend}}`, `X-Seen: {"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":`},
		{"placeholders of the guard and the queue", "", `request_header X-Seen "{http.inkit_webhook.outcome} {http.inkit_webhook.event_type} {http.inkit_webhook.resource_id} {http.inkit_webhook.secret_name} {http.inkit_queue.id} {http.inkit_queue.received}"
			reverse_proxy {{backend}}`, "X-Seen: verified DOCUMENT_CREATE_FINISHED doc_"},
		{"request_header", "request_header X-Before before", `request_header X-Custom "{http.request.header.X-Before} changed"
			request_header -Accept-Encoding
			reverse_proxy {{backend}}`, "X-Custom: before changed\r\n"},
		{"map", "", `map {http.request.header.X-Custom} {mapped} {
				~^(c.*)m$ "matched ${1}"
				default nothing
			}
			request_header X-Seen {mapped}
			reverse_proxy {{backend}}`, "X-Seen: matched custo\r\n"},
		{"vars", `vars before "set before"`, `vars inside "{http.vars.before}, set inside"
			request_header X-Seen {http.vars.inside}
			reverse_proxy {{backend}}`, "X-Seen: set before, set inside\r\n"},
		{"handle groups", "", `handle /nothing {
				abort
			}
			handle_path /{{path}}/* {
				request_header X-Seen handle_path
				reverse_proxy {{backend}}
			}
			handle {
				abort
			}`, "POST /a%20b/?x=1&y=%2F+z HTTP/1.1\r\n"},
		{"a matcher of the header", "", `@custom header X-Custom custom
			handle @custom {
				reverse_proxy {{backend}}
			}`, "X-Custom: custom\r\n"},
		{"an expression", "", `@custom expression {http.inkit_webhook.event_type}.startsWith("DOCUMENT")
			reverse_proxy @custom {{backend}}`, ""},
		{"log_append", "", `log_append seen {http.request.header.X-Custom}
			reverse_proxy {{backend}}`, ""},
		{"tracing", "", `tracing {
				span delivery
			}
			reverse_proxy {{backend}}`, "Traceparent: "},
		{"remote_ip", "", `@near remote_ip 127.0.0.1
			reverse_proxy @near {{backend}}`, ""},
		{"client_ip", "", `@far client_ip 203.0.113.9
			reverse_proxy @far {{backend}}`, ""},
		{"protocol, and the lack of TLS", "", `@plain {
				protocol http
				not protocol https
			}
			reverse_proxy @plain {{backend}}`, "X-Forwarded-Proto: http\r\n"},
		{"rewritten before", "rewrite /rewritten{uri}", "reverse_proxy {{backend}}", "POST /rewritten/"},
		{"rewritten inside", "", "rewrite /rewritten?{query}\n\t\t\treverse_proxy {{backend}}", "POST /rewritten?x=1&y=%2F+z HTTP/1.1\r\n"},
		{"another body", "", "request_body {\n\t\t\t\tset \"set {http.inkit_webhook.event_type}\"\n\t\t\t}\n\t\t\treverse_proxy {{backend}}", "\r\n\r\nset DOCUMENT_CREATE_FINISHED"},
		{"route", "", "route {\n\t\t\t\trequest_header X-Seen first\n\t\t\t\treverse_proxy {{backend}}\n\t\t\t}", "X-Seen: first\r\n"},
		{"a method of its own", "", "method PUT\n\t\t\treverse_proxy {{backend}}", "PUT /"},
	}

	var mu sync.Mutex
	attempts := make(map[string][]string) // the requests by row, without the field X-Attempt
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		row, attempt := r.Header.Get("X-Row"), r.Header.Get("X-Attempt")
		r.Header.Del("X-Attempt")
		dump, err := httputil.DumpRequest(r, true)
		if err != nil {
			panic(err)
		}
		mu.Lock()
		attempts[row] = append(attempts[row], attempt+"\n"+string(dump))
		mu.Unlock()
		if attempt == "1" {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer backend.Close()
	seen := func(row, attempt string) string {
		mu.Lock()
		defer mu.Unlock()
		for _, a := range attempts[row] {
			if request, ok := strings.CutPrefix(a, attempt+"\n"); ok {
				return request
			}
		}
		return ""
	}

	sites := func(scheme, port string) string {
		var b strings.Builder
		fmt.Fprintf(&b, "%s://127.0.0.1:%s {\n", scheme, port)
		if scheme == "https" {
			b.WriteString("\ttls internal\n")
		}
		for i, row := range rows {
			path := fmt.Sprintf("%s-%d", scheme, i)
			deliver := strings.NewReplacer("{{backend}}", backend.Listener.Addr().String(), "{{path}}", path).Replace(row.deliver)
			fmt.Fprintf(&b, "\thandle /%s/* {\n\t\t%s\n\t\tinkit_webhook {env.INKIT_WEBHOOK_SECRET}\n\t\tinkit_queue {\n\t\t\tname %s\n\t\t\tdeliver {\n\t\t\trequest_header X-Attempt {http.inkit_queue.attempt}\n\t\t\trequest_header X-Row %s\n\t\t\t%s\n\t\t\t}\n\t\t}\n\t}\n",
				path, row.before, path, path, deliver)
		}
		b.WriteString("\terror 404\n}\n")
		return b.String()
	}
	tlsAddr := freeAddr(t)
	options := "servers {\n\t\ttrusted_proxies static 127.0.0.1\n\t}\n\tdefault_sni 127.0.0.1"
	secure := strings.NewReplacer("protocol http\n", "protocol https\n", "not protocol https", "not protocol http").Replace(sites("https", port(tlsAddr)))
	c := newCaddy(t, options, sites("http", "{{port}}")+secure, "OTEL_TRACES_EXPORTER=none")
	c.start()
	waitFor(t, "the site with TLS has a certificate", c.process, func() bool {
		conn, err := tls.Dial("tcp", tlsAddr, &tls.Config{InsecureSkipVerify: true, ServerName: "127.0.0.1"})
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: c.tlsConfig()}}
	client.Transport.(*http.Transport).TLSClientConfig.ServerName = "127.0.0.1"
	defer client.CloseIdleConnections()
	for i := range rows {
		for scheme, addr := range map[string]string{"http": c.addr, "https": tlsAddr} {
			body := event(fmt.Sprintf("doc_%s_%d", scheme, i))
			url := fmt.Sprintf("%s://%s/%s-%d//a%%20b/?x=1&y=%%2F+z", scheme, addr, scheme, i)
			req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
			require.NoError(t, err)
			req.Header = http.Header{
				"Inkit-Signature": {sign(secret, body)}, "X-Custom": {"custom"}, "X-Forwarded-For": {"203.0.113.9"},
				"X-Two": {"one", "two"}, "Content-Type": {"application/json"},
			}
			resp, err := client.Do(req)
			require.NoError(t, err)
			resp.Body.Close()
			assert.Equal(t, http.StatusOK, resp.StatusCode, "%s, %s", rows[i].name, scheme)
		}
	}
	killHard(c)
	c.start()

	traceparent := regexp.MustCompile(`\r\nTraceparent: [^\r]+\r\n`)
	for i, row := range rows {
		for scheme, addr := range map[string]string{"http": c.addr, "https": tlsAddr} {
			t.Run(row.name+", "+scheme, func(t *testing.T) {
				path := fmt.Sprintf("%s-%d", scheme, i)
				first := seen(path, "1")
				require.NotEmpty(t, first)
				waitFor(t, "a second attempt", c.process, func() bool { return seen(path, "2") != "" })
				second := seen(path, "2")
				want := strings.NewReplacer("{{path}}", path, "{{addr}}", addr, "{{port}}", port(addr)).Replace(row.seen)
				if scheme == "https" {
					want = strings.Replace(want, "X-Forwarded-Proto: http\r\n", "X-Forwarded-Proto: https\r\n", 1)
				}
				assert.Contains(t, first, want)
				if row.name == "tracing" { // each attempt has its own traceparent field
					require.NotEqual(t, first, second)
					first, second = traceparent.ReplaceAllString(first, "\r\n"), traceparent.ReplaceAllString(second, "\r\n")
				}
				assert.Equal(t, first, second)
				mu.Lock()
				defer mu.Unlock()
				assert.Len(t, attempts[path], 2)
			})
		}
	}
}

// TestQueueAttemptsAreAlikeInPHP is TestQueueAttemptsAreAlike for php_fastcgi.
func TestQueueAttemptsAreAlikeInPHP(t *testing.T) {
	t.Parallel()
	root, php := startPHP(t, `<?php
$seen = $_SERVER;
foreach (['REQUEST_TIME', 'REQUEST_TIME_FLOAT', 'ATTEMPT'] as $name) unset($seen[$name]);
ksort($seen);
file_put_contents($_SERVER['DOCUMENT_ROOT'] . '/attempt-' . $_SERVER['ATTEMPT'], json_encode([$seen, file_get_contents('php://input')]));
if ($_SERVER['ATTEMPT'] == '1') http_response_code(500);`)
	c := startCaddy(t, "", `
http://{{addr}} {
	handle /webhook* {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			attempt_timeout 5s
			deliver {
				root `+root+`
				php_fastcgi `+php+` {
					env ATTEMPT {http.inkit_queue.attempt}
					env EVENT_TYPE {http.inkit_webhook.event_type}
				}
			}
		}
	}
	error 404
}`)
	body := event("doc_1")
	got := post(t, "http://"+c.addr+"/webhook/some/path?x=1&y=%20", body, sign(secret, body))
	require.Equal(t, http.StatusOK, got.status)
	killHard(c)
	c.start()
	waitFor(t, "a second attempt", c.process, func() bool {
		info, err := os.Stat(root + "/attempt-2")
		return err == nil && info.Size() > 0
	})
	first := readFile(t, root+"/attempt-1")
	assert.Equal(t, first, readFile(t, root+"/attempt-2"))
	var seen []any
	require.NoError(t, json.Unmarshal([]byte(first), &seen))
	assert.Equal(t, string(body), seen[1])
	assert.Equal(t, "DOCUMENT_CREATE_FINISHED", seen[0].(map[string]any)["EVENT_TYPE"])
	assert.Equal(t, "/webhook/some/path?x=1&y=%20", seen[0].(map[string]any)["REQUEST_URI"])
	assert.NotEmpty(t, seen[0].(map[string]any)["HTTP_IDEMPOTENCY_KEY"])
}

// TestQueueOfPHPThatHangs: php_fastcgi does not end an attempt at attempt_timeout.
func TestQueueOfPHPThatHangs(t *testing.T) {
	t.Parallel()
	root, addr := startPHP(t, `<?php
$body = file_get_contents('php://input');
file_put_contents(__DIR__ . '/seen', $body . "\n", FILE_APPEND);
if (str_contains($body, 'hangs')) sleep(3600);`)
	c := startCaddy(t, "", `http://{{addr}} {
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			store sqlite {{dir}}/events.db
			attempt_timeout 1s
			concurrency 2
			deliver {
				rewrite * /index.php
				root `+root+`
				php_fastcgi `+addr+`
			}
		}
	}
	error 404
}`)
	send := func(id string) {
		t.Helper()
		body := event(id)
		assert.Equal(t, 200, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	}
	seen := func(id string) int { return strings.Count(readFile(t, root+"/seen"), id) }
	send("hangs") // this event blocks one of the two PHP workers
	c.logged("an attempt goes on after attempt_timeout")
	waitFor(t, "it is tried again, but not while that goes on", c.process, func() bool {
		list := c.list(t)
		return len(list) == 1 && list[0].Attempts > 2 && list[0].LastError == "an earlier attempt has not ended yet"
	})
	for i := range 20 {
		send(fmt.Sprintf("good-%d.", i))
	}
	waitFor(t, "the others are delivered", c.process, func() bool { return len(c.list(t)) == 1 })
	for i := range 20 {
		assert.Equal(t, 1, seen(fmt.Sprintf("good-%d.", i)))
	}
	assert.Equal(t, 1, seen("hangs"))
	c.stop(t, syscall.SIGTERM)
}

// TestQueueDeliverBlocksThatFail has deliver blocks that cannot deliver, and one that can.
func TestQueueDeliverBlocksThatFail(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, all)
	cut := rawBackend(t, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
	garbage := rawBackend(t, "SSH-2.0-OpenSSH_9.2\r\n")
	rows := []struct{ name, deliver, says string }{
		{"takes nothing", "respond /another taken", "no directive of the deliver block handled the event"},
		{"takes nothing behind templates, which makes 200 of that", "templates\n\t\t\t\trespond /another taken", "no directive of the deliver block handled the event"},
		{"abort", "abort", "the backend's answer was cut short, or the directive abort ended the attempt"},
		{"an error", "error 418", "status 418"},
		{"an answer that is cut", "reverse_proxy " + cut, "the backend's answer was cut short, or the directive abort ended the attempt"},
		{"no HTTP", "reverse_proxy " + garbage, "status 502"},
		{"a redirect", "redir https://example.com/", "status 302"},
		{"a status that is no number", "respond ok {http.vars.nothing}", ""},
		{"a host that is not known", "reverse_proxy nowhere.invalid:80", "status 502"},
	}
	var site strings.Builder
	site.WriteString("http://{{addr}} {\n")
	for i, row := range append(rows, struct{ name, deliver, says string }{"good", "reverse_proxy " + backend.addr, ""}) {
		fmt.Fprintf(&site, "\thandle /%d {\n\t\tinkit_webhook {env.INKIT_WEBHOOK_SECRET}\n\t\tinkit_queue {\n\t\t\tname queue-%d\n\t\t\tattempt_timeout 5s\n\t\t\tdeliver {\n\t\t\t\t%s\n\t\t\t}\n\t\t}\n\t}\n", i, i, row.deliver)
	}
	site.WriteString("\terror 404\n}\n")
	c := startCaddy(t, "", site.String())
	for i, row := range rows {
		body := event("doc")
		got := post(t, fmt.Sprintf("http://%s/%d", c.addr, i), body, sign(secret, body))
		assert.Equal(t, http.StatusOK, got.status, row.name)
		assert.Empty(t, got.body, row.name)
	}
	s := newSender(t, c)
	s.urls = []string{fmt.Sprintf("http://%s/%d", c.addr, len(rows))}
	<-s.sendAll(t.Context(), "good", 50)
	backend.hasAll(t, s.ids(), 10*time.Second)
	listed := func() (events []queueEvent) { return c.list(t) }
	waitFor(t, "each is attempted again, and stays", c.process, func() bool {
		for _, e := range listed() {
			if e.Attempts < 2 {
				return false
			}
		}
		return true
	})
	events := listed()
	require.Len(t, events, len(rows))
	for _, e := range events {
		var i int
		_, err := fmt.Sscanf(e.Queue, "queue-%d", &i)
		require.NoError(t, err)
		assert.Contains(t, e.LastError, rows[i].says, rows[i].name)
		assert.Equal(t, "pending", e.State)
	}
	assert.True(t, c.running())
}

// queueEvent is a line of caddy inkit-queue list --json.
type queueEvent struct {
	ID, Queue, State, Received string
	EventType                  string `json:"event_type"`
	ResourceID                 string `json:"resource_id"`
	Attempts                   int
	NextAttempt                string `json:"next_attempt"`
	LastError                  string `json:"last_error"`
}

func (c *caddy) list(t *testing.T, args ...string) (events []queueEvent) {
	t.Helper()
	out, err := c.command(append([]string{"inkit-queue", "list", "--json", "--config", c.path("Caddyfile")}, args...)...)
	require.NoError(t, err, out)
	for line := range strings.Lines(out) {
		var e queueEvent
		require.NoError(t, json.Unmarshal([]byte(line), &e), line)
		events = append(events, e)
	}
	return events
}

// rawBackend answers every request with the same bytes, and closes the connection.
func rawBackend(t *testing.T, answer string) (addr string) {
	t.Helper()
	addr = freeAddr(t)
	l, err := net.Listen("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if r, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					_, _ = io.Copy(io.Discard, r.Body)
					_, _ = io.WriteString(conn, answer)
				}
			}()
		}
	}()
	return addr
}
