//go:build linux

package postgres_test

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/postgres"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/storetest"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) {
	// Parallel tests mostly wait for a server, so run more tests than the machine has
	// processors. -parallel on the command line overrides this number.
	if err := flag.Set("test.parallel", "24"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	flag.Parse()
	os.Exit(m.Run())
}

func TestPostgresIsAStore(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	suite := func(t *testing.T, port, schema string) {
		storetest.Run(t, func(t *testing.T) storetest.Database {
			name := server.NewDatabase(t)
			return storetest.Database{
				Opener: &postgres.Postgres{DSN: strings.Replace(server.DSN(name), ":"+server.Port+"/", ":"+port+"/", 1), Schema: schema},
				Exec: func(t *testing.T, statement string) {
					t.Helper()
					server.Exec(t, name, statement)
				},
			}
		})
	}
	t.Run("without a pooler", func(t *testing.T) { suite(t, server.Port, "") })
	t.Run("behind pgbouncer in transaction mode", func(t *testing.T) { suite(t, server.Bouncer(t), "") })
}

func opener(dsn string) *postgres.Postgres { return &postgres.Postgres{DSN: dsn} }

func openPostgres(t *testing.T, p *postgres.Postgres) store.Store {
	t.Helper()
	s, err := p.Open(t.Context(), store.Opening{Logger: zap.NewNop()})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func newRecord(id string) *store.Record {
	return &store.Record{ID: id, Queue: "default", Received: time.Now(), Request: []byte("request"), Checksum: []byte("checksum")}
}

func add(s store.Store, records ...*store.Record) error {
	return s.Apply(context.Background(), &store.Batch{Owner: "me", Add: records})
}

func limitedDSN(server *pgtest.Server, database, role string) string {
	return strings.Replace(server.DSN(database), "postgres:"+pgtest.Password, role+":"+pgtest.Password, 1)
}

// The function "limited" creates a role, and returns a connection string for this role.
func limited(t *testing.T, server *pgtest.Server, database, role string) string {
	t.Helper()
	server.Exec(t, database, "CREATE ROLE "+role+" LOGIN PASSWORD '"+pgtest.Password+"'")
	return limitedDSN(server, database, role)
}

func TestPostgresThatCannotBeUsed(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	made := func(t *testing.T, statements ...string) (name string) { // a database with the tables
		name = server.NewDatabase(t)
		require.NoError(t, openPostgres(t, opener(server.DSN(name))).Close())
		server.Exec(t, name, statements...)
		return name
	}
	for name, tt := range map[string]struct {
		dsn  func(t *testing.T) string
		want string
	}{
		"a wrong password": {func(t *testing.T) string {
			return strings.Replace(server.DSN("postgres"), pgtest.Password, pgtest.Password+"-old", 1)
		}, "password authentication failed for user"},
		"an unknown role": {func(t *testing.T) string {
			return strings.Replace(server.DSN("postgres"), "//postgres:", "//nobody:", 1)
		}, "password authentication failed for user"},
		"an unknown host": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "127.0.0.1", "unknown.invalid", 1)
		}, "lookup unknown.invalid"},
		"an unknown database": {func(*testing.T) string { return server.DSN("nothing") }, `database "nothing" does not exist`},
		"a server that is not running": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), ":"+server.Port+"/", ":1/", 1)
		}, "connect: connection refused"},
		"two servers that are not running": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "127.0.0.1:"+server.Port, "127.0.0.1:1,unknown.invalid:1", 1)
		}, "lookup unknown.invalid"},
		"a server without TLS": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "disable", "require", 1)
		}, "server refused TLS connection"},
		"a read-only server": {func(t *testing.T) string {
			name := made(t)
			server.Exec(t, name, "ALTER DATABASE "+name+" SET default_transaction_read_only = on")
			return server.DSN(name)
		}, "read only connection"},
		"a role without the right to create tables": {func(t *testing.T) string {
			name := server.NewDatabase(t)
			return limited(t, server, name, "maker")
		}, `permission denied for schema public (SQLSTATE 42501): the role is not allowed to create the tables: with another role, run the SQL that caddy inkit-queue migrate prints`},
		"a role without the right to delete": {func(t *testing.T) string {
			name := made(t)
			dsn := limited(t, server, name, "reader")
			server.Exec(t, name, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", "GRANT INSERT, UPDATE, DELETE ON inkit_queue_history, inkit_queue_once, inkit_queue_paused TO reader", "GRANT INSERT, UPDATE ON inkit_queue_events TO reader")
			return dsn
		}, "the role lacks the right to DELETE on inkit_queue_events"},
		"a missing table": {func(t *testing.T) string {
			return server.DSN(made(t, "DROP TABLE inkit_queue_events"))
		}, "the table inkit_queue_events is missing"},
		"a schema of an older version": {func(t *testing.T) string {
			return server.DSN(made(t, "UPDATE inkit_queue_schema SET version = 0"))
		}, "the database has the schema of another version: 0, and this Caddy needs 1"},
		"a schema of a newer version": {func(t *testing.T) string {
			return server.DSN(made(t, "UPDATE inkit_queue_schema SET version = 2"))
		}, "the database has the schema of another version: 2, and this Caddy needs 1"},
		"a schema without a version": {func(t *testing.T) string {
			return server.DSN(made(t, "DELETE FROM inkit_queue_schema"))
		}, "no rows in result set"},
		"an unlogged table": {func(t *testing.T) string {
			return server.DSN(made(t, "ALTER TABLE inkit_queue_events SET UNLOGGED"))
		}, "the table inkit_queue_events is unlogged: a crash of the server would empty it"},
		"an encoding other than UTF8": {func(t *testing.T) string {
			server.Exec(t, "postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
			return server.DSN("latin")
		}, "the database has the encoding LATIN1, and must have UTF8"},
		"a search path without an existing schema": {func(t *testing.T) string {
			name := server.NewDatabase(t)
			server.Exec(t, name, "ALTER DATABASE "+name+" SET search_path = nowhere")
			return server.DSN(name)
		}, "no schema in the role's search path exists: set schema"},
		"a row-level security that hides events": {func(t *testing.T) string {
			name := made(t, "ALTER TABLE inkit_queue_events ENABLE ROW LEVEL SECURITY")
			dsn := limited(t, server, name, "hidden")
			server.Exec(t, name, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO hidden")
			return dsn
		}, "row-level security is on for the table inkit_queue_events, and could hide events from the role"},
	} {
		t.Run(name, func(t *testing.T) {
			dsn := tt.dsn(t)
			_, err := opener(dsn).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
			require.ErrorContains(t, err, tt.want)
			assert.NotContains(t, fmt.Sprintf("%v %+v", err, err), pgtest.Password)
		})
	}
}

// proxy forwards messages between a client and the server. After the client has sent its
// allowed number of messages, the proxy drops all further messages of that connection.
type proxy struct {
	net.Listener
	server string
	may    atomic.Int64 // messages that the client may still send
	hung   atomic.Bool
}

func newProxy(t *testing.T, server string, may int) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{Listener: l, server: server}
	p.may.Store(int64(may))
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go p.pass(client)
		}
	}()
	return p
}

