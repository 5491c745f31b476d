package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	errorRows = 10_000 // Status reads the last errors of this many oldest and newest events
	maxErrors = 5      // Status returns this many errors of a queue, the most frequent first
)

// Status implements store.Store.
func (d *DB) Status(ctx context.Context, queues ...string) (status store.Status, err error) {
	if err := d.read(ctx, []any{&status.Size}, nil, d.Size); err != nil {
		return status, err
	}
	counts, err := d.Counts(ctx)
	if err != nil {
		return status, err
	}
	queues = slices.Clone(queues)
	counted := make(map[[2]string]store.Count) // by queue and state
	for _, c := range counts {
		queues = append(queues, c.Queue)
		counted[[2]string{c.Queue, c.State}] = c
	}
	for _, table := range []string{"history", "once", "paused"} {
		for next := (sql.NullString{Valid: true}); next.Valid; { // one query per queue is faster than reading all rows
			queues = append(queues, next.String)
			err := d.read(ctx, []any{&next}, nil, `SELECT min(queue) FROM {schema}inkit_queue_`+table+` WHERE queue > ?`, next.String)
			if err != nil {
				return status, err
			}
		}
	}
	slices.Sort(queues)
	for _, queue := range slices.Compact(queues)[1:] { // the first name is empty
		pending, dead := counted[[2]string{queue, store.Pending}], counted[[2]string{queue, store.Dead}]
		q := store.QueueStatus{Queue: queue, Pending: pending.Events, Dead: dead.Events, Oldest: pending.Oldest}
		if err := d.statusOf(ctx, &q); err != nil {
			return status, err
		}
		status.Queues = append(status.Queues, q)
	}
	return status, d.statusOfHours(ctx, &status)
}

// statusOf fills in the numbers that Counts does not return.
func (d *DB) statusOf(ctx context.Context, q *store.QueueStatus) error {
	peek, err := d.Peek(ctx, q.Queue)
	if err != nil {
		return err
	}
	q.Next, q.Paused = peek.Wait, peek.Paused
	var ago, delivered, retries int
	err = d.read(ctx, []any{&ago, &delivered, &retries}, func() {
		i := len(q.Delivered) - 1 - min(max(ago, 0), len(q.Delivered)-1) // the clock of a Caddy may be wrong
		q.Delivered[i] += delivered
		q.Failed[i] += retries
	}, fmt.Sprintf(`
		SELECT ({now} - finished) / %[1]d, count(*), sum(attempts - 1) FROM {schema}inkit_queue_history
		WHERE queue = ? AND finished > {now} - 24 * %[1]d GROUP BY 1`, time.Hour.Milliseconds()), q.Queue)
	if err != nil {
		return err
	}
	err = d.read(ctx, []any{&q.Duplicates}, nil, `
		SELECT coalesce(sum(duplicates), 0) FROM {schema}inkit_queue_once WHERE queue = ? AND duplicates > 0`, q.Queue)
	if err != nil {
		return err
	}
	var e store.ErrorCount
	return d.read(ctx, []any{&e.Error, &e.Events}, func() { q.Errors = append(q.Errors, e) }, fmt.Sprintf(`
		SELECT last_error, count(*) FROM {schema}inkit_queue_events WHERE queue = ? AND last_error <> '' AND id IN (
			SELECT id FROM (SELECT id FROM {schema}inkit_queue_events ORDER BY id LIMIT %[1]d) AS oldest
			UNION SELECT id FROM (SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT %[1]d) AS newest)
		GROUP BY last_error ORDER BY count(*) DESC, last_error LIMIT %[2]d`, errorRows, maxErrors), q.Queue)
}

// statusOfHours counts the pending and dead events of each hour. It selects events by the time in
// their ids, because the ids have an index. The last hour ends a minute from now, because the clock
// of another Caddy may be ahead.
func (d *DB) statusOfHours(ctx context.Context, status *store.Status) error {
	until := time.Now().Add(time.Minute)
	for i := range slices.Backward(status.Kept[:]) {
		from := until.Add(-time.Hour)
		err := d.read(ctx, []any{&status.Kept[i]}, nil, `SELECT count(*) FROM {schema}inkit_queue_events WHERE id >= ? AND id < ?`,
			idAt(from), idAt(until))
		if err != nil {
			return err
		}
		until = from
	}
	return nil
}

// Pause implements store.Store.
func (d *DB) Pause(ctx context.Context, queue string, paused bool) (bool, error) {
	query := `DELETE FROM {schema}inkit_queue_paused WHERE queue = ?`
	if paused {
		query = `INSERT INTO {schema}inkit_queue_paused (queue, since) VALUES (?, {now}) ON CONFLICT (queue) DO NOTHING`
	}
	n, err := d.change(ctx, query, queue)
	return n > 0, err
}
