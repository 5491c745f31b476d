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

// queueMetrics are the metrics of one queue. All series exist from the start, at 0.
type queueMetrics struct {
	queue                 string
	stored, attempts      map[string]prometheus.Counter // by result
	storeSeconds          prometheus.Observer
	down, damaged, paused prometheus.Gauge
	pending, dead, oldest prometheus.Gauge
}

func newQueueMetrics(queue string) *queueMetrics {
	m := &queueMetrics{
		queue:  queue,
		stored: make(map[string]prometheus.Counter), attempts: make(map[string]prometheus.Counter),
		storeSeconds: storeSeconds.WithLabelValues(queue),
		down:         backendDown.WithLabelValues(queue),
		paused:       pausedGauge.WithLabelValues(queue),
		damaged:      damagedFiles.WithLabelValues(queue),
		pending:      eventsGauge.WithLabelValues(queue, store.Pending),
		dead:         eventsGauge.WithLabelValues(queue, store.Dead),
		oldest:       oldestGauge.WithLabelValues(queue),
	}
	for _, result := range []string{resultStored, resultDelivered, resultDuplicate, resultRefused, resultFailed} {
		m.stored[result] = storedTotal.WithLabelValues(queue, result)
	}
	for _, result := range []string{resultDelivered, resultFailed, resultUnreachable} {
		m.attempts[result] = attemptsTotal.WithLabelValues(queue, result)
	}
	return m
}

// show sets the gauges.
func (m *queueMetrics) show(pending, dead store.Count, damaged int) {
	m.pending.Set(float64(pending.Events))
	m.dead.Set(float64(dead.Events))
	m.oldest.Set(pending.Oldest.Seconds())
	m.damaged.Set(float64(damaged))
}

// remove deletes the gauges of a closed queue, because no code updates them any more.
func (m *queueMetrics) remove() {
	for _, gauge := range []*prometheus.GaugeVec{eventsGauge, oldestGauge, backendDown, pausedGauge, damagedFiles} {
		gauge.DeletePartialMatch(prometheus.Labels{"queue": m.queue})
	}
}
