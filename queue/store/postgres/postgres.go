// Package postgres keeps the events of a queue in PostgreSQL.
package postgres

import (
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
}

// CaddyModule returns the Caddy module information.
func (Postgres) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "inkit_queue.stores.postgres",
		New: func() caddy.Module { return new(Postgres) },
	}
}

// Validate refuses a connection string that cannot be one.
func (p *Postgres) Validate() error {
	if p.DSN == "" {
		return errors.New("dsn: is required")
	}
	if len(p.Schema) > 63 || strings.ContainsRune(p.Schema, 0) {
		return errors.New("schema: must be the name of one, of 63 bytes at most")
	}
	_, err := p.config(nil)
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
		word := d.Val()
		value := map[string]*string{"dsn": &p.DSN, "schema": &p.Schema}[word]
		args := d.RemainingArgs()
		switch {
		case value == nil:
			return d.Err("store: postgres must hold dsn and schema only")
		case *value != "":
			return d.Err(word + ": must not be repeated")
		case len(args) != 1 || args[0] == "":
			return d.Err(word + ": takes one value, in quotes if there are spaces in it")
		}
		*value = args[0]
	}
	return nil
}

// Key is of store.Opener. It does not change with the value of a placeholder.
func (p *Postgres) Key() string {
	hash := sha256.Sum256([]byte(p.DSN + "\x00" + p.Schema))
	return fmt.Sprintf("postgres %x", hash[:6])
}

func (p *Postgres) Migration() string {
	var b strings.Builder
	b.WriteString("BEGIN;\n")
	if p.Schema != "" {
		fmt.Fprintf(&b, "CREATE SCHEMA IF NOT EXISTS %s;\n", pgx.Identifier{p.Schema}.Sanitize())
	}
	b.WriteString((&sqlstore.DB{Dialect: dialect(p.Schema)}).SchemaSQL() + "COMMIT;\n")
	return b.String()
}

const (
	// answerTimeout is how long a transaction may take: a connection that hangs must not
	// keep the others from being used.
	answerTimeout = 5 * time.Second

	// connectTimeout is how long one server may take to accept a connection, so that there
	// is time for the next, unless the connection string says otherwise.
	connectTimeout = 2 * time.Second

	// maxConnections is how many there may be, unless the connection string says otherwise.
	// Two to four are in use; but one that hangs stays for 15 s more, until the driver has
	// closed it.
	maxConnections = 20
)

var (
	embedded = regexp.MustCompile(`\{(\w+\.|\$)`)
	foreign  = regexp.MustCompile(`^(env\..*|file\..*|\$[\w:.]+|\$\{.*\}|\$\(.*\)|%\w+%)$`)
)

// config resolves and parses the connection string, and reads the files that it names.
func (p *Postgres) config(notice pgconn.NoticeHandler) (*pgxpool.Config, error) {
	dsn := p.DSN
	switch name, ok := placeholder.Name(dsn); {
	case ok:
		var err error
		if dsn, err = placeholder.Value(name); err != nil {
			return nil, errors.New("dsn: " + err.Error())
		}
	case foreign.MatchString(dsn):
		return nil, errors.New("dsn: stands for a text in a way that Caddy does not know: write {env.NAME} or {file./path}")
	case embedded.MatchString(dsn):
		return nil, errors.New("dsn: must be either one placeholder and nothing else, or a text without placeholders")
	}
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("dsn: " + parseFailure(err))
	}
	if !strings.Contains(dsn, "pool_max_conns") {
		config.MaxConns = maxConnections
	}
	c := config.ConnConfig
	c.OnNotice = notice
	// No statement outlives its transaction, which pgbouncer may give to any server.
	c.DefaultQueryExecMode = pgx.QueryExecModeExec
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

// knownFailures are the words of the driver that hold no part of the connection string.
var knownFailures = regexp.MustCompile("`: (failed to configure TLS|failed to read service|invalid port|invalid connect_timeout|" +
	`could not match \d+ port numbers to \d+ hosts|unknown target_session_attrs|unknown channel_binding|invalid require_auth)`)

// parseFailure says why a connection string cannot be parsed, and shows nothing of it,
// as the error does.
func parseFailure(err error) string {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return "names a file that cannot be read: " + pathErr.Err.Error()
	}
	if known := knownFailures.FindStringSubmatch(err.Error()); known != nil {
		return "cannot be used: " + known[1]
	}
	return "cannot be parsed as a connection string of PostgreSQL, such as postgres://role@host/database"
}
