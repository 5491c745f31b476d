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

// tidyStep is the maximum number of rows that one statement of Tidy deletes.
const tidyStep = 500

// columns has the columns of each table that store.Copy copies.
var columns = map[string]string{
	"events":  "id, queue, state, received, queued, due, lease, owner, attempts, last_error, event_type, resource_id, request, checksum",
	"history": "id, queue, event_type, resource_id, received, finished, attempts, status",
	"once":    "queue, digest, id, expires, duplicates",
	"paused":  "queue, since",
}

// ReadRows implements store.Store.
func (d *DB) ReadRows(ctx context.Context, after store.Rows, idle bool) (store.Rows, error) {
	page, all, c := store.Rows{Table: after.Table}, strings.Split(columns[after.Table], ", "), new(condition)
	key := max(0, slices.Index(all, "id")) // a queue has one row in paused
	if n := len(after.Rows); n > 0 {
		c.add(all[key]+" > ?", after.Rows[n-1][key])
	}
	if idle && page.Table == "events" {
		c.add("(lease IS NULL OR lease <= {now})")
	}
	row, dest := make([]any, len(all)), make([]any, len(all))
	for i := range row {
		dest[i] = &row[i]
	}
	err := d.read(ctx, dest, func() { page.Rows = append(page.Rows, slices.Clone(row)) },
		`SELECT `+columns[page.Table]+` FROM {schema}inkit_queue_`+page.Table+` WHERE `+c.String()+
			` ORDER BY `+all[key]+fmt.Sprint(` LIMIT `, store.MaxPage), c.args...)
	return page, err
}

// historyRows returns the rows of the history for delivered events.
func historyRows(history []*store.Record) (rows [][]any) {
	for _, r := range history {
		rows = append(rows, []any{r.ID, r.Queue, label(r.EventType), label(r.ResourceID), r.Received.UnixMilli(), r.Finished.UnixMilli(), r.Attempts, r.Status})
	}
	return rows
}

// once writes the keys of new events. If a key already exists, its event is a duplicate of
// the first event.
func (d *DB) once(ctx context.Context, tx *sql.Tx, added []*store.Record) (err error) {
	var keys []any
	for _, r := range added {
		if r.Digest != nil {
			keys = append(keys, r.Queue, r.Digest, r.ID, r.Remember.Milliseconds())
		}
	}
	firsts := make(map[string]string) // ids by queue and digest
	if keys != nil {
		var queue, digest, id string
		err = d.each(ctx, tx, []any{&queue, &digest, &id}, func() { firsts[queue+"\x00"+digest] = id }, addKeys.forRows(len(keys)/4), keys...)
	}
	for _, r := range added {
		r.First = firsts[r.Queue+"\x00"+string(r.Digest)]
		if r.First == r.ID {
			r.First = ""
		}
	}
	return err
}

// keyOver is the condition for a key that no longer counts: it has expired, and its event is gone.
const keyOver = `o.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = o.id)`

// addKeys sorts the keys, so that two transactions cannot deadlock.
var addKeys = statement{
	`(?, CAST(? AS {bytes}), ?, CAST(? AS BIGINT))`,
	`INSERT INTO {schema}inkit_queue_once AS o (queue, digest, id, expires, duplicates)
	SELECT column1, column2, min(column3), {now} + max(column4), count(*) - 1 FROM (VALUES {rows}) AS v
	GROUP BY column1, column2 ORDER BY column1, column2
	ON CONFLICT (queue, digest) DO UPDATE SET
		id = CASE WHEN ` + keyOver + ` THEN excluded.id ELSE o.id END,
		expires = CASE WHEN ` + keyOver + ` THEN excluded.expires ELSE o.expires END,
		duplicates = CASE WHEN ` + keyOver + ` THEN excluded.duplicates WHEN o.id = excluded.id THEN o.duplicates ELSE o.duplicates + 1 + excluded.duplicates END
	RETURNING queue, digest, id`,
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

// Tidy implements store.Store. It deletes a few rows at a time, so that no event waits long.
func (d *DB) Tidy(ctx context.Context, keep []store.Keep) (damagedFiles int, err error) {
	for _, k := range keep {
		var over int64
		err := d.read(ctx, []any{&over}, nil, `SELECT finished FROM {schema}inkit_queue_history WHERE queue = ?
			ORDER BY finished DESC LIMIT 1 OFFSET ?`, k.Queue, k.Rows)
		if err != nil {
			return 0, err
		}
		until := max(over, time.Now().Add(-k.For).UnixMilli())
		if err := d.deleteAll(ctx, `DELETE FROM {schema}inkit_queue_history WHERE id IN (SELECT e.id FROM {schema}inkit_queue_history AS e
			WHERE e.queue = ? AND e.finished <= ? ORDER BY e.finished`, k.Queue, until); err != nil {
			return 0, err
		}
	}
	return 0, d.deleteAll(ctx, `DELETE FROM {schema}inkit_queue_once WHERE (queue, digest) IN (SELECT e.queue, e.digest FROM {schema}inkit_queue_once AS e
		WHERE e.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = e.id)`)
}

// deleteAll repeats a DELETE until it deletes fewer than tidyStep rows.
func (d *DB) deleteAll(ctx context.Context, query string, args ...any) error {
	for n := tidyStep; n == tidyStep; {
		var err error
		if n, err = d.change(ctx, query+fmt.Sprint(` LIMIT `, tidyStep, ` {skip})`), args...); err != nil {
			return err
		}
	}
	return nil
}
