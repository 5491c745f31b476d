//go:build unix

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// scripted is a backend that answers as a test says, and keeps what it got.
type scripted struct {
	addr string

	mu       sync.Mutex
	requests []record
}

// newScripted starts one. The status is for the n-th request, from 1 on; with 0, the
// connection is closed without an answer.
func newScripted(t *testing.T, status func(n int) int) *scripted {
	t.Helper()
	s := new(scripted)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		s.requests = append(s.requests, record{Body: body, IdempotencyKey: r.Header["Idempotency-Key"], Note: r.Method + " " + r.URL.Path})
		n := len(s.requests)
		s.mu.Unlock()
		code := status(n)
		if code == 0 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(code)
	}))
	server.Config.ErrorLog = nil
	t.Cleanup(server.Close)
	s.addr = strings.TrimPrefix(server.URL, "http://")
	return s
}

func always(code int) func(int) int { return func(int) int { return code } }

func (s *scripted) got() []record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]record(nil), s.requests...)
}

// TestRecipeSignatureInLogs: with both filters, no log has a signature; and each of the
// filters is needed, whether the proxy stands behind the guard or in a queue.
func TestRecipeSignatureInLogs(t *testing.T) {
	t.Parallel()
	const filter = "\t\tformat filter {\n\t\t\trequest>headers>Inkit-Signature delete\n\t\t}\n"
	for _, tt := range []struct {
		name                       string
		queue, own, access, debug  bool // what there is: a queue, a filter of Caddy's own log, one of the access log, level DEBUG
		inOwn, inFailure, inAccess bool // where the signature shows: Caddy's own log, while the queue has room, and when it has none
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
					n := c.metric(`caddy_inkit_queue_attempts_total{queue="default",result="unreachable"}`)
					return n != "0" && n != "1"
				})
				assert.Equal(t, tt.inOwn, strings.Contains(c.output.String(), signature), "Caddy's own log, while the queue has room")
				assert.Equal(t, tt.debug, strings.Contains(c.output.String(), "upstream roundtrip"))
				assert.NotContains(t, c.output.String(), "http.log.error")
				status = http.StatusServiceUnavailable // now it has none
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

var _ = time.Second
var _ = always
