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

// Apply is of store.Store.
func (d *DB) Apply(ctx context.Context, b *store.Batch) error {
	b.Left = nil
	if err := d.prepareAdd(ctx, len(b.Add)); err != nil {
		return d.Wrap(err)
	}
	tx, err := d.BeginTx(ctx)
	if err != nil {
		return d.Wrap(err)
	}
	if err = d.apply(ctx, tx, b); err == nil {
		err = tx.Commit()
	}
	if err != nil {
		_ = tx.Rollback()
		b.Left = nil
		for _, claim := range b.Claims {
			claim.Records = nil
		}
	}
	return d.Wrap(err)
}

func (d *DB) apply(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	added, err := d.once(ctx, tx, b.Add)
	if err != nil {
		return err
	}
	if err := d.add(ctx, tx, b.Owner, added); err != nil {
		return err
	}
	if err := d.remember(ctx, tx, b); err != nil {
		return err
	}
	if err := d.finish(ctx, tx, b); err != nil {
		return err
	}
	for _, claim := range b.Claims {
		if err := d.claim(ctx, tx, b.Owner, claim); err != nil {
			return err
		}
	}
	return nil
}

// plain returns a text that every database accepts: UTF-8 without NUL. Otherwise one event
// would make its whole batch fail each time.
func plain(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// label returns the stored form of a type or a resource id. It cuts a long one, which has no
// space in an index of PostgreSQL.
func label(text string) string {
	const longest = 256 // bytes
	if text = plain(text); len(text) > longest {
		text = strings.ToValidUTF8(text[:longest], "")
	}
	return text
}

// values returns n rows of arguments for VALUES, each like pattern, with ? for an
// argument.
func values(n int, pattern string) string {
	var b strings.Builder
	arg := 0
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		for _, c := range []byte(pattern) {
			if c != '?' {
				b.WriteByte(c)
				continue
			}
			arg++
			fmt.Fprintf(&b, "$%d", arg)
		}
	}
	return b.String()
}

// rows is values for a statement without other arguments.
func (d *DB) rows(n int, pattern string) string {
	if d.Plain {
		return strings.Repeat(pattern+",", n-1) + pattern
	}
	return values(n, pattern)
}

// prepareAdd prepares the statements that add n events: SQLite takes as long to parse one
// as to run it. It runs before the transaction, which uses the only connection.
func (d *DB) prepareAdd(ctx context.Context, n int) error {
	if !d.Plain {
		return nil
	}
	for _, rows := range []int{min(n, d.Rows), n % d.Rows} {
		if _, ok := d.adds.Load(rows); !ok && rows > 0 {
			stmt, err := d.Write.PrepareContext(ctx, d.addQuery(rows))
			if err != nil {
				return err
			}
			d.adds.Store(rows, stmt)
		}
	}
	return nil
}

func (d *DB) addQuery(n int) string {
	return d.text(`
		INSERT INTO {schema}inkit_queue_events (id, queue, state, received, queued, due, lease, owner,
			attempts, last_error, event_type, resource_id, request, checksum) VALUES ` +
		d.rows(n, `(?, ?, 'pending', ?, {now}, {now} + CAST(? AS BIGINT), {now} + CAST(? AS BIGINT), ?, ?, ?, ?, ?, ?, ?)`) + `
		ON CONFLICT (id) DO NOTHING`)
}

