//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const once = "once *_CREATE_FINISHED"

// sendOnce sends an event to a Caddy, and asserts that Caddy answers 200.
func sendOnce(t *testing.T, c *caddy, id string) {
	t.Helper()
	assert.Equal(t, http.StatusOK, post(t, "http://"+c.addr+"/webhook", event(id), sign(secret, event(id))).status)
}

// A killed Caddy loses only the history of its last second.
func TestQueueHistoryAfterAKill(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, all)
	c := queueCaddy(t, backend.addr, "")
	s := newSender(t, c)
	s.workers = 2
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := s.sendAll(ctx, "delivered", 1_000_000)
	time.Sleep(3 * time.Second)
	killed := time.Now()
	killHard(c)
	cancel()
	<-done
	c.start()
	known := make(map[string]bool)
	for _, e := range c.list(t, "--state", "delivered") {
		known[e.ResourceID] = true
	}
	var last time.Duration // from the delivery of the oldest missing event to the kill
	missing := 0
	backend.mu.Lock()
	defer backend.mu.Unlock()
	for _, id := range s.ids() {
		if !known[id] {
			missing++
			last = max(last, killed.Sub(backend.takenAt[id]))
		}
	}
	t.Logf("%d of %d delivered events are not in the history, the first was delivered %v before the kill", missing, len(s.ids()), last.Round(time.Millisecond))
	assert.NotEmpty(t, known)
	assert.Less(t, last, 2*time.Second, "a second, and a transaction on a slow disk")
}

// An event that the sender sends several times is delivered once. The test sends many copies in
// parallel, and more after the delivery, after a restart, and after kill -9 in an outage.
func TestQueueOnce(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, all)
	c := queueCaddy(t, backend.addr, once)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { sendOnce(t, c, "twenty") })
	}
	wg.Wait()
	for range 3 {
		sendOnce(t, c, "twenty")
	}
	c.stop(t, syscall.SIGTERM)
	c.start()
	sendOnce(t, c, "twenty")

	backend.close()
	sendOnce(t, c, "outage")
	killHard(c)
	c.start()
	sendOnce(t, c, "outage")
	sendOnce(t, c, "twenty")
	backend.listen()
	backend.hasAll(t, []string{"outage"}, time.Minute)
	sendOnce(t, c, "outage")
	time.Sleep(2 * time.Second)
	assert.Equal(t, 1, backend.of("twenty").attempts)
	assert.Equal(t, 1, backend.of("outage").taken)
	assert.Equal(t, "3", c.metric(`caddy_inkit_queue_stored_total{queue="default",result="duplicate"}`))

	other := []byte(`{"event_type":"DOCUMENT_PDF_ACCESS","resource_id":"viewed"}`)
	for range 3 {
		assert.Equal(t, http.StatusOK, post(t, "http://"+c.addr+"/webhook", other, sign(secret, other)).status)
	}
	assert.Equal(t, 3, backend.of("viewed").taken, "of a type that is not named")

	list, err := c.command("inkit-queue", "list", "--state", "all", "--resource", "outage", "--db", c.path("queue/events.db"))
	require.NoError(t, err)
	assert.Regexp(t, `(?m)^\S+  delivered  \d+ s +DOCUMENT_CREATE_FINISHED  outage`, list)
}

