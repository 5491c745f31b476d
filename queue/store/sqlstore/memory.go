package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// tidyStep is how many rows one statement of Tidy deletes, and keysPage is how many
// keys are read at a time.
const (
	tidyStep = 500
	keysPage = 500
)

// once writes the keys of new events, and returns the events to store. An event whose key
// exists already is a duplicate of the first event.
func (d *DB) once(ctx context.Context, tx *sql.Tx, added []*store.Record) (first []*store.Record, err error) {
	firsts := make(map[string]*store.Record) // of this batch, by queue and digest
	more := make(map[*store.Record]int)      // the number of duplicates in this batch
	var keyed []*store.Record
	for _, r := range added {
		r.First = ""
		key := r.Queue + "\x00" + string(r.Digest)
		switch first := firsts[key]; {
		case r.Digest == nil:
		case first != nil:
			more[first]++
		default:
			firsts[key] = r
			keyed = append(keyed, r)
		}
	}
	if len(keyed) == 0 {
		return added, nil
	}
	slices.SortFunc(keyed, func(a, b *store.Record) int { // two transactions must not wait for each other
		return cmp.Or(cmp.Compare(a.Queue, b.Queue), bytes.Compare(a.Digest, b.Digest))
	})
	for some := range slices.Chunk(keyed, d.Rows) {
		if err := d.onceSome(ctx, tx, some, firsts, more); err != nil {
			return nil, err
		}
	}
	for _, r := range added {
		if f := firsts[r.Queue+"\x00"+string(r.Digest)]; r.Digest != nil && f != r {
			r.First = cmp.Or(f.First, f.ID)
		}
		if r.First == "" {
			first = append(first, r)
		}
	}
	return first, nil
}

// keyOver says that a key counts no longer: its time is over, and its event has gone.
const keyOver = `o.expires <= {now} AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS v WHERE v.id = o.id)`

func (d *DB) onceSome(ctx context.Context, tx *sql.Tx, some []*store.Record, firsts map[string]*store.Record, more map[*store.Record]int) error {
	args := make([]any, 0, 5*len(some))
	for _, r := range some {
		args = append(args, r.Queue, r.Digest, r.ID, r.Remember.Milliseconds(), more[r])
	}
	rows, err := tx.QueryContext(ctx, d.text(`
		INSERT INTO {schema}inkit_queue_once AS o (queue, digest, id, expires, duplicates) VALUES `+
		values(len(some), `(?, ?, ?, {now} + CAST(? AS BIGINT), CAST(? AS INTEGER))`)+`
		ON CONFLICT (queue, digest) DO UPDATE SET
			id = CASE WHEN `+keyOver+` THEN excluded.id ELSE o.id END,
			expires = CASE WHEN `+keyOver+` THEN excluded.expires ELSE o.expires END,
			duplicates = CASE WHEN `+keyOver+` THEN excluded.duplicates WHEN o.id = excluded.id THEN o.duplicates ELSE o.duplicates + 1 + excluded.duplicates END
		RETURNING queue, digest, id`), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var queue, id string
		var digest []byte
		if err := rows.Scan(&queue, &digest, &id); err != nil {
			return err
		}
		if r := firsts[queue+"\x00"+string(digest)]; r != nil && r.ID != id {
			r.First = id
		}
	}
	return rows.Err()
}

// remember writes rows of the history, and copied keys.
func (d *DB) remember(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	if err := d.addHistory(ctx, tx, b.History); err != nil {
		return err
	}
	for some := range slices.Chunk(b.Keys, d.Rows) {
		args := make([]any, 0, 5*len(some))
		for _, k := range some {
			args = append(args, k.Queue, k.Digest, k.ID, k.Expires.UnixMilli(), k.Duplicates)
		}
		if _, err := d.exec(ctx, tx, `INSERT INTO {schema}inkit_queue_once (queue, digest, id, expires, duplicates) VALUES `+
			d.rows(len(some), `(?, ?, ?, ?, ?)`)+` ON CONFLICT (queue, digest) DO NOTHING`, args...); err != nil {
			return err
		}
	}
	return nil
}

