// Package sqlstore is the SQL that the stores share: one schema, one way of doing each
// thing, and a Dialect for the few places in which databases differ.
package sqlstore

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// version is that of schema.sql.
const version = 1

//go:embed schema.sql
var schema string

// Dialect is what differs between databases. It takes the place of {bytes}, {schema},
// {now} and {skip} in the statements of this package.
type Dialect struct {
	Bytes  string         // the type of bytes
	Schema string         // stands before the names of tables, with its dot
	Rows   int            // how many events one statement adds or finishes
	Now    string         // the clock in milliseconds, the same throughout a statement
	Skip   string         // makes a SELECT pass over locked rows; empty if no row can be locked
	Begin  string         // the first statement of a transaction that writes, if there is one
	Tx     *sql.TxOptions // of such a transaction
	More   string         // what the schema has beyond schema.sql

	// Wrap translates an error of the driver into those of package store.
	Wrap func(error) error
}

// DB is a store on a database that does not heal itself: that is for the packages that
// embed it.
type DB struct {
	Dialect
	Write, Read *sql.DB
}

func (d *DB) text(query string) string {
	for _, part := range [][2]string{{"{bytes}", d.Bytes}, {"{schema}", d.Schema}, {"{now}", d.Now}, {"{skip}", d.Skip}} {
		query = strings.ReplaceAll(query, part[0], part[1]) // a Replacer costs more to make than it saves
	}
	return query
}

// BeginTx begins a transaction that writes.
func (d *DB) BeginTx(ctx context.Context) (*sql.Tx, error) {
	tx, err := d.Write.BeginTx(ctx, d.Tx)
	if err != nil || d.Begin == "" {
		return tx, err
	}
	if _, err = tx.ExecContext(ctx, d.Begin); err != nil {
		_ = tx.Rollback()
		return nil, err
	}
	return tx, nil
}

// SchemaSQL returns the statements that make the schema.
func (d *DB) SchemaSQL() []string {
	var statements []string
	for statement := range strings.SplitSeq(d.text(schema+d.More), ";\n") {
		if statement = strings.TrimSpace(statement); statement != "" {
			statements = append(statements, statement)
		}
	}
	return statements
}