func (p *proxy) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", "127.0.0.1:"+p.server)
	if err != nil {
		return
	}
	defer server.Close()
	var swallow atomic.Bool
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			if err != nil {
				if !swallow.Load() {
					client.Close()
				}
				return
			}
			if !swallow.Load() {
				_, _ = client.Write(buf[:n])
			}
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		if err != nil {
			return
		}
		if p.may.Add(-1) == -1 {
			swallow.Store(true)
			p.hung.Store(true)
		}
		if !swallow.Load() {
			_, _ = server.Write(buf[:n])
		}
	}
}

func (p *proxy) dsn(dsn string) string {
	_, port, _ := net.SplitHostPort(p.Addr().String())
	return strings.Replace(dsn, ":"+p.server+"/", ":"+port+"/", 1)
}

// The server may stop answering after any message. The store must then give up the
// connection, and the next transaction must succeed on another connection.
func TestPostgresConnectionThatHangs(t *testing.T) {
	t.Parallel()
	const giveUp = 5*time.Second + 1500*time.Millisecond // a timeout, and a margin
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	require.NoError(t, openPostgres(t, opener(server.DSN(name))).Close())

	t.Run("while opening", func(t *testing.T) {
		t.Parallel()
		for may := range 20 {
			p := newProxy(t, server.Port, may)
			t.Run(fmt.Sprint("after ", may), func(t *testing.T) {
				t.Parallel()
				began := time.Now()
				s, err := opener(p.dsn(server.DSN(name))).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
				assert.Less(t, time.Since(began), 2*giveUp)
				if err == nil {
					defer s.Close()
				} else {
					require.ErrorContains(t, err, "the server does not answer in time")
					s, err = opener(p.dsn(server.DSN(name))).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
					require.NoError(t, err)
					defer s.Close()
				}
			})
		}
	})
	for _, tt := range []struct {
		what string
		do   func(s store.Store, id string) error
	}{
		{"in a transaction", func(s store.Store, id string) error {
			return s.Apply(context.Background(), &store.Batch{
				Owner: "me", Add: []*store.Record{newRecord(id)},
				Finish: []store.Finish{{ID: id, Queue: "default", Outcome: store.Delivered}},
				Claims: []*store.Claim{{Queue: id, Max: 1, Lease: time.Minute}},
			})
		}},
		{"in a peek", func(s store.Store, id string) error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // as the queue does
			defer cancel()
			_, err := s.Peek(ctx, "default")
			return err
		}},
	} {
		p := newProxy(t, server.Port, 1000)
		s := openPostgres(t, opener(p.dsn(server.DSN(server.NewDatabase(t)))))
		before := p.may.Load()
		require.NoError(t, tt.do(s, "a"))
		says := int(before - p.may.Load()) // messages of the client
		t.Logf("%s the client speaks %d times", tt.what, says)
		for may := range says {
			t.Run(fmt.Sprint(tt.what, " after ", may), func(t *testing.T) {
				t.Parallel()
				name := server.NewDatabase(t) // a new database, so that no other transaction locks its rows
				p := newProxy(t, server.Port, 1000)
				s := openPostgres(t, opener(p.dsn(server.DSN(name))))
				p.may.Store(int64(may))
				began := time.Now()
				err := tt.do(s, "a")
				assert.Less(t, time.Since(began), giveUp)
				require.True(t, p.hung.Load())
				require.ErrorContains(t, err, "the server does not answer in time")
				began = time.Now()
				require.NoError(t, tt.do(s, "b"), "on another connection")
				assert.Less(t, time.Since(began), 2500*time.Millisecond)
			})
		}
	}
}

