package inkitwebhook

import (
	"errors"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"github.com/prometheus/client_golang/prometheus"
)

// Every load of a configuration has its own registry. The collectors are created once
// and registered in each registry, so that the counts survive a reload. This module does
// not measure time and size, because Caddy's metrics option does.
var (
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_webhook_requests_total",
		Help: "Counter of webhook requests by outcome and, if verified, by the name of the secret.",
	}, []string{"webhook", "outcome", "secret"})

	deliveriesTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_webhook_deliveries_total",
		Help: "Counter of verified events by the result of the next handlers.",
	}, []string{"webhook", "result"})

	secretReloadsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_inkit_webhook_secret_reloads_total",
		Help: "Counter of reloads of the secrets while running, by result.",
	}, []string{"webhook", "result"})
)

const ( // indexes of deliveryResults
	deliveryAccepted  = iota // status 2xx
	deliveryRefused          // another status below 500
	deliveryFailed           // status 5xx, an error or a panic
	deliveryUnhandled        // no handler took the event
)

const ( // indexes of reloadResults
	reloadChanged   = iota // at least one secret has a new value, which is in use
	reloadUnchanged        // no secret has a new value
	reloadFailed           // at least one secret could not be read, and keeps its value
)

var (
	deliveryResults = []string{"accepted", "refused", "failed", "unhandled"}
	reloadResults   = []string{"changed", "unchanged", "failed"}
)

func registerMetrics(registry prometheus.Registerer) error {
	for _, collector := range []prometheus.Collector{requestsTotal, deliveriesTotal, secretReloadsTotal} {
		if err := registry.Register(collector); err != nil && !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
			return err
		}
	}
	return nil
}

// counters has the counters of one handler, so that no request looks up a counter by its labels.
// All counters are created at 0: a counter that first appears at 1 shows no increase, so an alert
// would miss that event. The counters of a removed webhook or secret stay until Caddy restarts.
type counters struct {
	verified   []prometheus.Counter // by index of the secret
	rejected   []prometheus.Counter // by index of rejections
	deliveries []prometheus.Counter // by index of deliveryResults
	reloads    []prometheus.Counter // by index of reloadResults
}

func newCounters(webhook string, secrets []Secret) (c counters) {
	for _, secret := range secrets {
		c.verified = append(c.verified, requestsTotal.WithLabelValues(webhook, event.Verified, secret.Name))
	}
	for _, row := range rejections {
		c.rejected = append(c.rejected, requestsTotal.WithLabelValues(webhook, row.outcome, ""))
	}
	for _, result := range deliveryResults {
		c.deliveries = append(c.deliveries, deliveriesTotal.WithLabelValues(webhook, result))
	}
	for _, result := range reloadResults {
		c.reloads = append(c.reloads, secretReloadsTotal.WithLabelValues(webhook, result))
	}
	return c
}
