package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
)

// schemaLock is the advisory lock under which the schema is made: "inkit" in ASCII.
const schemaLock = 0x696e6b6974

// database is a store in PostgreSQL. Its pool heals broken connections.
type database struct {
	sqlstore.DB
	pool        *pgxpool.Pool
	unconfirmed atomic.Int64 // see notice
}

// Open is of store.Opener.
func (p *Postgres) Open(ctx context.Context, o store.Opening) (store.Store, error) {
	config, err := p.config(ctx)
	if err != nil {
		return nil, err
	}
	s := new(database)
	config.ConnConfig.OnNotice = s.notice
	// A pooler may pass on notifications that somebody else has asked for. They must not
	// pile up.
	config.ConnConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) {}
	config.PingTimeout = connectTimeout
	config.BeforeConnect = func(ctx context.Context, c *pgx.ConnConfig) error {
		fresh, err := p.config(ctx)
		if err != nil {
			return err
		}
		notice, notification := c.OnNotice, c.OnNotification
		*c = *fresh.ConnConfig
		c.OnNotice, c.OnNotification = notice, notification
		return nil
	}
	if s.pool, err = pgxpool.NewWithConfig(ctx, config); err != nil {
		return nil, s.wrap(err)
	}
	db := stdlib.OpenDBFromPool(s.pool)
	s.DB = sqlstore.DB{Write: db, Read: db, Dialect: dialect("")}
	s.DB.Wrap = s.wrap
	if err := s.prepare(ctx, p.Schema, o); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// dialect is that of tables in a schema.
func dialect(schema string) sqlstore.Dialect {
	qualified := ""
	if schema != "" {
		qualified = pgx.Identifier{schema}.Sanitize() + "."
	}
	return sqlstore.Dialect{
		Bytes: "BYTEA", Schema: qualified, Rows: 100, Skip: "FOR UPDATE OF e SKIP LOCKED",
		// not clock_timestamp(), for which PostgreSQL uses no index
		Now: "(extract(epoch FROM statement_timestamp()) * 1000)::bigint",
		Tx:  &sql.TxOptions{Isolation: sql.LevelReadCommitted},
		// The default of a role or a database may be less than durable, and through pgbouncer
		// only the settings of the transaction are sure to hold. If this Caddy vanishes, its
		// locks must go before other Caddys have waited for too long.
		Begin: `SELECT set_config('idle_in_transaction_session_timeout', '2s', true),
			CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN set_config('synchronous_commit', 'on', true) END`,
		More: vacuum,
		Size: `SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c WHERE c.oid IN (
			'{schema}inkit_queue_events'::regclass, '{schema}inkit_queue_history'::regclass, '{schema}inkit_queue_once'::regclass)`,
	}
}

// vacuum says when to remove dead rows. BenchmarkPostgres measures it: with the server's
// defaults, a look took 4.5 times as long after a million events as before, and a count 73
// times; with these, 1.5 and 2 times. A fillfactor would be of no use: each update moves
// due, which is in an index.
const vacuum = `
ALTER TABLE {schema}inkit_queue_events SET (
	autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
	autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000,
	toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000, toast.autovacuum_vacuum_cost_delay = 0
);
`

// prepare makes the schema if it is not there, and finds out whether it can be used.
func (s *database) prepare(ctx context.Context, schema string, o store.Opening) error {
	ctx, cancel := context.WithTimeout(ctx, 2*answerTimeout)
	defer cancel()
	var current sql.NullString
	var encoding, fsync string
	err := s.Read.QueryRowContext(ctx, `SELECT current_schema(), current_setting('server_encoding'), current_setting('fsync')`).Scan(&current, &encoding, &fsync)
	switch {
	case err != nil:
		return s.wrap(err)
	case encoding != "UTF8":
		return fmt.Errorf("the database has the encoding %s, and must have UTF8", encoding)
	case schema == "" && !current.Valid:
		return errors.New("no schema of the role's search path is there: name one")
	case schema == "":
		schema = current.String
	}
	if fsync != "on" {
		o.Logger.Warn("the server does not write to its disk when it says so (fsync is off): a crash loses events")
	}
	s.Schema = pgx.Identifier{schema}.Sanitize() + "."
	if err := s.makeTables(ctx, schema); err != nil {
		return err
	}
	return s.check(ctx)
}