// addHistory writes rows of the history. It prepares a statement once, since parsing takes
// as long as running.
func (d *DB) addHistory(ctx context.Context, tx *sql.Tx, history []*store.Record) error {
	var prepared *sql.Stmt
	size := 2 * d.Rows
	for some := range slices.Chunk(history, size) {
		args := make([]any, 0, 8*len(some))
		for _, r := range some {
			args = append(args, r.ID, r.Queue, label(r.EventType), label(r.ResourceID), r.Received.UnixMilli(), r.Finished.UnixMilli(), r.Attempts, r.Status)
		}
		query := d.text(`
			INSERT INTO {schema}inkit_queue_history (id, queue, event_type, resource_id, received, finished, attempts, status) VALUES ` +
			d.rows(len(some), `(?, ?, ?, ?, ?, ?, ?, ?)`) + ` ON CONFLICT (id) DO NOTHING`)
		var err error
		switch {
		case !d.Plain || len(some) < size:
			_, err = tx.ExecContext(ctx, query, args...)
		case prepared == nil:
			if prepared, err = tx.PrepareContext(ctx, query); err != nil { //nolint:sqlclosecheck // it ends with the transaction
				return err
			}
			defer prepared.Close()
			fallthrough
		default:
			_, err = prepared.ExecContext(ctx, args...)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Keys is of store.Store.
func (d *DB) Keys(ctx context.Context, after store.Key) (keys []store.Key, err error) {
	if after.Digest == nil {
		after.Digest = []byte{} // not NULL
	}
	rows, err := d.Read.QueryContext(ctx, d.text(`
		SELECT queue, digest, id, expires, duplicates FROM {schema}inkit_queue_once
		WHERE (queue, digest) > ($1, $2) ORDER BY queue, digest`+fmt.Sprint(` LIMIT `, keysPage)), after.Queue, after.Digest)
	if err != nil {
		return nil, d.Wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		var k store.Key
		var expires int64
		if err := rows.Scan(&k.Queue, &k.Digest, &k.ID, &expires, &k.Duplicates); err != nil {
			return nil, d.Wrap(err)
		}
		k.Expires = time.UnixMilli(expires)
		keys = append(keys, k)
	}
	return keys, d.Wrap(rows.Err())
}

// Pause is of store.Store.
func (d *DB) Pause(ctx context.Context, queue string, paused bool) (changed bool, err error) {
	query := `DELETE FROM {schema}inkit_queue_paused WHERE queue = $1`
	if paused {
		query = `INSERT INTO {schema}inkit_queue_paused (queue, since) VALUES ($1, {now}) ON CONFLICT (queue) DO NOTHING`
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		n, err := d.exec(ctx, tx, query, queue)
		changed = n > 0
		return err
	})
	return changed, err
}

// Tidy is of store.Store. It deletes a few rows at a time, so that no event waits long.
func (d *DB) Tidy(ctx context.Context, keep []store.Keep) (u store.Upkeep, err error) {
	for _, k := range keep {
		var over, now int64
		if err := d.Read.QueryRowContext(ctx, d.text(`SELECT {now}`)).Scan(&now); err != nil {
			return u, d.Wrap(err)
		}
		until := now - k.For.Milliseconds()
		if k.Rows > 0 {
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

// deleteAll repeats a statement that deletes, a step at a time.
func (d *DB) deleteAll(ctx context.Context, query string, args ...any) error {
	for n := tidyStep; n == tidyStep; {
		err := d.inTx(ctx, func(tx *sql.Tx) (err error) {
			n, err = d.exec(ctx, tx, query+fmt.Sprintf(` LIMIT %d {skip})`, tidyStep), args...)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
