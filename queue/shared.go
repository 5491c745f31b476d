package queue

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddyserver/caddy/v2"
)

const (
	// The pause between two counts of the events is at least countInterval and at most
	// maxCountPause. Between these bounds, counting takes countShare of the time.
	countInterval = 5 * time.Second
	maxCountPause = 2 * time.Minute
	countShare    = 0.002

	// peekTimeout is the timeout of one Peek.
	peekTimeout = 5 * time.Second
)

// database is a database with its writer and its counts of events. Queues can share it.
type database struct {
	opener store.Opener
	logger atomic.Pointer[zap.Logger] // of the latest configuration
	writer *writer.Writer

	ctx      context.Context // for the counts
	cancel   context.CancelFunc
	counting sync.WaitGroup
	outdated atomic.Bool // true if keepCounts must count the events soon

	failing                        atomic.Bool // the log has the error, but not the recovery yet
	failedLog, lockedLog, countLog *rate.Limiter

	mu      sync.Mutex
	queues  map[string]*queue
	counts  map[countKey]store.Count
	damaged int // number of damaged databases that were moved aside and still exist
}

type countKey struct{ queue, state string }

// openDatabase returns the database of a handler, and opens it in the background.
func openDatabase(h *Handler) *database {
	value, _, _ := databases.LoadOrNew(h.opener.Key(), func() (caddy.Destructor, error) {
		d := &database{
			opener: h.opener, queues: make(map[string]*queue), counts: make(map[countKey]store.Count),
			failedLog: onceAMinute(), lockedLog: onceAMinute(), countLog: onceAMinute(),
		}
		d.logger.Store(h.app.logger)
		d.ctx, d.cancel = context.WithCancel(context.Background())
		host, _ := os.Hostname()
		owner := fmt.Sprintf("%s-%d-%s", host, os.Getpid(), rand.Text()[:6])
		d.writer = writer.New(owner, func(ctx context.Context) (store.Store, error) {
			return d.opener.Open(ctx, store.Opening{Logger: d.logger.Load()})
		}, d)
		d.counting.Go(d.keepCounts)
		return d, nil
	})
	return value.(*database)
}

// Destruct closes the database. Its queues have been closed before.
func (d *database) Destruct() error {
	d.cancel()
	d.counting.Wait()
	d.writer.Close()
	return nil
}

// leave removes a closed queue from the database's list of queues.
func (d *database) leave(q *queue) {
	d.mu.Lock()
	if d.queues[q.name] == q {
		delete(d.queues, q.name)
	}
	d.mu.Unlock()
	if !caddy.Exiting() {
		d.warn(q.name)
	}
}

// warn logs a warning if a queue has pending events, but is not configured.
func (d *database) warn(queue string) {
	d.mu.Lock()
	pending, configured := d.counts[countKey{queue, store.Pending}].Events, d.queues[queue] != nil
	d.mu.Unlock()
	if pending > 0 && !configured {
		d.logger.Load().Warn("events are pending in a queue that is not configured: add the queue again to deliver them",
			zap.String("queue", queue), zap.Int("pending", pending), zap.String("database", d.opener.Key()))
	}
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

// Failed implements writer.Observer. It logs the first error after a success, and then at most
// one error a minute.
func (d *database) Failed(err error) {
	if was := d.failing.Swap(true); d.failedLog.Allow() || !was {
		d.logger.Load().Error("cannot store events: passing them to the backend, refusing with 503 what it does not accept", zap.Error(err))
	}
}

func (d *database) recovered() {
	if d.failing.Swap(false) {
		d.logger.Load().Info("storing events works again")
	}
}

// Written implements writer.Observer. It updates the counts, and wakes the queues with
// events that may be due.
func (d *database) Written(b *store.Batch) {
	if len(b.Add) > 0 {
		d.recovered()
	}
	if len(b.Left) > 0 && d.lockedLog.Allow() {
		d.logger.Load().Warn("cannot store the results of attempts: another program has locked these rows, trying again", zap.Int("events", len(b.Left)))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range b.Add {
		if r.First != "" {
			continue
		}
		d.changeLocked(r.Queue, store.Pending, 1)
		if q := d.queues[r.Queue]; q != nil && r.Lease == 0 && q.breaker.Backend().Down.IsZero() {
			q.schedule.Wake()
		}
	}
	for _, f := range b.Finish {
		switch {
		case slices.Contains(b.Left, f):
		case f.Outcome == store.Delivered:
			d.changeLocked(f.Queue, store.Pending, -1)
		case f.Outcome == store.SetAside:
			d.changeLocked(f.Queue, store.Pending, -1)
			d.changeLocked(f.Queue, store.Dead, 1)
		default:
			d.wakeLocked(f.Queue)
		}
	}
}

func (d *database) wakeLocked(queue string) {
	if q := d.queues[queue]; q != nil {
		q.schedule.Wake()
	}
}

func (d *database) changeLocked(queue, state string, by int) {
	key := countKey{queue, state}
	c := d.counts[key]
	c.Events = max(0, c.Events+by)
	d.counts[key] = c
}

// pending returns the last known number of pending events of a queue.
func (d *database) pending(queue string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[countKey{queue, store.Pending}].Events
}

// shown returns the last known numbers of a queue for the metrics.
func (d *database) shown(queue string) (pending, dead store.Count, damaged int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[countKey{queue, store.Pending}], d.counts[countKey{queue, store.Dead}], d.damaged
}

// keepCounts counts the events from time to time. Between two counts, the metrics do not show the
// changes by other processes.
func (d *database) keepCounts() {
	var next time.Time
	for d.ctx.Err() == nil {
		wait := countInterval
		s, _ := d.writer.Store()
		if s == nil {
			wait = time.Second / 10 // the check of max_events needs the first count
		} else if d.outdated.Swap(false) || !time.Now().Before(next) {
			if took, err := d.count(s, next.IsZero()); err == nil {
				next = time.Now().Add(countPause(took))
			} else if d.ctx.Err() == nil && d.countLog.Allow() {
				d.logger.Load().Error("cannot count events: the metrics show older numbers", zap.Error(err))
			}
		}
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
		}
	}
}

// countPause returns the wait before the next count of the events. The argument `took` is the
// duration of the last count.
func countPause(took time.Duration) time.Duration {
	return min(max(countInterval, time.Duration(float64(took)/countShare)), maxCountPause)
}

// count counts the events, and tidies the database. The first count warns of queues that are
// not configured. The result took is the time for counting, without the wait of Tidy for locks.
func (d *database) count(s store.Store, first bool) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(d.ctx, time.Minute)
	defer cancel()
	d.mu.Lock()
	before := maps.Clone(d.counts)
	d.mu.Unlock()
	began := time.Now()
	found, err := s.Counts(ctx)
	if err != nil {
		return 0, err
	}
	took = time.Since(began)
	d.mu.Lock()
	now := d.counts
	d.counts = make(map[countKey]store.Count)
	for _, c := range found {
		d.counts[countKey{c.Queue, c.State}] = c
	}
	for key, c := range now { // the changes during the count
		d.changeLocked(key.queue, key.state, c.Events-before[key].Events)
	}
	var keep []store.Keep
	for name, q := range d.queues {
		if h := q.current(); h != nil {
			keep = append(keep, store.Keep{Queue: name, For: time.Duration(*h.History), Rows: h.MaxEvents})
		}
	}
	d.mu.Unlock()
	for _, c := range found {
		if first && c.State == store.Pending {
			d.warn(c.Queue)
		}
	}
	damaged, err := s.Tidy(ctx, keep)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.damaged = damaged
	return took, err
}
