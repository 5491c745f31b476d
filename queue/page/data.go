package page

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// pageSize is the number of events in a list. searchTimeout is the time limit of a
	// search, including the wait for its turn.
	pageSize      = 50
	searchTimeout = 5 * time.Second

	// After a page is made, the next page waits for a pause. maxPause is the longest such pause.
	maxPause = 50 * time.Millisecond

	// A look reads the status of a database. The pause after a look is the longer of two times:
	// lookPause, and lookShare times the duration of the look. A visitor waits at most lookWait for
	// a look.
	lookPause   = 2 * time.Second
	lookShare   = 10
	lookWait    = 200 * time.Millisecond
	lookTimeout = 20 * time.Second

	// changeTime is the time limit for changing events, and for counting them before a drop.
	// maxCount is the largest number of events that are counted.
	changeTime = 20 * time.Second
	maxCount   = 10_000
)

// turn waits until no other page is being made. Then the turn of this visitor begins, and the
// caller ends it by calling done. The pause after a turn is as long as the turn, but at most
// maxPause, so that even many visitors do not slow down events.
func (h *Handler) turn(ctx context.Context) (done func(), err error) {
	select {
	case h.shared.turn <- struct{}{}:
		began := time.Now()
		return func() { time.AfterFunc(min(time.Since(began), maxPause), func() { <-h.shared.turn }) }, nil
	case <-ctx.Done():
		return nil, errors.New("too many visitors: try again in a moment")
	}
}

// database is a database, and the queues of this Caddy that are in it.
type database struct {
	Key    string
	queues []operator.Queue
}

// Live returns the queue with this name, or nil if this Caddy has no such queue.
func (d *database) Live(name string) *operator.Queue {
	for i := range d.queues {
		if d.queues[i].Name == name {
			return &d.queues[i]
		}
	}
	return nil
}

func (d *database) store() (store.Store, error) {
	s, err := d.queues[0].Store()
	if s == nil {
		if err == nil {
			err = errors.New("it is being opened")
		}
		return nil, fmt.Errorf("the database %s is not open: %w", d.Key, err)
	}
	return s, nil
}

// databases returns the databases of this Caddy, in the order of their queues.
func (h *Handler) databases() (all []*database) {
	for _, q := range h.queues.Queues() {
		i := slices.IndexFunc(all, func(d *database) bool { return d.Key == q.Database })
		if i < 0 {
			all, i = append(all, &database{Key: q.Database}), len(all)
		}
		all[i].queues = append(all[i].queues, q)
	}
	return all
}

// The method "each" calls f for the databases of a queue, so that a visitor who asks for one queue
// sees no error of another database. If this Caddy has no such queue, the method calls f for all
// databases.
func (h *Handler) each(queue string, f func(*database, store.Store) error) (err error) {
	some := slices.DeleteFunc(h.databases(), func(d *database) bool { return d.Live(queue) == nil })
	if len(some) == 0 {
		some = h.databases()
	}
	for _, d := range some {
		s, failed := d.store()
		if failed == nil {
			failed = f(d, s)
		}
		err = errors.Join(err, failed)
	}
	return err
}

// look is the last known status of a database. All visitors share it, because reading the
// status of a million events takes long, and many visitors must not slow down the queue.
type look struct {
	store.Status
	Err error
	At  time.Time // zero before the end of the first look

	next time.Time     // the earliest time of the next look
	done chan struct{} // closed at the end of the look
}

// look returns the last known status of a database. If it is time for a new look, the method
// begins one in the background. It waits at most lookWait for the end of a look.
func (h *Handler) look(d *database) look {
	h.shared.mu.Lock()
	l := h.shared.looks[d.Key]
	if l == nil {
		l = new(look)
		for _, q := range d.queues {
			l.Queues = append(l.Queues, store.QueueStatus{Queue: q.Name})
		}
		h.shared.looks[d.Key] = l
	}
	if !time.Now().Before(l.next) {
		l.next, l.done = time.Now().Add(2*lookTimeout), make(chan struct{})
		go h.take(l, d)
	}
	done := l.done
	h.shared.mu.Unlock()
	select {
	case <-done:
	case <-time.After(lookWait):
	}
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	return *l
}

func (h *Handler) take(l *look, d *database) {
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	began := time.Now()
	names := make([]string, len(d.queues))
	for i, q := range d.queues {
		names[i] = q.Name
	}
	var status store.Status
	s, err := d.store()
	if err == nil {
		status, err = s.Status(ctx, names...)
	}
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	if l.Err = err; err == nil {
		l.Status = status
	}
	l.At = time.Now()
	l.next = l.At.Add(max(lookPause, lookShare*time.Since(began)))
	close(l.done)
}

// forget removes all looks, so that the next visitor sees a change immediately.
func (h *Handler) forget() {
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	clear(h.shared.looks)
}

// search returns a page of the events in all databases. If some databases cannot be
// searched, it returns their errors, and also the events of the other databases.
func (h *Handler) search(ctx context.Context, f store.Filter, withRequest bool) (all store.Page, err error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	done, err := h.turn(ctx)
	if err != nil {
		return all, err
	}
	defer done()
	if f.Limit == 0 {
		f.Limit = pageSize
	}
	var parts []store.Page
	err = h.each(f.Queue, func(d *database, s store.Store) error {
		part, err := s.Search(ctx, f, withRequest)
		if err != nil {
			return fmt.Errorf("the database %s cannot be searched: %w", d.Key, err)
		}
		parts = append(parts, part)
		return nil
	})
	return store.Merge(f, parts...), err
}

// count counts the events that a filter selects, and returns a text, such as "12 events".
func (h *Handler) count(ctx context.Context, f store.Filter) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	f.Limit = store.MaxPage
	for n := 0; n <= maxCount; {
		page, err := h.search(ctx, f, false)
		if n += len(page.Records); err != nil || page.Next == "" {
			return events(n), err
		}
		f.After = page.Next
	}
	return "more than " + events(maxCount), nil
}

// changed is the result of changing events.
type changed struct {
	n      int
	more   bool     // changeTime ended before all events were changed
	queues []string // the queues of the changed events
}

// change changes events in all databases. After an error, the events that were already
// changed stay changed.
func (h *Handler) change(ctx context.Context, f store.Filter, action operator.Action) (c changed, err error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	defer h.forget()
	err = h.each(f.Queue, func(d *database, s store.Store) error {
		err := operator.InSteps(ctx, s, f, func(page []*store.Record, step store.Filter) error {
			for _, r := range page {
				if !slices.Contains(c.queues, r.Queue) {
					c.queues = append(c.queues, r.Queue)
				}
			}
			n, err := action(s, ctx, step)
			c.n += n
			return err
		})
		for _, q := range d.queues {
			q.Wake()
		}
		if err != nil && ctx.Err() != nil {
			c.more = true
			return nil
		}
		return err
	})
	return c, err
}
