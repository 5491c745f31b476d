// Package writer implements the group commit of a database: one goroutine puts all waiting
// work into one transaction. It does not import Caddy.
package writer

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// One transaction adds at most maxBatch events, and at most maxBatch rows of the history,
	// so that no event waits for long.
	maxBatch = 500

	// The next transaction writes the waiting rows of the history. It begins no later than
	// historyPause after the first of these rows. While the database fails, memory
	// keeps at most historyRoom rows, and further rows are lost.
	historyPause = time.Second
	historyRoom  = 100_000

	// timeout is the timeout of a transaction, and of opening the database.
	timeout = 20 * time.Second

	// pause is the time between a failure and the next try.
	pause = 200 * time.Millisecond
)

var (
	// ErrCalledBack is the error of an event that is not stored, because an attempt delivered it first.
	ErrCalledBack = errors.New("delivered before it was written")

	// ErrDuplicate is the error of an event that is not stored, because an earlier event has
	// the same digest. Record.First is the id of the earlier event.
	ErrDuplicate = errors.New("already stored")
)

// Observer gets the results of transactions. The writer calls one method at a time, and holds
// no lock during the call. The methods must not block.
type Observer interface {
	Opened()
	Written(b *store.Batch)
	Failed(err error)
}

// Writer writes to one database. It opens the database itself.
type Writer struct {
	owner    string
	open     func(context.Context) (store.Store, error)
	observer Observer

	wake, closing chan struct{}
	running       sync.WaitGroup

	mu       sync.Mutex
	store    store.Store // nil until the database is open
	broken   error       // the reason why store is nil
	failing  bool        // the last try to open the database or to add events has failed
	adds     []*Addition
	finishes []store.Finish
	claims   []*claim
	history  []*store.Record

	// attempting has the ids of the events that this process attempts. An id stays here until
	// the result of its attempt is written. No claim returns these events, even if a changed
	// clock makes them due.
	attempting map[string]bool
}

// Addition is a new event, which may be stored and attempted at the same time.
type Addition struct {
	record   *store.Record
	encode   func() ([]byte, error)
	deadline time.Time
	finish   *store.Finish // the result of an attempt that ended before the event was stored
	writing  bool          // a running transaction adds the event
	ended    bool          // done is closed
	err      error
	done     chan struct{}
	note     func(error)
}

// NewAddition returns an addition for Writer.Add. The writer calls encode to get the record's
// request. If encode fails, the event is not stored. If a transaction fails, the writer
// retries until the deadline, except on a full disk. When the event is stored, or will not be
// stored, the writer calls the function note with the value of Err. This function must not block.
func NewAddition(r *store.Record, encode func() ([]byte, error), deadline time.Time, note func(error)) *Addition {
	return &Addition{record: r, encode: encode, deadline: deadline, done: make(chan struct{}), note: note}
}

// Done returns a channel that is closed when the event is on the disk, or when it will not be
// stored.
func (a *Addition) Done() <-chan struct{} { return a.done }

// Err returns nil if the event is on the disk, and otherwise the reason why it is not. Call Err
// only after the channel of Done is closed.
func (a *Addition) Err() error { return a.err }

type claim struct {
	*store.Claim
	done chan error
}

// New starts a writer, which runs until Close. The owner is the name of this process in
// the leases.
func New(owner string, open func(context.Context) (store.Store, error), observer Observer) *Writer {
	w := &Writer{
		owner: owner, open: open, observer: observer,
		wake: make(chan struct{}, 1), closing: make(chan struct{}),
		broken: errors.New("the database is not open yet"), attempting: make(map[string]bool),
	}
	w.running.Go(w.run)
	return w
}

// Close writes all waiting work and closes the database. After Close, do not use the writer or
// wait for an addition.
func (w *Writer) Close() {
	close(w.closing)
	w.running.Wait()
}

func (w *Writer) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Store returns the database for reading, or nil with the reason why it is not open.
func (w *Writer) Store() (store.Store, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.store, w.broken
}

// Failing reports whether events cannot be stored, according to the last try.
func (w *Writer) Failing() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failing
}

// Add makes the writer store an event, unless an attempt has delivered the event already. It
// does not wait for the transaction.
func (w *Writer) Add(a *Addition) {
	var err error
	a.record.Request, err = a.encode()
	a.record.Checksum = a.record.Sum()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case a.ended: // an attempt has delivered the event
	case err != nil:
		w.endLocked(a, err)
	default:
		if a.record.Lease > 0 {
			w.attempting[a.record.ID] = true
		}
		w.adds = append(w.adds, a)
		w.poke()
	}
}

// Attempt reports whether an attempt at an event without a lease may begin, although Add was called:
// the event must not be stored yet. No claim returns the event until its attempt is finished.
func (w *Writer) Attempt(a *Addition) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !a.ended {
		w.attempting[a.record.ID] = true
	}
	return !a.ended
}

// Finish makes the writer store the result of an attempt. It does not wait for the
// transaction. The argument a is the addition of the event, or nil if the event was claimed.
func (w *Writer) Finish(a *Addition, f store.Finish) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case a == nil, a.ended && a.err == nil:
		w.finishes = append(w.finishes, f)
		w.poke()
	case !a.ended && !a.writing && f.Outcome == store.Delivered:
		w.adds = slices.DeleteFunc(w.adds, func(added *Addition) bool { return added == a })
		w.endLocked(a, ErrCalledBack)
	default:
		a.finish = &f
	}
}

// Remember writes a row of the history with a later transaction.
func (w *Writer) Remember(r *store.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.history) == 0 {
		time.AfterFunc(historyPause, w.poke)
	}
	if len(w.history) < historyRoom {
		w.history = append(w.history, r)
	}
}