func TestPostgresWritesToTheDisk(t *testing.T) {
	server := pgtest.Start(t, "synchronous_commit=off", "synchronous_standby_names=nobody")
	bouncer := server.Bouncer(t)
	for configured, want := range map[string]string{"off": "on", "local": "on", "remote_write": "on", "on": "on", "remote_apply": "remote_apply"} {
		for _, port := range []string{server.Port, bouncer} {
			t.Run(fmt.Sprintf("%s on the server, by port %s", configured, port), func(t *testing.T) {
				name := server.NewDatabase(t)
				// triggers undo each transaction, so that no transaction waits for the missing standby
				server.Exec(t, name, "ALTER DATABASE "+name+" SET synchronous_commit = "+configured,
					"SET synchronous_commit = local; "+(&postgres.Postgres{}).Migration(),
					`CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''it is %'', current_setting(''synchronous_commit''); END'`,
					"CREATE TRIGGER fail BEFORE INSERT OR DELETE OR UPDATE ON inkit_queue_events FOR EACH STATEMENT EXECUTE FUNCTION fail()")
				p := opener(strings.Replace(server.DSN(name), server.Port, port, 1))
				s := openPostgres(t, p)
				require.EqualError(t, add(s, newRecord("a")), "ERROR: it is "+want+" (SQLSTATE P0001)")
				_, err := s.Retry(t.Context(), store.Filter{States: []string{store.Dead}})
				require.EqualError(t, err, "ERROR: it is "+want+" (SQLSTATE P0001)")
			})
		}
	}

	t.Run("a commit that no standby has confirmed is an error", func(t *testing.T) {
		name := server.NewDatabase(t)
		server.Exec(t, name, "SET synchronous_commit = local; "+(&postgres.Postgres{}).Migration(), "ALTER DATABASE "+name+" SET client_min_messages = error")
		s := openPostgres(t, opener(server.DSN(name)))
		began := time.Now()
		require.ErrorContains(t, add(s, newRecord("a")), "the server does not answer in time")
		assert.Less(t, time.Since(began), 6*time.Second)
		failed := make(chan error)
		go func() { failed <- add(s, newRecord("b")) }()
		for err := error(nil); err == nil; { // the query may cancel the wait of event a before event b waits, so repeat the query
			server.Query(t, name, `SELECT count(*)::text FROM (SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'commit') c`)
			select {
			case err = <-failed:
				require.EqualError(t, err, "no standby has confirmed the commit: the wait for it was cancelled on the server")
			case <-time.After(10 * time.Millisecond):
			}
		}
		assert.Eventually(t, func() bool { // the server may still end the transaction of event a
			return server.Query(t, name, "SELECT count(*)::text FROM inkit_queue_events") == "2"
		}, 20*time.Second, 50*time.Millisecond, "both events are stored anyway: any process may deliver them")
	})
}

