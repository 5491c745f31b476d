package queue

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(Postgres{})
}

// Postgres keeps the events of a queue in PostgreSQL, which several Caddys can share.
//
// Each of them takes events, and delivers what is due, whoever took it. Version 12 of
// PostgreSQL is the lowest. The tables are made when the queue starts, if they are not
// there; `caddy inkit-queue migrate --print` shows the SQL for a role that may not make
// any. With SELECT, INSERT, UPDATE and DELETE on them the role can do its work.
//
// Of several servers in the connection string, the one that can be written to is used.
// A pooler such as pgbouncer may be in between, in the mode that gives a connection to
// each transaction.
type Postgres struct {
	// The connection string, as libpq takes it, such as
	// `postgres://inkit@db1,db2/inkit?sslmode=verify-full`. Either one placeholder and
	// nothing else, or a text without placeholders. Required. A placeholder is resolved
	// again for each new connection.
	DSN string `json:"dsn,omitempty"`

	// The schema of the tables. It is made if it is not there. Default: the first of
	// the role's search path.
	Schema string `json:"schema,omitempty"`

	logger *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (Postgres) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "inkit_queue.stores.postgres",
		New: func() caddy.Module { return new(Postgres) },
	}
}

// Provision sets up the logger. No connection is made.
func (p *Postgres) Provision(ctx caddy.Context) error {
	p.logger = ctx.Logger()
	return nil
}

// Validate refuses a connection string that cannot be one.
func (p *Postgres) Validate() error {
	if p.DSN == "" {
		return errors.New("dsn: is required")
	}
	if len(p.Schema) > 63 || strings.ContainsRune(p.Schema, 0) {
		return errors.New("schema: must be the name of one, of 63 bytes at most")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*answerTimeout)
	defer cancel()
	_, err := p.config(ctx)
	return err
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store postgres [<placeholder>] {
//		dsn    <dsn>
//		schema <name>
//	}
//
// On its own line the connection string must be a placeholder. Errors show no word of
// the input, any of which may be a part of it.
func (p *Postgres) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name of the store
	if d.NextArg() {
		if _, ok := placeholder.Name(d.Val()); !ok {
			return d.Err("store: postgres takes a placeholder in braces, any other connection string goes into the block")
		}
		p.DSN = d.Val()
	}
	if d.NextArg() {
		return d.Err("store: postgres takes one placeholder at most")
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var value *string
		word := d.Val()
		switch word {
		case "dsn":
			value = &p.DSN
		case "schema":
			value = &p.Schema
		default:
			return d.Err("store: postgres must hold dsn and schema only")
		}
		switch args := d.RemainingArgs(); {
		case *value != "":
			return d.Err(word + ": must not be repeated")
		case len(args) != 1 || args[0] == "":
			return d.Err(word + ": takes one value, in quotes if there are spaces in it")
		default:
			*value = args[0]
		}
	}
	if p.DSN == "" {
		return d.Err("dsn: is required")
	}
	return nil
}

// Key is of Opener. It does not change with the value of a placeholder.
func (p *Postgres) Key() string {
	hash := sha256.Sum256([]byte(p.DSN + "\x00" + p.Schema))
	return fmt.Sprintf("postgres %x", hash[:6])
}

const (
	// answerTimeout is how long a transaction may take, and with it every statement: a
	// connection on which nothing comes back any more must not hold the others. Its
	// senders are told 503 after as long, unless answer_after says otherwise.
	answerTimeout = 5 * time.Second

	// mixedTimeout is how long one may take that adds events and finishes others.
	mixedTimeout = 2 * time.Second

	// connectTimeout is how long one server may take to accept a connection, so that
	// there is time for the next, unless the connection string says otherwise.
	connectTimeout = 2 * time.Second

	// maxConnections is how many there may be, unless the connection string says
	// otherwise. Two to four are in use; but each that hangs is there for 15 s more, until
	// the driver has taken leave of it.
	maxConnections = 20

	// schemaLock is the advisory lock under which the schema is made: "inkit" in ASCII.
	schemaLock = 0x696e6b6974

	// channel is where a queue is named of which an event is due that others may take.
	channel = "inkit_queue"
)

var (
	embedded = regexp.MustCompile(`\{(\w+\.|\$)`)
	foreign  = regexp.MustCompile(`^(env\..*|file\..*|\$[\w:.]+|\$\{.*\}|\$\(.*\)|%\w+%)$`)
)

// config resolves and parses the connection string, and the files that it names.
func (p *Postgres) config(ctx context.Context) (*pgxpool.Config, error) {
	type result struct {
		config *pgxpool.Config
		err    error
	}
	results := make(chan result, 1)
	go func() { // a file system may hang
		config, err := p.parse()
		results <- result{config, err}
	}()
	select {
	case r := <-results:
		return r.config, r.err
	case <-ctx.Done():
		return nil, shownError{"dsn: could not be read in time"}
	}
}

func (p *Postgres) parse() (*pgxpool.Config, error) {
	dsn := p.DSN
	switch name, ok := placeholder.Name(dsn); {
	case ok:
		var err error
		if dsn, err = placeholder.Value(name); err != nil {
			return nil, shownError{"dsn: " + err.Error()}
		}
	case foreign.MatchString(dsn):
		return nil, errors.New("dsn: stands for a text in a way that Caddy does not know: write {env.NAME} or {file./path}")
	case embedded.MatchString(dsn):
		return nil, errors.New("dsn: must be either one placeholder and nothing else, or a text without placeholders")
	}
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, shownError{"dsn: " + parseFailure(err)}
	}
	if !strings.Contains(dsn, "pool_max_conns") {
		config.MaxConns = maxConnections
	}
	c := config.ConnConfig
	// No statement outlives its transaction, which pgbouncer may give to any server.
	c.DefaultQueryExecMode = pgx.QueryExecModeExec
	c.StatementCacheCapacity, c.DescriptionCacheCapacity = 0, 0
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	if c.ValidateConnect == nil {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "caddy inkit_queue"
	}
	c.RuntimeParams["client_encoding"] = "UTF8"
	return config, nil
}

