package queue

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// linger is how long an event is with its backend before it is written. What the
	// backend takes within it never goes to the disk. Nobody is answered meanwhile: an
	// event that has to be kept, because its attempt has failed or there is none, is
	// written at once.
	linger = 25 * time.Millisecond

	// maxBatch is how many events one transaction adds.
	maxBatch = 500

	// applyTimeout is how long a transaction may take, and finishTimeout one that has been
	// set apart from those that others wait for.
	applyTimeout  = 20 * time.Second
	finishTimeout = time.Second

	// maxFailed is how many of these may fail before what is new has its turn again.
	maxFailed = 2

	// reopenInterval is the pause between two tries to open a database.
	reopenInterval = time.Second

	// minPause is the pause after a transaction that has failed, which doubles with each
	// up to maxPause.
	minPause = 50 * time.Millisecond
	maxPause = 500 * time.Millisecond

	// countInterval is the pause between two counts of what waits at least, maxCountPause
	// at most, and countShare the part of the time that they may take in between.
	countInterval = 5 * time.Second
	maxCountPause = 2 * time.Minute
	countShare    = 0.002

	// errorInterval is how long an error of the database is not worth another line.
	errorInterval = time.Minute
)

// errNotOpen says why a database is not open at first.
var errNotOpen = errors.New("the database is not open yet")

// database is a store that queues share. One goroutine puts whatever waits into one
// transaction; it opens the store, and opens it again when it has become useless.
type database struct {
	opener Opener
	owner  string
	logger atomic.Pointer[zap.Logger] // of the configuration that was loaded last

	wake    chan struct{}
	closing chan struct{}
	closed  chan struct{}

	// apart says that what is finished is written by itself, since it could not be written
	// with other things: somebody may have locked one of its rows. For the goroutine that
	// writes alone.
	apart bool

	mu       sync.Mutex
	store    Store // nil while it is not open
	broken   error // why it is not
	useless  Store // damaged, and still to be moved aside
	work     work
	counts   map[[2]string]Count
	changes  map[[2]string]int        // made while they are counted, or nil
	held     map[string]bool          // events that are stored and that this process has, in an attempt or after one that cannot be written
	said     map[string]announcements // by queue
	queues   map[string]*shared
	strange  map[string]bool // queues that are not configured, and whether the log says that events wait in them
	lastLine time.Time       // when an error was logged

	finishLine time.Time // when the log said that what became of events cannot be written
	failing    bool      // whether events cannot be kept
	full       bool      // whether some were refused since the last count, because as many as may waited by it
}

// listener is a store that other machines use too, and that calls heard when one of
// them says that something is due in a queue; with an empty name, in any.
type listener interface {
	Listen(heard func(queue string))
}

// sharer is a store in which one process counts for all: pause says how long it is
// until the next count, by what the last one has taken.
type sharer interface {
	SharedCounts(ctx context.Context, pause func(took time.Duration) time.Duration) ([]Count, error)
}

// work is what waits for the next transaction.
type work struct {
	adds     []*addition
	finish   []Finish
	backends []Backend
	claims   []*claiming
}

// addition is an event on its way into the database.
type addition struct {
	rec     *Record
	request *request // which is encoded when it is written
	began   time.Time
	urgent  bool          // whether it is to be written without a wait
	writing bool          // whether it is beyond being called back
	done    chan struct{} // closed when err is known
	err     error
	metrics *queueMetrics
}

// end says what came of it. The lock of the database is held.
func (a *addition) end(err error) {
	a.err = err
	close(a.done)
	switch {
	case err == nil:
		a.metrics.stored[resultStored].Inc()
		a.metrics.storeSeconds.Observe(time.Since(a.began).Seconds())
	case errors.Is(err, errCalledBack):
		a.metrics.stored[resultDelivered].Inc()
	default:
		a.metrics.stored[resultFailed].Inc()
	}
}

type claiming struct {
	*Claim
	done chan error
}

// errCalledBack says that an event was delivered before it was written.
var errCalledBack = errors.New("delivered before it was written")

