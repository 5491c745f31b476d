package sqlstore

import (
	"context"
	"database/sql"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// The method `once` writes the keys of the new events that have a digest. If a key already exists,
// the new event is a duplicate, and its field `First` gets the id of the earlier event.
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

// keyOver is the condition for a key that a new event may replace: the key has expired, and its
// event is no longer stored.
const keyOver = `o.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = o.id)`

// addKeys adds the keys in sorted order, so that two transactions cannot deadlock.
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
