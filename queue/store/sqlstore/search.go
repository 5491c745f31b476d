package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// searchStep is how many rows one statement reads. After searchTime, a search stops and
	// returns its position.
	searchStep = 5000
	searchTime = 200 * time.Millisecond

	// idMargin is the largest difference between the time in an id and the event's time.
	idMargin = time.Second
)

// condition is the WHERE condition of a statement, and its arguments.
type condition struct {
	parts []string
	args  []any
}

// add adds a part. It replaces each %d by the number of an argument.
func (c *condition) add(part string, args ...any) {
	numbers := make([]any, len(args))
	for i, arg := range args {
		c.args = append(c.args, arg)
		numbers[i] = len(c.args)
	}
	c.parts = append(c.parts, fmt.Sprintf(part, numbers...))
}

func (c *condition) String() string { return strings.Join(append(c.parts, "TRUE"), " AND ") }

// in adds the condition that a column has one of the values. Without values, no row matches.
func (c *condition) in(column string, values []string) {
	args := make([]any, len(values))
	for i, value := range values {
		args[i] = value
	}
	c.add(column+" IN (NULL"+strings.Repeat(", $%d", len(values))+")", args...)
}

// idAt returns the smallest id with a time.
func idAt(t time.Time) string {
	var id uuid.UUID
	ms := max(0, t.UnixMilli())
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	return id.String()
}

// position adds the bounds of ids: the times of a filter, because ids have an index, the
// position of the filter, and the end of a step unless it is empty.
func (c *condition) position(f store.Filter, end string) {
	if !f.Since.IsZero() {
		c.add("id >= $%d", idAt(f.Since.Add(-idMargin)))
	}
	if !f.Until.IsZero() {
		c.add("id < $%d", idAt(f.Until.Add(idMargin)))
	}
	after, until := "id > $%d", "id <= $%d"
	if f.Newest {
		after, until = "id < $%d", "id >= $%d"
	}
	if f.After != "" {
		c.add(after, f.After)
	}
	if end != "" {
		c.add(until, end)
	}
}

// order returns the ORDER BY of a search.
func order(f store.Filter) string {
	if f.Newest {
		return " ORDER BY id DESC"
	}
	return " ORDER BY id"
}

// where returns the condition of a filter in a table. state is the part for the filter's states.
func where(f store.Filter, state, end string) *condition {
	c := new(condition)
	c.add(state)
	if f.Queue != "" && f.Due {
		c.add("queue = $%d", f.Queue)
	} else if f.Queue != "" {
		c.add("queue || '' = $%d", f.Queue) // avoids an index of queues: the database must read the rows in the order of their ids
	}
	if f.Due {
		c.add("state = 'pending' AND due <= {now}")
	}
	if f.Type != "" {
		c.add("event_type = $%d", label(f.Type))
	}
	if f.Resource != "" {
		c.add("resource_id = $%d AND resource_id <> ''", label(f.Resource))
	}
	if f.Error != "" {
		c.add(`lower(last_error) LIKE lower($%d) ESCAPE '\'`, "%"+likeEscape.Replace(f.Error)+"%")
	}
	if !f.Since.IsZero() {
		c.add("received >= $%d", f.Since.UnixMilli())
	}
	if !f.Until.IsZero() {
		c.add("received < $%d", f.Until.UnixMilli())
	}
	c.position(f, end)
	if f.IDs != nil {
		c.in("id", f.IDs)
	}
	return c
}

