//go:build unix

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// If a guard does not answer, nginx sends it no requests for some time. Unsigned bodies must
// not cause this: nginx loses genuine events while it sends no requests to either guard.
func TestNginxInFront(t *testing.T) {
	t.Parallel()
	b := newBackend(t, good)
	site := recommendedSite(t, b.addr)
	one, two := startCaddy(t, "", site), startCaddy(t, "", site)
	addr := freeAddr(t)
	p := startNginx(t, addr, `
client_max_body_size 2m;
upstream guards { server `+one.addr+`; server `+two.addr+`; }
server {
	listen `+addr+`;
	location / { proxy_pass http://guards; }
}
`)

	seconds := size(15, 5)
	var sent, lost, unsigned, unanswered atomic.Int64
	client := &http.Client{Timeout: time.Minute, Transport: new(http.Transport)}
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	for i := range seconds * 10 {
		wg.Go(func() {
			sent.Add(1)
			body := event(fmt.Sprintf("doc_%d", i))
			got, err := send(context.Background(), client, "http://"+addr+"/webhook", body, int64(len(body)), sign(secret, body))
			if err != nil || got.status != 200 {
				lost.Add(1)
			}
		})
		if i%10 == 0 {
			for _, size := range []int{64 << 10, 900_000} {
				wg.Go(func() {
					unsigned.Add(1)
					got, err := send(context.Background(), client, "http://"+addr+"/webhook", make([]byte, size), int64(size))
					if err != nil || got.status != 401 {
						unanswered.Add(1)
					}
				})
			}
		}
		time.Sleep(time.Second / 10)
	}
	wg.Wait()
	t.Logf("%d of %d genuine events lost, %d of %d unsigned requests without a 401", lost.Load(), sent.Load(), unanswered.Load(), unsigned.Load())
	assert.Zero(t, lost.Load())
	assert.Zero(t, unanswered.Load())
	require.Len(t, b.records(), int(sent.Load()))
	assert.Zero(t, strings.Count(p.output.String(), "upstream server temporarily disabled"), p.output.String())
}
