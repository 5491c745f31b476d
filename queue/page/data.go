package page

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/live"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// pageSize is the number of events in a list. searchTimeout is the time limit of a
	// search, including the wait for its turn.
	pageSize      = 50
	searchTimeout = 5 * time.Second

	// maxPause is the longest pause after a page before the next one.
	maxPause = 50 * time.Millisecond

	// The pause after a look at a database is lookPause, or lookShare times the duration of
	// the look if that is longer. A visitor waits for a look at most lookWait.
	lookPause   = 2 * time.Second
	lookShare   = 10
	lookWait    = 200 * time.Millisecond
	lookTimeout = 20 * time.Second

	// changeStep is the maximum number of events in one transaction. It is small, because a
	// new event may have to wait for the transaction.
	changeStep = 100

	// countTime is the time limit for counting the events before a drop. changeTime is the
	// time limit for changing events.
	countTime  = 2 * time.Second
	changeTime = 20 * time.Second
)

// errBusy means that the visitor did not get a turn in time.
var errBusy = errors.New("too many visitors: try again in a moment")

// errLooking means that the first look at the database has not ended yet.
var errLooking = errors.New("the events are being counted")

// turn waits for the turn of this visitor, which ends with done. Only one page is made at a
// time, and the pause after it is as long as the turn, up to maxPause. So even many
// visitors do not slow down events.
func (h *Handler) turn(ctx context.Context) (done func(), err error) {
	select {
	case h.shared.turn <- struct{}{}:
		began := time.Now()
		return func() { time.AfterFunc(min(time.Since(began), maxPause), func() { <-h.shared.turn }) }, nil
	case <-ctx.Done():
		if ctx.Err() == context.Canceled { //nolint:errorlint // Err returns this value unwrapped
			return nil, context.Canceled // the visitor has closed the connection
		}
		return nil, errBusy
	}
}

// database is a database with the queues of this Caddy in it.
type database struct {
	key    string
	queues []live.Queue
}

// databasesOf returns the databases that may have events of a queue. An error of another
// database is not shown to a visitor who looks at this queue.
func (h *Handler) databasesOf(queue string) []*database {
	all := h.databases()
	has := func(d *database) bool {
		return slices.ContainsFunc(d.queues, func(q live.Queue) bool { return q.Name == queue })
	}
	if !slices.ContainsFunc(all, has) {
		return all
	}
	return slices.DeleteFunc(all, func(d *database) bool { return !has(d) })
}

func (d *database) store() (store.Store, error) {
	s, err := d.queues[0].Store()
	if s == nil {
		if err == nil {
			err = errors.New("it is being opened")
		}
		return nil, fmt.Errorf("the database %s is not open: %w", d.key, err)
	}
	return s, nil
}

// wake makes the queues of the database look for due events.
func (d *database) wake() {
	for _, q := range d.queues {
		q.Wake()
	}
}

// databases returns the databases of this Caddy, in the order of their queues.
func (h *Handler) databases() (all []*database) {
	for _, q := range h.queues.Queues() {
		i := slices.IndexFunc(all, func(d *database) bool { return d.key == q.Database })
		if i < 0 {
			all, i = append(all, &database{key: q.Database}), len(all)
		}
		all[i].queues = append(all[i].queues, q)
	}
	return all
}

// look is the last known status of a database. All visitors share it, because reading the
// status of a million events takes long, and many visitors must not slow down the queue.
type look struct {
	mu      sync.Mutex
	status  store.Status
	err     error
	at      time.Time // zero before the first look
	next    time.Time
	running chan struct{} // closed at the end of the running look; nil if none is running
}

// status returns the last known status, and its time.
func (h *Handler) status(ctx context.Context, d *database) (store.Status, time.Time, error) {
	h.shared.mu.Lock()
	l := h.shared.looks[d.key]
	if l == nil {
		l = new(look)
		h.shared.looks[d.key] = l
	}
	h.shared.mu.Unlock()
	l.mu.Lock()
	if l.running == nil && !time.Now().Before(l.next) {
		l.running = make(chan struct{})
		go l.take(context.WithoutCancel(ctx), d) // other visitors may wait for it
	}
	running := l.running
	l.mu.Unlock()
	if running != nil {
		select {
		case <-running:
		case <-time.After(lookWait):
		case <-ctx.Done():
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.at.IsZero() {
		return store.Status{}, time.Time{}, errLooking
	}
	return l.status, l.at, l.err
}

func (l *look) take(ctx context.Context, d *database) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
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
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status, l.err, l.at = status, err, time.Now()
	l.next = l.at.Add(max(lookPause, lookShare*time.Since(began)))
	close(l.running)
	l.running = nil
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
	for _, d := range h.databasesOf(f.Queue) {
		s, openErr := d.store()
		if openErr != nil {
			err = errors.Join(err, openErr)
			continue
		}
		part, searchErr := s.Search(ctx, f, withRequest)
		if searchErr != nil {
			err = errors.Join(err, fmt.Errorf("the database %s cannot be searched: %w", d.key, searchErr))
			continue
		}
		parts = append(parts, part)
	}
	return store.Merge(f, parts...), err
}

// count counts events. It stops after countTime, and more means that it did not count all.
func (h *Handler) count(ctx context.Context, f store.Filter) (n int, more bool, err error) {
	f.Limit = store.MaxPage
	for began := time.Now(); ; {
		page, err := h.search(ctx, f, false)
		if n += len(page.Records); err != nil || page.Next == "" {
			return n, false, err
		}
		if f.After = page.Next; time.Since(began) > countTime {
			return n, true, nil
		}
	}
}

// changed is the result of changing events.
type changed struct {
	n      int
	more   bool     // changeTime ended before all events were changed
	queues []string // the queues of these events
}

// change changes events in all databases, in small steps, so that a new event never waits
// long. After an error, the events that were already changed stay changed.
func (h *Handler) change(ctx context.Context, f store.Filter, what func(store.Store, context.Context, store.Filter) (int, error)) (c changed, err error) {
	ctx, cancel := context.WithTimeout(ctx, changeTime)
	defer cancel()
	defer h.forget()
	f.Limit = changeStep
	for _, d := range h.databasesOf(f.Queue) {
		s, openErr := d.store()
		if openErr != nil {
			err = errors.Join(err, openErr)
			continue
		}
		changeErr := store.Each(ctx, s, f, func(page []*store.Record) error {
			some := f
			some.IDs, some.After, some.Limit = make([]string, len(page)), "", 0
			for i, r := range page {
				some.IDs[i] = r.ID
				if !slices.Contains(c.queues, r.Queue) {
					c.queues = append(c.queues, r.Queue)
				}
			}
			n, err := what(s, ctx, some)
			c.n += n
			return err
		})
		d.wake()
		if changeErr != nil && ctx.Err() != nil {
			c.more = true
			return c, err
		}
		err = errors.Join(err, changeErr)
	}
	return c, err
}

// find returns the queue with this name, and its database.
func (h *Handler) find(name string) (*database, live.Queue, bool) {
	for _, d := range h.databases() {
		for _, q := range d.queues {
			if q.Name == name {
				return d, q, true
			}
		}
	}
	return nil, live.Queue{}, false
}

// shown returns the text of an error for the page.
func shown(err error) string {
	if err == nil {
		return ""
	}
	return request.Printable(err.Error(), '\n')
}
