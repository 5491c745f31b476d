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
	// pageSize is how many events a list shows, and searchTimeout how long a search may take,
	// with the wait for its turn.
	pageSize      = 50
	searchTimeout = 5 * time.Second

	// maxPause is the longest pause between two pages that are made.
	maxPause = 50 * time.Millisecond

	// A look at a database is lookPause old at least before the next one begins, or as
	// long as lookShare times what it took. A visitor waits lookWait for it.
	lookPause   = 2 * time.Second
	lookShare   = 10
	lookWait    = 200 * time.Millisecond
	lookTimeout = 20 * time.Second

	// changeStep is how many events are changed in one transaction, for which an event on its
	// way may have to wait.
	changeStep = 100

	// countTime is how long events are counted before they are dropped, and changeTime how
	// long a change of many goes on.
	countTime  = 2 * time.Second
	changeTime = 20 * time.Second
)

// errBusy is for a visitor who did not get a turn.
var errBusy = errors.New("too many pages are being made: try again in a moment")

// errLooking is for a database that is being looked at for the first time.
var errLooking = errors.New("the events are being counted")

// turn waits until it is the turn of this visitor, until done is called. One page at a time
// is made, with a pause as long as that took: visitors, however many, leave the processors
// to the events.
func (h *Handler) turn(ctx context.Context) (done func(), err error) {
	select {
	case h.shared.turn <- struct{}{}:
		began := time.Now()
		return func() { time.AfterFunc(min(time.Since(began), maxPause), func() { <-h.shared.turn }) }, nil
	case <-ctx.Done():
		if ctx.Err() == context.Canceled { //nolint:errorlint // it is that one
			return nil, context.Canceled // the visitor has gone
		}
		return nil, errBusy
	}
}

// database is a database with the queues of this Caddy in it.
type database struct {
	key    string
	queues []live.Queue
}

// databasesOf returns the databases that may have events of a queue: trouble with another
// one does not concern a visitor who looks at that queue.
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

// wake has the queues look at their events again.
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

// look is what was last seen of a database. All visitors share it: a look at a million
// events takes long, and many visitors must not slow down the queue.
type look struct {
	mu      sync.Mutex
	status  store.Status
	err     error
	at      time.Time // zero before the first
	next    time.Time
	running chan struct{} // closed when the look under way has ended
}

// status returns what was last seen, and when.
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
		go l.take(context.WithoutCancel(ctx), d) // others look too
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

// forget has the next visitor see what has just changed.
func (h *Handler) forget() {
	h.shared.mu.Lock()
	defer h.shared.mu.Unlock()
	clear(h.shared.looks)
}

// search returns a page of the events in all databases. The error is about databases that
// could not be searched: what was found in the others is there all the same.
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

// count counts events, and stops at some point: then there are more.
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

// changed is what became of a change of events.
type changed struct {
	n      int
	more   bool     // the time was over before all were changed
	queues []string // whose events were changed
}

// change changes events in all databases, a page at a time, so that no event on its way
// waits for it. What was changed before an error stays changed.
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
		changeErr := store.Each(ctx, s, f, false, func(page []*store.Record) error {
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

// find returns the queue of a name and its database.
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

// shown is an error as the page shows it.
func shown(err error) string {
	if err == nil {
		return ""
	}
	return request.Printable(err.Error(), '\n')
}