var likeEscape = strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`)

const (
	events  = "inkit_queue_events"
	history = "inkit_queue_history"

	isDead = "state = 'dead'" // the condition of an index
)

// tables returns the tables that a filter searches, each with the condition for the states.
func tables(f store.Filter) map[string]string {
	found := make(map[string]string)
	pending := f.States == nil || slices.Contains(f.States, store.Pending)
	dead := f.States == nil || slices.Contains(f.States, store.Dead)
	switch {
	case pending && dead:
		found[events] = "TRUE"
	case pending:
		found[events] = "state || '' = 'pending'"
	case dead:
		found[events] = isDead
	}
	if slices.Contains(f.States, store.History) && f.Error == "" && !f.Due {
		found[history] = "TRUE"
	}
	return found
}

// Search implements store.Store.
func (d *DB) Search(ctx context.Context, f store.Filter, withRequest bool) (store.Page, error) {
	if f.Limit <= 0 || f.Limit > store.MaxPage {
		f.Limit = store.MaxPage
	}
	searched := tables(f)
	var parts []store.Page
	for table, state := range searched {
		part, err := d.searchTable(ctx, table, state, f, withRequest, searchTime/time.Duration(len(searched)))
		if err != nil {
			return store.Page{}, d.Wrap(err)
		}
		parts = append(parts, part)
	}
	return store.Merge(f, parts...), nil
}

// searchTable searches one table. If no index fits the filter, it reads searchStep rows at a
// time, until it has enough records or reaches the time limit.
func (d *DB) searchTable(ctx context.Context, table, state string, f store.Filter, withRequest bool, limit time.Duration) (page store.Page, err error) {
	began := time.Now()
	indexed := f.IDs != nil || f.Resource != "" || f.Due || // or every row matches
		f.Queue == "" && f.Type == "" && f.Error == "" && (state == "TRUE" || state == isDead)
	for {
		end := ""
		if !indexed {
			if end, err = d.stepEnd(ctx, table, state, f); err != nil {
				return page, err
			}
		}
		found, err := d.searchRows(ctx, table, state, f, end, withRequest)
		if err != nil {
			return page, err
		}
		page.Records = append(page.Records, found...)
		switch {
		case len(found) == f.Limit:
			page.Next = found[len(found)-1].ID
			return page, nil
		case end == "":
			return page, nil
		case time.Since(began) > limit:
			page.Next = end
			return page, nil
		}
		f.After, f.Limit = end, f.Limit-len(found)
	}
}

// stepEnd returns the id of the last row that the next statement reads, or "" if the
// statement reads all remaining rows.
func (d *DB) stepEnd(ctx context.Context, table, state string, f store.Filter) (id string, err error) {
	c := new(condition)
	c.position(f, "")
	if state == isDead {
		c.add(state)
	}
	err = d.Read.QueryRowContext(ctx, d.text(`SELECT id FROM {schema}`+table+` WHERE `+c.String()+
		order(f)+fmt.Sprintf(` LIMIT 1 OFFSET %d`, searchStep-1)), c.args...).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return id, err
}

const (
	eventColumns   = `id, queue, state, received, queued, due, lease, attempts, last_error, event_type, resource_id, 0, 0, `
	historyColumns = `id, queue, 'delivered', received, 0, 0, NULL, attempts, '', event_type, resource_id, finished, status, `
)

// searchRows returns the rows that a filter selects, up to the id end.
func (d *DB) searchRows(ctx context.Context, table, state string, f store.Filter, end string, withRequest bool) (found []*store.Record, err error) {
	c := where(f, state, end)
	columns := eventColumns
	if table == history {
		columns = historyColumns
	}
	if withRequest && table == events {
		columns += "request, checksum"
	} else {
		columns += "NULL, NULL"
	}
	var r store.Record
	var received, queued, due, finished int64
	var lease sql.NullInt64
	err = d.each(ctx, d.Read, []any{
		&r.ID, &r.Queue, &r.State, &received, &queued, &due, &lease, &r.Attempts, &r.LastError,
		&r.EventType, &r.ResourceID, &finished, &r.Status, &r.Request, &r.Checksum,
	}, func() {
		one := r
		one.Received = time.UnixMilli(received)
		if r.State == store.History {
			one.Finished = time.UnixMilli(finished)
		} else {
			one.Queued, one.Due = time.UnixMilli(queued), time.UnixMilli(due)
		}
		if lease.Valid {
			one.LeasedUntil = time.UnixMilli(lease.Int64)
		}
		found = append(found, &one)
	}, `SELECT `+columns+` FROM {schema}`+table+` WHERE `+c.String()+order(f)+fmt.Sprint(` LIMIT `, f.Limit), c.args...)
	return found, err
}

// Retry implements store.Store.
func (d *DB) Retry(ctx context.Context, f store.Filter) (n int, err error) {
	state, ok := tables(f)[events]
	if !ok {
		return 0, nil
	}
	c := where(f, state, "")
	err = d.InTx(ctx, func(tx *sql.Tx) (err error) {
		n, err = d.exec(ctx, tx, `
			UPDATE {schema}inkit_queue_events SET state = 'pending', queued = {now}, due = {now}, lease = NULL, owner = NULL
			WHERE `+c.String()+` AND (lease IS NULL OR lease <= {now})`, c.args...)
		return err
	})
	return n, err
}

// Drop implements store.Store.
func (d *DB) Drop(ctx context.Context, f store.Filter) (n int, err error) {
	err = d.InTx(ctx, func(tx *sql.Tx) (err error) {
		for table, state := range tables(f) {
			c := where(f, state, "")
			if _, err := d.exec(ctx, tx, `
				DELETE FROM {schema}inkit_queue_once WHERE id IN (SELECT id FROM {schema}`+table+` WHERE `+c.String()+`)`, c.args...); err != nil {
				return err
			}
			dropped, err := d.exec(ctx, tx, `DELETE FROM {schema}`+table+` WHERE `+c.String(), c.args...)
			if err != nil {
				return err
			}
			n += dropped
		}
		if f.IDs == nil || n > 0 || !slices.Contains(f.States, store.History) {
			return nil
		}
		c := new(condition) // a key may stay longer than its event's history
		c.in("id", f.IDs)
		n, err = d.exec(ctx, tx, `DELETE FROM {schema}inkit_queue_once WHERE `+c.String()+
			` AND NOT EXISTS (SELECT 1 FROM {schema}inkit_queue_events AS e WHERE e.id = inkit_queue_once.id)`, c.args...)
		return err
	})
	return n, err
}
