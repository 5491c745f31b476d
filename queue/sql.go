package queue

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// schemaVersion is that of schema. A store migrates what is older, and does not touch
// what is newer.
const schemaVersion = 1

// schema is what SQLite and PostgreSQL both have, but for the type of bytes. Times are
// milliseconds since 1970. docs/queue.md explains the columns.
//
// The first index has the pending events in the order in which they are due, and with
// it all that is asked often: what is due, how many there are, and since when.
var schema = []string{
	`CREATE TABLE {schema}inkit_queue_events (
		id          TEXT    NOT NULL PRIMARY KEY,
		queue       TEXT    NOT NULL,
		state       TEXT    NOT NULL,
		received    BIGINT  NOT NULL,
		queued      BIGINT  NOT NULL,
		due         BIGINT  NOT NULL,
		lease       BIGINT,
		owner       TEXT,
		attempts    INTEGER NOT NULL,
		last_error  TEXT    NOT NULL,
		event_type  TEXT    NOT NULL,
		resource_id TEXT    NOT NULL,
		request     {bytes} NOT NULL,
		checksum    {bytes} NOT NULL
	)`,
	`CREATE INDEX inkit_queue_due ON {schema}inkit_queue_events (queue, due, queued) WHERE state = 'pending'`,
	`CREATE INDEX inkit_queue_dead ON {schema}inkit_queue_events (queue, queued) WHERE state = 'dead'`,
	`CREATE TABLE {schema}inkit_queue_backends (
		queue TEXT   NOT NULL PRIMARY KEY,
		down  BIGINT,
		probe BIGINT NOT NULL
	)`,
	`CREATE TABLE {schema}inkit_queue_schema (version INTEGER NOT NULL)`,
	`INSERT INTO {schema}inkit_queue_schema VALUES (1)`,
}

// dialect is what differs between databases. The statements of this file hold
// {bytes}, {schema}, {now} and {skip} in its place.
type dialect struct {
	bytes  string         // the type
	schema string         // what stands before the names of tables
	rows   int            // how many rows a statement may have
	now    string         // the clock, in milliseconds: stable in a statement
	skip   string         // what has a claim pass over rows that another one has locked
	begin  string         // the first statement of a transaction that writes, if there is one
	tx     *sql.TxOptions // of such a transaction
	more   []string       // what it has beyond schema

	// wrap says in terms of ErrFull and so on what an error of the driver means.
	wrap func(error) error
}

// sqlStore is a Store on SQL.
type sqlStore struct {
	dialect
	write, read *sql.DB
	peek        *sql.Stmt // if it need not be compiled anew each time, or nil

	// last is what else a transaction does, or nil.
	last func(ctx context.Context, tx *sql.Tx, b *Batch) error
}

func (s *sqlStore) text(query string) string {
	for _, part := range [][2]string{{"{bytes}", s.bytes}, {"{schema}", s.schema}, {"{now}", s.now}, {"{skip}", s.skip}} {
		query = strings.ReplaceAll(query, part[0], part[1]) // a Replacer costs more to make than it saves
	}
	return query
}

// begin begins a transaction that writes.
func (s *sqlStore) begin(ctx context.Context) (*sql.Tx, error) {
	tx, err := s.write.BeginTx(ctx, s.tx)
	if err != nil || s.dialect.begin == "" {
		return tx, err
	}
	if _, err = tx.ExecContext(ctx, s.dialect.begin); err != nil {
		_ = tx.Rollback()
		return nil, err
	}
	return tx, nil
}

// migrate makes the schema if it is not there. It is for a transaction that keeps
// others from doing the same.
func (s *sqlStore) migrate(ctx context.Context, tx *sql.Tx, exists bool) error {
	if !exists {
		for _, query := range slices.Concat(schema, s.more) {
			if _, err := tx.ExecContext(ctx, s.text(query)); err != nil {
				return err
			}
		}
		return nil
	}
	return s.checkVersion(ctx, tx)
}

// querier is a database, or a transaction in it.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// checkVersion refuses a schema that is not the one of this version.
func (s *sqlStore) checkVersion(ctx context.Context, db querier) error {
	var version int
	if err := db.QueryRowContext(ctx, s.text(`SELECT version FROM {schema}inkit_queue_schema`)).Scan(&version); err != nil {
		return err
	}
	switch {
	case version > schemaVersion:
		return fmt.Errorf("%w: %d, and this one knows %d", ErrNewer, version, schemaVersion)
	case version < schemaVersion:
		return fmt.Errorf("%w: %d, and this one needs %d", ErrOlder, version, schemaVersion)
	}
	return nil
}