func (d *DB) add(ctx context.Context, tx *sql.Tx, batchOwner string, added []*store.Record) error {
	for records := range slices.Chunk(added, d.Rows) {
		args := make([]any, 0, 12*len(records))
		for _, r := range records {
			var lease, owner any
			delay := r.Delay
			if r.Lease > 0 {
				lease, owner, delay = r.Lease.Milliseconds(), batchOwner, r.Lease
			}
			args = append(args, r.ID, r.Queue, r.Received.UnixMilli(), delay.Milliseconds(), lease, owner,
				r.Attempts, plain(r.LastError), label(r.EventType), label(r.ResourceID), r.Request, r.Checksum)
		}
		var err error
		if stmt, ok := d.adds.Load(len(records)); ok {
			_, err = tx.StmtContext(ctx, stmt.(*sql.Stmt)).ExecContext(ctx, args...) //nolint:sqlclosecheck // it ends with the transaction
		} else {
			_, err = tx.ExecContext(ctx, d.addQuery(len(records)), args...)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *DB) finish(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	var delivered, others []store.Finish
	for _, f := range b.Finish {
		if f.Outcome == store.Delivered {
			delivered = append(delivered, f)
		} else {
			others = append(others, f)
		}
	}
	for some := range slices.Chunk(delivered, d.Rows) {
		query := `DELETE FROM {schema}inkit_queue_events WHERE id IN (` + values(len(some), `?`) + `)`
		if d.Skip != "" {
			query = `DELETE FROM {schema}inkit_queue_events WHERE id IN (
				SELECT e.id FROM {schema}inkit_queue_events AS e WHERE e.id IN (` + values(len(some), `?`) + `) {skip})`
		}
		if err := d.finishSome(ctx, tx, b, some, query, ids(some), ""); err != nil {
			return err
		}
	}
	for some := range slices.Chunk(others, d.Rows) {
		args := make([]any, 0, 5*len(some)+1)
		for _, f := range some {
			args = append(args, finishRow(f)...)
		}
		args = append(args, b.Owner)
		// an owner without the lease must not change the event
		mine := fmt.Sprintf(`(owner IS NULL OR owner = $%d)`, len(args))
		locked := ""
		if d.Skip != "" {
			locked = ` AND id IN (SELECT e.id FROM {schema}inkit_queue_events AS e JOIN v ON e.id = v.column1 {skip})`
		}
		query := `WITH v AS (SELECT * FROM (VALUES ` +
			values(len(some), `(?, ?, CAST(? AS BIGINT), ?, CAST(? AS INTEGER))`) + `) AS v)
			UPDATE {schema}inkit_queue_events
			SET state = v.column2, due = {now} + v.column3, lease = NULL, owner = NULL,
				last_error = COALESCE(v.column4, last_error), attempts = attempts - v.column5
			FROM v WHERE id = v.column1 AND ` + mine + locked
		if err := d.finishSome(ctx, tx, b, some, query, args, ` AND owner = $1`); err != nil {
			return err
		}
	}
	return nil
}

func ids(finishes []store.Finish) []any {
	all := make([]any, len(finishes))
	for i, f := range finishes {
		all[i] = f.ID
	}
	return all
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

// finishSome runs a statement that finishes events, and adds events with locked rows to
// Left: their rows still exist, and still match condition.
func (d *DB) finishSome(ctx context.Context, tx *sql.Tx, b *store.Batch, some []store.Finish, query string, args []any, condition string) error {
	result, err := tx.ExecContext(ctx, d.text(query), args...)
	if err != nil || d.Skip == "" {
		return err
	}
	if n, err := result.RowsAffected(); err != nil || n == int64(len(some)) {
		return err
	}
	args, pattern := ids(some), values(len(some), `?`)
	if condition != "" {
		args = append([]any{b.Owner}, args...)
		pattern, _ = strings.CutPrefix(values(len(some)+1, `?`), "$1,")
	}
	rows, err := tx.QueryContext(ctx, d.text(`SELECT id FROM {schema}inkit_queue_events WHERE id IN (`+pattern+`)`+condition), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	left := make(map[string]bool)
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return err
		}
		left[id] = true
	}
	for _, f := range some {
		if left[f.ID] {
			b.Left = append(b.Left, f)
		}
	}
	return rows.Err()
}

func (d *DB) claim(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim) error {
	// Events with a due time that only a wrong clock can give are due now.
	_, err := tx.ExecContext(ctx, d.text(`
		UPDATE {schema}inkit_queue_events SET due = {now}, lease = NULL, owner = NULL WHERE id IN (
			SELECT e.id FROM {schema}inkit_queue_events AS e
			WHERE e.queue = $1 AND e.state = 'pending' AND e.due > {now} + CAST($2 AS BIGINT) LIMIT 500 {skip})`),
		claim.Queue, max(store.Latest, claim.Lease).Milliseconds())
	if err != nil {
		return err
	}
	if claim.Newest { // first look at the last arrivals: sorting all due events takes long
		err := d.claimFrom(ctx, tx, owner, claim,
			`(SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT 16 + 4 * $2) AS n CROSS JOIN {schema}inkit_queue_events AS e WHERE e.id = n.id AND`, `e.id DESC`)
		if err != nil || len(claim.Records) > 0 {
			return err
		}
	}
	return d.claimFrom(ctx, tx, owner, claim, `{schema}inkit_queue_events AS e WHERE`, `e.due`)
}

func (d *DB) claimFrom(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim, from, order string) error {
	rows, err := tx.QueryContext(ctx, d.text(`
		WITH picked AS MATERIALIZED (
			SELECT e.id FROM `+from+` e.queue = $1 AND e.state = 'pending' AND e.due <= {now}
			ORDER BY `+order+` LIMIT $2 {skip})
		UPDATE {schema}inkit_queue_events
		SET due = {now} + CAST($3 AS BIGINT), lease = {now} + CAST($3 AS BIGINT), owner = $4, attempts = attempts + 1
		WHERE id IN (SELECT id FROM picked)
		RETURNING id, received, queued, attempts, event_type, resource_id, request, checksum, {now}`),
		claim.Queue, claim.Max, claim.Lease.Milliseconds(), owner)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		r := &store.Record{Queue: claim.Queue, State: store.Pending}
		var received, queued, now int64
		if err := rows.Scan(&r.ID, &received, &queued, &r.Attempts, &r.EventType, &r.ResourceID, &r.Request, &r.Checksum, &now); err != nil {
			return err
		}
		r.Received, r.Age = time.UnixMilli(received), time.Duration(max(0, now-queued))*time.Millisecond
		claim.Records = append(claim.Records, r)
	}
	return rows.Err()
}
