package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
)

// schemaLock is the key of the advisory lock for creating the schema: "inkit" in ASCII.
const schemaLock = 0x696e6b6974

// database is a store in PostgreSQL. Its pool replaces broken connections.
type database struct {
	sqlstore.DB
	pool        *pgxpool.Pool
	unconfirmed atomic.Int64 // the number of commits that the method notice has counted
}

func (p *Postgres) Open(ctx context.Context, o store.Opening) (store.Store, error) {
	s := new(database)
	config, err := p.config()
	if err != nil {
		return nil, err
	}
	config.PingTimeout = connectTimeout
	config.BeforeConnect = func(_ context.Context, c *pgx.ConnConfig) error {
		fresh, err := p.config()
		if err == nil {
			*c = *fresh.ConnConfig
			c.OnNotice = s.notice
		}
		return err
	}
	if s.pool, err = pgxpool.NewWithConfig(ctx, config); err != nil {
		return nil, err
	}
	db := stdlib.OpenDBFromPool(s.pool)
	s.DB = sqlstore.DB{Write: db, Read: db}
	if err := s.prepare(ctx, p.Schema, o); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// dialect returns the dialect for tables in a schema.
func dialect(schema string) sqlstore.Dialect {
	qualified := ""
	if schema != "" {
		qualified = pgx.Identifier{schema}.Sanitize() + "."
	}
	return sqlstore.Dialect{
		Bytes: "BYTEA", Schema: qualified, Rows: 100, Numbered: true, Skip: "FOR UPDATE OF e SKIP LOCKED",
		// not clock_timestamp(), because PostgreSQL uses no index for a comparison with it
		Now: "(extract(epoch FROM statement_timestamp()) * 1000)::bigint",
		// The timeout ends the locks of a crashed Caddy, because other Caddys wait for them. The
		// driver reads only hex. The method notice needs warnings. Without row_security, a policy
		// that hides rows is an error. The CASE replaces a synchronous_commit with which a crash can
		// lose a commit. Each transaction sets all this again, because pgbouncer does not keep the
		// settings of a session.
		Begin: `SELECT set_config('idle_in_transaction_session_timeout', '2s', true), set_config('bytea_output', 'hex', true),
			set_config('client_min_messages', 'warning', true), set_config('row_security', 'off', true),
			CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN set_config('synchronous_commit', 'on', true) END`,
		More: vacuum,
		Size: `SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c WHERE c.oid IN (
			'{schema}inkit_queue_events'::regclass, '{schema}inkit_queue_history'::regclass, '{schema}inkit_queue_once'::regclass)`,
	}
}

// vacuum makes the server remove dead rows early. BenchmarkPostgres measures Peek and Counts before
// and after a million events. With the server's defaults, Peek became 4.5 times as slow, and Counts
// became 73 times as slow. With these settings, Peek became 1.5 times as slow, and Counts became
// twice as slow. The setting `fillfactor` would not help, because each update changes the column
// `due`, which is in an index.
const vacuum = `
ALTER TABLE {schema}inkit_queue_events SET (
	autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
	autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000,
	toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000, toast.autovacuum_vacuum_cost_delay = 0
);
`

// prepare creates a missing schema, and checks that the role can use it.
func (s *database) prepare(ctx context.Context, schema string, o store.Opening) error {
	ctx, cancel := context.WithTimeout(ctx, 2*answerTimeout)
	defer cancel()
	var existing sql.NullString
	var encoding, fsync string
	err := s.Read.QueryRowContext(ctx, `
		SELECT COALESCE(NULLIF($1, ''), current_schema()), current_setting('server_encoding'), current_setting('fsync')`, schema).
		Scan(&existing, &encoding, &fsync)
	switch {
	case err != nil:
		return s.wrap(err)
	case encoding != "UTF8":
		return fmt.Errorf("the database has the encoding %s, and must have UTF8", encoding)
	case !existing.Valid:
		return errors.New("no schema in the role's search path exists: set schema")
	case fsync != "on":
		o.Logger.Warn("the server has fsync off: a crash of the server loses events, turn fsync on")
	}
	s.Dialect = dialect(existing.String)
	s.Wrap = s.wrap
	if err := s.makeTables(ctx); err != nil {
		return err
	}
	return s.check(ctx)
}

// check reports missing rights of the role at the start, before an event needs them. It
// refuses unlogged tables, because a crash of the server would empty them.
func (s *database) check(ctx context.Context) error {
	for _, name := range []string{"events", "history", "once", "paused"} {
		table := "inkit_queue_" + name
		var unlogged, hidden bool
		var lacks sql.NullString
		err := s.Read.QueryRowContext(ctx, `
			SELECT relpersistence <> 'p', row_security_active(oid), (SELECT string_agg(r, ', ') FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS r WHERE NOT has_table_privilege(oid, r))
			FROM pg_class WHERE oid = to_regclass($1)`, s.Schema+table).Scan(&unlogged, &hidden, &lacks)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return fmt.Errorf("the table %s is missing", table)
		case err != nil:
			return s.wrap(err)
		case lacks.Valid:
			return fmt.Errorf("the role lacks the right to %s on %s", lacks.String, table)
		case hidden:
			return fmt.Errorf("row-level security is on for the table %s, and could hide events from the role", table)
		case unlogged:
			return fmt.Errorf("the table %s is unlogged: a crash of the server would empty it", table)
		}
	}
	return nil
}

// makeTables creates the schema and its tables, if they are missing.
func (s *database) makeTables(ctx context.Context) error {
	schema := strings.TrimSuffix(s.Schema, ".")
	return s.InTx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, schemaLock); err != nil { // another Caddy may start at the same time
			return err
		}
		var schemaExists, exists bool
		err := tx.QueryRowContext(ctx, `SELECT to_regnamespace($1) IS NOT NULL, to_regclass($2) IS NOT NULL`,
			schema, s.Schema+"inkit_queue_schema").Scan(&schemaExists, &exists)
		if err == nil && !schemaExists {
			_, err = tx.ExecContext(ctx, `CREATE SCHEMA `+schema)
		}
		if err == nil && !exists {
			_, err = tx.ExecContext(ctx, s.SchemaSQL())
		}
		if err == nil {
			err = s.CheckVersion(ctx, tx)
		}
		if !exists && sqlState(err) == "42501" {
			return fmt.Errorf("%w: the role is not allowed to create the tables: with another role, run the SQL that caddy inkit-queue migrate prints", err)
		}
		return err
	})
}

// notice counts commits that no standby has confirmed, because the wait for the standby was
// cancelled on the server. Apart from this notice, such a commit looks successful to the client.
func (s *database) notice(_ *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine == "SyncRepWaitForLSN" {
		s.unconfirmed.Add(1)
	}
}

func (s *database) Apply(ctx context.Context, b *store.Batch) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	before := s.unconfirmed.Load()
	err := s.DB.Apply(ctx, b)
	if err == nil && s.unconfirmed.Load() != before {
		err = errors.New("no standby has confirmed the commit: the wait for it was cancelled on the server")
	}
	return err
}

func (s *database) Close() error {
	go s.pool.Close() // waits up to 15 s if the server does not answer
	return s.Write.Close()
}
