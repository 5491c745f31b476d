package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// Status reads the last errors of the errorRows oldest and the errorRows newest events. It
	// returns the maxErrors most frequent errors of each queue.
	errorRows = 10_000
	maxErrors = 5

	hour = int64(time.Hour / time.Millisecond)
)

// Status implements store.Store.
func (d *DB) Status(ctx context.Context, queues ...string) (status store.Status, err error) {
	if err := d.Read.QueryRowContext(ctx, d.text(d.Size)).Scan(&status.Size); err != nil {
		return status, d.Wrap(err)
	}
	all := make(map[string]*store.QueueStatus)
	of := func(queue string) *store.QueueStatus {
		if all[queue] == nil {
			all[queue] = &store.QueueStatus{Queue: queue}
		}
		return all[queue]
	}
	for _, queue := range queues {
		of(queue)
	}
	counts, err := d.Counts(ctx)
	if err != nil {
		return status, err
	}
	for _, c := range counts {
		if q := of(c.Queue); c.State == store.Dead {
			q.Dead = c.Events
		} else {
			q.Pending, q.Oldest = c.Events, c.Oldest
		}
	}
	for _, table := range []string{"history", "once", "paused"} {
		for queue := ""; ; of(queue) { // one query per queue is faster than reading all rows
			var next sql.NullString
			if err := d.Read.QueryRowContext(ctx, d.text(`SELECT min(queue) FROM {schema}inkit_queue_`+table+` WHERE queue > $1`), queue).Scan(&next); err != nil {
				return status, d.Wrap(err)
			}
			if !next.Valid {
				break
			}
			queue = next.String
		}
	}
	if err := d.statusOfErrors(ctx, of); err != nil {
		return status, d.Wrap(err)
	}
	if err := d.statusOfHours(ctx, &status); err != nil {
		return status, d.Wrap(err)
	}
	for _, queue := range slices.Sorted(maps.Keys(all)) {
		q := all[queue]
		peek, err := d.Peek(ctx, queue)
		if err != nil {
			return status, err
		}
		q.Next, q.Paused = peek.Wait, peek.Paused
		if err := d.statusOfMemory(ctx, q); err != nil {
			return status, d.Wrap(err)
		}
		status.Queues = append(status.Queues, *q)
	}
	return status, nil
}

// statusOfMemory fills in the numbers from the history and the keys.
func (d *DB) statusOfMemory(ctx context.Context, q *store.QueueStatus) error {
	var ago, delivered, retries int
	err := d.each(ctx, d.Read, []any{&ago, &delivered, &retries}, func() {
		i := len(q.Hours) - 1 - min(max(ago, 0), len(q.Hours)-1) // the clock of a Caddy may be wrong
		q.Hours[i] += delivered
		q.LastDay += delivered
		q.Retries += retries
		q.Failed[i] += retries
	}, fmt.Sprintf(`
		SELECT ({now} - finished) / %[1]d, count(*), sum(attempts - 1) FROM {schema}inkit_queue_history
		WHERE queue = $1 AND finished > {now} - 24 * %[1]d GROUP BY 1`, hour), q.Queue)
	if err != nil {
		return err
	}
	q.LastHour = q.Hours[len(q.Hours)-1]
	return d.Read.QueryRowContext(ctx, d.text(`
		SELECT coalesce(sum(duplicates), 0) FROM {schema}inkit_queue_once WHERE queue = $1 AND duplicates > 0`), q.Queue).Scan(&q.Duplicates)
}

// statusOfErrors reads the last errors of the oldest and of the newest events, and fills in
// the most frequent of these errors.
func (d *DB) statusOfErrors(ctx context.Context, of func(string) *store.QueueStatus) error {
	var queue string
	var e store.ErrorCount
	return d.each(ctx, d.Read, []any{&queue, &e.Error, &e.Events}, func() {
		if q := of(queue); len(q.Errors) < maxErrors {
			q.Errors = append(q.Errors, e)
		}
	}, fmt.Sprintf(`
		SELECT queue, last_error, count(*) FROM {schema}inkit_queue_events WHERE last_error <> '' AND id IN (
			SELECT id FROM (SELECT id FROM {schema}inkit_queue_events ORDER BY id LIMIT %[1]d) AS oldest
			UNION SELECT id FROM (SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT %[1]d) AS newest)
		GROUP BY queue, last_error ORDER BY count(*) DESC, last_error`, errorRows))
}

// statusOfHours counts pending and dead events by the time in their ids, because ids have an
// index.
func (d *DB) statusOfHours(ctx context.Context, status *store.Status) error {
	now := time.Now()
	for i := range status.Kept {
		from := now.Add(time.Duration(i-len(status.Kept)) * time.Hour)
		until := from.Add(time.Hour)
		if i == len(status.Kept)-1 {
			until = until.Add(time.Minute) // the clock of another Caddy may be ahead
		}
		err := d.Read.QueryRowContext(ctx, d.text(`SELECT count(*) FROM {schema}inkit_queue_events WHERE id >= $1 AND id < $2`),
			idAt(from), idAt(until)).Scan(&status.Kept[i])
		if err != nil {
			return err
		}
	}
	return nil
}
