package queue

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

const (
	// The pause between two counts of the events is at least countInterval and at most
	// maxCountPause. Between these bounds, counting takes countShare of the time.
	countInterval = 5 * time.Second
	maxCountPause = 2 * time.Minute
	countShare    = 0.002

	// countTimeout is the timeout of one count, and peekTimeout is the timeout of one Peek.
	countTimeout = time.Minute
	peekTimeout  = 5 * time.Second

	// keepInterval is the pause between two counts of the history, which max_events bounds.
	keepInterval = time.Minute
)

// database is a database with its writer and its counts of events. Queues can share it.
type database struct {
	opener store.Opener
	logger atomic.Pointer[zap.Logger] // of the latest configuration
	writer *writer.Writer

	ctx      context.Context // for the counts
	cancel   context.CancelFunc
	counting sync.WaitGroup
	measured time.Time     // when the rows of the history were last counted
	recount  chan struct{} // requests a count now

	failing                        atomic.Bool // the log has the error, but not the recovery yet
	failedLog, lockedLog, countLog seldom

	mu      sync.Mutex
	queues  map[string]*queue
	counts  map[countKey]store.Count
	changes map[countKey]int // while a count is running, the changes since its start
	ignored map[string]bool  // queues without a configuration that warn has logged
	damaged int              // files that were moved aside
}

type countKey struct{ queue, state string }

// openDatabase returns the database of an opener, and opens it in the background.
func openDatabase(opener store.Opener, logger *zap.Logger) *database {
	value, _, _ := databases.LoadOrNew(opener.Key(), func() (caddy.Destructor, error) {
		return newDatabase(opener, logger), nil
	})
	return value.(*database)
}

func newDatabase(opener store.Opener, logger *zap.Logger) *database {
	host, _ := os.Hostname()
	d := &database{
		opener: opener, recount: make(chan struct{}, 1), queues: make(map[string]*queue),
		counts: make(map[countKey]store.Count), ignored: make(map[string]bool),
	}
	d.logger.Store(logger)
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.writer = writer.New(fmt.Sprintf("%s-%d-%s", host, os.Getpid(), rand.Text()[:6]), d.open, d)
	d.counting.Go(d.count)
	return d
}

func (d *database) open(ctx context.Context) (store.Store, error) {
	return d.opener.Open(ctx, store.Opening{Logger: d.logger.Load()})
}

// Destruct closes the database. Its queues are closed before.
func (d *database) Destruct() error {
	d.cancel()
	d.counting.Wait()
	d.writer.Close()
	return nil
}

// join adds a queue to this database, and leave removes it.
func (d *database) join(q *queue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queues[q.name] = q
	delete(d.ignored, q.name)
}

func (d *database) leave(q *queue) {
	d.mu.Lock()
	if d.queues[q.name] == q {
		delete(d.queues, q.name)
		q.metrics.remove()
	}
	d.mu.Unlock()
	if !caddy.Exiting() {
		d.warn()
	}
}

// warn logs each queue that has pending events but is not configured. It logs a queue once.
func (d *database) warn() {
	ignored := make(map[string]int)
	d.mu.Lock()
	for key, c := range d.counts {
		if key.state == store.Pending && c.Events > 0 && d.queues[key.queue] == nil && !d.ignored[key.queue] {
			d.ignored[key.queue] = true
			ignored[key.queue] = c.Events
		}
	}
	d.mu.Unlock()
	for queue, pending := range ignored {
		d.logger.Load().Warn("events are pending in a queue that is not configured: add the queue again to deliver them",
			zap.String("queue", queue), zap.Int("pending", pending), zap.String("database", d.opener.Key()))
	}
}

func (d *database) peek(queue string) (store.Peek, error) {
	s, err := d.writer.Store()
	if s == nil {
		return store.Peek{}, err
	}
	ctx, cancel := context.WithTimeout(d.ctx, peekTimeout)
	defer cancel()
	return s.Peek(ctx, queue)
}

// Opened implements writer.Observer.
func (d *database) Opened() {
	d.recovered()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, q := range d.queues {
		q.schedule.Wake()
	}
}

// Failed implements writer.Observer. It logs once a minute.
func (d *database) Failed(err error) {
	if was := d.failing.Swap(true); d.failedLog.may() || !was {
		d.logger.Load().Error("cannot store events: passing them to the backend, refusing with 503 what it does not accept", zap.Error(err))
	}
}

func (d *database) recovered() {
	if d.failing.Swap(false) {
		d.logger.Load().Info("events are stored again")
	}
}