func (s *database) makeTables(ctx context.Context, schema string) error {
	tx, err := s.BeginTx(ctx)
	if err != nil {
		return s.wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	exists, err := tablesExist(ctx, tx, schema)
	if err == nil && !exists {
		if _, err = tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, schemaLock); err == nil {
			exists, err = tablesExist(ctx, tx, schema) // another Caddy may have made them meanwhile
		}
	}
	if err == nil && !exists {
		err = makeSchema(ctx, tx, schema)
	}
	if err == nil {
		err = s.Migrate(ctx, tx, exists)
	}
	if !exists && isSQLState(err, "42501") {
		return fmt.Errorf("%w: the role may not make the tables: run the SQL that caddy inkit-queue migrate --print shows", s.wrap(err))
	}
	if err == nil {
		err = tx.Commit()
	}
	return s.wrap(err)
}

// tablesExist does not ask to_regclass, which remembers until the end of the transaction
// that a table was not there.
func tablesExist(ctx context.Context, tx *sql.Tx, schema string) (exist bool, err error) {
	err = tx.QueryRowContext(ctx, `SELECT EXISTS (
		SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relname = 'inkit_queue_schema')`, schema).Scan(&exist)
	return exist, err
}

func makeSchema(ctx context.Context, tx *sql.Tx, schema string) error {
	var exists bool
	err := tx.QueryRowContext(ctx, `SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)`, schema).Scan(&exists)
	if err == nil && !exists {
		_, err = tx.ExecContext(ctx, `CREATE SCHEMA `+pgx.Identifier{schema}.Sanitize())
	}
	return err
}

// check says which rights the role lacks now, and not when it needs them, and refuses
// tables that would be empty after a crash of the server.
func (s *database) check(ctx context.Context) error {
	var lacks []string
	for _, name := range []string{"events", "history", "once", "paused"} {
		table := "inkit_queue_" + name
		for _, right := range []string{"SELECT", "INSERT", "UPDATE", "DELETE"} {
			var has sql.NullBool
			if err := s.Read.QueryRowContext(ctx, `SELECT has_table_privilege(to_regclass($1)::oid, $2)`, s.Schema+table, right).Scan(&has); err != nil {
				return s.wrap(err)
			}
			if !has.Valid {
				return fmt.Errorf("the table %s is missing", table)
			}
			if !has.Bool {
				lacks = append(lacks, right+" on "+table)
			}
		}
	}
	if lacks != nil {
		return fmt.Errorf("the role lacks the right to %s", strings.Join(lacks, ", "))
	}
	var persistence string
	err := s.Read.QueryRowContext(ctx, `SELECT relpersistence::text FROM pg_class WHERE oid = to_regclass($1)`, s.Schema+"inkit_queue_events").Scan(&persistence)
	if err == nil && persistence != "p" {
		return errors.New("the table inkit_queue_events is unlogged: a crash of the server would empty it")
	}
	return s.wrap(err)
}

// notice hears that a commit returns though no standby has confirmed it, because somebody
// on the server has ended the wait. To the client, the commit looks like any other.
func (s *database) notice(_ *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine == "SyncRepWaitForLSN" {
		s.unconfirmed.Add(1)
	}
}

// Apply is of store.Store. It tries again if other transactions were in conflict with it.
func (s *database) Apply(ctx context.Context, b *store.Batch) (err error) {
	for range 3 {
		if err = s.applyOnce(ctx, b); !errors.Is(err, errConflict) {
			return err
		}
	}
	return err
}

func (s *database) applyOnce(ctx context.Context, b *store.Batch) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	before := s.unconfirmed.Load()
	err := s.DB.Apply(ctx, b)
	if err == nil && s.unconfirmed.Load() != before {
		err = errors.New("no standby has confirmed the commit: somebody has ended the wait for it")
	}
	return err
}

// Due is of store.Store. While the server can be written to, other Caddys attempt the same
// events; when its disk is full, nobody can lease any.
func (s *database) Due(ctx context.Context, c *store.Claim, why error) error {
	if !errors.Is(why, store.ErrFull) {
		return why
	}
	return s.DB.Due(ctx, c, why)
}

// Peek is of store.Store.
func (s *database) Peek(ctx context.Context, queue string) (store.Peek, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return s.DB.Peek(ctx, queue)
}

// Close is of store.Store.
func (s *database) Close() error {
	err := s.Write.Close()
	closed := make(chan struct{})
	go func() {
		s.pool.Close() // waits for a server that does not answer
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(connectTimeout):
	}
	return err
}
