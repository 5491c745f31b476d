//go:build unix

package e2e

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"net/http"
	"os/exec"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// bodySizes are near two limits: php_fastcgi buffers at most 4,096 bytes to find the length
// of a body, and the option max_size is 65,536 bytes by default.
var bodySizes = []int{0, 1, 84, 4095, 4096, 4097, 65536}

// testBodiesArriveWhole sends two random bodies of each size: one with a Content-Length, and one
// in chunks. The backend must respond with the hash of each body.
func testBodiesArriveWhole(t *testing.T, client *http.Client, url string, proto string) {
	t.Helper()
	for _, size := range bodySizes {
		for _, chunked := range []bool{false, true} {
			body := make([]byte, size)
			_, _ = rand.Read(body)
			sum := sha256.Sum256(body)
			length := int64(size)
			if chunked {
				length = -1
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			got, err := send(ctx, client, url, body, length, sign(secret, body))
			cancel()
			require.NoError(t, err)
			assert.Equal(t, 200, got.status, "%s, %d bytes, chunked: %v", proto, size, chunked)
			assert.Equal(t, hex.EncodeToString(sum[:]), got.body, "%s, %d bytes, chunked: %v", proto, size, chunked)
			assert.Equal(t, proto, got.header.Get("X-Proto"))

			body = append(body, 'x')
			got, err = send(t.Context(), client, url, body, map[bool]int64{false: int64(len(body)), true: -1}[chunked], sign("wrong", body))
			require.NoError(t, err)
			want := 401
			if size == 65536 {
				want = 413
			}
			assert.Equal(t, want, got.status, "%s, %d bytes, forged", proto, size)
		}
	}
}

func clients(t *testing.T, c *caddy) map[string]*http.Client {
	t.Helper()
	waitFor(t, "the certificate is there", c.process, func() bool {
		conn, err := tls.Dial("tcp", c.addr, c.tlsConfig())
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
	h2 := &http.Transport{TLSClientConfig: c.tlsConfig(), ForceAttemptHTTP2: true}
	h3 := &http3.Transport{TLSClientConfig: c.tlsConfig()}
	h1 := &http.Transport{TLSClientConfig: c.tlsConfig(), TLSNextProto: nil}
	h1.Protocols = new(http.Protocols)
	h1.Protocols.SetHTTP1(true)
	t.Cleanup(func() {
		h1.CloseIdleConnections()
		h2.CloseIdleConnections()
		h3.Close()
	})
	return map[string]*http.Client{
		"HTTP/1.1": {Transport: h1}, "HTTP/2.0": {Transport: h2}, "HTTP/3.0": {Transport: h3},
	}
}

func TestBodiesArriveWhole(t *testing.T) {
	t.Run("reverse_proxy", func(t *testing.T) {
		b := newBackend(t, good)
		c := startCaddy(t, "", `https://localhost:{{port}} {
	tls internal
	header X-Proto {http.request.proto}
	inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	reverse_proxy `+b.addr+`
}
`)
		for proto, client := range clients(t, c) {
			t.Run(proto, func(t *testing.T) {
				testBodiesArriveWhole(t, client, "https://localhost:"+port(c.addr)+"/webhook", proto)
			})
		}
		records := b.records()
		require.Len(t, records, 3*2*len(bodySizes))
		for _, r := range records {
			assert.False(t, r.Chunked)
			assert.EqualValues(t, len(r.Body), r.ContentLength)
		}
	})

	t.Run("php_fastcgi", func(t *testing.T) {
		root, addr := startPHP(t, `<?php echo hash('sha256', file_get_contents('php://input'));`)
		c := startCaddy(t, "", `https://localhost:{{port}} {
	tls internal
	header X-Proto {http.request.proto}
	root `+root+`
	inkit_webhook {env.INKIT_WEBHOOK_SECRET}
	php_fastcgi `+addr+`
}
`)
		for proto, client := range clients(t, c) {
			t.Run(proto, func(t *testing.T) {
				testBodiesArriveWhole(t, client, "https://localhost:"+port(c.addr)+"/index.php", proto)
			})
		}
	})
}

// startPHP runs php-cgi as a FastCGI server for one script.
func startPHP(t *testing.T, script string) (root, addr string) {
	t.Helper()
	needs(t, "php-cgi")
	root, addr = t.TempDir(), freeAddr(t)
	writeFile(t, root+"/index.php", script)
	cmd := exec.Command("php-cgi", "-b", addr)
	cmd.Env = []string{"PHP_FCGI_CHILDREN=2", "PHP_FCGI_MAX_REQUESTS=10000"}
	p := start(t, cmd)
	waitFor(t, "php-cgi listens", p, listening(addr))
	return root, addr
}
