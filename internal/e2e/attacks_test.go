//go:build unix

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// exchange sends bytes. It returns the status of the response, and all bytes after its
// header.
func exchange(t *testing.T, addr, request string) (status int, rest *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	go func() { _, _ = io.WriteString(conn, request) }()
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	require.NoError(t, err)
	return resp.StatusCode, reader
}

// An error route that does not look at the outcome passes every rejected request to a backend.
// The backend gets neither the unsigned body nor the field Upgrade, also if the directive
// "timeouts" in front of the guard makes a copy of the request.
func TestErrorRouteGetsNothingForged(t *testing.T) {
	for name, before := range map[string]string{"": "", "behind timeouts": "timeouts {\n\t\tread_timeout 10s\n\t}\n\t"} {
		t.Run("no gate "+name, func(t *testing.T) {
			b, fallback := newBackend(t, good), newBackend(t, good)
			c := startCaddy(t, "", `http://:{{port}} {
	`+before+`inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	reverse_proxy `+b.addr+`
	handle_errors {
		reverse_proxy `+fallback.addr+`
	}
}
`)
			forged := string(event("forged"))
			for _, size := range []int{0, 70_000, 900_000, 3 << 20} {
				body := forged + strings.Repeat("a", size)
				signature := sign("wrong", []byte(body))
				chunks := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
				for _, tt := range []struct{ method, fields string }{
					{"POST", ""},
					{"PUT", "Inkit-Signature: " + sign(secret, []byte(body)) + "\r\n"},
					{"POST", "Inkit-Signature: " + signature + "\r\n"},
					{"POST", "Inkit-Signature: sha256=" + signature + "\r\n"},
					{"POST", "Connection: Upgrade\r\nUpgrade: websocket\r\n"},
				} {
					exchange(t, c.addr, fmt.Sprintf("%s /webhook HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", tt.method, tt.fields, len(body), body))
					exchange(t, c.addr, fmt.Sprintf("%s /webhook HTTP/1.1\r\nHost: x\r\n%sTransfer-Encoding: chunked\r\n\r\n%s", tt.method, tt.fields, chunks))
				}
			}
			assert.Empty(t, b.records())
			for _, r := range fallback.records() {
				assert.Empty(t, r.Body, "%d bytes that nobody signed", len(r.Body))
				assert.NotContains(t, r.Header, "Upgrade")
			}
			assert.NotEmpty(t, fallback.records(), "or else nothing was forwarded that could have been forged")
		})
	}
	t.Run("the gate of the documentation", func(t *testing.T) {
		fallback := newBackend(t, good)
		c := startCaddy(t, "", `http://:{{port}} {
	inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	reverse_proxy `+freeAddr(t)+`
	handle_errors {
		@ok vars {http.inkit_webhook.outcome} verified
		reverse_proxy @ok `+fallback.addr+`
	}
}
`)
		body := event("doc_1")
		assert.Equal(t, 401, post(t, webhookURL(c, "/"), body, sign("wrong", body)).status)
		assert.Equal(t, 413, post(t, webhookURL(c, "/"), make([]byte, 70_000), sign("wrong", body)).status)
		assert.Empty(t, fallback.records())
		// here the error comes from the proxy: the first backend is down
		assert.Equal(t, 200, post(t, webhookURL(c, "/"), body, sign(secret, body)).status)
		records := fallback.records()
		require.Len(t, records, 1)
		assert.Equal(t, body, records[0].Body, "a verified event goes on whole")
		assert.Len(t, records[0].IdempotencyKey, 1)
	})
}