// Apply is of Store.
func (s *sqlStore) Apply(ctx context.Context, b *Batch) error {
	tx, err := s.begin(ctx)
	if err != nil {
		return s.wrap(err)
	}
	if err = s.apply(ctx, tx, b); err == nil && s.last != nil {
		err = s.last(ctx, tx, b)
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		_ = tx.Rollback()
		for _, claim := range b.Claims {
			claim.Records = nil
		}
		return s.wrap(err)
	}
	return nil
}

func (s *sqlStore) apply(ctx context.Context, tx *sql.Tx, b *Batch) error {
	if err := s.add(ctx, tx, b); err != nil {
		return err
	}
	if err := s.finish(ctx, tx, b); err != nil {
		return err
	}
	for _, backend := range b.Backends {
		_, err := tx.ExecContext(ctx, s.text(`
			INSERT INTO {schema}inkit_queue_backends AS b (queue, down, probe)
			VALUES ($1, CASE WHEN $2 THEN {now} END, {now} + CAST($3 AS BIGINT))
			ON CONFLICT (queue) DO UPDATE SET
				down = CASE WHEN $2 THEN COALESCE(b.down, {now}) END,
				probe = {now} + CAST($3 AS BIGINT)`),
			backend.Queue, backend.Down, backend.Probe.Milliseconds())
		if err != nil {
			return err
		}
	}
	for _, claim := range b.Claims {
		if err := s.claim(ctx, tx, b.Owner, claim); err != nil {
			return err
		}
	}
	return nil
}