func newDatabase(opener Opener, logger *zap.Logger) *database {
	host, _ := os.Hostname()
	d := &database{
		opener: opener,
		owner:  fmt.Sprintf("%s-%d-%s", host, os.Getpid(), rand.Text()[:6]),
		wake:   make(chan struct{}, 1), closing: make(chan struct{}), closed: make(chan struct{}),
		broken: errNotOpen,
		counts: make(map[[2]string]Count), held: make(map[string]bool), said: make(map[string]announcements),
		queues: make(map[string]*shared), strange: make(map[string]bool),
	}
	d.logger.Store(logger)
	return d
}

func (d *database) start() {
	go d.run()
	go d.count()
}

// close writes what waits, and closes the database. Nobody may use it any more.
func (d *database) close() {
	close(d.closing)
	<-d.closed
}

func (d *database) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// add has an event written: at once if it is urgent, or there is no attempt at it, or
// when the attempt has taken longer than linger.
func (d *database) add(rec *Record, r *request, urgent bool, metrics *queueMetrics) *addition {
	a := &addition{rec: rec, request: r, began: time.Now(), urgent: urgent || rec.Lease == 0, done: make(chan struct{}), metrics: metrics}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == nil && !errors.Is(d.broken, errNotOpen) {
		a.end(d.broken)
		return a
	}
	d.work.adds = append(d.work.adds, a)
	d.poke()
	return a
}

// finish writes what became of an event. One that is not written yet is changed, or
// called back.
func (d *database) finish(a *addition, f Finish) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case a == nil || a.err == nil && a.writing:
		d.work.finish = append(d.work.finish, f)
		d.poke()
		return
	case a.err != nil: // it never got there
		return
	}
	for i, waiting := range d.work.adds {
		if waiting != a {
			continue
		}
		if f.Outcome == Delivered {
			d.work.adds = append(d.work.adds[:i], d.work.adds[i+1:]...)
			a.end(errCalledBack)
			return
		}
		if f.Outcome == Unbegun {
			a.rec.Attempts--
		}
		a.rec.Lease, a.rec.Delay, a.rec.LastError, a.urgent = 0, f.After, f.LastError, true
		d.poke()
		return
	}
}

// announce tells the other owners of a queue of its backend, with the next transaction:
// that of the event from which it is known.
func (d *database) announce(b Backend) {
	d.mu.Lock()
	d.work.backends = append(d.work.backends, b)
	d.said[b.Queue] = announcements{d.said[b.Queue].made + 1, d.said[b.Queue].waiting + 1}
	d.mu.Unlock()
}

// keeping reports whether events can be kept, as far as is known.
func (d *database) keeping() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.failing
}

// announcements are those of a queue: how many were made, and how many of these wait to
// be written.
type announcements struct{ made, waiting int }

func (d *database) announced(queue string) announcements {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.said[queue]
}

// claim leases events that are due. If nothing can be written, it takes what it can
// read: a disk that is full has to be emptied.
func (d *database) claim(c *Claim) ([]*Record, error) {
	request := &claiming{c, make(chan error, 1)}
	d.mu.Lock()
	if d.store == nil {
		defer d.mu.Unlock()
		return nil, d.broken
	}
	d.work.claims = append(d.work.claims, request)
	d.mu.Unlock()
	d.poke()
	if err := <-request.done; err != nil {
		return d.look(c, err)
	}
	return c.Records, nil
}

// holdLocked notes that this process has the events of a claim. It leaves out those that
// it has already: their leases are over in the database, since the clock was set, or what
// became of them could not be written.
func (d *database) holdLocked(claimed []*Record) []*Record {
	return slices.DeleteFunc(claimed, func(r *Record) bool {
		had := d.held[r.ID]
		d.held[r.ID] = true
		return had
	})
}

// look returns events that are due and that this process does not have.
func (d *database) look(c *Claim, why error) (records []*Record, err error) {
	store := d.opened()
	if store == nil || c.Probe || errors.Is(why, errLocked) { // by who can write, as another process that delivers
		return nil, why
	}
	if _, ok := store.(listener); ok && !errors.Is(why, ErrFull) {
		return nil, why // as all others on that database would deliver the same
	}
	err = store.Select(context.Background(), Filter{Queue: c.Queue, Due: true}, true, func(r *Record) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.held[r.ID] {
			d.held[r.ID] = true
			r.Attempts++
			r.Age = max(0, time.Since(r.Queued))
			records = append(records, r)
		}
		return len(records) < c.Max
	})
	if len(records) > 0 {
		return records, nil
	}
	return nil, errors.Join(why, err)
}

