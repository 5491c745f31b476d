package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Due implements store.Store. It returns why if another process may still write: the other
// process may deliver the same events. On a full disk, no process can write.
func (d *DB) Due(ctx context.Context, c *store.Claim, why error) error {
	if errors.Is(why, store.ErrLocked) || d.Skip != "" && !errors.Is(why, store.ErrFull) {
		return why
	}
	page, err := d.Search(ctx, store.Filter{Queue: c.Queue, Due: true, Limit: c.Max}, true)
	for _, r := range page.Records {
		r.Attempts++
		r.Age = max(0, time.Since(r.Queued))
		c.Records = append(c.Records, r)
	}
	if len(c.Records) > 0 {
		return nil
	}
	return errors.Join(why, err)
}

// Peek implements store.Store.
func (d *DB) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	var first, last, paused sql.NullInt64
	var now int64
	err = d.Read.QueryRowContext(ctx, d.text(`SELECT
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due LIMIT 1),
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due DESC LIMIT 1),
		(SELECT since FROM {schema}inkit_queue_paused WHERE queue = $1), {now}`), queue).
		Scan(&first, &last, &paused, &now)
	if err != nil {
		return p, d.Wrap(err)
	}
	p.Empty = !first.Valid
	p.Wait = time.Duration(max(0, first.Int64-now)) * time.Millisecond
	if last.Int64-now > store.Latest.Milliseconds() {
		p.Wait = 0 // a clock was wrong: the next claim corrects the due time
	}
	if paused.Valid {
		p.Paused = time.UnixMilli(paused.Int64)
	}
	return p, nil
}

// Counts implements store.Store.
func (d *DB) Counts(ctx context.Context) (counts []store.Count, err error) {
	var c store.Count
	var oldest int64
	err = d.each(ctx, d.Read, []any{&c.Queue, &c.State, &c.Events, &oldest}, func() {
		c.Oldest = time.Duration(max(0, oldest)) * time.Millisecond
		counts = append(counts, c)
	}, `
		SELECT queue, 'pending', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'pending' GROUP BY queue
		UNION ALL
		SELECT queue, 'dead', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'dead' GROUP BY queue`)
	return counts, d.Wrap(err)
}