// plain returns a text as every database takes it: UTF-8, and no NUL. A single event
// with another one would have its whole batch fail, each time.
func plain(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// rows returns n rows of arguments for VALUES, each after a pattern in which ? stands
// for an argument.
func rows(n int, pattern string) string {
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

func (s *sqlStore) add(ctx context.Context, tx *sql.Tx, b *Batch) error {
	for start := 0; start < len(b.Add); start += s.rows {
		records := b.Add[start:min(start+s.rows, len(b.Add))]
		if _, err := tx.ExecContext(ctx, s.insert(len(records)), insertArgs(b.Owner, records)...); err != nil {
			return err
		}
	}
	return nil
}

// insert returns the statement that adds n events.
func (s *sqlStore) insert(n int) string {
	return s.text(`
		INSERT INTO {schema}inkit_queue_events (id, queue, state, received, queued, due, lease, owner,
			attempts, last_error, event_type, resource_id, request, checksum) VALUES ` +
		rows(n, `(?, ?, 'pending', ?, {now}, {now} + CAST(? AS BIGINT), {now} + CAST(? AS BIGINT), ?, ?, ?, ?, ?, ?, ?)`) + `
		ON CONFLICT (id) DO NOTHING`)
}

func insertArgs(batchOwner string, records []*Record) []any {
	args := make([]any, 0, 12*len(records))
	for _, r := range records {
		var lease, owner any
		delay := r.Delay
		if r.Lease > 0 {
			lease, owner, delay = r.Lease.Milliseconds(), batchOwner, r.Lease
		}
		args = append(args, r.ID, r.Queue, r.Received.UnixMilli(), delay.Milliseconds(), lease, owner,
			r.Attempts, plain(r.LastError), plain(r.EventType), plain(r.ResourceID), r.Request, r.Checksum)
	}
	return args
}

func (s *sqlStore) finish(ctx context.Context, tx *sql.Tx, b *Batch) error {
	var delivered, others []any
	for _, f := range b.Finish {
		switch f.Outcome {
		case Delivered:
			delivered = append(delivered, f.ID)
		case Later:
			others = append(others, f.ID, statePending, f.After.Milliseconds(), plain(f.LastError), 0)
		case Dead:
			others = append(others, f.ID, stateDead, int64(0), plain(f.LastError), 0)
		case Released:
			others = append(others, f.ID, statePending, int64(0), nil, 0)
		case Unbegun:
			others = append(others, f.ID, statePending, int64(0), nil, 1)
		}
	}
	for start := 0; start < len(delivered); start += s.rows {
		args := delivered[start:min(start+s.rows, len(delivered))]
		if _, err := tx.ExecContext(ctx, s.text(`DELETE FROM {schema}inkit_queue_events WHERE id IN (`+rows(len(args), `?`)+`)`), args...); err != nil {
			return err
		}
	}
	// whoever has lost the lease has no say any more
	const columns = 5
	for start := 0; start < len(others); start += columns * s.rows {
		args := others[start:min(start+columns*s.rows, len(others))]
		values := rows(len(args)/columns, `(?, ?, CAST(? AS BIGINT), ?, CAST(? AS INTEGER))`)
		args = append(slices.Clip(args), b.Owner)
		_, err := tx.ExecContext(ctx, s.text(`
			UPDATE {schema}inkit_queue_events
			SET state = v.column2, due = {now} + v.column3, lease = NULL, owner = NULL, last_error = COALESCE(v.column4, last_error), attempts = attempts - v.column5
			FROM (VALUES `+values+`) AS v
			WHERE id = v.column1 AND (owner IS NULL OR owner = $`+fmt.Sprint(len(args))+`)`), args...)
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *sqlStore) claim(ctx context.Context, tx *sql.Tx, owner string, claim *Claim) error {
	events := claim.Max
	if claim.Probe {
		result, err := tx.ExecContext(ctx, s.text(`
			UPDATE {schema}inkit_queue_backends SET probe = {now} + CAST($2 AS BIGINT)
			WHERE queue = $1 AND down IS NOT NULL AND (probe <= {now} OR probe > {now} + CAST($2 AS BIGINT))`), claim.Queue, claim.Lease.Milliseconds())
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); n == 0 || err != nil {
			return err
		}
		events = 1
	}
	due, ahead := `e.due <= {now}`, `e.due > {now} + `+milliseconds(farthest(claim.Lease))
	if claim.Newest {
		// by a look at the last ones alone, first: to go through all that are due takes long
		err := s.claimFrom(ctx, tx, owner, claim, events,
			`(SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT 16 + 4 * $2) AS n CROSS JOIN {schema}inkit_queue_events AS e WHERE e.id = n.id AND (`+due+` OR `+ahead+`) AND`, `e.id DESC`)
		if err != nil || len(claim.Records) > 0 {
			return err
		}
	}
	for _, which := range []string{due, ahead} { // and not both at once, for which no index is of use
		if n := events - len(claim.Records); n > 0 {
			if err := s.claimFrom(ctx, tx, owner, claim, n, `{schema}inkit_queue_events AS e WHERE `+which+` AND`, `e.due`); err != nil {
				return err
			}
		}
	}
	if len(claim.Records) > 0 || !claim.Probe {
		return nil
	}
	// there was nothing to probe with, and the next one need not wait for that
	_, err := tx.ExecContext(ctx, s.text(`UPDATE {schema}inkit_queue_backends SET probe = {now} WHERE queue = $1`), claim.Queue)
	return err
}

// farthest returns how far ahead of now an event can be due. One that is due later was
// written before the clock was set back: it is due now. A leased event is due when its
// lease ends. The lease may be longer than those of this process, since another process,
// or the configuration before a reload, may have a longer attempt_timeout: so the bound
// is the same for leased events.
func farthest(lease time.Duration) time.Duration { return max(maxDelay, lease) }

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

func (s *sqlStore) claimFrom(ctx context.Context, tx *sql.Tx, owner string, claim *Claim, events int, from, order string) error {
	rows, err := tx.QueryContext(ctx, s.text(`
		WITH picked AS MATERIALIZED (
			SELECT e.id FROM `+from+` e.queue = $1 AND e.state = 'pending'
			ORDER BY `+order+` LIMIT $2 {skip})
		UPDATE {schema}inkit_queue_events
		SET queued = CASE WHEN queued > {now} THEN {now} ELSE queued END, due = {now} + CAST($3 AS BIGINT), lease = {now} + CAST($3 AS BIGINT), owner = $4, attempts = attempts + 1
		WHERE id IN (SELECT id FROM picked)
		RETURNING id, received, queued, attempts, event_type, resource_id, request, checksum, {now}`),
		claim.Queue, events, claim.Lease.Milliseconds(), owner)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		r := &Record{Queue: claim.Queue, State: statePending}
		var received, queued, now int64
		if err := rows.Scan(&r.ID, &received, &queued, &r.Attempts, &r.EventType, &r.ResourceID, &r.Request, &r.Checksum, &now); err != nil {
			return err
		}
		r.Received, r.Age = time.UnixMilli(received), time.Duration(max(0, now-queued))*time.Millisecond
		claim.Records = append(claim.Records, r)
	}
	return rows.Err()
}

const peekQuery = `SELECT
	(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due LIMIT 1),
	(SELECT due FROM {schema}inkit_queue_events WHERE queue = $1 AND state = 'pending' ORDER BY due DESC LIMIT 1),
	(SELECT probe FROM {schema}inkit_queue_backends WHERE queue = $1 AND down IS NOT NULL), {now}`

// Peek is of Store.
func (s *sqlStore) Peek(ctx context.Context, queue string) (p Peek, err error) {
	var due, last, probe sql.NullInt64
	var now int64
	var row *sql.Row
	if s.peek != nil {
		row = s.peek.QueryRowContext(ctx, queue)
	} else {
		row = s.read.QueryRowContext(ctx, s.text(peekQuery), queue)
	}
	if err = row.Scan(&due, &last, &probe, &now); err != nil {
		return p, s.wrap(err)
	}
	p.Empty, p.Down = !due.Valid, probe.Valid
	p.Wait = max(0, time.Duration(due.Int64-now)*time.Millisecond)
	p.Last = max(0, time.Duration(last.Int64-now)*time.Millisecond)
	p.Probe = max(0, time.Duration(probe.Int64-now)*time.Millisecond)
	return p, nil
}

// Counts is of Store.
func (s *sqlStore) Counts(ctx context.Context) (counts []Count, err error) {
	rows, err := s.read.QueryContext(ctx, s.text(`
		SELECT queue, 'pending', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'pending' GROUP BY queue
		UNION ALL
		SELECT queue, 'dead', count(*), {now} - min(queued) FROM {schema}inkit_queue_events WHERE state = 'dead' GROUP BY queue`))
	if err != nil {
		return nil, s.wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		var c Count
		var oldest int64
		if err := rows.Scan(&c.Queue, &c.State, &c.Events, &oldest); err != nil {
			return nil, s.wrap(err)
		}
		c.Oldest = time.Duration(max(0, oldest)) * time.Millisecond
		counts = append(counts, c)
	}
	return counts, s.wrap(rows.Err())
}

// where returns the condition of a filter, and its arguments.
func (f Filter) where() (condition string, args []any) {
	conditions := []string{"TRUE"}
	if f.Queue != "" {
		args = append(args, f.Queue)
		conditions = append(conditions, fmt.Sprintf("queue = $%d", len(args)))
	}
	if f.Dead {
		conditions = append(conditions, "state = 'dead'")
	}
	if f.Due {
		conditions = append(conditions, "state = 'pending' AND (due <= {now} OR due > {now} + "+milliseconds(maxDelay)+")")
	}
	if f.After != "" {
		args = append(args, f.After)
		conditions = append(conditions, fmt.Sprintf("id > $%d", len(args)))
	}
	if f.IDs != nil && len(f.IDs) == 0 {
		conditions = append(conditions, "FALSE")
	} else if f.IDs != nil {
		marks := make([]string, len(f.IDs))
		for i, id := range f.IDs {
			args = append(args, id)
			marks[i] = fmt.Sprintf("$%d", len(args))
		}
		conditions = append(conditions, "id IN ("+strings.Join(marks, ", ")+")")
	}
	return strings.Join(conditions, " AND "), args
}

// Select is of Store.
func (s *sqlStore) Select(ctx context.Context, filter Filter, withRequest bool, f func(*Record) bool) error {
	where, args := filter.where()
	request := "NULL, NULL"
	if withRequest {
		request = "request, checksum"
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rows, err := s.read.QueryContext(ctx, s.text(`
		SELECT id, queue, state, received, queued, due, lease, attempts, last_error, event_type, resource_id, `+request+`
		FROM {schema}inkit_queue_events WHERE `+where+` ORDER BY id`), args...)
	if err != nil {
		return s.wrap(err)
	}
	defer rows.Close()
	for rows.Next() {
		r := new(Record)
		var received, queued, due int64
		var lease sql.NullInt64
		if err := rows.Scan(&r.ID, &r.Queue, &r.State, &received, &queued, &due, &lease, &r.Attempts, &r.LastError,
			&r.EventType, &r.ResourceID, &r.Request, &r.Checksum); err != nil {
			return s.wrap(err)
		}
		r.Received, r.Queued, r.Due = time.UnixMilli(received), time.UnixMilli(queued), time.UnixMilli(due)
		if lease.Valid {
			r.LeasedUntil = time.UnixMilli(lease.Int64)
		}
		if !f(r) {
			cancel() // or else a driver may read what is left
			return nil
		}
	}
	return s.wrap(rows.Err())
}

// Retry is of Store. What is being delivered is left alone.
func (s *sqlStore) Retry(ctx context.Context, filter Filter) (int, error) {
	where, args := filter.where()
	return s.exec(ctx, `
		UPDATE {schema}inkit_queue_events SET state = 'pending', queued = {now}, due = {now}, lease = NULL, owner = NULL
		WHERE `+where+` AND (lease IS NULL OR lease <= {now} OR lease > {now} + `+milliseconds(maxDelay)+`)`, args)
}

// Drop is of Store.
func (s *sqlStore) Drop(ctx context.Context, filter Filter) (int, error) {
	where, args := filter.where()
	return s.exec(ctx, `DELETE FROM {schema}inkit_queue_events WHERE `+where, args)
}

func (s *sqlStore) exec(ctx context.Context, query string, args []any) (int, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return 0, s.wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	result, err := tx.ExecContext(ctx, s.text(query), args...)
	if err != nil {
		return 0, s.wrap(err)
	}
	n, err := result.RowsAffected()
	if err == nil {
		err = tx.Commit()
	}
	return int(n), s.wrap(err)
}

// Close is of Store.
func (s *sqlStore) Close() error {
	return errors.Join(s.read.Close(), s.write.Close())
}