// parseFailure says why a connection string cannot be parsed, and shows nothing of it,
// as the error does.
func parseFailure(err error) string {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return "names a file that cannot be read: " + pathErr.Err.Error()
	}
	_, why, _ := strings.Cut(err.Error(), "`: ")
	for _, known := range []string{
		"failed to configure TLS", "failed to read service", "invalid port", "invalid connect_timeout",
		"could not match", "unknown target_session_attrs value", "unknown channel_binding value", "invalid require_auth",
	} {
		if strings.HasPrefix(why, known) {
			if known == "could not match" {
				known = "there are not as many ports as hosts"
			}
			return "cannot be used: " + known
		}
	}
	return "cannot be parsed as a connection string of PostgreSQL, such as postgres://role@host/database"
}

// postgresStore is a Store in PostgreSQL.
type postgresStore struct {
	sqlStore
	opener   *Postgres
	pool     *pgxpool.Pool
	name     string       // of the schema, without quotes
	unsynced atomic.Int64 // see notice

	ctx     context.Context // of what listens
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu   sync.Mutex
	down map[string]bool // the queues of which the backend is down, by the last look
}

// Open is of Opener.
func (p *Postgres) Open(ctx context.Context) (Store, error) {
	config, err := p.config(ctx)
	if err != nil {
		return nil, err
	}
	s := &postgresStore{opener: p, down: make(map[string]bool)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	config.ConnConfig.OnNotice = s.notice
	// what a pooler passes on that somebody else has asked for must not pile up
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
	s.sqlStore = sqlStore{write: db, read: db, last: s.notify, dialect: postgresDialect("")}
	s.sqlStore.wrap = s.wrap
	if err := s.prepare(ctx); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// postgresDialect is that of tables in a schema.
func postgresDialect(schema string) dialect {
	qualified := ""
	if schema != "" {
		qualified = pgx.Identifier{schema}.Sanitize() + "."
	}
	return dialect{
		bytes: "BYTEA", schema: qualified, rows: 100, skip: "FOR UPDATE OF e SKIP LOCKED",
		// and not clock_timestamp(), for which no index is used
		now: "(extract(epoch FROM statement_timestamp()) * 1000)::bigint",
		tx:  &sql.TxOptions{Isolation: sql.LevelReadCommitted},
		// What a role or a database has as its default may be less than durable; and with
		// pgbouncer, only what is set for the transaction is sure to be set. If this Caddy
		// vanishes, its locks must go before the others have waited for too long.
		begin: `SELECT set_config('idle_in_transaction_session_timeout', '2s', true),
			CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN set_config('synchronous_commit', 'on', true) END`,
		more: postgresSchema,
	}
}

// postgresSchema is what PostgreSQL has beyond schema: the counts, which one Caddy
// makes for all, and when to remove dead rows. BenchmarkPostgres measures it: with the
// server's defaults, a look took 4.5 times as long after a million events as before,
// and a count 73 times; with these, 1.5 and 2 times. A fillfactor would be of no use:
// each update moves due, which is in an index, so that none is HOT.
var postgresSchema = []string{
	`CREATE TABLE {schema}inkit_queue_counts (
		counts  TEXT   NOT NULL,
		counted BIGINT NOT NULL,
		next    BIGINT NOT NULL
	)`,
	`INSERT INTO {schema}inkit_queue_counts VALUES ('[]', 0, 0)`,
	`ALTER TABLE {schema}inkit_queue_events SET (
		autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_delay = 0,
		autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000,
		toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000, toast.autovacuum_vacuum_cost_delay = 0
	)`,
}

// Migration returns the SQL that makes the tables.
func (p *Postgres) Migration() string {
	var b strings.Builder
	s := &sqlStore{dialect: postgresDialect(p.Schema)}
	b.WriteString("BEGIN;\n")
	if p.Schema != "" {
		fmt.Fprintf(&b, "CREATE SCHEMA IF NOT EXISTS %s;\n", pgx.Identifier{p.Schema}.Sanitize())
	}
	for _, query := range slices.Concat(schema, s.more) {
		b.WriteString(strings.ReplaceAll(s.text(query), "\n\t", "\n") + ";\n")
	}
	b.WriteString("COMMIT;\n")
	return b.String()
}

// prepare makes the schema if it is not there, and finds out whether it can be used.
func (s *postgresStore) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*answerTimeout)
	defer cancel()
	var name sql.NullString
	var encoding, fsync string
	err := s.read.QueryRowContext(ctx, `SELECT current_schema(), current_setting('server_encoding'), current_setting('fsync')`).Scan(&name, &encoding, &fsync)
	switch {
	case err != nil:
		return s.wrap(err)
	case encoding != "UTF8":
		return fmt.Errorf("the database has the encoding %s, and must have UTF8", encoding)
	case s.opener.Schema != "":
		s.name = s.opener.Schema
	case !name.Valid:
		return errors.New("no schema of the role's search path is there: name one")
	default:
		s.name = name.String
	}
	if fsync != "on" && s.opener.logger != nil {
		s.opener.logger.Warn("the server does not write to its disk when it says so (fsync is off): a crash loses events")
	}
	s.dialect.schema = pgx.Identifier{s.name}.Sanitize() + "."

	tx, err := s.begin(ctx)
	if err != nil {
		return s.wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	exists, err := s.exists(ctx, tx)
	if err == nil && !exists {
		if _, err = tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, schemaLock); err == nil {
			exists, err = s.exists(ctx, tx) // as another Caddy has made it meanwhile
		}
	}
	if err == nil && !exists {
		err = s.makeSchema(ctx, tx)
	}
	if err == nil {
		err = s.migrate(ctx, tx, exists)
	}
	if !exists && isSQLState(err, "42501") {
		return fmt.Errorf("%w: the role may not make the tables: run the SQL that caddy inkit-queue migrate --print shows", s.wrap(err))
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		return s.wrap(err)
	}
	return s.check(ctx)
}