// Written implements writer.Observer. It updates the counts, and wakes the queues with
// events that may be due.
func (d *database) Written(b *store.Batch) {
	if len(b.Add) > 0 {
		d.recovered()
	}
	left := make(map[string]bool, len(b.Left))
	for _, f := range b.Left {
		left[f.ID] = true
	}
	if len(left) > 0 && d.lockedLog.may() {
		d.logger.Load().Warn("cannot store the results of attempts: another program has locked these rows, trying again", zap.Int("events", len(left)))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	woken := make(map[string]bool)
	for _, r := range b.Add {
		if r.First != "" {
			continue
		}
		d.changeLocked(countKey{r.Queue, store.Pending}, 1)
		woken[r.Queue] = woken[r.Queue] || r.Lease == 0
	}
	for _, f := range b.Finish {
		switch {
		case left[f.ID]:
		case f.Outcome == store.Delivered:
			d.changeLocked(countKey{f.Queue, store.Pending}, -1)
		case f.Outcome == store.SetAside:
			d.changeLocked(countKey{f.Queue, store.Pending}, -1)
			d.changeLocked(countKey{f.Queue, store.Dead}, 1)
		default:
			woken[f.Queue] = true
		}
	}
	for name, wake := range woken {
		if q := d.queues[name]; q != nil && wake {
			q.schedule.Wake()
		}
	}
}

func (d *database) changeLocked(key countKey, by int) {
	c := d.counts[key]
	if c.Events = max(0, c.Events+by); c.Events == 0 {
		c.Oldest = 0
	}
	d.counts[key] = c
	if d.changes != nil {
		d.changes[key] += by
	}
}

// pending returns the last known number of pending events of a queue.
func (d *database) pending(queue string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[countKey{queue, store.Pending}].Events
}

// countSoon requests a count: other processes may have delivered some events.
func (d *database) countSoon() {
	select {
	case d.recount <- struct{}{}:
	default:
	}
}

// count counts the events from time to time, and tidies the database. Between two counts,
// the metrics show only the changes by this process.
func (d *database) count() {
	var next time.Time
	for d.ctx.Err() == nil {
		if s, _ := d.writer.Store(); s != nil && !time.Now().Before(next) {
			began := time.Now()
			if err := d.countOnce(s); err == nil {
				next = time.Now().Add(countPause(time.Since(began)))
			} else if d.ctx.Err() == nil && d.countLog.may() {
				d.logger.Load().Error("cannot count events: the metrics show older numbers", zap.Error(err))
			}
		}
		d.show()
		d.warn()
		select {
		case <-time.After(countInterval):
		case <-d.recount:
			next = time.Time{}
			select { // at most once a second
			case <-time.After(time.Second):
			case <-d.ctx.Done():
			}
		case <-d.ctx.Done():
		}
	}
}

// countPause returns the pause after a count that took this long.
func countPause(took time.Duration) time.Duration {
	return min(max(countInterval, time.Duration(float64(took)/countShare)), maxCountPause)
}

func (d *database) countOnce(s store.Store) error {
	ctx, cancel := context.WithTimeout(d.ctx, countTimeout)
	defer cancel()
	d.mu.Lock()
	d.changes = make(map[countKey]int)
	d.mu.Unlock()
	counts, err := s.Counts(ctx)
	d.mu.Lock()
	changes := d.changes
	if d.changes = nil; err == nil {
		clear(d.counts)
		for _, c := range counts {
			d.counts[countKey{c.Queue, c.State}] = c
		}
		for key, by := range changes {
			d.changeLocked(key, by)
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	for u := (store.Upkeep{More: true}); u.More; {
		if u, err = s.Tidy(ctx, d.keep()); err != nil {
			return err
		}
		d.mu.Lock()
		d.damaged = u.DamagedFiles
		d.mu.Unlock()
	}
	return nil
}

// keep returns the limits for the history of each queue. Once per keepInterval, the limits
// include the number of rows.
func (d *database) keep() (keep []store.Keep) {
	count := time.Since(d.measured) >= keepInterval
	if count {
		d.measured = time.Now()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, q := range d.queues {
		if h := q.current(); h != nil {
			k := store.Keep{Queue: name, For: time.Duration(*h.History)}
			if count {
				k.Rows = h.MaxEvents
			}
			keep = append(keep, k)
		}
	}
	return keep
}

// show sets the metrics.
func (d *database) show() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, q := range d.queues {
		q.metrics.show(d.counts[countKey{name, store.Pending}], d.counts[countKey{name, store.Dead}], d.damaged)
	}
}
