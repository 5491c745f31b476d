package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Due is of store.Store. Who cannot write while others can must not deliver the same
// events. On a full disk, nobody can.
func (d *DB) Due(ctx context.Context, c *store.Claim, why error) error {
	if errors.Is(why, store.ErrLocked) || d.Skip != "" && !errors.Is(why, store.ErrFull) {
		return why
	}
	err := d.Select(ctx, store.Filter{Queue: c.Queue, Due: true, Limit: c.Max}, true, func(r *store.Record) bool {
		r.Attempts++
		r.Age = max(0, time.Since(r.Queued))
		c.Records = append(c.Records, r)
		return true
	})
	if len(c.Records) > 0 {
		return nil
	}
	return errors.Join(why, err)
}

// Peek is of store.Store.
func (d *DB) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	var first, last sql.NullInt64
	var now int64
	err = d.Read.QueryRowContext(ctx, d.text(`SELECT
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due LIMIT 1),
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due DESC LIMIT 1), {now}`), queue).
		Scan(&first, &last, &now)
	if err != nil {
		return p, d.Wrap(err)
	}
	p.Empty = !first.Valid
	p.Wait = time.Duration(max(0, first.Int64-now)) * time.Millisecond
	if last.Int64-now > store.Latest.Milliseconds() {
		p.Wait = 0 // a clock was wrong: the next claim mends it
	}
	return p, nil
}

// Counts is of store.Store.
func (d *DB) Counts(ctx context.Context) (counts []store.Count, err error) {
	rows, err := d.Read.QueryContext(ctx, d.text(`
		SELECT queue, 'pending', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'pending' GROUP BY queue
		UNION ALL
		SELECT queue, 'dead', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'dead' GROUP BY queue`))
	if err != nil {
		return nil, d.Wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		var c store.Count
		var oldest int64
		if err := rows.Scan(&c.Queue, &c.State, &c.Events, &oldest); err != nil {
			return nil, d.Wrap(err)
		}
		c.Oldest = time.Duration(max(0, oldest)) * time.Millisecond
		counts = append(counts, c)
	}
	return counts, d.Wrap(rows.Err())
}

// where returns the condition of a filter, and its arguments.
func where(f store.Filter) (condition string, args []any) {
	conditions := []string{"TRUE"}
	argument := func(format string, arg any) {
		args = append(args, arg)
		conditions = append(conditions, fmt.Sprintf(format, len(args)))
	}
	if f.Queue != "" {
		argument("queue = $%d", f.Queue)
	}
	if f.Dead {
		conditions = append(conditions, "state = 'dead'")
	}
	if f.Due {
		conditions = append(conditions, "state = 'pending' AND due <= {now}")
	}
	if f.After != "" {
		argument("id > $%d", f.After)
	}
	if f.IDs != nil {
		marks := make([]string, 0, 1+len(f.IDs))
		marks = append(marks, "NULL") // for no ids at all
		for _, id := range f.IDs {
			args = append(args, id)
			marks = append(marks, fmt.Sprintf("$%d", len(args)))
		}
		conditions = append(conditions, "id IN ("+strings.Join(marks, ", ")+")")
	}
	return strings.Join(conditions, " AND "), args
}

// Select is of store.Store.
func (d *DB) Select(ctx context.Context, filter store.Filter, withRequest bool, f func(*store.Record) bool) error {
	condition, args := where(filter)
	request, limit := "NULL, NULL", ""
	if withRequest {
		request = "request, checksum"
	}
	if filter.Limit > 0 {
		limit = fmt.Sprint(" LIMIT ", filter.Limit)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rows, err := d.Read.QueryContext(ctx, d.text(`
		SELECT id, queue, state, received, queued, due, lease, attempts, last_error, event_type, resource_id, `+request+`
		FROM {schema}inkit_queue_events WHERE `+condition+` ORDER BY id`+limit), args...)
	if err != nil {
		return d.Wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		r := new(store.Record)
		var received, queued, due int64
		var lease sql.NullInt64
		if err := rows.Scan(&r.ID, &r.Queue, &r.State, &received, &queued, &due, &lease, &r.Attempts, &r.LastError,
			&r.EventType, &r.ResourceID, &r.Request, &r.Checksum); err != nil {
			return d.Wrap(err)
		}
		r.Received, r.Queued, r.Due = time.UnixMilli(received), time.UnixMilli(queued), time.UnixMilli(due)
		if lease.Valid {
			r.LeasedUntil = time.UnixMilli(lease.Int64)
		}
		if !f(r) {
			cancel() // otherwise the driver may read the rest
			return nil
		}
	}
	return d.Wrap(rows.Err())
}

// Retry is of store.Store.
func (d *DB) Retry(ctx context.Context, filter store.Filter) (int, error) {
	condition, args := where(filter)
	return d.exec(ctx, `
		UPDATE {schema}inkit_queue_events SET state = 'pending', queued = {now}, due = {now}, lease = NULL, owner = NULL
		WHERE `+condition+` AND (lease IS NULL OR lease <= {now})`, args)
}

// Drop is of store.Store.
func (d *DB) Drop(ctx context.Context, filter store.Filter) (int, error) {
	condition, args := where(filter)
	return d.exec(ctx, `DELETE FROM {schema}inkit_queue_events WHERE `+condition, args)
}

func (d *DB) exec(ctx context.Context, query string, args []any) (int, error) {
	tx, err := d.BeginTx(ctx)
	if err != nil {
		return 0, d.Wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	result, err := tx.ExecContext(ctx, d.text(query), args...)
	if err != nil {
		return 0, d.Wrap(err)
	}
	n, err := result.RowsAffected()
	if err == nil {
		err = tx.Commit()
	}
	return int(n), d.Wrap(err)
}