func TestPostgresCredentialsThatChange(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	file := filepath.Join(t.TempDir(), "dsn")
	require.NoError(t, os.WriteFile(file, []byte(limited(t, server, name, "rotated")+"\n"), 0o600))
	server.Exec(t, name, "GRANT CREATE ON SCHEMA public TO rotated")
	p := opener("{file." + file + "}")
	key := p.Key()
	s := openPostgres(t, p)
	require.NoError(t, add(s, newRecord("a")))

	server.Exec(t, name, "ALTER ROLE rotated PASSWORD 'n3w-pw'", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'")
	require.Eventually(t, func() bool {
		err := add(s, newRecord("b"))
		return err != nil && strings.Contains(err.Error(), "password authentication failed")
	}, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, os.WriteFile(file, []byte(strings.Replace(limitedDSN(server, name, "rotated"), pgtest.Password, "n3w-pw", 1)), 0o600))
	require.NoError(t, add(s, newRecord("c")))
	assert.Equal(t, key, p.Key())
	assert.NotContains(t, key, file)
}

// The documented settings for TLS and passwords work.
func TestPostgresConnecting(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	authority := pgtest.NewAuthority(t)
	server.Exec(t, name, "CREATE ROLE certified LOGIN", "CREATE ROLE known LOGIN PASSWORD '"+pgtest.Password+"'", "GRANT CREATE ON SCHEMA public TO certified")
	server.Exec(t, name, (&postgres.Postgres{}).Migration(), "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO certified, known")
	server.TLS(t, authority,
		"hostssl all certified 127.0.0.1/32 cert", "hostssl all known 127.0.0.1/32 scram-sha-256")
	certificate, key := authority.Issue(t, "certified")
	foreign, foreignKey := pgtest.NewAuthority(t).Issue(t, "certified")
	dir := t.TempDir()
	write := func(name, content string) (path string) {
		path = filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	passwords := write("pgpass", "127.0.0.1:"+server.Port+":"+name+":known:"+pgtest.Password+"\n")
	anywhere := write("pgpass-anywhere", "*:*:"+name+":known:"+pgtest.Password+"\n")
	services := write("services", "[inkit]\nhost=127.0.0.1\nport="+server.Port+"\ndbname="+name+"\nuser=known\n")

	address := "host=127.0.0.1 port=" + server.Port + " dbname=" + name
	trusted := " sslmode=verify-full sslrootcert=" + authority.File
	for name, tt := range map[string]struct {
		dsn  string
		want string // the error, empty if connecting works
	}{
		"a client certificate":                           {address + " user=certified" + trusted + " sslcert=" + certificate + " sslkey=" + key, ""},
		"no client certificate":                          {address + " user=certified" + trusted, "connection requires a valid client certificate"},
		"a client certificate from an unknown authority": {address + " user=certified" + trusted + " sslcert=" + foreign + " sslkey=" + foreignKey, "remote error: tls: unknown certificate authority"},
		"a client certificate for another role":          {address + " user=known" + trusted + " sslcert=" + certificate + " sslkey=" + key, "password authentication failed for user"},
		"a server certificate from an unknown authority": {address + " user=certified sslmode=verify-full sslrootcert=" + pgtest.NewAuthority(t).File, "x509: certificate signed by unknown authority"},
		"a server certificate for another name":          {strings.Replace(address, "127.0.0.1", "localhost", 1) + " user=known" + trusted, "x509: certificate is not valid for any names, but wanted to match localhost"},
		"another name with sslmode verify-ca": {strings.Replace(address, "127.0.0.1", "localhost", 1) + " user=known sslmode=verify-ca sslrootcert=" + authority.File +
			" password=" + pgtest.Password, ""},
		"no TLS, although the server requires it":   {address + " user=known sslmode=disable password=" + pgtest.Password, "no pg_hba.conf entry for host"},
		"a password file":                           {address + " user=known" + trusted + " passfile=" + passwords, ""},
		"a missing password file":                   {address + " user=known" + trusted + " passfile=" + passwords + ".none", "password authentication failed for user"},
		"a service file":                            {"service=inkit servicefile=" + services + trusted + " password=" + pgtest.Password, ""},
		"two servers, and only the second one runs": {strings.Replace(address, "host=127.0.0.1 port=", "host=127.0.0.1,127.0.0.1 port=1,", 1) + " user=known" + trusted + " passfile=" + anywhere, ""},
		"a client certificate without TLS":          {address + " user=certified sslmode=disable sslcert=" + certificate + " sslkey=" + key, "no pg_hba.conf entry for host"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := opener(tt.dsn).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
			for err != nil && strings.Contains(err.Error(), "connection reset by peer") { // on a busy machine, the reset arrives before the TLS alert
				s, err = opener(tt.dsn).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
			}
			if tt.want != "" {
				require.ErrorContains(t, err, tt.want)
				assert.NotContains(t, err.Error(), dir)
				assert.NotContains(t, err.Error(), pgtest.Password)
				return
			}
			require.NoError(t, err)
			assert.NoError(t, add(s, newRecord(name)))
			assert.NoError(t, s.Close())
		})
	}
	t.Run("the environment variables of libpq", func(t *testing.T) {
		for name, value := range map[string]string{
			"PGHOST": "127.0.0.1", "PGPORT": server.Port, "PGDATABASE": name, "PGUSER": "known",
			"PGPASSFILE": passwords, "PGSSLMODE": "verify-full", "PGSSLROOTCERT": authority.File,
		} {
			t.Setenv(name, value)
		}
		require.NoError(t, add(openPostgres(t, opener("application_name=caddy")), newRecord("variables")))
	})
}

// A role needs only the documented rights.
func TestPostgresRoleWithFourRights(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	limited(t, server, "postgres", "runner")
	storetest.Run(t, func(t *testing.T) storetest.Database {
		name := server.NewDatabase(t)
		server.Exec(t, name, (&postgres.Postgres{Schema: "In kit"}).Migration(),
			`GRANT USAGE ON SCHEMA "In kit" TO runner`, `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "In kit" TO runner`)
		return storetest.Database{Opener: &postgres.Postgres{DSN: limitedDSN(server, name, "runner"), Schema: "In kit"}, Exec: func(t *testing.T, statement string) {
			t.Helper()
			server.Exec(t, name, strings.ReplaceAll(statement, "inkit_queue_", `"In kit".inkit_queue_`))
		}}
	})
}

func TestPostgresSchemaIsMadeOnce(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			s, err := (&postgres.Postgres{DSN: server.DSN(name), Schema: "inkit"}).Open(context.Background(), store.Opening{Logger: zap.NewNop()})
			if assert.NoError(t, err) {
				assert.NoError(t, s.Close())
			}
		})
	}
	wg.Wait()
	assert.Equal(t, "1", server.Query(t, name, "SELECT count(*)::text FROM inkit.inkit_queue_schema"))

	made, printed := server.NewDatabase(t), server.NewDatabase(t)
	require.NoError(t, openPostgres(t, opener(server.DSN(made))).Close())
	server.Exec(t, printed, (&postgres.Postgres{}).Migration())
	const columns = `SELECT string_agg(c.relname || coalesce(a.attname || format_type(a.atttypid, a.atttypmod) || a.attnotnull::text, '') || coalesce(c.reloptions::text, ''), ' ' ORDER BY c.relname, a.attnum)
		FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 WHERE c.relname LIKE 'inkit%'`
	assert.Equal(t, server.Query(t, made, columns), server.Query(t, printed, columns), "what migrate prints is what is made")
}

