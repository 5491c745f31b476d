package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// statement is an SQL statement for many events. In the field `text`, {rows} stands for copies of
// the field `row`, one copy for each event.
type statement struct{ row, text string }

// insert returns a statement that adds rows to a table, with an argument for each column.
func insert(table string) statement {
	row := "(" + strings.Repeat("?, ", strings.Count(columns[table], ",")) + "?)"
	return statement{row, `INSERT INTO {schema}inkit_queue_` + table + ` (` + columns[table] + `) VALUES {rows} ON CONFLICT DO NOTHING`}
}

var (
	addEvents = statement{
		`(?, ?, 'pending', ?, {now}, {now} + CAST(? AS BIGINT), {now} + CAST(? AS BIGINT), ?, ?, ?, ?, ?, ?, ?)`,
		insert("events").text,
	}
	addHistory    = insert("history")
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
			last_error = COALESCE(NULLIF(v.column4, ''), last_error), attempts = attempts - v.column5
		FROM v WHERE id = v.column1 AND (owner IS NULL OR owner = v.column6)
			AND id IN (SELECT e.id FROM {schema}inkit_queue_events AS e JOIN v ON e.id = v.column1 {skip})`,
	}
)

// forRows returns the text of the statement for n rows.
func (s statement) forRows(n int) string {
	return strings.Replace(s.text, "{rows}", strings.Repeat(s.row+",", n-1)+s.row, 1)
}

// PrepareApply prepares the statements of Apply, because SQLite takes as long to parse them as
// to run them.
func (d *DB) PrepareApply(ctx context.Context) error {
	d.prepared = make(map[string]*sql.Stmt)
	for _, s := range []statement{addEvents, addHistory, deliverEvents, keepEvents} {
		for n := range d.Rows {
			query := s.forRows(n + 1)
			stmt, err := d.Write.PrepareContext(ctx, d.text(query)) //nolint:sqlclosecheck // used until the database is closed
			if err != nil {
				return err
			}
			d.prepared[query] = stmt
		}
	}
	return nil
}

// run runs a statement with the arguments of each event, and returns the number of changed
// rows.
func (d *DB) run(ctx context.Context, tx *sql.Tx, s statement, events [][]any) (total int, err error) {
	for some := range slices.Chunk(events, d.Rows) {
		n, err := d.exec(ctx, tx, s.forRows(len(some)), slices.Concat(some...)...)
		if err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

// Apply implements store.Store.
func (d *DB) Apply(ctx context.Context, b *store.Batch) error {
	return d.InTx(ctx, func(tx *sql.Tx) error {
		if err := d.once(ctx, tx, b.Add); err != nil {
			return err
		}
		added := eventRows(b)
		delivered, others := finishRows(b)
		done := make(map[statement]int)
		for _, step := range []struct {
			statement
			rows [][]any
		}{
			{addEvents, added},
			{addHistory, historyRows(b.History)},
			{insert(b.Copied.Table), b.Copied.Rows},
			{deliverEvents, delivered},
			{keepEvents, others},
		} {
			n, err := d.run(ctx, tx, step.statement, step.rows)
			if err != nil {
				return err
			}
			if step.statement == addEvents && n < len(added) {
				if err := d.checkAdded(ctx, tx, added); err != nil {
					return err
				}
			}
			done[step.statement] = n
		}
		b.Left = nil
		if done[deliverEvents]+done[keepEvents] < len(b.Finish) && d.Skip != "" {
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
}

// checkAdded returns an error if one of the added events is not in the database. Usually, an earlier
// transaction has added the event, and its caller did not get the answer.
func (d *DB) checkAdded(ctx context.Context, tx *sql.Tx, added [][]any) error {
	ids := make([]string, len(added))
	for i, row := range added {
		ids[i] = row[0].(string)
	}
	c, found := new(condition), 0
	c.ids(ids)
	err := d.each(ctx, tx, []any{&found}, nil, `SELECT count(*) FROM {schema}inkit_queue_events WHERE `+c.String(), c.args...)
	if err == nil && found < len(ids) {
		err = errors.New("the database has not added all events: remove the trigger or rule that prevents this")
	}
	return err
}

// plain returns a text that every database accepts: UTF-8 without NUL. A batch with any other text
// would fail at each try.
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

// eventRows returns the arguments of addEvents. It leaves out duplicates.
func eventRows(b *store.Batch) (rows [][]any) {
	for _, r := range b.Add {
		if r.First != "" {
			continue
		}
		var lease, owner any
		if r.Lease > 0 {
			lease, owner = r.Lease.Milliseconds(), b.Owner
		}
		rows = append(rows, []any{
			r.ID, r.Queue, r.Received.UnixMilli(), r.Lease.Milliseconds(), lease, owner,
			r.Attempts, plain(r.LastError), label(r.EventType), label(r.ResourceID), r.Request, r.Checksum,
		})
	}
	return rows
}

// finishRows returns the arguments of deliverEvents for the delivered events, and the arguments of
// keepEvents for the other events.
func finishRows(b *store.Batch) (delivered, others [][]any) {
	for _, f := range b.Finish {
		state, uncounted := store.Pending, 0
		switch f.Outcome {
		case store.Delivered:
			delivered = append(delivered, []any{f.ID})
			continue
		case store.SetAside:
			state = store.Dead
		case store.Unbegun:
			uncounted = 1
		case store.Later:
		}
		others = append(others, []any{f.ID, state, f.After.Milliseconds(), plain(f.LastError), uncounted, b.Owner})
	}
	return delivered, others
}

// left sets b.Left to the finishes that Apply could not write because another transaction has locked
// their rows. left takes a finish if its event still exists and one of these is true: the Outcome
// is Delivered, or b.Owner still has the lease.
func (d *DB) left(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	for some := range slices.Chunk(b.Finish, d.Rows) {
		finishes, c := make(map[string]store.Finish), new(condition)
		for _, f := range some {
			finishes[f.ID] = f
		}
		c.ids(slices.Collect(maps.Keys(finishes)))
		var id, owner string
		err := d.each(ctx, tx, []any{&id, &owner}, func() {
			if f := finishes[id]; owner == b.Owner || f.Outcome == store.Delivered {
				b.Left = append(b.Left, f)
			}
		}, `SELECT id, COALESCE(owner, '') FROM {schema}inkit_queue_events WHERE `+c.String(), c.args...)
		if err != nil {
			return err
		}
	}
	return nil
}
