// Package writer implements the group commit of a database: one goroutine puts all waiting
// work into one transaction. It does not import Caddy.
package writer

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// maxBatch is how many events one transaction adds at most.
	maxBatch = 500

	// applyTimeout is the timeout of a transaction.
	applyTimeout = 20 * time.Second

	// After a failed transaction the writer pauses. The pause doubles each time within these
	// bounds. openPause is the pause before a retry to open the database.
	minPause  = 50 * time.Millisecond
	maxPause  = 500 * time.Millisecond
	openPause = time.Second
)

var (
	// ErrNotOpen is the error of a database that is not open yet.
	ErrNotOpen = errors.New("the database is not open yet")

	// ErrCalledBack is the error of an event that was delivered before it was stored.
	ErrCalledBack = errors.New("delivered before it was written")

	// ErrDuplicate is the error of a duplicate event of a type in once. Record.First is the id
	// of the first event, which is on the disk.
	ErrDuplicate = errors.New("already stored")
)

// Observer gets the results of transactions. It is called without a lock of the writer,
// from one goroutine at a time, and must not block.
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
	closed        chan struct{}

	mu       sync.Mutex
	store    store.Store // nil until the database is open
	broken   error       // the reason why store is nil
	failing  bool        // the last transaction that added events has failed
	adds     []*Addition
	finishes []store.Finish
	claims   []*claim
	history  []*store.Record

	// attempting has the ids of the events that this process attempts, until the result is
	// written. No claim returns these events, even if a changed clock makes them due.
	attempting map[string]bool
}

// Addition is a new event, which may be stored and attempted at the same time.
type Addition struct {
	record   *store.Record
	encode   func() ([]byte, error)
	deadline time.Time
	finish   *store.Finish // the result of an attempt that ended during the write
	state    state
	err      error
	done     chan struct{}
	ended    func(error)
}

type state int

const (
	waiting state = iota // for Writer.Add, or for a transaction
	writing
	ended
)

// NewAddition returns an addition for Writer.Add. If a transaction fails, the writer retries
// until the deadline, except on a full disk. Each try calls encode to get the request of the
// record. At the end, the writer calls the function ended with the error of Err. It must not
// block.
func NewAddition(r *store.Record, encode func() ([]byte, error), deadline time.Time, ended func(error)) *Addition {
	return &Addition{record: r, encode: encode, deadline: deadline, done: make(chan struct{}), ended: ended}
}

// Done is closed when the event is on the disk, or when it will not be stored.
func (a *Addition) Done() <-chan struct{} { return a.done }

// Err returns nil if the event is on the disk. Call it after Done.
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
		wake: make(chan struct{}, 1), closing: make(chan struct{}), closed: make(chan struct{}),
		broken: ErrNotOpen, attempting: make(map[string]bool),
	}
	go w.run()
	return w
}

// Close writes all waiting work and closes the database. After that, do not use the writer
// or wait for an addition.
func (w *Writer) Close() {
	close(w.closing)
	<-w.closed
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

// Add writes an event, unless an attempt has delivered it already.
func (w *Writer) Add(a *Addition) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a.state != waiting {
		return
	}
	if a.record.Lease > 0 {
		w.attempting[a.record.ID] = true
	}
	w.adds = append(w.adds, a)
	w.poke()
}

// Refuse ends an addition with an error in place of Add, unless an attempt has delivered the
// event already.
func (w *Writer) Refuse(a *Addition, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a.state == waiting {
		w.endLocked(a, err)
	}
}

// Finish writes the result of an attempt. The addition is nil if the event was claimed.
func (w *Writer) Finish(a *Addition, f store.Finish) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case a == nil, a.state == ended && a.err == nil:
		w.finishes = append(w.finishes, f)
		w.poke()
	case a.state == writing:
		a.finish = &f
	case a.state == waiting:
		w.changeLocked(a, f)
	}
}

// changeLocked applies the result of an attempt to an addition that is not written yet.
func (w *Writer) changeLocked(a *Addition, f store.Finish) {
	if f.Outcome == store.Delivered {
		w.endLocked(a, ErrCalledBack)
		return
	}
	if f.Outcome == store.Unbegun {
		a.record.Attempts--
	}
	delete(w.attempting, a.record.ID)
	a.record.Lease, a.record.Delay, a.record.LastError = 0, f.After, f.LastError
}

func (w *Writer) endLocked(a *Addition, err error) {
	if err != nil {
		delete(w.attempting, a.record.ID)
	}
	a.state, a.err = ended, err
	close(a.done)
	a.ended(err)
}

// Claim leases events that are due. It leaves out the events that this process attempts,
// until their results are written. Call Finish for each claimed event.
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
	if err := <-waits.done; err != nil {
		return nil, err
	}
	return c.Records, nil
}

// exclude removes from a claim the events that this process already attempts, and registers
// the others. It must run before the next transaction, which may end such an attempt.
func (w *Writer) exclude(c *claim) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.Records = slices.DeleteFunc(c.Records, func(r *store.Record) bool { return w.attempting[r.ID] })
	for _, r := range c.Records {
		w.attempting[r.ID] = true
	}
}

