//go:build linux

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// proxySite is queueSite without the queue.
func proxySite(backend string) string {
	return `
http://{{addr}} {
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		reverse_proxy ` + backend + `
	}
	error 404
}`
}

// slowly sends the body of each request some time after its head.
type slowly struct{ *http.Transport }

func (s slowly) RoundTrip(req *http.Request) (*http.Response, error) {
	body := req.Body
	req.GetBody = nil
	req.Body = &lateBody{ReadCloser: body}
	return s.Transport.RoundTrip(req)
}

type lateBody struct {
	io.ReadCloser
	once sync.Once
}

func (b *lateBody) Read(p []byte) (int, error) {
	b.once.Do(func() { time.Sleep(50 * time.Millisecond) })
	return b.ReadCloser.Read(p)
}

// Requests that have begun before a reload reach the handlers of the old configuration
// after Caddy has cleaned it up. With slow senders, there are some at each reload.
func TestQueueReloadsRefuseNothing(t *testing.T) {
	t.Parallel()
	other := func(site string) string { return strings.Replace(site, "events.db", "others.db", 1) }
	for _, tt := range []struct {
		name  string
		sites func(backend string) []string // one after the other, again and again
		down  bool                          // whether the backend is
	}{
		{"options change, the backend is up", changedOptions, false},
		{"options change, the backend is down", changedOptions, true},
		{"the store changes, the backend is up", func(backend string) []string {
			return []string{queueSite(backend, ""), other(queueSite(backend, ""))}
		}, false},
		{"the store changes, the backend is down", func(backend string) []string {
			return []string{queueSite(backend, ""), other(queueSite(backend, ""))}
		}, true},
		{"the name changes, the backend is up", func(backend string) []string {
			return []string{queueSite(backend, ""), queueSite(backend, "name another")}
		}, false},
		{"the name changes, the backend is down", func(backend string) []string {
			return []string{queueSite(backend, ""), queueSite(backend, "name another")}
		}, true},
		{"the queue goes and comes, the backend is up", func(backend string) []string {
			return []string{queueSite(backend, ""), proxySite(backend)}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			backend := newTaker(t, all)
			if tt.down {
				backend.close()
			}
			sites := tt.sites(backend.addr)
			c := queueCaddy(t, backend.addr, "")
			load, cancel := context.WithCancel(t.Context())
			defer cancel()
			s, slow := newSender(t, c), newSender(t, c)
			slow.client.Transport = slowly{slow.client.Transport.(*http.Transport)}
			s.workers, slow.workers = 4, 4
			done, slowDone := s.sendAll(load, "reload", 1_000_000), slow.sendAll(load, "slow", 1_000_000)
			reloads := size(60, 20)
			for i := range reloads {
				before := len(s.ids())
				waitFor(t, "events are accepted", c.process, func() bool { return len(s.ids()) >= before+20 })
				c.configure("grace_period 5s", sites[(i+1)%len(sites)])
				c.reload()
			}
			cancel()
			<-done
			<-slowDone
			ids := append(s.ids(), slow.ids()...)
			if tt.down {
				backend.listen(t)
			}
			for i := 0; i < 10 && len(backend.missing(ids)) > 0; i++ { // what each of them keeps
				c.configure("grace_period 5s", sites[i%len(sites)])
				c.reload()
				for began := time.Now(); len(backend.missing(ids)) > 0 && time.Since(began) < 5*time.Second; {
					time.Sleep(20 * time.Millisecond)
				}
			}
			backend.hasAll(t, ids, 20*time.Second)
			s.refusedNone(t)
			slow.refusedNone(t)
		})
	}
}

// changedOptions changes them with every third site.
func changedOptions(backend string) (sites []string) {
	for _, seconds := range []int{5, 4, 3} {
		site := queueSite(backend, fmt.Sprintf("answer_after %ds\nconcurrency %d", seconds, 10+seconds))
		sites = append(sites, site, site, site)
	}
	return sites
}

// What lists the folder of the database takes long then.
func TestQueueBesideManyFiles(t *testing.T) {
	backend := newTaker(t, all)
	c := newQueueCaddy(t, backend.addr, "")
	require.NoError(t, os.Mkdir(c.path("queue"), 0o700))
	for i := range size(200_000, 50_000) {
		f, err := os.Create(c.path(fmt.Sprintf("queue/another-file-of-somebody-else-%06d", i)))
		require.NoError(t, err)
		f.Close()
	}
	c.start()
	s := newSender(t, c)
	began := time.Now()
	for i := 0; i < size(1500, 500) || time.Since(began) < time.Duration(size(12, 6))*time.Second; i++ { // in which the events are counted
		require.True(t, s.send(t.Context(), fmt.Sprint("beside-", i), 0))
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("the slowest of %d answers after %v, the median %v", len(s.times), s.quantile(1).Round(time.Millisecond), s.median().Round(100*time.Microsecond))
	assert.Less(t, s.quantile(1), 250*time.Millisecond)
	backend.hasAll(t, s.ids(), 5*time.Second)
	s.refusedNone(t)
}