func (d *database) opened() Store {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.store
}

func (d *database) peek(queue string) (Peek, error) {
	store := d.opened()
	if store == nil {
		return Peek{}, errNotOpen
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyTimeout)
	defer cancel()
	p, err := store.Peek(ctx, queue)
	if err != nil {
		d.observe(store, err)
	}
	return p, err
}

// pending returns how many events of a queue wait, as far as is known.
func (d *database) pending(queue string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[[2]string{queue, statePending}].Events
}

// recount has what waits counted soon, whoever else counts: other processes may have
// delivered some.
func (d *database) recount() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = true
}

// run is the goroutine that writes.
func (d *database) run() {
	defer close(d.closed)
	pause := minPause
	for {
		open := d.open()
		wait := reopenInterval
		if open {
			wait = d.untilDue()
		}
		select {
		case <-d.wake:
		case <-time.After(wait):
		case <-d.closing:
			d.write()
			d.write() // what the first one left

			if store, ok := d.opened().(interface{ isThere() bool }); ok && !store.isThere() { // as nothing may have been written since
				d.rescue(d.opened())
			}
			for _, store := range []Store{d.opened(), d.useless} {
				if store != nil {
					_ = store.Close()
				}
			}
			return
		}
		if !open {
			continue
		}
		if d.write() {
			pause = minPause
		} else {
			time.Sleep(pause)
			pause = min(2*pause, maxPause)
		}
	}
}

// open opens the database, and reports whether it is open.
func (d *database) open() bool {
	if d.opened() != nil {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyTimeout)
	defer cancel()
	d.mu.Lock()
	useless, why := d.useless, d.broken
	d.useless = nil
	d.mu.Unlock()
	if useless != nil {
		_ = useless.Close()
		d.moveAside(why)
	}
	store, err := d.opener.Open(ctx)
	if errors.Is(err, ErrDamaged) {
		d.moveAside(err)
		store, err = d.opener.Open(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.store, d.broken = store, err
	if err == nil {
		d.recoveredLocked()
		for _, s := range d.queues {
			s.queue.poke()
		}
		if l, ok := store.(listener); ok {
			l.Listen(d.heard)
		}
		return true
	}
	d.store = nil // and not an interface that holds nil
	d.failAddsLocked(err)
	for _, c := range d.work.claims {
		c.done <- err
	}
	d.work.claims = nil
	d.failedLocked(err)
	return false
}

// moveAside puts a damaged database out of the way of a new one.
func (d *database) moveAside(why error) {
	mover, ok := d.opener.(interface {
		moveAside(now time.Time) (name string, err error)
	})
	if !ok {
		return
	}
	name, err := mover.moveAside(time.Now())
	if err != nil {
		d.logger.Load().Error("moving a damaged database aside", zap.Error(err))
		return
	}
	d.logger.Load().Error("the database is damaged: it was moved aside, and what can be recovered of its events is for an operator to recover",
		zap.String("moved_to", name), zap.Error(why))
}

// untilDue returns how long it is until an event has been with its backend for long
// enough.
func (d *database) untilDue() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.work.adds) == 0 {
		return time.Hour
	}
	return linger - time.Since(d.work.adds[0].began)
}