// A row that another transaction locks delays no other row. A later batch finishes the event of the row.
func TestPostgresLockedRow(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	s := openPostgres(t, opener(server.DSN(name)))
	leased := func(id string) *store.Record { r := newRecord(id); r.Lease = time.Minute; return r }
	require.NoError(t, add(s, leased("a"), leased("b"), leased("c"), leased("d")))
	conn, err := pgx.Connect(t.Context(), server.DSN(name))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), "BEGIN; UPDATE inkit_queue_events SET attempts = 7 WHERE id IN ('b', 'd')")
	require.NoError(t, err)
	finishes := []store.Finish{
		{ID: "a", Outcome: store.Delivered},
		{ID: "b", Outcome: store.Delivered},
		{ID: "gone", Outcome: store.Delivered},
		{ID: "c", Outcome: store.Later, After: time.Minute, LastError: "status 500"},
		{ID: "d", Outcome: store.Later, LastError: "status 501"},
	}
	b := &store.Batch{Owner: "me", Add: []*store.Record{newRecord("e")}, Finish: finishes}
	require.NoError(t, s.Apply(t.Context(), b))
	require.Len(t, b.Left, 2)
	assert.Equal(t, []string{"b", "d"}, []string{b.Left[0].ID, b.Left[1].ID})
	_, err = conn.Exec(t.Context(), "COMMIT")
	require.NoError(t, err)
	b = &store.Batch{Owner: "me", Finish: b.Left}
	require.NoError(t, s.Apply(t.Context(), b))
	assert.Empty(t, b.Left)
	assert.Equal(t, "c 0 status 500, d 7 status 501, e 0 ", server.Query(t, name, `SELECT string_agg(id || ' ' || attempts || ' ' || last_error, ', ' ORDER BY id) FROM inkit_queue_events`))
}