// exists reports whether the schema has been made. It does not ask to_regclass, which
// remembers that a table was not there until the transaction ends.
func (s *postgresStore) exists(ctx context.Context, tx *sql.Tx) (exists bool, err error) {
	err = tx.QueryRowContext(ctx, `SELECT EXISTS (
		SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relname = 'inkit_queue_schema')`, s.name).Scan(&exists)
	return exists, err
}

func (s *postgresStore) makeSchema(ctx context.Context, tx *sql.Tx) error {
	var exists bool
	err := tx.QueryRowContext(ctx, `SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)`, s.name).Scan(&exists)
	if err == nil && !exists {
		_, err = tx.ExecContext(ctx, `CREATE SCHEMA `+pgx.Identifier{s.name}.Sanitize())
	}
	return err
}

// rights are what the role needs.
var rights = []struct{ table, right string }{
	{"inkit_queue_events", "SELECT"},
	{"inkit_queue_events", "INSERT"},
	{"inkit_queue_events", "UPDATE"},
	{"inkit_queue_events", "DELETE"},
	{"inkit_queue_backends", "SELECT"},
	{"inkit_queue_backends", "INSERT"},
	{"inkit_queue_backends", "UPDATE"},
	{"inkit_queue_counts", "SELECT"},
	{"inkit_queue_counts", "UPDATE"},
}

