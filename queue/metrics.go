package queue

import (
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// The collectors are created once, in a registry that is registered again for each
// configuration, so that the counts survive a reload.
var (
	metrics = prometheus.NewRegistry()
	factory = promauto.With(metrics)

	storedTotal = factory.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_queue_stored_total",
		Help: "Counter of verified events by result: stored, delivered before they were stored, duplicate of a stored event, refused above max_events, or failed to store.",
	}, []string{"queue", "result"})

	attemptsTotal = factory.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_queue_attempts_total",
		Help: "Counter of attempts by result: delivered, failed, or unreachable (no answer, or 502, 503, 504, 429).",
	}, []string{"queue", "result"})

	storeSeconds = factory.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "caddy_inkit_queue_store_seconds",
		Help:    "Histogram of the seconds until an event was on the disk.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
	}, []string{"queue"})
)

// createSeries creates all counters of a queue at 0: a counter that first appears at 1 shows no
// increase.
func createSeries(queue string) {
	for _, result := range []string{"stored", "delivered", "duplicate", "refused", "failed"} {
		storedTotal.WithLabelValues(queue, result)
	}
	for _, result := range []string{"delivered", "failed", "unreachable"} {
		attemptsTotal.WithLabelValues(queue, result)
	}
	storeSeconds.WithLabelValues(queue)
}

// gauge returns the description of a gauge with the label queue and more labels.
func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, append([]string{"queue"}, labels...), nil)
}

var (
	eventsGauge  = gauge("caddy_inkit_queue_events", "Stored events by state: pending, or dead until an operator retries or drops them.", "state")
	oldestGauge  = gauge("caddy_inkit_queue_oldest_age_seconds", "Age of the oldest pending event, 0 if there is none.")
	backendDown  = gauge("caddy_inkit_queue_backend_down", "Whether the backend counts as down: 1 or 0.")
	pausedGauge  = gauge("caddy_inkit_queue_paused", "Whether an operator has paused the queue: 1 or 0.")
	damagedFiles = gauge("caddy_inkit_queue_damaged_files", "Damaged databases that were moved aside and are still there.")
)

func init() {
	metrics.MustRegister(gauges{})
}

// gauges collects the gauges of all queues that deliver. It reads the state of the queues when it is
// asked, because a reload may replace a queue by another one of the same name.
type gauges struct{}

// Describe implements prometheus.Collector.
func (gauges) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{eventsGauge, oldestGauge, backendDown, pausedGauge, damagedFiles} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector.
func (gauges) Collect(collected chan<- prometheus.Metric) {
	byName := make(map[string]*queue)
	queues.Range(func(_, value any) bool {
		if q := value.(*queue); q.current() != nil {
			byName[q.name] = q
		}
		return true
	})
	for name, q := range byName {
		send := func(desc *prometheus.Desc, value float64, labels ...string) {
			collected <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, append([]string{name}, labels...)...)
		}
		pending, dead, damaged := q.db.shown(name)
		send(eventsGauge, float64(pending.Events), store.Pending)
		send(eventsGauge, float64(dead.Events), store.Dead)
		send(oldestGauge, pending.Oldest.Seconds())
		send(damagedFiles, float64(damaged))
		send(backendDown, flag(!q.breaker.Backend().Down.IsZero()))
		send(pausedGauge, flag(!q.paused.Load().IsZero()))
	}
}

// flag returns 1 for true, and 0 for false.
func flag(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
