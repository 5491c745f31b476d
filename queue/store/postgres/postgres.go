// Package postgres keeps the events of a queue in PostgreSQL.
package postgres

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlstore"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(Postgres{})
}

// Postgres keeps the events of a queue in PostgreSQL. Several Caddys can share the database.
//
// Each Caddy stores the events that it receives, and delivers due events of all Caddys.
// PostgreSQL must be version 12 or later. When a queue starts, Caddy creates missing tables.
// If Caddy's role may not create tables, run the SQL of `caddy inkit-queue migrate` with
// another role. Caddy's role needs SELECT, INSERT, UPDATE and DELETE on the tables.
//
// If the connection string names several servers, Caddy uses the server that accepts writes.
// Caddy can also use a pooler, such as pgbouncer in transaction mode.
type Postgres struct {
	// The connection string in the format of libpq, such as
	// `postgres://inkit@db1,db2/inkit?sslmode=verify-full`. It is either one placeholder and
	// nothing else, or a text without placeholders. Caddy resolves a placeholder again for
	// each new connection. Required.
	DSN string `json:"dsn,omitempty"`

	// The schema of the tables. Caddy creates a missing schema. Default: the first existing
	// schema in the role's search path.
	Schema string `json:"schema,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Postgres) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "inkit_queue.stores.postgres",
		New: func() caddy.Module { return new(Postgres) },
	}
}

// Validate refuses an invalid connection string.
func (p *Postgres) Validate() error {
	if p.DSN == "" {
		return errors.New("dsn: is required")
	}
	if strings.ContainsAny(p.Schema, "?{}'") {
		return errors.New("schema: must not contain ', ?, { or }")
	}
	_, err := p.config()
	return err
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens. Syntax:
//
//	store postgres [<placeholder>] {
//		dsn    <dsn>
//		schema <name>
//	}
//
// On the line of the option `store`, only a placeholder is allowed. Errors show no word of the
// input: each word may be a part of the connection string.
func (p *Postgres) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name of the store
	if args := d.RemainingArgs(); len(args) > 0 {
		if _, ok := placeholder.Name(args[0]); !ok || len(args) > 1 {
			return d.Err("store: postgres takes one placeholder in braces: write any other connection string as dsn in its block")
		}
		p.DSN = args[0]
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		word := d.Val()
		value := map[string]*string{"dsn": &p.DSN, "schema": &p.Schema}[word]
		args := d.RemainingArgs()
		switch {
		case value == nil:
			return d.Err("store: postgres takes only dsn and schema")
		case *value != "":
			return d.Err(word + ": must not be repeated")
		case len(args) != 1 || args[0] == "":
			return d.Err(word + ": takes one value, in quotes if there are spaces in it")
		}
		*value = args[0]
	}
	return nil
}

// Key implements store.Opener. The value of a placeholder does not change the key.
func (p *Postgres) Key() string {
	hash := sha256.Sum256([]byte(p.DSN + "\x00" + p.Schema))
	return fmt.Sprintf("postgres %x", hash[:6])
}

func (p *Postgres) Migration() string {
	begin := "BEGIN;\n"
	if p.Schema != "" {
		begin += "CREATE SCHEMA IF NOT EXISTS " + pgx.Identifier{p.Schema}.Sanitize() + ";\n"
	}
	return begin + (&sqlstore.DB{Dialect: dialect(p.Schema)}).SchemaSQL() + "COMMIT;\n"
}

const (
	// answerTimeout limits the time of a transaction, so that a hanging connection does not
	// block the other transactions.
	answerTimeout = 5 * time.Second

	// connectTimeout limits the time of connecting to one server, so that time is left for
	// the next server. The connection string can change this limit.
	connectTimeout = 2 * time.Second

	// maxConnections is the size of the pool. The connection string can change this size. A
	// store uses two to four connections. After its timeout, a hanging connection stays in the
	// pool until the driver has closed it, for up to 15 s.
	maxConnections = 20
)

var (
	embedded  = regexp.MustCompile(`\{(\w+\.|\$)`)
	parameter = regexp.MustCompile(`^\w[\w.]*$`)
)

var errInvalid = errors.New("dsn: is not a valid connection string of PostgreSQL, such as postgres://role@host/database: in a URL, write %40 for an @ in a password, and %2F for a /")

// config resolves and parses the connection string, and reads the files that the string
// names. The errors of config show no part of the string.
func (p *Postgres) config() (*pgxpool.Config, error) {
	dsn := p.DSN
	if name, ok := placeholder.Name(dsn); ok {
		var err error
		if dsn, err = placeholder.Value(name); err != nil {
			return nil, fmt.Errorf("dsn: %w", err)
		}
	} else if embedded.MatchString(dsn) {
		return nil, errors.New("dsn: must be either one placeholder and nothing else, or a text without placeholders")
	}
	config, err := pgxpool.ParseConfig(dsn)
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return nil, fmt.Errorf("dsn: names a file that cannot be read: %w", pathErr.Err)
	}
	if err != nil {
		return nil, errInvalid
	}
	c := config.ConnConfig
	names := []string{c.Host, c.Database}
	for _, fallback := range c.Fallbacks {
		names = append(names, fallback.Host)
	}
	if strings.Contains(dsn, "://") && strings.Contains(strings.Join(names, " "), "@") { // in a URL, the part before the @ is a part of a password with an unescaped @ or /
		return nil, errInvalid
	}
	for name := range c.RuntimeParams { // the parser accepts any text before a = as a name, and the server would show this text
		if !parameter.MatchString(name) {
			return nil, errInvalid
		}
	}
	if !strings.Contains(dsn, "pool_max_conns") {
		config.MaxConns = maxConnections
	}
	// Prepare no statements, because pgbouncer may run the next transaction in another
	// connection to the server.
	c.DefaultQueryExecMode = pgx.QueryExecModeExec
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, connectTimeout)
	if c.ValidateConnect == nil {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	c.RuntimeParams["application_name"] = cmp.Or(c.RuntimeParams["application_name"], "caddy inkit_queue")
	c.RuntimeParams["client_encoding"] = "UTF8"
	return config, nil
}
