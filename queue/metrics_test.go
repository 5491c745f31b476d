package queue

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// seriesOf returns the values of the series of a queue, by name.
func seriesOf(t *testing.T, queue string) map[string]float64 {
	t.Helper()
	families, err := metrics.Gather()
	require.NoError(t, err)
	series := make(map[string]float64)
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			labels := make(map[string]string)
			for _, pair := range metric.GetLabel() {
				labels[pair.GetName()] = pair.GetValue()
			}
			if labels["queue"] == queue {
				name := strings.TrimSpace(strings.TrimPrefix(family.GetName(), "caddy_inkit_queue_") + " " + labels["state"] + labels["result"])
				series[name] = metric.GetGauge().GetValue() + metric.GetCounter().GetValue() + float64(metric.GetHistogram().GetSampleCount())
			}
		}
	}
	return series
}

// All counters start at 0, because a counter that first appears at 1 shows no increase.
func TestAllSeriesExistFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{Name: "from-the-start", StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(status(200))})
		defer c.stop(t)
		assert.Equal(t, map[string]float64{
			"events pending": 0, "events dead": 0, "oldest_age_seconds": 0, "store_seconds": 0, "backend_down": 0, "damaged_files": 0, "paused": 0,
			"stored_total stored": 0, "stored_total delivered": 0, "stored_total duplicate": 0, "stored_total refused": 0, "stored_total failed": 0,
			"attempts_total delivered": 0, "attempts_total failed": 0, "attempts_total unreachable": 0,
		}, seriesOf(t, "from-the-start"))
	})
}

func TestMetricsCount(t *testing.T) {
	for i, tt := range []struct {
		name   string
		status int
		store  error
		events int
		after  time.Duration
		want   map[string]float64 // 0 for all other series
	}{
		{"accepted by the first attempt", 200, nil, 3, 0, map[string]float64{"stored_total delivered": 3, "attempts_total delivered": 3}},
		{"failed with status 500", 500, nil, 2, 0, map[string]float64{"stored_total stored": 2, "store_seconds": 2, "attempts_total failed": 2, "events pending": 2}},
		{"unreachable", 502, nil, 2, 0, map[string]float64{"stored_total stored": 2, "store_seconds": 2, "attempts_total unreachable": 2, "events pending": 2}},
		{"backend down", 502, nil, 7, 0, map[string]float64{"stored_total stored": 7, "store_seconds": 7, "attempts_total unreachable": 5, "backend_down": 1, "events pending": 7}},
		{"cannot be stored", 500, store.ErrFull, 2, 0, map[string]float64{"stored_total failed": 2, "attempts_total failed": 2}},
		{"more than max_events", 500, nil, 12, 0, map[string]float64{"stored_total stored": 10, "stored_total refused": 2, "store_seconds": 10, "attempts_total failed": 12, "events pending": 10}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				name := fmt.Sprint("counted-", i, "-", rand.Text()[:6])
				opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}}
				c := start(t, &Handler{Name: name, StoreRaw: storeOf(opener), MaxEvents: 10, Routes: routes(status(tt.status))})
				defer c.stop(t)
				synctest.Wait()
				opener.fail(tt.store)
				for range tt.events {
					serve(t, c.handlers[0], post(body))
					synctest.Wait()
				}
				for series, got := range seriesOf(t, name) {
					assert.InDelta(t, tt.want[series], got, 0, series)
				}
			})
		})
	}
}

// Every few seconds, the queue counts its pending events and reads the age of the oldest one.
func TestEventsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := start(t, &Handler{Name: "waiting", StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(status(500))})
		defer c.stop(t)
		synctest.Wait()
		for range 3 {
			serve(t, c.handlers[0], post(body))
			time.Sleep(10 * time.Second)
		}
		synctest.Wait()
		series := seriesOf(t, "waiting")
		assert.InDelta(t, 3, series["events pending"], 0)
		assert.InDelta(t, 30, series["oldest_age_seconds"], 7)
	})
}

// The slower a count is, the later the next count begins. Until the end of the next count, the
// metrics show the last count plus the changes by this process.
func TestMetricsBetweenTwoCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}, counting: 10 * time.Second}
		var up atomic.Bool
		c := start(t, &Handler{Name: "between", StoreRaw: storeOf(opener), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			if up.Load() {
				return status(200)(w, r, next)
			}
			return status(500)(w, r, next)
		})})
		defer c.stop(t)
		c.queue().db.opened(t)
		time.Sleep(countInterval + time.Second) // the first count has read no event, and has not ended
		serve(t, c.handlers[0], post(body))
		time.Sleep(opener.counting + countInterval) // the first count has ended, and the next one begins in two minutes
		synctest.Wait()
		assert.InDelta(t, 1, seriesOf(t, "between")["events pending"], 0)
		serve(t, c.handlers[0], post(body))
		time.Sleep(countInterval)
		synctest.Wait()
		assert.InDelta(t, 2, seriesOf(t, "between")["events pending"], 0)
		assert.EqualValues(t, 1, opener.counted.Load())
		up.Store(true)
		time.Sleep(10 * countInterval)
		synctest.Wait()
		assert.Zero(t, seriesOf(t, "between")["events pending"])
	})
}

func TestCountPause(t *testing.T) {
	for took, pause := range map[time.Duration]time.Duration{
		time.Millisecond: countInterval, 20 * time.Millisecond: 10 * time.Second, time.Second: maxCountPause, time.Hour: maxCountPause,
	} {
		assert.Equal(t, pause, countPause(took), took)
	}
}