// take returns the work of the next transaction, and the store to do it in, if it is
// open.
func (d *database) take() (w work, store Store) {
	closing := false
	select {
	case <-d.closing:
		closing = true
	default:
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == nil {
		return w, nil
	}
	all := d.work.adds
	w, d.work = d.work, work{}
	w.adds = nil
	for _, a := range all {
		ready := closing || a.urgent || time.Since(a.began) >= linger
		if !ready || len(w.adds) == maxBatch {
			d.work.adds = append(d.work.adds, a)
			continue
		}
		a.writing = true
		if err := a.seal(); err != nil {
			a.end(err)
			continue
		}
		w.adds = append(w.adds, a)
	}
	if len(w.adds) == maxBatch {
		d.poke() // for the rest
	}
	return w, d.store
}

// seal gives the record its request.
func (a *addition) seal() (err error) {
	a.rec.Request, err = a.request.encode()
	a.rec.Checksum = a.rec.checksum()
	return err
}

// write does what waits in one transaction, and reports whether it succeeded.
func (d *database) write() bool {
	w, store := d.take()
	if store == nil {
		return true
	}
	if !d.apart || len(w.finish) == 0 {
		return d.apply(store, w, applyTimeout)
	}
	finish := w.finish
	w.finish = nil
	done := d.apply(store, w, applyTimeout)
	failed := 0 // one by one, so that a locked row holds up no other until its lease is over
	for i, f := range finish {
		if failed == maxFailed {
			d.mu.Lock()
			d.finishLater(finish[i:])
			d.mu.Unlock()
			break
		}
		if !d.apply(store, work{finish: []Finish{f}}, finishTimeout) {
			failed++
		}
	}
	d.apart = failed > 0
	return done && !d.apart
}

// apply does work in one transaction, and reports whether it succeeded.
func (d *database) apply(store Store, w work, timeout time.Duration) bool {
	if len(w.adds)+len(w.finish)+len(w.backends)+len(w.claims) == 0 {
		return true
	}
	b := &Batch{Owner: d.owner, Finish: w.finish, Backends: w.backends}
	for _, a := range w.adds {
		b.Add = append(b.Add, a.rec)
	}
	for _, c := range w.claims {
		b.Claims = append(b.Claims, c.Claim)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	err := store.Apply(ctx, b)
	if err == nil {
		d.written(w)
		return true
	}
	if _, shared := store.(listener); shared && len(w.finish) > 0 && !errors.Is(err, ErrFull) {
		finish := w.finish
		w.finish = nil
		d.apart = true
		d.apply(store, w, timeout)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.finishLater(finish)
		if time.Since(d.finishLine) >= errorInterval {
			d.finishLine = time.Now()
			d.logger.Load().Warn("what became of events cannot be written: it is tried again, and until then they may be delivered twice", zap.Int("events", len(finish)), zap.Error(err))
		}
		return false
	}

	// The events that were to be added are up to those who wait for them. What was
	// finished has to be written at some time, without them if that is what is wrong.
	d.observe(store, err)
	d.mu.Lock()
	d.failAdds(w.adds, err)
	d.failedLocked(err)
	d.mu.Unlock()
	if errors.Is(err, ErrReplaced) {
		d.rescue(store)
	}
	if errors.Is(err, ErrFull) && len(b.Add) > 0 {
		w.adds, b.Add = nil, nil
		if err = store.Apply(ctx, b); err == nil {
			d.written(w)
			return true
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.finishLater(w.finish)
	d.work.backends = append(w.backends, d.work.backends...)
	for _, c := range w.claims {
		c.done <- err
	}
	return false
}

// finishLater has what could not be written tried again. The lock is held.
func (d *database) finishLater(finish []Finish) {
	d.work.finish = append(d.work.finish, finish...) // behind those that have not been tried
	for _, f := range finish {
		d.held[f.ID] = true
	}
	d.poke()
}

// written notes what a transaction has done.
func (d *database) written(w work) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change := func(queue, state string, by int) {
		key := [2]string{queue, state}
		d.counts[key] = d.counts[key].plus(by)
		if d.changes != nil {
			d.changes[key] += by
		}
	}
	for _, a := range w.adds {
		change(a.rec.Queue, statePending, 1)
		a.end(nil)
		if a.rec.Lease == 0 {
			d.pokeLocked(a.rec.Queue)
		} else {
			d.held[a.rec.ID] = true
		}
	}
	for _, b := range w.backends {
		d.said[b.Queue] = announcements{d.said[b.Queue].made, d.said[b.Queue].waiting - 1}
	}
	for _, f := range w.finish {
		delete(d.held, f.ID)
		switch f.Outcome {
		case Delivered:
			change(f.Queue, statePending, -1)
		case Dead:
			change(f.Queue, statePending, -1)
			change(f.Queue, stateDead, 1)
		case Later, Released, Unbegun:
			d.pokeLocked(f.Queue)
		}
	}
	for _, c := range w.claims {
		c.Records = d.holdLocked(c.Records)
		c.done <- nil
	}
	if len(w.adds) > 0 {
		d.recoveredLocked()
	}
}

// pokeLocked tells a queue that an event may be due sooner than it knows.
func (d *database) pokeLocked(queue string) {
	if s, ok := d.queues[queue]; ok {
		s.queue.poke()
	}
}

// heard tells a queue, or all, what another process says: that an event is due, or that
// the backend is back.
func (d *database) heard(queue string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, s := range d.queues {
		if queue == "" || queue == name {
			s.queue.poke()
		}
	}
}

func (d *database) failAdds(adds []*addition, err error) {
	for _, a := range adds {
		a.end(err)
	}
}

func (d *database) failAddsLocked(err error) {
	d.failAdds(d.work.adds, err)
	d.work.adds = nil
}

// failedLocked says that events cannot be kept, once a minute, and recoveredLocked
// that they are kept again.
func (d *database) failedLocked(err error) {
	d.failing = true
	if time.Since(d.lastLine) >= errorInterval {
		d.lastLine = time.Now()
		d.logger.Load().Error("events cannot be kept: while that is so, they pass to a backend that is up, and are refused with status 503 otherwise", zap.Error(err))
	}
}

func (d *database) recoveredLocked() {
	if d.failing {
		d.failing = false
		d.lastLine = time.Time{}
		d.logger.Load().Info("events are kept again")
	}
}

// observe gives up a store that has turned out to be damaged. The goroutine that writes
// moves it aside: two that do would move the new one, too.
func (d *database) observe(store Store, err error) {
	if !errors.Is(err, ErrDamaged) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == store {
		d.store, d.broken, d.useless = nil, err, store
		d.poke()
	}
}

// rescue opens the database that has taken the place of the one that was open, and
// copies the events over that only the old one has.
func (d *database) rescue(old Store) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	moved := true
	var err error
	if leaver, ok := old.(interface {
		leave(ctx context.Context) (moved bool, err error)
	}); ok {
		moved, err = leaver.leave(ctx)
	}
	if err == nil && !moved { // only its log was gone, which is of no use any more
		_ = old.Close()
		d.mu.Lock()
		d.store, d.broken = nil, errNotOpen
		d.mu.Unlock()
		d.poke()
		d.logger.Load().Error("the write-ahead log of the database was deleted while it was open: nothing is lost")
		return
	}
	var store Store
	var copied int
	if err == nil {
		store, err = d.opener.Open(ctx)
	}
	if err == nil {
		copied, err = copyEvents(ctx, old, store, d.owner, nil, nil)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.failedLocked(err)
		if store != nil {
			_ = store.Close()
		}
		return // the old one is still there, for this process
	}
	d.store = store
	_ = old.Close()
	d.logger.Load().Error("the database was deleted or replaced while it was open: what was in it was copied into the new one", zap.Int("events", copied))
}

// copyEvents copies events from one store to another, and returns how many: those that
// are wanted, or all. It calls after with the ids of those that are copied.
func copyEvents(ctx context.Context, from, to Store, owner string, wanted func(*Record) bool, after func(ids []string) error) (copied int, err error) {
	b := &Batch{Owner: owner}
	flush := func() error {
		if err := to.Apply(ctx, b); err != nil {
			return err
		}
		copied += len(b.Add)
		ids := make([]string, len(b.Add))
		for i, r := range b.Add {
			ids[i] = r.ID
		}
		b = &Batch{Owner: owner}
		if after == nil || len(ids) == 0 {
			return nil
		}
		return after(ids)
	}
	var flushErr error
	err = from.Select(ctx, Filter{}, true, func(r *Record) bool {
		if wanted != nil && !wanted(r) {
			return true
		}
		r.Delay, r.Lease = max(0, time.Until(r.Due)), max(0, time.Until(r.LeasedUntil))
		if r.State == stateDead {
			r.Lease = time.Minute // the finish needs one
			b.Finish = append(b.Finish, Finish{ID: r.ID, Queue: r.Queue, Outcome: Dead, LastError: r.LastError})
		}
		b.Add = append(b.Add, r)
		if len(b.Add) < maxBatch {
			return true
		}
		flushErr = flush()
		return flushErr == nil
	})
	if err = errors.Join(err, flushErr); err == nil {
		err = flush()
	}
	return copied, err
}

// count counts what waits, and has room given back to the disk, for a small part of
// the time. In between, the metrics show what this process has changed since, if no
// other writes to the database.
func (d *database) count() {
	var next, lastLine time.Time
	for {
		store := d.opened()
		_, isShared := store.(sharer)
		switch {
		case store == nil:
			next = time.Time{}
		case !time.Now().Before(next), !isShared && d.isEmpty(), d.isFull(): // or nothing waits, which is soon counted, and has room to give back
			began := time.Now()
			next = began.Add(countInterval)
			if err := d.countOnce(store); err == nil {
				next = time.Now().Add(countPause(time.Since(began)))
			} else if began.Sub(lastLine) >= errorInterval {
				lastLine = began
				d.logger.Load().Error("counting what waits: the metrics show what is known from before", zap.Error(err))
			}
		case !isShared:
			d.show()
		}
		wait := countInterval
		if store == nil {
			wait = reopenInterval
		}
		select {
		case <-time.After(wait):
		case <-d.closing:
			return
		}
	}
}

// isEmpty reports whether no events are left, as far as is known.
func (d *database) isEmpty() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.counts {
		if c.Events > 0 {
			return false
		}
	}
	return true
}

func (d *database) isFull() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.full
}