// check says what the role lacks now, and not when it is needed, and refuses a table
// that would be empty after a crash of the server.
func (s *postgresStore) check(ctx context.Context) error {
	var lacks []string
	for _, r := range rights {
		var has sql.NullBool
		if err := s.read.QueryRowContext(ctx, `SELECT has_table_privilege(to_regclass($1)::oid, $2)`, s.dialect.schema+r.table, r.right).Scan(&has); err != nil {
			return s.wrap(err)
		}
		if !has.Valid {
			return fmt.Errorf("the table %s is missing", r.table)
		}
		if !has.Bool {
			lacks = append(lacks, r.right+" on "+r.table)
		}
	}
	if lacks != nil {
		return fmt.Errorf("the role lacks the right to %s", strings.Join(lacks, ", "))
	}
	var persistence string
	err := s.read.QueryRowContext(ctx, `SELECT relpersistence::text FROM pg_class WHERE oid = to_regclass($1)`, s.dialect.schema+"inkit_queue_events").Scan(&persistence)
	if err == nil && persistence != "p" {
		return errors.New("the table inkit_queue_events is unlogged: a crash of the server would empty it")
	}
	return s.wrap(err)
}

// notice hears that a commit returns though no standby has confirmed it, because
// somebody on the server has ended the wait. For the client it looks like any other.
func (s *postgresStore) notice(_ *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine == "SyncRepWaitForLSN" {
		s.unsynced.Add(1)
	}
}

// Apply is of Store.
func (s *postgresStore) Apply(ctx context.Context, b *Batch) (err error) {
	for range 3 {
		if err = s.applyOnce(ctx, b); !errors.Is(err, errConflict) {
			return err
		}
	}
	return err
}

func (s *postgresStore) applyOnce(ctx context.Context, b *Batch) error {
	timeout := answerTimeout
	if len(b.Add) > 0 && len(b.Finish) > 0 { // so that there is time to add without them, should one of their rows be locked
		timeout = mixedTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	unsynced := s.unsynced.Load()
	err := s.sqlStore.Apply(ctx, b)
	if err == nil && s.unsynced.Load() != unsynced {
		err = errors.New("no standby has confirmed the commit: somebody has ended the wait for it")
	}
	return err
}

// Peek is of Store.
func (s *postgresStore) Peek(ctx context.Context, queue string) (Peek, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	p, err := s.sqlStore.Peek(ctx, queue)
	if err == nil {
		s.mu.Lock()
		s.down[queue] = p.Down
		s.mu.Unlock()
	}
	return p, err
}

// notify tells the other Caddys of a queue in which an event is due that they may
// take, or of which the backend is back. Notifying holds a lock of the whole server
// until the commit is through, so there is none for an event that this Caddy has
// begun to deliver, as it has with nearly all, and none while the backend is down.
func (s *postgresStore) notify(ctx context.Context, tx *sql.Tx, b *Batch) error {
	queues := make(map[string]bool)
	for _, r := range b.Add {
		if r.Lease == 0 && r.Delay == 0 {
			queues[r.Queue] = true
		}
	}
	for _, f := range b.Finish {
		if f.Outcome == Released || f.Outcome == Unbegun {
			queues[f.Queue] = true
		}
	}
	s.mu.Lock()
	for queue := range queues {
		if s.down[queue] {
			delete(queues, queue)
		}
	}
	s.mu.Unlock()
	for _, backend := range b.Backends {
		if !backend.Down {
			queues[backend.Queue] = true
		}
	}
	for queue := range queues {
		if _, err := tx.ExecContext(ctx, `SELECT pg_notify($1, $2)`, channel, s.name+" "+queue); err != nil {
			return err
		}
	}
	return nil
}

// Listen has heard called with the name of each queue of which another Caddy says that
// an event is due, until Close. An empty name stands for all. A pooler may keep what
// is said from coming through, which costs no more than the time until the next poll.
func (s *postgresStore) Listen(heard func(queue string)) {
	s.running.Go(func() {
		for s.ctx.Err() == nil && s.listen(heard) {
			select {
			case <-time.After(answerTimeout):
			case <-s.ctx.Done():
			}
		}
	})
}

// listen listens on a connection of its own, and reports whether to try again.
func (s *postgresStore) listen(heard func(queue string)) (again bool) {
	ctx, cancel := context.WithTimeout(s.ctx, answerTimeout)
	defer cancel()
	config, err := s.opener.config(ctx)
	if err != nil {
		return true
	}
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return true
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx)
	}()
	// A pooler makes up the number of its process. What listens would be a connection to
	// the server that is somebody else's a moment later.
	var pid uint32
	if err := conn.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
		return true
	}
	if pid != conn.PgConn().PID() {
		return false
	}
	if _, err := conn.Exec(ctx, `LISTEN `+channel); err != nil {
		return true
	}
	heard("") // what was said before
	for s.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
		notification, err := conn.WaitForNotification(ctx)
		cancel()
		switch {
		case err == nil:
			if queue, ok := strings.CutPrefix(notification.Payload, s.name+" "); ok {
				heard(queue)
			}
		case conn.IsClosed():
			return true
		default:
			ctx, cancel := context.WithTimeout(s.ctx, answerTimeout)
			err := conn.Ping(ctx)
			cancel()
			if err != nil {
				return true
			}
		}
	}
	return false
}

