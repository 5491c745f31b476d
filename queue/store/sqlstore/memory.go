package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// tidyStep is the maximum number of rows that one statement of Tidy deletes.
const tidyStep = 500

// columns has the columns of each table that store.Copy copies. The primary key comes first.
var columns = map[string][]string{
	"events":  {"id", "queue", "state", "received", "queued", "due", "lease", "owner", "attempts", "last_error", "event_type", "resource_id", "request", "checksum"},
	"history": {"id", "queue", "event_type", "resource_id", "received", "finished", "attempts", "status"},
	"once":    {"queue", "digest", "id", "expires", "duplicates"},
	"paused":  {"queue", "since"},
}

// insert returns a statement that adds whole rows to a table.
func insert(table string) statement {
	all := columns[table]
	return statement{
		`(` + strings.Repeat("?, ", max(1, len(all))-1) + `?)`,
		`INSERT INTO {schema}inkit_queue_` + table + ` (` + strings.Join(all, ", ") + `) VALUES {rows} ON CONFLICT DO NOTHING`,
	}
}

// ReadRows implements store.Store.
func (d *DB) ReadRows(ctx context.Context, after store.Rows, idle bool) (store.Rows, error) {
	page, all, key, c := store.Rows{Table: after.Table}, columns[after.Table], 1, new(condition)
	if page.Table == "once" {
		key = 2
	}
	order := strings.Join(all[:key], ", ")
	if n := len(after.Rows); n > 0 {
		c.add("("+order+") > ($%d"+strings.Repeat(", $%d", key-1)+")", after.Rows[n-1][:key]...)
	}
	if idle && page.Table == "events" {
		c.add("(lease IS NULL OR lease <= {now})")
	}
	row, dest := make([]any, len(all)), make([]any, len(all))
	for i := range row {
		dest[i] = &row[i]
	}
	err := d.each(ctx, d.Read, dest, func() { page.Rows = append(page.Rows, slices.Clone(row)) },
		`SELECT `+strings.Join(all, ", ")+` FROM {schema}inkit_queue_`+page.Table+` WHERE `+c.String()+
			` ORDER BY `+order+fmt.Sprint(` LIMIT `, store.MaxPage), c.args...)
	return page, d.Wrap(err)
}

// historyRows returns the rows of the history for delivered events.
func historyRows(history []*store.Record) (rows [][]any) {
	for _, r := range history {
		rows = append(rows, []any{r.ID, r.Queue, label(r.EventType), label(r.ResourceID), r.Received.UnixMilli(), r.Finished.UnixMilli(), r.Attempts, r.Status})
	}
	return rows
}

// once writes the keys of new events, and returns the events to store. If a key
// already exists, its event is a duplicate of the first event.
func (d *DB) once(ctx context.Context, tx *sql.Tx, added []*store.Record) ([]*store.Record, error) {
	same := make(map[string][]*store.Record) // events of this batch by queue and digest
	for _, r := range added {
		r.First = ""
		if r.Digest != nil {
			key := r.Queue + "\x00" + string(r.Digest)
			same[key] = append(same[key], r)
		}
	}
	rows := make([][]any, 0, len(same))
	for _, key := range slices.Sorted(maps.Keys(same)) { // sorted, so that two transactions cannot deadlock
		r := same[key][0]
		rows = append(rows, []any{r.Queue, r.Digest, r.ID, r.Remember.Milliseconds(), len(same[key]) - 1})
	}
	var queue, digest, id string
	for some := range slices.Chunk(rows, d.Rows) {
		err := d.each(ctx, tx, []any{&queue, &digest, &id}, func() {
			for _, r := range same[queue+"\x00"+digest] {
				if r.ID != id {
					r.First = id
				}
			}
		}, d.query(addKeys, len(some)), slices.Concat(some...)...)
		if err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(slices.Clone(added), func(r *store.Record) bool { return r.First != "" }), nil
}

// keyOver is the condition for a key that no longer counts: it has expired, and its event is gone.
const keyOver = `o.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = o.id)`

var addKeys = statement{
	`(?, ?, ?, {now} + CAST(? AS BIGINT), CAST(? AS INTEGER))`,
	`INSERT INTO {schema}inkit_queue_once AS o (queue, digest, id, expires, duplicates) VALUES {rows}
	ON CONFLICT (queue, digest) DO UPDATE SET
		id = CASE WHEN ` + keyOver + ` THEN excluded.id ELSE o.id END,
		expires = CASE WHEN ` + keyOver + ` THEN excluded.expires ELSE o.expires END,
		duplicates = CASE WHEN ` + keyOver + ` THEN excluded.duplicates WHEN o.id = excluded.id THEN o.duplicates ELSE o.duplicates + 1 + excluded.duplicates END
	RETURNING queue, digest, id`,
}

// Pause implements store.Store.
func (d *DB) Pause(ctx context.Context, queue string, paused bool) (changed bool, err error) {
	query := `DELETE FROM {schema}inkit_queue_paused WHERE queue = $1`
	if paused {
		query = `INSERT INTO {schema}inkit_queue_paused (queue, since) VALUES ($1, {now}) ON CONFLICT (queue) DO NOTHING`
	}
	err = d.InTx(ctx, func(tx *sql.Tx) error {
		n, err := d.exec(ctx, tx, query, queue)
		changed = n > 0
		return err
	})
	return changed, err
}

// Tidy implements store.Store. It deletes a few rows at a time, so that no event waits long.
func (d *DB) Tidy(ctx context.Context, keep []store.Keep) (u store.Upkeep, err error) {
	for _, k := range keep {
		until := time.Now().Add(-k.For).UnixMilli()
		if k.Rows > 0 {
			var over int64
			err := d.Read.QueryRowContext(ctx, d.text(`SELECT finished FROM {schema}inkit_queue_history WHERE queue = $1
				ORDER BY finished DESC LIMIT 1 OFFSET `+fmt.Sprint(k.Rows)), k.Queue).Scan(&over)
			if err != nil && !errors.Is(err, sql.ErrNoRows) {
				return u, d.Wrap(err)
			}
			until = max(until, over)
		}
		if err := d.deleteAll(ctx, `DELETE FROM {schema}inkit_queue_history WHERE id IN (SELECT e.id FROM {schema}inkit_queue_history AS e
			WHERE e.queue = $1 AND e.finished <= $2 ORDER BY e.finished`, k.Queue, until); err != nil {
			return u, d.Wrap(err)
		}
	}
	return u, d.Wrap(d.deleteAll(ctx, `DELETE FROM {schema}inkit_queue_once WHERE (queue, digest) IN (SELECT e.queue, e.digest FROM {schema}inkit_queue_once AS e
		WHERE e.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = e.id)`))
}

// deleteAll repeats a DELETE until it deletes fewer than tidyStep rows.
func (d *DB) deleteAll(ctx context.Context, query string, args ...any) error {
	for n := tidyStep; n == tidyStep; {
		err := d.InTx(ctx, func(tx *sql.Tx) (err error) {
			n, err = d.exec(ctx, tx, query+fmt.Sprintf(` LIMIT %d {skip})`, tidyStep), args...)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
