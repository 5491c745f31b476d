package inkitwebhook

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Every load of a configuration has a registry of its own. The collectors are
// made once and join each of them, so that what they counted outlives a reload.
//
// There are none for time and size: Caddy's own metrics option has both for each
// handler, by its name.
var (
	requestsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy",
		Subsystem: "inkit_webhook",
		Name:      "requests_total",
		Help:      "Counter of webhook requests by outcome and, if verified, by the name of the secret that signed.",
	}, []string{"outcome", "secret"})

	secretReloadsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "caddy",
		Subsystem: "inkit_webhook",
		Name:      "secret_reloads_total",
		Help:      "Counter of times that secrets were read again while running, by result.",
	}, []string{"result"})
)

// The results of reading secrets again.
const (
	reloadChanged   = "changed"   // at least one has a new value, which is in use
	reloadUnchanged = "unchanged" // all are as they were
	reloadFailed    = "failed"    // at least one could not be read and stays as it was
)

func registerMetrics(registry prometheus.Registerer) error {
	for _, collector := range []prometheus.Collector{requestsTotal, secretReloadsTotal} {
		err := registry.Register(collector)
		var already prometheus.AlreadyRegisteredError
		if err != nil && !errors.As(err, &already) {
			return err
		}
	}
	return nil
}

// counters holds the counters of one handler, so that no request looks one up by
// its labels. All are there from the start, at 0: an alert on the growth of a
// counter misses the first event of one that comes into being with it.
type counters struct {
	verified []prometheus.Counter          // by index of the secret
	rejected map[string]prometheus.Counter // by outcome
}

func newCounters(secrets []Secret) counters {
	c := counters{rejected: make(map[string]prometheus.Counter)}
	for _, secret := range secrets {
		c.verified = append(c.verified, requestsTotal.WithLabelValues(outcomeVerified, secret.Name))
	}
	for _, outcome := range []string{
		outcomeMethodNotAllowed, outcomeSignatureMissing, outcomeSignatureMalformed,
		outcomeBodyTooLarge, outcomeBodyUnreadable, outcomeSignatureMismatch,
	} {
		c.rejected[outcome] = requestsTotal.WithLabelValues(outcome, "")
	}
	return c
}