// SharedCounts returns what one of the Caddys has counted for all, and counts if it is
// time for that: pause says how long it is until the next time, by what it has taken.
func (s *postgresStore) SharedCounts(ctx context.Context, pause func(took time.Duration) time.Duration) (counts []Count, err error) {
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	// whoever changes the row counts, and has a minute for it
	mine, err := s.exec(short, `UPDATE {schema}inkit_queue_counts SET next = {now} + 60000 WHERE next <= {now} OR next > {now} + `+milliseconds(maxCountPause), nil)
	if err != nil {
		return nil, err
	}
	if mine > 0 {
		began := time.Now()
		if counts, err = s.Counts(ctx); err != nil {
			return nil, err
		}
		stored, err := json.Marshal(counts)
		if err != nil {
			return nil, err
		}
		_, err = s.exec(ctx, `UPDATE {schema}inkit_queue_counts SET counts = $1, counted = {now}, next = {now} + CAST($2 AS BIGINT)`,
			[]any{string(stored), pause(time.Since(began)).Milliseconds()})
		return counts, err
	}
	var stored []byte
	var age int64
	err = s.read.QueryRowContext(short, s.text(`SELECT counts, {now} - counted FROM {schema}inkit_queue_counts`)).Scan(&stored, &age)
	if err != nil {
		return nil, s.wrap(err)
	}
	err = json.Unmarshal(stored, &counts)
	for i := range counts {
		counts[i].Oldest += time.Duration(max(0, age)) * time.Millisecond
	}
	return counts, err
}

// Retry is of Store.
func (s *postgresStore) Retry(ctx context.Context, filter Filter) (int, error) {
	n, err := s.sqlStore.Retry(ctx, filter)
	if err == nil && n > 0 {
		_, err = s.exec(ctx, `SELECT pg_notify($1, $2)`, []any{channel, s.name + " "})
	}
	return n, err
}

// Close is of Store.
func (s *postgresStore) Close() error {
	s.cancel()
	s.running.Wait()
	err := s.write.Close()
	closed := make(chan struct{})
	go func() {
		s.pool.Close() // which waits for a server that does not answer
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(connectTimeout):
	}
	return err
}

// errConflict says that a transaction was undone because of another one.
var errConflict = errors.New("the transaction was in conflict with another one")

// lost are the states (SQLSTATE) of a server that is not there any more for those who
// write: it ends, it starts, or it has become a standby.
var lost = []string{"25006", "57P01", "57P02", "57P03"}