func (w *Writer) endLocked(a *Addition, err error) {
	if err != nil {
		delete(w.attempting, a.record.ID)
	}
	a.ended, a.err = true, err
	close(a.done)
	a.note(err)
}

// Claim leases events that are due. It leaves out each event that this process attempts or
// whose result is not yet written. Call Finish for each claimed event.
func (w *Writer) Claim(c *store.Claim) ([]*store.Record, error) {
	waits := &claim{c, make(chan error, 1)}
	w.mu.Lock()
	if w.store == nil {
		defer w.mu.Unlock()
		return nil, w.broken
	}
	w.claims = append(w.claims, waits)
	w.mu.Unlock()
	w.poke()
	err := <-waits.done
	return c.Records, err
}

func (w *Writer) run() {
	for closing := false; !closing; {
		w.expire()
		wake, retry := w.wake, (<-chan time.Time)(nil)
		if !w.opened() || !w.write() {
			wake, retry = nil, time.After(pause)
		}
		select {
		case <-wake:
		case <-retry:
		case <-w.closing:
			closing = true
		}
	}
	if w.store != nil {
		w.write()
		for w.write() && len(w.history) > 0 { // nobody else uses the writer now
		}
		_ = w.store.Close()
	}
}

// opened opens the database if necessary, and reports whether the database is open.
func (w *Writer) opened() bool {
	if w.store != nil {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s, err := w.open(ctx)
	w.mu.Lock()
	w.store, w.broken, w.failing = s, err, err != nil
	w.mu.Unlock()
	if err != nil {
		w.observer.Failed(err)
		return false
	}
	w.observer.Opened()
	return true
}

// expire ends the additions that have passed their deadline.
func (w *Writer) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.adds = slices.DeleteFunc(w.adds, func(a *Addition) bool {
		late := time.Now().After(a.deadline)
		if late {
			w.endLocked(a, errors.New("the event could not be stored in time"))
		}
		return late
	})
}

// take removes the work of the next transaction from the writer. It returns this work as a batch,
// and also the additions and the claims from which it has made the batch.
func (w *Writer) take() (adds []*Addition, claims []*claim, b *store.Batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b = &store.Batch{Owner: w.owner, Finish: w.finishes}
	n := min(len(w.adds), maxBatch)
	adds, w.adds = w.adds[:n:n], w.adds[n:]
	for _, a := range adds {
		a.writing = true
		b.Add = append(b.Add, a.record)
		if a.finish != nil {
			b.Finish, a.finish = append(b.Finish, *a.finish), nil
		}
	}
	for _, c := range w.claims {
		b.Claims = append(b.Claims, c.Claim)
	}
	claims, w.claims, w.finishes = w.claims, nil, nil
	n = min(len(w.history), maxBatch)
	b.History, w.history = w.history[:n:n], w.history[n:]
	if len(w.adds)+len(w.history) > 0 {
		w.poke()
	}
	return adds, claims, b
}

// write does the waiting work in one transaction. It returns false if the transaction failed, or
// if it could not store the results of some attempts, so that the writer must try again.
func (w *Writer) write() bool {
	adds, claims, b := w.take()
	if len(b.Add)+len(b.Finish)+len(b.History)+len(b.Claims) == 0 {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	err := w.store.Apply(ctx, b)
	if errors.Is(err, store.ErrFull) && len(b.Add)+len(b.History) > 0 {
		w.observer.Failed(err)
		w.settle(adds, &store.Batch{}, err)
		adds, b.Add, b.History = nil, nil, nil
		err = w.store.Apply(ctx, b) // on a full disk, finishing still works
	}
	if err != nil {
		w.observer.Failed(err)
	} else {
		w.observer.Written(b) // before settle, which lets a sender get its answer
	}
	w.settle(adds, b, err)
	for _, c := range claims {
		result := err
		if err != nil {
			c.Records = nil // although Apply failed, it may have set Records
			w.mu.Lock()
			c.Without = maps.Clone(w.attempting)
			w.mu.Unlock()
			result = w.store.Due(ctx, c.Claim, err)
		}
		w.exclude(c.Claim)
		c.done <- result
	}
	return err == nil && len(b.Left) == 0
}

// settle ends the additions that a transaction has finished, and puts back the work that the
// transaction has not done.
func (w *Writer) settle(adds []*Addition, b *store.Batch, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	left := b.Left
	if err == nil {
		for _, f := range b.Finish {
			delete(w.attempting, f.ID)
		}
	} else {
		left = b.Finish
		w.history = append(b.History, w.history...)
	}
	for _, f := range left {
		w.attempting[f.ID] = true
	}
	w.finishes = append(left, w.finishes...)
	var again []*Addition
	for _, a := range adds {
		switch {
		case err == nil && a.record.First != "":
			w.endLocked(a, ErrDuplicate)
		case err == nil:
			w.endLocked(a, nil)
			if a.finish != nil { // the attempt ended during the transaction
				w.finishes = append(w.finishes, *a.finish)
				w.poke()
			}
		case a.finish != nil && a.finish.Outcome == store.Delivered:
			w.endLocked(a, ErrCalledBack)
		case errors.Is(err, store.ErrFull): // the sender can retry later
			w.endLocked(a, err)
		default:
			a.writing = false
			again = append(again, a)
		}
	}
	w.adds = append(again, w.adds...)
	if len(adds) > 0 {
		w.failing = err != nil
	}
}

// exclude removes from a claim the events that this process already attempts, and adds the
// other events to the map `attempting`. It must run before the next transaction, because that
// transaction may remove events from this map.
func (w *Writer) exclude(c *store.Claim) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.Records = slices.DeleteFunc(c.Records, func(r *store.Record) bool { return w.attempting[r.ID] })
	for _, r := range c.Records {
		w.attempting[r.ID] = true
	}
}
