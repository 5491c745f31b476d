package inkitwebhook

import (
	"context"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
)

// configure loads handlers as a configuration does. The returned function unloads them,
// as a reload does with the previous handlers.
func configure(t *testing.T, handlers ...*Handler) (unload func()) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	for _, h := range handlers {
		require.NoError(t, h.Provision(ctx))
		require.NoError(t, h.Validate())
	}
	return cancel
}

func seriesOf(t *testing.T, webhook string) (lines []string) {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registerMetrics(registry))
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			labels := make(map[string]string)
			for _, pair := range metric.GetLabel() {
				labels[pair.GetName()] = pair.GetValue()
			}
			if labels["webhook"] == webhook {
				name := strings.TrimPrefix(family.GetName(), "caddy_inkit_webhook_")
				lines = append(lines, strings.TrimRight(name+" "+labels["outcome"]+labels["result"]+" "+labels["secret"], " "))
			}
		}
	}
	return lines
}

func webhook(name string, secrets ...string) *Handler {
	h := &Handler{Name: name}
	for _, secret := range secrets {
		h.Secrets = append(h.Secrets, Secret{Value: "value of " + secret, Name: secret})
	}
	return h
}

// A counter that first appears at 1 shows no increase, so an alert would miss that event.
func TestAllCountersExistFromLoad(t *testing.T) {
	unload := configure(t, webhook("zero", "old", "new"))
	defer unload()
	assert.ElementsMatch(t, []string{
		"requests_total verified old", "requests_total verified new", "requests_total method_not_allowed", "requests_total signature_missing",
		"requests_total signature_malformed", "requests_total signature_mismatch", "requests_total body_too_large", "requests_total body_unreadable",
		"deliveries_total accepted", "deliveries_total refused", "deliveries_total failed", "deliveries_total unhandled",
		"secret_reloads_total changed", "secret_reloads_total unchanged", "secret_reloads_total failed",
	}, seriesOf(t, "zero"))
	for _, counter := range []prometheus.Counter{
		requestsTotal.WithLabelValues("zero", "verified", "new"), deliveriesTotal.WithLabelValues("zero", "failed"), secretReloadsTotal.WithLabelValues("zero", "failed"),
	} {
		assert.Zero(t, testutil.ToFloat64(counter))
	}
}

// The counters of a removed name keep their values until Caddy restarts.
func TestCountersSurviveAReload(t *testing.T) {
	unload := configure(t, webhook("stays", "old", "new"), webhook("goes", "only"), webhook("stays", "old"))
	verified := requestsTotal.WithLabelValues("stays", "verified", "new")
	verified.Add(3)

	defer configure(t, webhook("stays", "new"))() // a reload loads the new configuration, then unloads the old one
	unload()
	assert.InDelta(t, 3, testutil.ToFloat64(verified), 0)
	assert.Contains(t, seriesOf(t, "stays"), "requests_total verified new")
	assert.Contains(t, seriesOf(t, "stays"), "requests_total verified old")
	assert.Contains(t, seriesOf(t, "goes"), "requests_total verified only")
	assert.Same(t, verified, requestsTotal.WithLabelValues("stays", "verified", "new"), "both configurations count in one counter")
}

func TestFailedLoadLeavesNoCounters(t *testing.T) {
	h := webhook("broken", "a")
	h.Secrets[0].Value = ""
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	require.EqualError(t, h.Provision(ctx), "secret a: must not be empty")
	assert.Empty(t, seriesOf(t, "broken"))
}

func TestVerifiedEventsAreCountedBySecret(t *testing.T) {
	h := webhook("counted", "old", "new")
	defer configure(t, h)()
	for range 2 {
		assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte("value of new"), []byte("x")))).status)
	}
	assert.InDelta(t, 2, testutil.ToFloat64(requestsTotal.WithLabelValues("counted", "verified", "new")), 0)
	assert.Zero(t, testutil.ToFloat64(requestsTotal.WithLabelValues("counted", "verified", "old")))
	assert.InDelta(t, 2, testutil.ToFloat64(deliveriesTotal.WithLabelValues("counted", "accepted")), 0)
}

func TestMetricsThatCannotBeRegistered(t *testing.T) {
	registry := prometheus.NewRegistry()
	require.NoError(t, registerMetrics(registry))
	require.NoError(t, registerMetrics(registry), "two handlers of one configuration share its registry")

	registry = prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "caddy_inkit_webhook_requests_total", Help: "of another plugin"}))
	require.ErrorContains(t, registerMetrics(registry), "caddy_inkit_webhook_requests_total")
}