// wrap says what an error means, in words that show nothing of the connection string
// and of events. A connection that is of no use any more takes the others with it:
// they are to the same server.
func (s *postgresStore) wrap(err error) error {
	if err == nil {
		return nil
	}
	for _, code := range lost {
		if isSQLState(err, code) {
			s.pool.Reset()
		}
	}
	if errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err) {
		s.pool.Reset()
	}
	return wrapPostgres(err)
}

func isSQLState(err error, code string) bool {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pgErr.Code == code
}

// shownError is an error whose text may be shown.
type shownError struct{ text string }

func (e shownError) Error() string { return e.text }

func wrapPostgres(err error) error {
	if _, ok := errors.AsType[shownError](err); ok || errors.Is(err, ErrNewer) || errors.Is(err, ErrOlder) {
		return err
	}
	var texts []string
	for _, cause := range causes(err) {
		if text := postgresCause(cause); !slices.Contains(texts, text) {
			texts = append(texts, text)
		}
	}
	text := shownError{strings.Join(texts, "; ")}
	switch {
	case isSQLState(err, "53100"):
		return fmt.Errorf("%w: %w", ErrFull, text)
	case isSQLState(err, "40001"), isSQLState(err, "40P01"):
		return fmt.Errorf("%w: %w", errConflict, text)
	case errors.Is(err, context.Canceled):
		return context.Canceled
	}
	return text
}

// causes returns the errors that err has joined, one for each server that was tried,
// or err itself.
func causes(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if joined, ok := e.(interface{ Unwrap() []error }); ok {
			var all []error
			for _, one := range joined.Unwrap() {
				all = append(all, causes(one)...)
			}
			return all
		}
	}
	return []error{err}
}

// postgresCause says what is wrong. What the driver says of a connection has the
// host, the role and the database in it, and what the server says of a value the value.
func postgresCause(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch code := pgErr.Code; {
		case code == "28P01":
			return "the server refuses the role: wrong password, or none"
		case code == "3D000":
			return "the server has no database of that name"
		case code == "25006":
			return "the server is read-only, as a standby is"
		case code == "53300":
			return "the server has no connection left"
		case strings.HasPrefix(code, "28"):
			return "the server refuses the role: it is not known, or pg_hba.conf does not let it in from here (SQLSTATE " + code + ")"
		case strings.HasPrefix(code, "22"), strings.HasPrefix(code, "23"):
			return "the server refuses a value (SQLSTATE " + code + ")"
		case strings.HasPrefix(code, "08"):
			return "the server, or a pooler, refuses the connection (SQLSTATE " + code + ")"
		}
		return pgErr.Message + " (SQLSTATE " + pgErr.Code + ")"
	}
	if dnsErr, ok := errors.AsType[*net.DNSError](err); ok {
		if dnsErr.IsNotFound {
			return "the host of the server is not known"
		}
		return "the host of the server cannot be looked up"
	}
	_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
	_, other := errors.AsType[x509.HostnameError](err)
	_, invalid := errors.AsType[x509.CertificateInvalidError](err)
	opErr, _ := errors.AsType[*net.OpError](err)
	switch {
	case unknown:
		return "the server's certificate is from an authority that is not trusted"
	case other:
		return "the server's certificate is for another name"
	case invalid:
		return "the server's certificate is not valid, or not any more"
	case opErr != nil && opErr.Op == "remote error": // what crypto/tls makes of an alert
		return "the server refuses TLS, or the client's certificate"
	case errors.Is(err, pgconn.ErrReadOnlyConnection):
		return "the server is read-only, as a standby is"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return "the server refuses the connection: it does not run, or does not listen there"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "there is no way to the server"
	case errors.Is(err, context.DeadlineExceeded), pgconn.Timeout(err):
		return "the server does not answer in time"
	case strings.Contains(err.Error(), "server refused TLS connection"):
		return "the server does not speak TLS"
	case errors.Is(err, sql.ErrNoRows):
		return "a row is missing that was made with the tables"
	}
	return "the connection to the server broke, or cannot be made"
}

// Interface guards
var (
	_ Opener                = (*Postgres)(nil)
	_ caddy.Provisioner     = (*Postgres)(nil)
	_ caddy.Validator       = (*Postgres)(nil)
	_ caddyfile.Unmarshaler = (*Postgres)(nil)
	_ listener              = (*postgresStore)(nil)
	_ sharer                = (*postgresStore)(nil)
)
