package sqlstore

import (
	"context"
	"database/sql"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Peek implements store.Store.
func (d *DB) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	var first, last, paused sql.NullInt64
	err = d.read(ctx, []any{&first, &last, &paused}, nil, `SELECT
		(SELECT due - {now} FROM {schema}inkit_queue_events WHERE queue = ? AND state = 'pending' ORDER BY due LIMIT 1),
		(SELECT due - {now} FROM {schema}inkit_queue_events WHERE queue = ? AND state = 'pending' ORDER BY due DESC LIMIT 1),
		(SELECT since FROM {schema}inkit_queue_paused WHERE queue = ?)`, queue, queue, queue)
	p.Empty, p.Wait, p.Paused = !first.Valid, milliseconds(first.Int64), at(paused)
	if last.Int64 > store.Latest.Milliseconds() {
		p.Wait = 0 // a clock was wrong: the next claim corrects the due time
	}
	return p, err
}

// Counts implements store.Store.
func (d *DB) Counts(ctx context.Context) (counts []store.Count, err error) {
	var c store.Count
	var oldest int64
	err = d.read(ctx, []any{&c.Queue, &c.State, &c.Events, &oldest}, func() {
		c.Oldest = milliseconds(oldest)
		counts = append(counts, c)
	}, `
		SELECT queue, 'pending', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'pending' GROUP BY queue
		UNION ALL
		SELECT queue, 'dead', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'dead' GROUP BY queue`)
	return counts, err
}
