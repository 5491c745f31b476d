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

const (
	// searchStep is how many rows one statement reads. After searchTime, the search of a table
	// stops and returns its position.
	searchStep = 5000
	searchTime = 200 * time.Millisecond

	events  = "inkit_queue_events"
	history = "inkit_queue_history"
)

// condition is the WHERE condition of a statement, and its arguments.
type condition struct {
	parts []string
	args  []any
}

func (c *condition) add(part string, args ...any) {
	c.parts, c.args = append(c.parts, part), append(c.args, args...)
}

// when adds a part to the condition, but only if the argument `used` is true.
func (c *condition) when(used bool, part string, arg any) {
	if used {
		c.add(part, arg)
	}
}

func (c *condition) String() string { return strings.Join(append(c.parts, "TRUE"), " AND ") }

// ids adds the condition that the column id has one of these values. Without a value, no row matches.
func (c *condition) ids(ids []string) {
	c.add("id IN (NULL" + strings.Repeat(", ?", len(ids)) + ")")
	for _, id := range ids {
		c.args = append(c.args, id)
	}
}

// idAt returns the text with which all ids of a time begin. An id is a UUID of version 7, and
// begins with its time in milliseconds.
func idAt(t time.Time) string {
	ms := fmt.Sprintf("%012x", max(0, t.UnixMilli()))
	return ms[:8] + "-" + ms[8:]
}

// has reports whether a filter selects events in a state.
func has(f store.Filter, state string) bool {
	return f.States == nil && state != store.History || slices.Contains(f.States, state)
}

// tables returns the tables that a filter searches.
func tables(f store.Filter) (found []string) {
	if has(f, store.Pending) || has(f, store.Dead) {
		found = append(found, events)
	}
	if has(f, store.History) && f.Error == "" {
		found = append(found, history)
	}
	return found
}

// conditions returns the condition of a filter in two parts. A row fits if both parts are true.
// An index finds the rows of `bounds` in the order of their ids. The times of the filter are in
// `bounds` too, because an id begins with the time of its event. In `rest`, concatenations with an
// empty text prevent the use of the index of due times, so that the database reads the rows in the
// order of their ids. If the filter selects neither pending nor dead events, no row of the table
// `events` fits.
func conditions(f store.Filter, table string) (bounds, rest *condition) {
	bounds, rest = new(condition), new(condition)
	if table == events && !has(f, store.Pending) {
		bounds.add("state = 'dead'")
	}
	bounds.when(!f.Since.IsZero(), "id >= ?", idAt(f.Since))
	bounds.when(!f.Until.IsZero(), "id < ?", idAt(f.Until))
	bounds.when(f.After != "" && f.Newest, "id < ?", f.After)
	bounds.when(f.After != "" && !f.Newest, "id > ?", f.After)
	if table == events && !has(f, store.Dead) {
		rest.add("state || '' = 'pending'")
	}
	rest.when(f.Queue != "", "queue || '' = ?", f.Queue)
	rest.when(f.Type != "", "event_type = ?", label(f.Type))
	rest.when(f.Resource != "", "resource_id = ? AND resource_id <> ''", label(f.Resource))
	rest.when(f.Error != "", "replace(lower(last_error), lower(?), '') <> lower(last_error)", f.Error) // LIKE has wildcards
	if f.IDs != nil {
		rest.ids(f.IDs)
	}
	return bounds, rest
}

// both returns one condition from two. It is true if the conditions a and b are true.
func both(a, b *condition) *condition {
	return &condition{slices.Concat(a.parts, b.parts), slices.Concat(a.args, b.args)}
}

// Search implements store.Store.
func (d *DB) Search(ctx context.Context, f store.Filter, withRequest bool) (store.Page, error) {
	if f.Limit <= 0 || f.Limit > store.MaxPage {
		f.Limit = store.MaxPage
	}
	var parts []store.Page
	for _, table := range tables(f) {
		part, err := d.searchTable(ctx, table, f, withRequest)
		if err != nil {
			return store.Page{}, d.Wrap(err)
		}
		parts = append(parts, part)
	}
	return store.Merge(f, parts...), nil
}

