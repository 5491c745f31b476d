package queue

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

// pause records whether an operator has paused a queue, as far as this process knows.
type pause struct {
	known chan struct{} // closed after the first response of the database, or after storeWait
	close func()

	mu    sync.Mutex
	since time.Time // zero if it is not paused
}

func newPause() *pause {
	p := &pause{known: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.known) })
	time.AfterFunc(storeWait, p.close)
	return p
}

// heedPause records whether the queue is paused. For a paused queue, it changes p so that
// no event is due.
func (q *queue) heedPause(p *store.Peek) {
	q.pause.mu.Lock()
	was := q.pause.since
	q.pause.since = p.Paused
	q.pause.mu.Unlock()
	q.pause.close()
	logger := q.db.logger.Load()
	switch {
	case p.Paused.IsZero() && !was.IsZero():
		logger.Info("the queue is no longer paused", zap.String("queue", q.name), zap.Duration("paused", time.Since(was)))
		q.metrics.paused.Set(0)
	case !p.Paused.IsZero() && was.IsZero():
		logger.Warn("the queue is paused: events are stored without attempts until caddy inkit-queue resume", zap.String("queue", q.name), zap.Time("since", p.Paused))
		q.metrics.paused.Set(1)
	}
	if !p.Paused.IsZero() {
		p.Empty, p.Wait = false, store.Latest
	}
}

// isPaused reports whether the queue is paused. After the start, it waits until the
// database is open, because the backend of a paused queue must not get an event.
func (q *queue) isPaused() bool {
	if !q.db.writer.Failing() {
		<-q.pause.known
	}
	q.pause.mu.Lock()
	defer q.pause.mu.Unlock()
	return !q.pause.since.IsZero()
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

// onceForm returns a pattern that matches the event types, or nil if there are none.
func onceForm(types []string) *regexp.Regexp {
	if validateOnce(types) != nil || len(types) == 0 {
		return nil
	}
	return regexp.MustCompile("^(?s:" + strings.ReplaceAll(strings.Join(types, "|"), "*", ".*") + ")$")
}

func (h *Handler) isOnce(eventType string) bool {
	return h.once != nil && h.once.MatchString(eventType)
}
