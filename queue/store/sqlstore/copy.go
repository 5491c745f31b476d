package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

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
	key := max(0, slices.Index(all, "id")) // the table paused has no column id: its key is the first column, queue
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