// The test sends each of 200 events to two Caddys in parallel. The Caddys share a PostgreSQL.
// Each event arrives only one time.
func TestPostgresOnce(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	backend := newTaker(t, all)
	caddys := []*caddy{pgCaddy(t, backend.addr, dsn, once), pgCaddy(t, backend.addr, dsn, once)}
	ids := make([]string, 200)
	var wg sync.WaitGroup
	places := make(chan struct{}, 10)
	for i := range ids {
		ids[i] = fmt.Sprintf("pair-%03d", i)
		for _, c := range caddys {
			places <- struct{}{}
			wg.Go(func() {
				defer func() { <-places }()
				sendOnce(t, c, ids[i])
			})
		}
	}
	wg.Wait()
	backend.hasAll(t, ids, time.Minute)
	time.Sleep(2 * time.Second)
	attempts := 0
	for _, id := range ids {
		attempts += backend.of(id).attempts
	}
	assert.Equal(t, 200, attempts)

	server.Kill() // events are delivered even without the database
	s := newSender(t, caddys[0])
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for i := range 3 {
		assert.True(t, s.send(ctx, fmt.Sprint("dead-", i), 0))
	}
	assert.Empty(t, backend.missing([]string{"dead-0", "dead-1", "dead-2"}))
	assert.Equal(t, 1, strings.Count(caddys[0].output.String(), "cannot store events before their first attempt"))
}

// A queue that two Caddys share is paused in both, and stays paused in both after one Caddy
// has reloaded, restarted, and been killed with kill -9.
func TestPostgresPause(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	dsn := server.DSN(server.NewDatabase(t))
	backend := newTaker(t, all)
	caddys := []*caddy{pgCaddy(t, backend.addr, dsn, ""), pgCaddy(t, backend.addr, dsn, "")}
	c := caddys[0]
	config := c.path("Caddyfile")
	said, err := c.command("inkit-queue", "pause", "--config", config)
	require.NoError(t, err)
	assert.Equal(t, "default is paused\n", said)
	time.Sleep(2 * time.Second)
	var ids []string
	sendBoth := func() {
		for _, c := range caddys {
			ids = append(ids, fmt.Sprint("paused-", len(ids)))
			sendOnce(t, c, ids[len(ids)-1])
		}
	}
	sendBoth()
	c.reload()
	sendBoth()
	c.stop(t, syscall.SIGTERM)
	c.start()
	sendBoth()
	killHard(c)
	c.start()
	sendBoth()
	time.Sleep(3 * time.Second)
	assert.Zero(t, backend.snapshot().events)
	assert.Equal(t, "1", c.metric(`caddy_inkit_queue_paused{queue="default"}`))
	_, err = c.command("inkit-queue", "pause", "none", "--config", config)
	require.Error(t, err)
	status, err := c.command("inkit-queue", "status", "--config", config)
	require.NoError(t, err)
	assert.Regexp(t, `(?m)^  paused +for \d+ s\n  pending +8, `, status)

	_, err = c.command("inkit-queue", "resume", "--config", config)
	require.NoError(t, err)
	resumed := time.Now()
	backend.hasAll(t, ids, 10*time.Second)
	t.Log("delivered after", time.Since(resumed))
	c.logged("the queue is no longer paused")
}

func TestRecipeUnwanted(t *testing.T) {
	t.Parallel()
	backend := newTaker(t, func(id string, _ int) int {
		switch id {
		case "gone":
			return http.StatusGone
		case "wrong":
			return http.StatusUnprocessableEntity
		}
		return http.StatusInternalServerError
	})
	options, site := recipe(t, "An event that your backend will never want", "localhost:9000", backend.addr,
		"inkit_queue {\n", "inkit_queue {\n\t\t\tstore sqlite {{dir}}/queue/events.db\n")
	c := startCaddy(t, options, site)
	for id, status := range map[string]int{"gone": 204, "wrong": 204, "failed": 200} {
		assert.Equal(t, status, post(t, webhookURL(c, "/webhook"), event(id), sign(secret, event(id))).status, id)
	}
	waitFor(t, "the history has both", c.process, func() bool {
		list, err := c.command("inkit-queue", "list", "--json", "--state", "delivered", "--db", c.path("queue/events.db"))
		return err == nil && strings.Count(list, `"status":204`) == 2
	})
	list, err := c.command("inkit-queue", "list", "--json", "--db", c.path("queue/events.db"))
	require.NoError(t, err)
	assert.Equal(t, 1, strings.Count(list, "\n"))
	assert.Contains(t, list, `"resource_id":"failed"`)
	assert.Equal(t, 1, backend.of("gone").attempts)
}