// A client sends header fields such as Connection and Upgrade. The header fields of the guard
// still reach the backend, no tunnel opens, and the proxy still buffers the body for a retry.
func TestSenderDoesNotSteerTheProxy(t *testing.T) {
	b := newBackend(t, func(b *backend, w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			good(b, w, r)
			return
		}
		b.record(r) // the backend switches to any requested protocol
		conn := hijack(w)
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
	})
	c := startCaddy(t, "", recommendedSite(t, b.addr))
	body := string(event("doc_1"))
	head := "POST /webhook HTTP/1.1\r\nHost: x\r\nInkit-Signature: " + sign(secret, []byte(body)) + fmt.Sprintf("\r\nContent-Length: %d\r\n", len(body))
	for _, fields := range []string{
		"Connection: Idempotency-Key, Inkit-Signature\r\n",
		"Connection: Upgrade\r\nUpgrade: websocket\r\n",
		"Connection: upgrade, Idempotency-Key\r\nUpgrade: h2c\r\n",
		"Incremental: ?1\r\n",
		"X-Idempotency-Key: mine\r\nIdempotency-Key: mine\r\n",
		"TE: trailers\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\n",
	} {
		before := len(b.records())
		status, _ := exchange(t, c.addr, head+fields+"\r\n"+body+"bytes for a tunnel, which nobody signed")
		assert.Equal(t, 200, status, fields)
		records := b.records()
		require.Len(t, records, before+1, fields)
		r := records[before]
		assert.Equal(t, body, string(r.Body), fields)
		require.Len(t, r.IdempotencyKey, 1, fields)
		assert.Regexp(t, `^"[A-Z2-7]{26}-[0-9]+"$`, r.IdempotencyKey[0], fields)
		assert.Equal(t, sign(secret, []byte(body)), r.Header.Get("Inkit-Signature"), fields)
		for _, field := range []string{"Upgrade", "Incremental", "X-Idempotency-Key", "Te", "Keep-Alive", "Proxy-Connection"} {
			assert.NotContains(t, r.Header, field, fields)
		}
	}
}

func TestUnhandledEvent(t *testing.T) {
	t.Parallel()
	c := startCaddy(t, "", `http://:{{port}} {
	inkit_webhook {env.INKIT_WEBHOOK_SECRET} {
		name hook
	}
	templates /templates
	respond /known "known"
}
`)
	body := event("doc_unhandled")
	assert.Equal(t, 200, post(t, webhookURL(c, "/known"), body, sign(secret, body)).status)
	assert.Equal(t, 404, post(t, webhookURL(c, "/unknown"), body, sign(secret, body)).status, "where Caddy answers 200")
	assert.Equal(t, 404, post(t, webhookURL(c, "/templates"), body, sign(secret, body)).status, "where templates does")
	metrics := c.get("http://" + c.admin + "/metrics")
	assert.Contains(t, metrics, `caddy_inkit_webhook_deliveries_total{result="accepted",webhook="hook"} 1`)
	assert.Contains(t, metrics, `caddy_inkit_webhook_deliveries_total{result="unhandled",webhook="hook"} 2`)
	waitFor(t, "a warning", c.process, func() bool {
		return strings.Count(c.output.String(), `"result":"unhandled"`) == 2 && strings.Contains(c.output.String(), `"resource_id":"doc_unhandled"`)
	})
}

// Behind the guard, request_body replaces the body. Each backend, also that of an error route,
// gets only the new body. The Transport cannot send the new body again, so some requests fail,
// as with plain Caddy.
func TestReplacedBodyIsNotUndoneByARetry(t *testing.T) {
	t.Parallel()
	b, fallback := newBackend(t, dropReused(true)), newBackend(t, good)
	c := startCaddy(t, "", `http://:{{port}} {
	route {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		request_body {
			set "another body"
		}
		reverse_proxy `+b.addr+`
	}
	handle_errors {
		reverse_proxy `+fallback.addr+`
	}
}
`)
	client := &http.Client{Timeout: time.Minute, Transport: new(http.Transport)}
	defer client.CloseIdleConnections()
	answered := make(map[int]int)
	for range 100 {
		body := event("doc_1")
		got, err := send(t.Context(), client, webhookURL(c, "/"), body, int64(len(body)), sign(secret, body))
		require.NoError(t, err)
		answered[got.status]++
	}
	t.Logf("answered: %v", answered)
	assert.Positive(t, answered[200])
	assert.Positive(t, 100-answered[200], "or else nothing was to be sent again")
	for _, r := range append(b.records(), fallback.records()...) {
		assert.Equal(t, "another body", string(r.Body))
	}
}

// 200 clients hang up. Caddy ends their requests to the backend, and still stops on SIGTERM.
func TestSenderThatHangsUp(t *testing.T) {
	t.Parallel()
	const senders = 200
	var arrived, gone atomic.Int64
	b := newBackend(t, func(_ *backend, _ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		arrived.Add(1)
		<-r.Context().Done()
		gone.Add(1)
	})
	c := startCaddy(t, "", recommendedSite(t, b.addr))
	body := event("doc_1")
	inParallel(20, senders, func(int) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := send(ctx, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, webhookURL(c, "/webhook"), body, int64(len(body)), sign(secret, body))
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	})
	waitFor(t, "the backend is left alone", c.process, func() bool { return arrived.Load() > 0 && arrived.Load() == gone.Load() })
	c.stop(t, syscall.SIGTERM) // fails the test if Caddy does not end
}
