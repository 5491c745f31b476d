package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// statement is a statement for many events. In text, {rows} stands for one row per event. In
// row, each ? is an argument.
type statement struct{ row, text string }

// prepared is the key of a prepared statement for a number of events.
type prepared struct {
	statement
	events int
}

var (
	addEvents = statement{
		`(?, ?, 'pending', ?, {now}, {now} + CAST(? AS BIGINT), {now} + CAST(? AS BIGINT), ?, ?, ?, ?, ?, ?, ?)`,
		`INSERT INTO {schema}inkit_queue_events (id, queue, state, received, queued, due, lease, owner,
			attempts, last_error, event_type, resource_id, request, checksum)
		VALUES {rows} ON CONFLICT (id) DO NOTHING`,
	}
	deliverEvents = statement{
		`?`,
		`DELETE FROM {schema}inkit_queue_events WHERE id IN (
			SELECT e.id FROM {schema}inkit_queue_events AS e WHERE e.id IN ({rows}) {skip})`,
	}
	keepEvents = statement{ // an owner without the lease must not change the event
		`(?, ?, CAST(? AS BIGINT), ?, CAST(? AS INTEGER), ?)`,
		`WITH v AS (SELECT * FROM (VALUES {rows}) AS v)
		UPDATE {schema}inkit_queue_events
		SET state = v.column2, due = {now} + v.column3, lease = NULL, owner = NULL,
			last_error = COALESCE(v.column4, last_error), attempts = attempts - v.column5
		FROM v WHERE id = v.column1 AND (owner IS NULL OR owner = v.column6)
			AND id IN (SELECT e.id FROM {schema}inkit_queue_events AS e JOIN v ON e.id = v.column1 {skip})`,
	}
	readOwners = statement{`?`, `SELECT id, COALESCE(owner, '') FROM {schema}inkit_queue_events WHERE id IN ({rows})`}
)

// query returns the text of a statement for n events.
func (d *DB) query(s statement, n int) string {
	rows := strings.Repeat(s.row+",", n-1) + s.row
	if !d.Plain {
		var b strings.Builder
		for i, part := range strings.Split(rows, "?") {
			if i > 0 {
				fmt.Fprint(&b, "$", i)
			}
			b.WriteString(part)
		}
		rows = b.String()
	}
	return d.text(strings.Replace(s.text, "{rows}", rows, 1))
}

// prepare prepares a statement for n events: SQLite is as slow in parsing it as in running it.
// Call it before the transaction, because a transaction uses the only connection.
func (d *DB) prepare(ctx context.Context, s statement, n int) error {
	for _, rows := range []int{min(n, d.Rows), n % d.Rows} {
		if rows == 0 || !d.Plain {
			continue
		}
		if _, ok := d.prepared.Load(prepared{s, rows}); ok {
			continue
		}
		stmt, err := d.Write.PrepareContext(ctx, d.query(s, rows))
		if err != nil {
			return err
		}
		d.prepared.Store(prepared{s, rows}, stmt)
	}
	return nil
}

// run runs a statement with the arguments of each event, and returns the number of changed
// rows.
func (d *DB) run(ctx context.Context, tx *sql.Tx, s statement, events [][]any) (changed int, err error) {
	for some := range slices.Chunk(events, d.Rows) {
		args := slices.Concat(some...)
		var result sql.Result
		if stmt, ok := d.prepared.Load(prepared{s, len(some)}); ok {
			result, err = tx.StmtContext(ctx, stmt.(*sql.Stmt)).ExecContext(ctx, args...) //nolint:sqlclosecheck // the transaction closes it
		} else {
			result, err = tx.ExecContext(ctx, d.query(s, len(some)), args...)
		}
		if err != nil {
			return changed, err
		}
		n, err := result.RowsAffected()
		if err != nil {
			return changed, err
		}
		changed += int(n)
	}
	return changed, nil
}

