package queue

import (
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/live"
)

// Queues implements live.Queues.
func (a *App) Queues() (all []live.Queue) {
	seen := make(map[string]bool)
	for _, h := range a.handlers {
		q := h.use.queue.Load()
		if q == nil || seen[h.Name] {
			continue
		}
		seen[h.Name] = true
		all = append(all, live.Queue{
			Name: q.name, Database: q.db.opener.Key(), History: time.Duration(*h.History), MaxEvents: h.MaxEvents,
			Store: q.db.writer.Store, Down: func() time.Time { return q.breaker.Backend().Down }, Wake: q.schedule.Wake,
		})
	}
	return all
}

// Interface guard
var _ live.Queues = (*App)(nil)