// Migrate makes the schema if it is not there. The caller keeps others from doing the same.
func (d *DB) Migrate(ctx context.Context, tx *sql.Tx, exists bool) error {
	if exists {
		return d.CheckVersion(ctx, tx)
	}
	for _, statement := range d.SchemaSQL() {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// Querier is a database, or a transaction in it.
type Querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// CheckVersion refuses a schema that is not the one of this version.
func (d *DB) CheckVersion(ctx context.Context, db Querier) error {
	var found int
	if err := db.QueryRowContext(ctx, d.text(`SELECT version FROM {schema}inkit_queue_schema`)).Scan(&found); err != nil {
		return err
	}
	switch {
	case found > version:
		return fmt.Errorf("%w: %d, and this one knows %d", store.ErrNewer, found, version)
	case found < version:
		return fmt.Errorf("%w: %d, and this one needs %d", store.ErrOlder, found, version)
	}
	return nil
}

// Apply is of store.Store.
func (d *DB) Apply(ctx context.Context, b *store.Batch) error {
	b.Left = nil
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
	if err := d.add(ctx, tx, b); err != nil {
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

// plain returns a text that every database takes: UTF-8 without NUL. Otherwise one event
// would make the batch that it is in fail each time.
func plain(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// values returns n rows of arguments for VALUES, each like pattern, in which ? stands for
// an argument.
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

func (d *DB) add(ctx context.Context, tx *sql.Tx, b *store.Batch) error {
	for records := range slices.Chunk(b.Add, d.Rows) {
		args := make([]any, 0, 12*len(records))
		for _, r := range records {
			var lease, owner any
			delay := r.Delay
			if r.Lease > 0 {
				lease, owner, delay = r.Lease.Milliseconds(), b.Owner, r.Lease
			}
			args = append(args, r.ID, r.Queue, r.Received.UnixMilli(), delay.Milliseconds(), lease, owner,
				r.Attempts, plain(r.LastError), plain(r.EventType), plain(r.ResourceID), r.Request, r.Checksum)
		}
		_, err := tx.ExecContext(ctx, d.text(`
			INSERT INTO {schema}inkit_queue_events (id, queue, state, received, queued, due, lease, owner,
				attempts, last_error, event_type, resource_id, request, checksum) VALUES `+
			values(len(records), `(?, ?, 'pending', ?, {now}, {now} + CAST(? AS BIGINT), {now} + CAST(? AS BIGINT), ?, ?, ?, ?, ?, ?, ?)`)+`
			ON CONFLICT (id) DO NOTHING`), args...)
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
		// an owner that has lost the lease must not change the event any more
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

// finishRow returns the id, state, delay and error of an event after an attempt, and how
// many attempts are to be taken off.
func finishRow(f store.Finish) []any {
	switch f.Outcome {
	case store.Later:
		return []any{f.ID, store.Pending, f.After.Milliseconds(), plain(f.LastError), 0}
	case store.SetAside:
		return []any{f.ID, store.Dead, int64(0), plain(f.LastError), 0}
	case store.Unbegun:
		return []any{f.ID, store.Pending, int64(0), nil, 1}
	}
	return []any{f.ID, store.Pending, int64(0), nil, 0}
}

// finishSome runs a statement that finishes events, and adds to Left those whose rows are
// locked: they are still there, and condition still holds for them.
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
	// Events that are due later than an honest clock can say are due now.
	_, err := tx.ExecContext(ctx, d.text(`
		UPDATE {schema}inkit_queue_events SET due = {now}, lease = NULL, owner = NULL WHERE id IN (
			SELECT e.id FROM {schema}inkit_queue_events AS e
			WHERE e.queue = $1 AND e.state = 'pending' AND e.due > {now} + CAST($2 AS BIGINT) LIMIT 500 {skip})`),
		claim.Queue, max(store.Latest, claim.Lease).Milliseconds())
	if err != nil {
		return err
	}
	if claim.Newest { // first among the last arrivals: sorting all that are due takes long
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

// Due is of store.Store, for a database with one user.
func (d *DB) Due(ctx context.Context, c *store.Claim, why error) error {
	err := d.Select(ctx, store.Filter{Queue: c.Queue, Due: true, Limit: c.Max}, true, func(r *store.Record) bool {
		r.Attempts++
		r.Age = max(0, time.Since(r.Queued))
		c.Records = append(c.Records, r)
		return true
	})
	if len(c.Records) > 0 {
		return nil
	}
	return errors.Join(why, err)
}

// Peek is of store.Store.
func (d *DB) Peek(ctx context.Context, queue string) (p store.Peek, err error) {
	var first, last sql.NullInt64
	var now int64
	err = d.Read.QueryRowContext(ctx, d.text(`SELECT
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due LIMIT 1),
		(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due DESC LIMIT 1), {now}`), queue).
		Scan(&first, &last, &now)
	if err != nil {
		return p, d.Wrap(err)
	}
	p.Empty = !first.Valid
	p.Wait = time.Duration(max(0, first.Int64-now)) * time.Millisecond
	if last.Int64-now > store.Latest.Milliseconds() {
		p.Wait = 0 // a clock was wrong: the next claim mends it
	}
	return p, nil
}

// Counts is of store.Store.
func (d *DB) Counts(ctx context.Context) (counts []store.Count, err error) {
	rows, err := d.Read.QueryContext(ctx, d.text(`
		SELECT queue, 'pending', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'pending' GROUP BY queue
		UNION ALL
		SELECT queue, 'dead', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'dead' GROUP BY queue`))
	if err != nil {
		return nil, d.Wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		var c store.Count
		var oldest int64
		if err := rows.Scan(&c.Queue, &c.State, &c.Events, &oldest); err != nil {
			return nil, d.Wrap(err)
		}
		c.Oldest = time.Duration(max(0, oldest)) * time.Millisecond
		counts = append(counts, c)
	}
	return counts, d.Wrap(rows.Err())
}

// where returns the condition of a filter, and its arguments.
func where(f store.Filter) (condition string, args []any) {
	conditions := []string{"TRUE"}
	argument := func(format string, arg any) {
		args = append(args, arg)
		conditions = append(conditions, fmt.Sprintf(format, len(args)))
	}
	if f.Queue != "" {
		argument("queue = $%d", f.Queue)
	}
	if f.Dead {
		conditions = append(conditions, "state = 'dead'")
	}
	if f.Due {
		conditions = append(conditions, "state = 'pending' AND due <= {now}")
	}
	if f.After != "" {
		argument("id > $%d", f.After)
	}
	if f.IDs != nil {
		marks := []string{"NULL"} // for no ids at all
		for _, id := range f.IDs {
			args = append(args, id)
			marks = append(marks, fmt.Sprintf("$%d", len(args)))
		}
		conditions = append(conditions, "id IN ("+strings.Join(marks, ", ")+")")
	}
	return strings.Join(conditions, " AND "), args
}

// Select is of store.Store.
func (d *DB) Select(ctx context.Context, filter store.Filter, withRequest bool, f func(*store.Record) bool) error {
	condition, args := where(filter)
	request, limit := "NULL, NULL", ""
	if withRequest {
		request = "request, checksum"
	}
	if filter.Limit > 0 {
		limit = fmt.Sprint(" LIMIT ", filter.Limit)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rows, err := d.Read.QueryContext(ctx, d.text(`
		SELECT id, queue, state, received, queued, due, lease, attempts, last_error, event_type, resource_id, `+request+`
		FROM {schema}inkit_queue_events WHERE `+condition+` ORDER BY id`+limit), args...)
	if err != nil {
		return d.Wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		r := new(store.Record)
		var received, queued, due int64
		var lease sql.NullInt64
		if err := rows.Scan(&r.ID, &r.Queue, &r.State, &received, &queued, &due, &lease, &r.Attempts, &r.LastError,
			&r.EventType, &r.ResourceID, &r.Request, &r.Checksum); err != nil {
			return d.Wrap(err)
		}
		r.Received, r.Queued, r.Due = time.UnixMilli(received), time.UnixMilli(queued), time.UnixMilli(due)
		if lease.Valid {
			r.LeasedUntil = time.UnixMilli(lease.Int64)
		}
		if !f(r) {
			cancel() // otherwise the driver may read the rest
			return nil
		}
	}
	return d.Wrap(rows.Err())
}

// Retry is of store.Store.
func (d *DB) Retry(ctx context.Context, filter store.Filter) (int, error) {
	condition, args := where(filter)
	return d.exec(ctx, `
		UPDATE {schema}inkit_queue_events SET state = 'pending', queued = {now}, due = {now}, lease = NULL, owner = NULL
		WHERE `+condition+` AND (lease IS NULL OR lease <= {now})`, args)
}

// Drop is of store.Store.
func (d *DB) Drop(ctx context.Context, filter store.Filter) (int, error) {
	condition, args := where(filter)
	return d.exec(ctx, `DELETE FROM {schema}inkit_queue_events WHERE `+condition, args)
}

func (d *DB) exec(ctx context.Context, query string, args []any) (int, error) {
	tx, err := d.BeginTx(ctx)
	if err != nil {
		return 0, d.Wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	result, err := tx.ExecContext(ctx, d.text(query), args...)
	if err != nil {
		return 0, d.Wrap(err)
	}
	n, err := result.RowsAffected()
	if err == nil {
		err = tx.Commit()
	}
	return int(n), d.Wrap(err)
}

// Tidy is of store.Store, for a database that needs no upkeep.
func (d *DB) Tidy(context.Context) (store.Upkeep, error) { return store.Upkeep{}, nil }

// Close is of store.Store.
func (d *DB) Close() error {
	return errors.Join(d.Read.Close(), d.Write.Close())
}
