package queue

import (
	"errors"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/prometheus/client_golang/prometheus"
)

// The collectors are created once, and registered again for each configuration, like the
// collectors of inkit_webhook.
var (
	eventsGauge = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_events",
		Help: "Stored events by state: pending, or dead until an operator retries or drops them.",
	}, []string{"queue", "state"})

	oldestGauge = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_oldest_age_seconds",
		Help: "Age of the oldest pending event, 0 if there is none.",
	}, []string{"queue"})

	storedTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_queue_stored_total",
		Help: "Counter of verified events by result: stored, delivered before they were stored, duplicate of a stored event, refused above max_events, or failed to store.",
	}, []string{"queue", "result"})

	attemptsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_queue_attempts_total",
		Help: "Counter of attempts by result: delivered, failed, or unreachable (no answer, or 502, 503, 504, 429).",
	}, []string{"queue", "result"})

	storeSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "caddy_inkit_queue_store_seconds",
		Help:    "Histogram of the seconds until an event was on the disk.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
	}, []string{"queue"})

	backendDown = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_backend_down",
		Help: "Whether the backend counts as down: 1 or 0.",
	}, []string{"queue"})

	pausedGauge = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_paused",
		Help: "Whether an operator has paused the queue: 1 or 0.",
	}, []string{"queue"})

	damagedFiles = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "caddy_inkit_queue_damaged_files",
		Help: "Damaged databases that were moved aside and are still there.",
	}, []string{"queue"})
)

// The labels for the result of storing an event, and for the result of an attempt.
const (
	resultStored    = "stored"
	resultDelivered = "delivered"
	resultDuplicate = "duplicate"
	resultRefused   = "refused"
	resultFailed    = "failed"

	resultUnreachable = "unreachable"
)

func registerMetrics(registry prometheus.Registerer) error {
	for _, collector := range []prometheus.Collector{
		eventsGauge, oldestGauge, storedTotal, attemptsTotal, storeSeconds, backendDown, pausedGauge, damagedFiles,
	} {
		if err := registry.Register(collector); err != nil && !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
			return err
		}
	}
	return nil
}

// createSeries creates all series of a queue at 0: a counter that first appears at 1 shows no
// increase.
func createSeries(queue string) {
	for _, result := range []string{resultStored, resultDelivered, resultDuplicate, resultRefused, resultFailed} {
		storedTotal.WithLabelValues(queue, result)
	}
	for _, result := range []string{resultDelivered, resultFailed, resultUnreachable} {
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
