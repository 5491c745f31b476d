package queue

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

// heedPause records whether the queue is paused. For a paused queue, it changes p so that
// no event is due.
func (q *queue) heedPause(p *store.Peek) {
	was := q.paused.Swap(&p.Paused)
	q.knowPause()
	logger := q.db.logger.Load()
	switch {
	case p.Paused.IsZero() && !was.IsZero():
		logger.Info("the queue is no longer paused", zap.String("queue", q.name), zap.Duration("paused", time.Since(*was)))
		pausedGauge.WithLabelValues(q.name).Set(0)
	case !p.Paused.IsZero() && was.IsZero():
		logger.Warn("the queue is paused: events are stored without attempts until caddy inkit-queue resume", zap.String("queue", q.name), zap.Time("since", p.Paused))
		pausedGauge.WithLabelValues(q.name).Set(1)
	}
	if !p.Paused.IsZero() {
		p.Empty, p.Wait = false, store.Latest
	}
}

// isPaused reports whether the queue is paused. After the start, it waits until the
// database is open, because the backend of a paused queue must not get an event.
func (q *queue) isPaused() bool {
	if !q.db.writer.Failing() {
		<-q.pauseKnown.Done()
	}
	return !q.paused.Load().IsZero()
}

// remember adds a delivered event to the history.
func (q *queue) remember(h *Handler, r *store.Record, status int) {
	if *h.History > 0 {
		q.db.writer.Remember(&store.Record{
			ID: r.ID, Queue: q.name, EventType: r.EventType, ResourceID: r.ResourceID,
			Received: r.Received, Finished: time.Now(), Attempts: r.Attempts, Status: status,
		})
	}
}

var onceType = regexp.MustCompile(`^[A-Za-z0-9_*]+$`)

func validateOnce(types []string) error {
	for i, name := range types {
		switch {
		case !onceType.MatchString(name):
			return errors.New("once: an event type must be letters, digits, '_' and '*'")
		case slices.Contains(types[:i], name):
			return fmt.Errorf("once: %s is listed twice", name)
		}
	}
	return nil
}

// isOnce reports whether once lists an event type.
func (h *Handler) isOnce(eventType string) bool {
	return slices.ContainsFunc(h.Once, func(pattern string) bool {
		match, _ := path.Match(pattern, eventType)
		return match
	})
}