// countPause returns how long to wait after a count that has taken so long.
func countPause(took time.Duration) time.Duration {
	return min(max(countInterval, time.Duration(float64(took)/countShare)), maxCountPause)
}

func (d *database) countOnce(store Store) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var counts []Count
	var err error
	changes := make(map[[2]string]int) // since what is counted
	d.mu.Lock()
	full := d.full
	d.full = false
	d.mu.Unlock()
	if sharer, ok := store.(sharer); ok && !full {
		counts, err = sharer.SharedCounts(ctx, countPause)
	} else {
		d.mu.Lock()
		d.changes = changes
		d.mu.Unlock()
		counts, err = store.Counts(ctx)
	}
	if err != nil {
		d.observe(store, err)
		return err
	}
	d.mu.Lock()
	d.changes = nil
	clear(d.counts)
	for _, c := range counts {
		d.counts[[2]string{c.Queue, c.State}] = c
	}
	for key, by := range changes {
		d.counts[key] = d.counts[key].plus(by)
	}
	d.mu.Unlock()
	d.show()
	if tidier, ok := store.(interface {
		Tidy(ctx context.Context) (more bool, err error)
	}); ok {
		for more := true; more && err == nil; {
			more, err = tidier.Tidy(ctx)
		}
	}
	return nil
}

