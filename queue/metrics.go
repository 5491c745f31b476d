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

	eventsGauge = factory.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_events",
		Help: "Stored events by state: pending, or dead until an operator retries or drops them.",
	}, []string{"queue", "state"})

	oldestGauge = factory.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_oldest_age_seconds",
		Help: "Age of the oldest pending event, 0 if there is none.",
	}, []string{"queue"})

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

	backendDown = factory.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_backend_down",
		Help: "Whether the backend counts as down: 1 or 0.",
	}, []string{"queue"})

	pausedGauge = factory.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_paused",
		Help: "Whether an operator has paused the queue: 1 or 0.",
	}, []string{"queue"})

	damagedFiles = factory.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_damaged_files",
		Help: "Damaged databases that were moved aside and are still there.",
	}, []string{"queue"})
)

// createSeries creates all series of a queue at 0: a counter that first appears at 1 shows no
// increase.
func createSeries(queue string) {
	for _, result := range []string{"stored", "delivered", "duplicate", "refused", "failed"} {
		storedTotal.WithLabelValues(queue, result)
	}
	for _, result := range []string{"delivered", "failed", "unreachable"} {
		attemptsTotal.WithLabelValues(queue, result)
	}
	for _, gauge := range []*prometheus.GaugeVec{oldestGauge, backendDown, pausedGauge, damagedFiles} {
		gauge.WithLabelValues(queue)
	}
	eventsGauge.WithLabelValues(queue, store.Pending)
	eventsGauge.WithLabelValues(queue, store.Dead)
	storeSeconds.WithLabelValues(queue)
}

// deleteGauges deletes the gauges of a closed queue, because no code updates them any more.
func deleteGauges(queue string) {
	for _, gauge := range []*prometheus.GaugeVec{eventsGauge, oldestGauge, backendDown, pausedGauge, damagedFiles} {
		gauge.DeletePartialMatch(prometheus.Labels{"queue": queue})
	}
}