// Apply implements store.Store.
func (d *DB) Apply(ctx context.Context, b *store.Batch) error {
	b.Left = nil
	addHistory, addCopied := insert("history"), insert(b.Copied.Table)
	delivered, others := finishRows(b)
	for s, n := range map[statement]int{
		addEvents: len(b.Add), addHistory: len(b.History), addCopied: len(b.Copied.Rows), deliverEvents: len(delivered), keepEvents: len(others),
	} {
		if err := d.prepare(ctx, s, n); err != nil {
			return d.Wrap(err)
		}
	}
	err := d.InTx(ctx, func(tx *sql.Tx) error {
		added, err := d.once(ctx, tx, b.Add)
		if err != nil {
			return err
		}
		if _, err := d.run(ctx, tx, addEvents, eventRows(b.Owner, added)); err != nil {
			return err
		}
		if _, err := d.run(ctx, tx, addHistory, historyRows(b.History)); err != nil {
			return err
		}
		if _, err := d.run(ctx, tx, addCopied, b.Copied.Rows); err != nil {
			return err
		}
		n, err := d.run(ctx, tx, deliverEvents, delivered)
		if err != nil {
			return err
		}
		m, err := d.run(ctx, tx, keepEvents, others)
		if err != nil {
			return err
		}
		if n+m < len(b.Finish) {
			if err := d.left(ctx, tx, b); err != nil {
				return err
			}
		}
		for _, claim := range b.Claims {
			if err := d.claim(ctx, tx, b.Owner, claim); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Left = nil
		for _, claim := range b.Claims {
			claim.Records = nil
		}
	}
	return err
}

// plain returns a text that every database accepts: UTF-8 without NUL. Otherwise one event
// would make each batch with it fail.
func plain(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// label returns the stored form of a type or a resource id. It cuts a long text,
// because an index of PostgreSQL has no space for it.
func label(text string) string {
	const longest = 256 // bytes
	if text = plain(text); len(text) > longest {
		text = strings.ToValidUTF8(text[:longest], "")
	}
	return text
}

// eventRows returns the arguments of addEvents.
func eventRows(batchOwner string, added []*store.Record) (rows [][]any) {
	for _, r := range added {
		var lease, owner any
		delay := r.Delay
		if r.Lease > 0 {
			lease, owner, delay = r.Lease.Milliseconds(), batchOwner, r.Lease
		}
		rows = append(rows, []any{
			r.ID, r.Queue, r.Received.UnixMilli(), delay.Milliseconds(), lease, owner,
			r.Attempts, plain(r.LastError), label(r.EventType), label(r.ResourceID), r.Request, r.Checksum,
		})
	}
	return rows
}

// finishRows returns the arguments of deliverEvents and of keepEvents.
func finishRows(b *store.Batch) (delivered, others [][]any) {
	for _, f := range b.Finish {
		if f.Outcome == store.Delivered {
			delivered = append(delivered, []any{f.ID})
		} else {
			others = append(others, append(finishRow(f), b.Owner))
		}
	}
	return delivered, others
}

// left finds the finishes that Apply could not write because another transaction has locked
// their rows. Their events still exist, and this owner still has the lease.
func (d *DB) left(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	if d.Skip == "" {
		return nil
	}
	var id, owner string
	owners := make(map[string]string)
	for some := range slices.Chunk(b.Finish, d.Rows) {
		ids := make([]any, len(some))
		for i, f := range some {
			ids[i] = f.ID
		}
		err := d.each(ctx, tx, []any{&id, &owner}, func() { owners[id] = owner },
			d.query(readOwners, len(some)), ids...)
		if err != nil {
			return err
		}
	}
	for _, f := range b.Finish {
		if owner, ok := owners[f.ID]; ok && (owner == b.Owner || f.Outcome == store.Delivered) {
			b.Left = append(b.Left, f)
		}
	}
	return nil
}

// finishRow returns the id, state, delay and error of an event after an attempt, and the
// number of attempts to subtract.
func finishRow(f store.Finish) []any {
	switch f.Outcome {
	case store.Later:
		return []any{f.ID, store.Pending, f.After.Milliseconds(), plain(f.LastError), 0}
	case store.SetAside:
		return []any{f.ID, store.Dead, int64(0), plain(f.LastError), 0}
	case store.Unbegun:
		return []any{f.ID, store.Pending, int64(0), nil, 1}
	case store.Released, store.Delivered: // the row of a delivered event is deleted
		return []any{f.ID, store.Pending, int64(0), nil, 0}
	}
	panic("an outcome that there is not")
}

func (d *DB) claim(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim) error {
	// Only a wrong clock gives such a late due time: these events are due now.
	_, err := d.exec(ctx, tx, `
		UPDATE {schema}inkit_queue_events SET due = {now}, lease = NULL, owner = NULL WHERE id IN (
			SELECT e.id FROM {schema}inkit_queue_events AS e
			WHERE e.queue = $1 AND e.state = 'pending' AND e.due > {now} + CAST($2 AS BIGINT) LIMIT 500 {skip})`,
		claim.Queue, max(store.Latest, claim.Lease).Milliseconds())
	if err != nil {
		return err
	}
	if claim.Newest { // first look at the last arrivals: sorting all due events is slow
		err := d.claimFrom(ctx, tx, owner, claim,
			`(SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT 16 + 4 * $2) AS n CROSS JOIN {schema}inkit_queue_events AS e WHERE e.id = n.id AND`, `e.id DESC`)
		if err != nil || len(claim.Records) > 0 {
			return err
		}
	}
	return d.claimFrom(ctx, tx, owner, claim, `{schema}inkit_queue_events AS e WHERE`, `e.due`)
}

func (d *DB) claimFrom(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim, from, order string) error {
	r := store.Record{Queue: claim.Queue, State: store.Pending}
	var received, queued, now int64
	dest := []any{&r.ID, &received, &queued, &r.Attempts, &r.EventType, &r.ResourceID, &r.Request, &r.Checksum, &now}
	return d.each(ctx, tx, dest, func() {
		found := r
		found.Received, found.Age = time.UnixMilli(received), time.Duration(max(0, now-queued))*time.Millisecond
		claim.Records = append(claim.Records, &found)
	}, `
		WITH picked AS MATERIALIZED (
			SELECT e.id FROM `+from+` e.queue = $1 AND e.state = 'pending' AND e.due <= {now}
			ORDER BY `+order+` LIMIT $2 {skip})
		UPDATE {schema}inkit_queue_events
		SET due = {now} + CAST($3 AS BIGINT), lease = {now} + CAST($3 AS BIGINT), owner = $4, attempts = attempts + 1
		WHERE id IN (SELECT id FROM picked)
		RETURNING id, received, queued, attempts, event_type, resource_id, request, checksum, {now}`,
		claim.Queue, claim.Max, claim.Lease.Milliseconds(), owner)
}