func (w *Writer) run() {
	defer close(w.closed)
	pause := minPause
	for closing := false; !closing; {
		var retry <-chan time.Time
		switch {
		case !w.opened():
			retry = time.After(openPause)
		case w.write():
			pause = minPause
		default:
			retry = time.After(pause)
			pause = min(2*pause, maxPause)
		}
		wake := w.wake
		if retry != nil {
			wake = nil
		}
		select {
		case <-wake:
		case <-retry:
		case <-w.closing:
			closing = true
		}
	}
	if s, _ := w.Store(); s != nil {
		w.write()
		for w.write() && !w.remembered() { // until all history is written
		}
		_ = s.Close()
	}
}

// opened opens the database if necessary, and reports whether the database is open.
func (w *Writer) opened() bool {
	if s, _ := w.Store(); s != nil {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyTimeout)
	defer cancel()
	s, err := w.open(ctx)
	w.mu.Lock()
	if err != nil {
		w.broken, w.failing = err, true
		w.expireLocked(err)
	} else {
		w.store, w.broken, w.failing = s, nil, false
	}
	claims := w.claims
	w.claims = nil
	w.mu.Unlock()
	for _, c := range claims {
		c.done <- err
	}
	if err != nil {
		w.observer.Failed(err)
		return false
	}
	w.observer.Opened()
	return true
}

// expireLocked ends the additions that have passed their deadline.
func (w *Writer) expireLocked(err error) {
	w.adds = slices.DeleteFunc(w.adds, func(a *Addition) bool {
		if a.state == waiting && !time.Now().Before(a.deadline) {
			w.endLocked(a, err)
		}
		return a.state == ended
	})
}

// take returns the work of the next transaction.
func (w *Writer) take() (adds []*Addition, b *store.Batch, claims []*claim, s store.Store) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.store == nil {
		return nil, nil, nil, nil
	}
	b = &store.Batch{Owner: w.owner, Finish: w.finishes}
	w.finishes, claims, w.claims = nil, w.claims, nil
	for _, c := range claims {
		b.Claims = append(b.Claims, c.Claim)
	}
	w.expireLocked(errors.New("the event could not be stored in time"))
	n := min(len(w.adds), maxBatch)
	for _, a := range w.adds[:n] {
		a.state = writing
	}
	adds, w.adds = w.adds[:n:n], w.adds[n:]
	n = min(len(w.history), maxHistory)
	b.History, w.history = w.history[:n:n], w.history[n:]
	if len(w.adds)+len(w.history) > 0 {
		w.poke()
	}
	return adds, b, claims, w.store
}

// write does all work that is waiting in one transaction, and reports whether it succeeded.
func (w *Writer) write() bool {
	adds, b, claims, s := w.take()
	if s == nil || len(adds)+len(b.Finish)+len(b.History)+len(claims) == 0 {
		return true
	}
	for _, a := range adds {
		var err error
		if a.record.Request, err = a.encode(); err != nil {
			w.mu.Lock()
			w.endLocked(a, err)
			w.mu.Unlock()
			continue
		}
		a.record.Checksum = a.record.Sum()
		b.Add = append(b.Add, a.record)
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyTimeout)
	defer cancel()
	err := s.Apply(ctx, b)
	if errors.Is(err, store.ErrFull) && len(b.Add)+len(b.History) > 0 {
		w.observer.Failed(err)
		w.failed(adds, &store.Batch{}, err)
		adds, b.Add, b.History = nil, nil, nil
		err = s.Apply(ctx, b) // on a full disk, finishing still works
	}
	if err != nil {
		w.observer.Failed(err)
		w.failed(adds, b, err)
	} else {
		w.written(adds, b)
		w.observer.Written(b)
	}
	for _, c := range claims {
		why := err
		if err != nil {
			c.Records = nil // the store may have committed all the same
			why = s.Due(ctx, c.Claim, err)
		}
		if why == nil {
			w.exclude(c)
		}
		c.done <- why
	}
	return err == nil && len(b.Left) == 0
}

// failed puts a batch back after its transaction has failed. On a full disk, the writer does
// not retry the additions: their senders can retry later.
func (w *Writer) failed(adds []*Addition, b *store.Batch, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failing = w.failing || len(adds) > 0
	w.finishes = append(b.Finish, w.finishes...)
	w.history = append(b.History, w.history...)
	var again []*Addition
	for _, a := range adds {
		switch {
		case a.state == ended:
			continue
		case a.finish != nil: // the attempt ended during the transaction
			a.state = waiting
			w.changeLocked(a, *a.finish)
			a.finish = nil
		}
		switch {
		case a.state == ended:
		case errors.Is(err, store.ErrFull), !time.Now().Before(a.deadline):
			w.endLocked(a, err)
		default:
			a.state = waiting
			again = append(again, a)
		}
	}
	w.adds = append(again, w.adds...)
}

// written ends the additions and finishes of a transaction.
func (w *Writer) written(adds []*Addition, b *store.Batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range b.Finish {
		delete(w.attempting, f.ID)
	}
	for _, f := range b.Left {
		w.attempting[f.ID] = true
	}
	w.finishes = append(w.finishes, b.Left...)
	for _, a := range adds {
		if a.state == ended {
			continue
		}
		if a.record.First != "" {
			w.endLocked(a, ErrDuplicate)
			continue
		}
		w.endLocked(a, nil)
		if a.finish != nil {
			w.finishes = append(w.finishes, *a.finish)
			w.poke()
		}
	}
	if len(adds) > 0 {
		w.failing = false
	}
}