// show has the metrics show what waits, and the log of what no queue takes care. It
// looks into the folder without the lock, which every request needs.
func (d *database) show() {
	damaged := 0
	if finder, ok := d.opener.(interface{ damagedFiles() int }); ok {
		damaged = finder.damagedFiles()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, s := range d.queues {
		for _, state := range []string{statePending, stateDead} {
			eventsGauge.WithLabelValues(name, state).Set(float64(d.counts[[2]string{name, state}].Events))
		}
		oldestGauge.WithLabelValues(name).Set(d.counts[[2]string{name, statePending}].Oldest.Seconds())
		s.queue.metrics.damaged.Set(float64(damaged))
	}
	for key := range d.counts {
		_, configured := d.queues[key[0]]
		if _, known := d.strange[key[0]]; !configured && !known {
			d.strange[key[0]] = false
		}
	}
	for name, said := range d.strange {
		for _, state := range []string{statePending, stateDead} {
			if n := d.counts[[2]string{name, state}].Events; n > 0 {
				eventsGauge.WithLabelValues(name, state).Set(float64(n))
			} else {
				eventsGauge.DeleteLabelValues(name, state)
			}
		}
		c := d.counts[[2]string{name, statePending}]
		if c.Events == 0 {
			oldestGauge.DeleteLabelValues(name)
			continue
		}
		oldestGauge.WithLabelValues(name).Set(c.Oldest.Seconds())
		if !said {
			d.strange[name] = true
			d.logger.Load().Warn("events wait in a queue that is not configured: they stay", zap.String("queue", name), zap.Int("pending", c.Events))
		}
	}
}

// forget takes back what the metrics say of the backend of a queue that has ended,
// unless there is one of its name again.
func (d *database) forget(queue string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, again := d.queues[queue]; !again {
		backendDown.DeleteLabelValues(queue)
	}
}
