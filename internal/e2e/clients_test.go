//go:build unix

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The actions of a client after it has sent its bytes.
type then int

const (
	wait      then = iota // wait for the response
	halfClose             // close its half of the connection, and wait
	reset                 // reset the connection
)

// TestBrokenClients speaks broken HTTP/1.1. No request may reach the backend, except in
// the rows with the outcome "verified".
func TestBrokenClients(t *testing.T) { //nolint:tparallel // its subtests share a Caddy
	t.Parallel()
	b := newBackend(t, good)
	c := startCaddy(t, `	log {
		output file {{dir}}/log
		format json
	}
	servers {
		timeouts {
			read_header 1s
			read_body 1s
		}
	}`, `http://:{{port}} {
	inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	reverse_proxy `+b.addr+`
	handle_errors {
		respond {http.inkit_webhook.outcome}
	}
}
`)
	body := string(event("doc_1"))
	good := sign(secret, []byte(body))
	head := func(fields ...string) string {
		return "POST /webhook HTTP/1.1\r\nHost: localhost\r\n" + strings.Join(fields, "\r\n") + "\r\n\r\n"
	}
	length := fmt.Sprintf("Content-Length: %d", len(body))
	signature := "Inkit-Signature: " + good
	chunk := fmt.Sprintf("%x\r\n%s\r\n", len(body), body)
	const chunked = "Transfer-Encoding: chunked"

	for _, tt := range []struct {
		name    string
		send    string
		then    then
		status  int    // 0: no response
		outcome string // "": the request does not reach the handler
		atOnce  bool   // whether the response comes before the guard has discarded a body for 5 s
	}{
		{"good, with a length", head(signature, length) + body, wait, 200, "verified", false},
		{"good, in chunks", head(signature, chunked) + chunk + "0\r\n\r\n", wait, 200, "verified", false},
		{"good, in chunks, with a trailer that is not signed", head(signature, chunked, "Trailer: X-Evil") + chunk + "0\r\nX-Evil: 1\r\n\r\n", wait, 200, "verified", false},
		{"good, in chunks, with a length that is a lie", head(signature, chunked, "Content-Length: 3") + chunk + "0\r\n\r\n", wait, 200, "verified", false},

		{"body cut short", head(signature, length) + body[:40], halfClose, 400, "body_unreadable", false},
		{"body cut short, and the connection reset", head(signature, length) + body[:40], reset, 0, "body_unreadable", false},
		{"no body where there must be one", head(signature, length), halfClose, 400, "body_unreadable", false},
		{"body that never comes", head(signature, length), wait, 408, "body_unreadable", false},
		{"body that stalls", head(signature, length) + body[:40], wait, 408, "body_unreadable", false},
		{"length too small", head(signature, "Content-Length: 10") + body, wait, 401, "signature_mismatch", false},
		{"length too large", head(signature, fmt.Sprintf("Content-Length: %d", len(body)+1)) + body, halfClose, 400, "body_unreadable", false},
		{"length too large, by the bytes of the next request", head(signature, fmt.Sprintf("Content-Length: %d", len(body)+4)) + body + "POST", wait, 401, "signature_mismatch", false},
		{"no length at all", head(signature) + body, wait, 401, "signature_mismatch", false},
		{"two lengths", head(signature, length, "Content-Length: 3") + body, wait, 400, "", false},
		{"a length that is no number", head(signature, "Content-Length: x") + body, wait, 400, "", false},
		{"chunk size that is no number", head(signature, chunked) + "zz\r\n" + body + "\r\n0\r\n\r\n", wait, 400, "body_unreadable", false},
		{"chunk shorter than its size", head(signature, chunked) + "ff\r\n" + body + "\r\n0\r\n\r\n", halfClose, 400, "body_unreadable", false},
		{"chunk longer than its size", head(signature, chunked) + "5\r\n" + body + "\r\n0\r\n\r\n", wait, 400, "body_unreadable", false},
		{"no last chunk", head(signature, chunked) + chunk, halfClose, 400, "body_unreadable", false},
		{"no last chunk, and a wait", head(signature, chunked) + chunk, wait, 408, "body_unreadable", false},
		{"no last chunk, and the connection reset", head(signature, chunked) + chunk, reset, 0, "body_unreadable", false},
		{"chunks above max_size", head(signature, chunked) + "20000\r\n" + strings.Repeat("a", 0x20000) + "\r\n0\r\n\r\n", wait, 413, "body_too_large", true},
		{"a chunk above max_size that does not end", head(signature, chunked) + "20000\r\n" + strings.Repeat("a", 0x10001), wait, 413, "body_too_large", false},
		{"another transfer coding", head(signature, "Transfer-Encoding: gzip, chunked") + chunk, wait, 501, "", false},
		{"header that stalls", "POST /webhook HTTP/1.1\r\nHost: localhost\r\n" + signature, wait, 0, "", false},
		{"header cut short", "POST /webhook HTTP/1.1\r\nHost: localhost\r\n" + signature, halfClose, 400, "", false},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01", halfClose, 400, "", false},

		{"no signature", head(length) + body, wait, 401, "signature_missing", true},
		{"no signature, and a body that never comes", head(length), wait, 401, "signature_missing", false},
		{"no signature, and chunks that never come", head(chunked), wait, 401, "signature_missing", false},
		{"malformed signature", head("Inkit-Signature: sha256="+good, length) + body, wait, 401, "signature_malformed", true},
		{"two signatures", head(signature, signature, length) + body, wait, 401, "signature_malformed", true},
		{"signature folded over two lines", head("Inkit-Signature: "+good[:32]+"\r\n "+good[32:], length) + body, wait, 401, "signature_malformed", true},
		{"signature in a field with an underscore", head("Inkit_Signature: "+good, length) + body, wait, 401, "signature_missing", true},
		{"large length, and a body that never comes", head(signature, "Content-Length: 67108864"), wait, 413, "body_too_large", false},
		{"expects to be told to go on, without a signature", head(length, "Expect: 100-continue"), wait, 401, "signature_missing", true},
		{"expects to be told to go on, and sends chunks all the same", head(chunked, "Expect: 100-continue") + chunk, wait, 401, "signature_missing", true},
		{"another method", strings.Replace(head(signature, length), "POST", "PUT", 1) + body, wait, 405, "method_not_allowed", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			logged := len(readFile(t, c.path("log")))
			forwarded := len(b.records())
			conn, err := net.Dial("tcp", c.addr)
			require.NoError(t, err)
			defer conn.Close()
			require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			began := time.Now()
			_, err = io.WriteString(conn, tt.send)
			require.NoError(t, err)
			switch tt.then {
			case wait:
			case halfClose:
				require.NoError(t, conn.(*net.TCPConn).CloseWrite())
			case reset:
				time.Sleep(50 * time.Millisecond) // time for Caddy to read the request
				require.NoError(t, conn.(*net.TCPConn).SetLinger(0))
				require.NoError(t, conn.Close())
			}
			if tt.then != reset {
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if tt.status == 0 {
					require.Error(t, err, "no answer")
				} else {
					require.NoError(t, err)
					defer resp.Body.Close()
					assert.Equal(t, tt.status, resp.StatusCode)
					text, _ := io.ReadAll(resp.Body)
					if tt.outcome != "verified" && tt.outcome != "" {
						assert.Equal(t, tt.outcome, string(text))
					}
				}
			}
			if tt.atOnce {
				assert.Less(t, time.Since(began), 2*time.Second, "answered at once")
			}
			if tt.outcome == "verified" {
				records := b.records()
				require.Len(t, records, forwarded+1)
				assert.Equal(t, body, string(records[forwarded].Body))
				assert.Empty(t, records[forwarded].Header["Trailer"])
				return
			}
			if tt.outcome != "" {
				waitFor(t, "a log line", nil, func() bool {
					return strings.Contains(readFile(t, c.path("log"))[logged:], `"outcome":"`+tt.outcome+`"`)
				})
			} else {
				time.Sleep(50 * time.Millisecond)
				assert.NotContains(t, readFile(t, c.path("log"))[logged:], `"outcome"`)
			}
			assert.Len(t, b.records(), forwarded, "nothing is forwarded")
		})
	}
	assert.NotContains(t, readFile(t, c.path("log")), good)
}

func rawStatus(t *testing.T, addr, request string) int {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(conn, request)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	return resp.StatusCode
}