// If counting the events fails, Caddy logs the error, and soon counts again.
func TestCountThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}, counting: 10 * time.Second}
		c := start(t, &Handler{Name: "uncounted", StoreRaw: storeOf(opener), Routes: routes(status(500))})
		defer c.stop(t)
		synctest.Wait()
		serve(t, c.handlers[0], post(body))
		opener.uncount.Store(true)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		counted := opener.counted.Load()
		assert.Greater(t, counted, int32(15))
		lines := c.logs.FilterMessageSnippet("cannot count events").All()
		assert.Len(t, lines, 5, "one line a minute")
		opener.uncount.Store(false)
		time.Sleep(opener.counting + countInterval)
		synctest.Wait()
		assert.Equal(t, counted+1, opener.counted.Load())
	})
}

// Another process may have delivered events that this process counts as pending. So this
// process counts again after it has refused an event.
func TestRefusedByAnOldCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opener := &faulty{SQLite: sqlite.SQLite{Path: filepath.Join(t.TempDir(), "queue.db")}, counting: time.Second}
		c := start(t, &Handler{Name: "other", MaxEvents: 1, StoreRaw: storeOf(opener), Routes: routes(status(500))})
		defer c.stop(t)
		c.queue().db.opened(t)
		time.Sleep(opener.counting + countInterval + time.Second)
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		_, err := c.queue().db.opened(t).Drop(t.Context(), store.Filter{}) // like another process
		require.NoError(t, err)
		assert.Equal(t, 503, serve(t, c.handlers[0], post(body)).status)
		time.Sleep(opener.counting + countInterval + time.Second)
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
	})
}

// An event that is not stored, because the queue is full (max_events), counts as refused even
// if its first attempt then succeeds.
func TestRefusedEventCountsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Bool
		name := rand.Text() // the metrics are global
		c := start(t, &Handler{Name: name, MaxEvents: 1, StoreRaw: sqliteAt(filepath.Join(t.TempDir(), "queue.db")), Routes: routes(func(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
			if slow.Load() {
				time.Sleep(200 * time.Millisecond)
				return status(200)(w, r, next)
			}
			return status(500)(w, r, next)
		})})
		defer c.stop(t)
		c.queue().db.opened(t)
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		slow.Store(true)
		assert.Equal(t, 200, serve(t, c.handlers[0], post(body)).status)
		series := seriesOf(t, name)
		assert.InDelta(t, 1, series["stored_total stored"], 0)
		assert.InDelta(t, 1, series["stored_total refused"], 0)
		assert.InDelta(t, 0, series["stored_total delivered"], 0)
	})
}

// After a reload has removed a queue, the events stay in the database, one log line says so,
// and the gauges of the queue disappear.
func TestQueueThatAReloadRemoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "queue.db")
		load := func(names ...string) *configuration {
			var handlers []*Handler
			for _, name := range names {
				handlers = append(handlers, &Handler{Name: name, StoreRaw: sqliteAt(path), Routes: routes(status(500))})
			}
			return start(t, handlers...)
		}
		first := load("kept", "removed")
		first.queue().db.opened(t)
		for range 4 {
			serve(t, first.handlers[1], post(body))
		}
		time.Sleep(2 * countInterval)
		second := load("kept")
		first.stop(t)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		gone := second.logs.FilterMessage("events are pending in a queue that is not configured: add the queue again to deliver them").FilterLevelExact(zapcore.WarnLevel)
		require.Equal(t, 1, gone.Len())
		assert.Equal(t, map[string]any{"queue": "removed", "pending": int64(4), "database": "sqlite " + path}, gone.All()[0].ContextMap())
		for _, gauge := range []string{"events pending", "oldest_age_seconds", "backend_down"} {
			assert.NotContains(t, seriesOf(t, "removed"), gauge)
		}
		assert.Equal(t, map[string]int{store.Pending: 4}, second.counts(t))
		third := load("kept", "removed") // the queue is back, so its events are attempted
		second.stop(t)
		defer third.stop(t)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		assert.Greater(t, seriesOf(t, "removed")["attempts_total failed"], 8.0)
	})
}

// The gauges of a queue are those of the queue that delivers, also while the old queue of the same
// name still ends its attempts.
func TestGaugesAfterAReloadToAnotherStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const name = "another-store"
		load := func(path string, answer func(http.ResponseWriter, *http.Request, caddyhttp.Handler) error) *configuration {
			return start(t, &Handler{Name: name, StoreRaw: sqliteAt(path), Routes: routes(answer)})
		}
		old := filepath.Join(t.TempDir(), "old.db")
		first := load(old, status(502))
		for range 2 * 5 {
			serve(t, first.handlers[0], post(body))
		}
		synctest.Wait()
		require.InDelta(t, 1, seriesOf(t, name)["backend_down"], 0)
		second := load(filepath.Join(t.TempDir(), "new.db"), status(200))
		defer second.stop(t)
		first.stop(t)
		for range 3 {
			series := seriesOf(t, name)
			for _, gauge := range []string{"backend_down", "paused", "events pending", "oldest_age_seconds"} {
				assert.Contains(t, series, gauge)
				assert.Zero(t, series[gauge], gauge)
			}
			time.Sleep(time.Minute)
		}
	})
}

func TestMetricsFollowTheConventions(t *testing.T) {
	createSeries("linted")
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(metrics))
	require.ErrorAs(t, registry.Register(metrics), new(prometheus.AlreadyRegisteredError), "a second handler of a configuration")
	problems, err := testutil.GatherAndLint(registry)
	require.NoError(t, err)
	assert.Empty(t, problems)

	taken := prometheus.NewRegistry()
	taken.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "caddy_inkit_queue_events", Help: "Of another module."}))
	require.Error(t, taken.Register(metrics))
}