// searchTable searches one table. If no index fits the filter, it reads searchStep rows at a
// time, until it has enough records or reaches the time limit.
func (d *DB) searchTable(ctx context.Context, table string, f store.Filter, withRequest bool) (page store.Page, err error) {
	began := time.Now()
	order, until := " ORDER BY id", "id <= ?"
	if f.Newest {
		order, until = " ORDER BY id DESC", "id >= ?"
	}
	for {
		c, rest := conditions(f, table)
		end := ""
		if len(rest.parts) > 0 && f.IDs == nil && f.Resource == "" {
			err := d.each(ctx, d.Read, []any{&end}, nil, `SELECT id FROM {schema}`+table+` WHERE `+c.String()+order+
				fmt.Sprintf(` LIMIT 1 OFFSET %d`, searchStep-1), c.args...)
			if err != nil {
				return page, err
			}
		}
		c.when(end != "", until, end)
		c = both(c, rest)
		found, err := d.records(ctx, d.Read, `SELECT `+recordColumns(table, withRequest)+` FROM {schema}`+table+
			` WHERE `+c.String()+order+fmt.Sprint(` LIMIT `, f.Limit), c.args...)
		if err != nil {
			return page, err
		}
		page.Records, page.Next = append(page.Records, found...), end
		if len(found) == f.Limit {
			page.Next = found[len(found)-1].ID
			return page, nil
		}
		if end == "" || time.Since(began) > searchTime {
			return page, nil
		}
		f.After, f.Limit = end, f.Limit-len(found)
	}
}

// recordColumns returns the columns of a table that the method `records` needs.
func recordColumns(table string, withRequest bool) string {
	columns := `id, queue, state, received, due, {now} - queued, lease, attempts, last_error, event_type, resource_id, NULL, 0`
	if table == history {
		columns = `id, queue, 'delivered', received, NULL, 0, NULL, attempts, '', event_type, resource_id, finished, status`
	}
	if withRequest && table == events {
		return columns + ", request, checksum"
	}
	return columns + ", NULL, NULL"
}

// records runs a statement with the columns of recordColumns, and returns a record for each row.
func (d *DB) records(ctx context.Context, db Querier, query string, args ...any) (found []*store.Record, err error) {
	var r store.Record
	var received, due, lease, finished sql.NullInt64
	var age int64
	err = d.each(ctx, db, []any{
		&r.ID, &r.Queue, &r.State, &received, &due, &age, &lease, &r.Attempts, &r.LastError,
		&r.EventType, &r.ResourceID, &finished, &r.Status, &r.Request, &r.Checksum,
	}, func() {
		one := r
		one.Received, one.Due, one.LeasedUntil, one.Finished = at(received), at(due), at(lease), at(finished)
		one.Age = milliseconds(age)
		found = append(found, &one)
	}, query, args...)
	return found, err
}

// at converts a time from the database. NULL becomes the zero time.
func at(ms sql.NullInt64) time.Time {
	if !ms.Valid {
		return time.Time{}
	}
	return time.UnixMilli(ms.Int64)
}

// milliseconds converts a duration from the database. A negative duration becomes 0, because it
// comes from a wrong clock.
func milliseconds(ms int64) time.Duration { return time.Duration(max(0, ms)) * time.Millisecond }

// Retry implements store.Store.
func (d *DB) Retry(ctx context.Context, f store.Filter) (int, error) {
	c := both(conditions(f, events))
	return d.change(ctx, `
		UPDATE {schema}inkit_queue_events SET state = 'pending', queued = {now}, due = {now}, lease = NULL, owner = NULL
		WHERE `+c.String()+` AND (lease IS NULL OR lease <= {now})`, c.args...)
}

// Drop implements store.Store.
func (d *DB) Drop(ctx context.Context, f store.Filter) (n int, err error) {
	err = d.InTx(ctx, func(tx *sql.Tx) error {
		var id string
		var gone []string
		for _, table := range tables(f) {
			c := both(conditions(f, table))
			err := d.each(ctx, tx, []any{&id}, func() { gone = append(gone, id) },
				`DELETE FROM {schema}`+table+` WHERE `+c.String()+` RETURNING id`, c.args...)
			if err != nil {
				return err
			}
		}
		n = len(gone)
		if n == 0 && has(f, store.History) { // a key may exist longer than the row of its event in the history
			gone = f.IDs
		}
		c := new(condition)
		c.ids(gone)
		keys, err := d.exec(ctx, tx, `DELETE FROM {schema}inkit_queue_once WHERE `+c.String()+
			` AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS e WHERE e.id = inkit_queue_once.id)`, c.args...)
		if n == 0 {
			n = keys
		}
		return err
	})
	return n, err
}
