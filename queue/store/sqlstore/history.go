package sqlstore

import (
	"context"
	"fmt"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// tidyStep is the maximum number of rows that one statement of Tidy deletes.
const tidyStep = 500

// historyRows returns the rows of the history for delivered events.
func historyRows(history []*store.Record) (rows [][]any) {
	for _, r := range history {
		rows = append(rows, []any{r.ID, r.Queue, label(r.EventType), label(r.ResourceID), r.Received.UnixMilli(), r.Finished.UnixMilli(), r.Attempts, r.Status})
	}
	return rows
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