// A setting of the database or a trigger may not lose an event.
func TestPostgresSettingsAndTriggers(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	server.Exec(t, name, "ALTER DATABASE "+name+" SET bytea_output = escape")
	s := openPostgres(t, opener(server.DSN(name)))
	require.NoError(t, add(s, newRecord("a")))
	require.NoError(t, add(s, newRecord("a"), newRecord("b")), "an event that is there already")
	b := &store.Batch{Owner: "me", Claims: []*store.Claim{{Queue: "default", Max: 2, Lease: time.Minute}}}
	require.NoError(t, s.Apply(t.Context(), b))
	require.Len(t, b.Claims[0].Records, 2)
	assert.Equal(t, []byte("request"), b.Claims[0].Records[0].Request)

	server.Exec(t, name, `CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`,
		"CREATE TRIGGER nothing BEFORE INSERT ON inkit_queue_events FOR EACH ROW EXECUTE FUNCTION nothing()")
	require.EqualError(t, add(s, newRecord("c")), "the database has not added all events: remove the trigger or rule that prevents this")
	server.Exec(t, name, "DROP TRIGGER nothing ON inkit_queue_events", "CREATE TABLE audit (id TEXT REFERENCES inkit_queue_events)", "INSERT INTO audit VALUES ('a')")
	err := s.Apply(t.Context(), &store.Batch{Owner: "me", Finish: []store.Finish{{ID: "a", Outcome: store.Delivered}}})
	require.EqualError(t, err, `the server refuses a value (SQLSTATE 23503, constraint "audit_id_fkey")`)
}

func TestPostgresDiskFull(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	dir := filepath.Join(server.Dir, "small")
	server.Mount(t, dir, "12m")
	server.Exec(t, "postgres", "CREATE TABLESPACE small LOCATION '"+dir+"'", "CREATE DATABASE small TABLESPACE small")
	server.Exec(t, "small", "CREATE TABLE filler AS SELECT generate_series(1, 20000)")
	s := openPostgres(t, opener(server.DSN("small")))
	var err error
	n := 0
	for ; err == nil && n < 1000; n++ {
		r := newRecord(fmt.Sprint(n))
		r.Request = make([]byte, 64<<10)
		_, _ = rand.Read(r.Request)
		err = add(s, r)
	}
	require.ErrorIs(t, err, store.ErrFull)
	require.ErrorContains(t, err, "No space left on device")
	assert.NotContains(t, err.Error(), pgtest.Password)
	for i := range n {
		require.NoError(t, s.Apply(t.Context(), &store.Batch{Owner: "me", Finish: []store.Finish{{ID: fmt.Sprint(i), Queue: "default", Outcome: store.Delivered}}}), "deleting works")
	}
	server.Exec(t, "small", "DROP TABLE filler", "VACUUM inkit_queue_events") // these statements need some space too
	require.NoError(t, add(s, newRecord("again")))
}
