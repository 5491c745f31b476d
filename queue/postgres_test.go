//go:build linux

package queue_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/storetest"
)

func TestPostgresIsAStore(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	suite := func(t *testing.T, port, schema string) {
		storetest.Run(t, func(t *testing.T) storetest.Database {
			name := server.NewDatabase(t)
			return storetest.Database{
				Opener: &queue.Postgres{DSN: strings.Replace(server.DSN(name), ":"+server.Port+"/", ":"+port+"/", 1), Schema: schema},
				Exec: func(t *testing.T, statement string) {
					t.Helper()
					server.Exec(t, name, statement)
				},
			}
		})
	}
	t.Run("alone", func(t *testing.T) { suite(t, server.Port, "") })
	t.Run("behind pgbouncer in transaction mode", func(t *testing.T) { suite(t, server.Bouncer(t), "") })
}

func opener(dsn string) *queue.Postgres { return &queue.Postgres{DSN: dsn} }

func openPostgres(t *testing.T, p *queue.Postgres) queue.Store {
	t.Helper()
	store, err := p.Open(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	return store
}

func newRecord(id string) *queue.Record {
	return &queue.Record{ID: id, Queue: "default", Received: time.Now(), Request: []byte("request"), Checksum: []byte("checksum")}
}

func add(store queue.Store, records ...*queue.Record) error {
	return store.Apply(context.Background(), &queue.Batch{Owner: "me", Add: records})
}

// limited makes a role, and returns the connection string of it.
func limited(t *testing.T, server *pgtest.Server, database, role string) string {
	t.Helper()
	server.Exec(t, database, "CREATE ROLE "+role+" LOGIN PASSWORD '"+pgtest.Password+"'")
	return strings.Replace(server.DSN(database), "postgres:"+pgtest.Password, role+":"+pgtest.Password, 1)
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
		is   error
	}{
		"a wrong password": {func(t *testing.T) string {
			return strings.Replace(server.DSN("postgres"), pgtest.Password, pgtest.Password+"-old", 1)
		}, "the server refuses the role: wrong password, or none", nil},
		"an unknown role": {func(t *testing.T) string {
			return strings.Replace(server.DSN("postgres"), "//postgres:", "//nobody:", 1)
		}, "the server refuses the role: wrong password, or none", nil},
		"an unknown host": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "127.0.0.1", "unknown.invalid", 1)
		}, "the host of the server", nil},
		"an unknown database": {func(*testing.T) string { return server.DSN("nothing") }, "the server has no database of that name", nil},
		"a server that is not running": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), ":"+server.Port+"/", ":1/", 1)
		}, "the server refuses the connection: it does not run, or does not listen there", nil},
		"two servers that are not running": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "127.0.0.1:"+server.Port, "127.0.0.1:1,unknown.invalid:1", 1)
		}, "the host of the server is not known; the server refuses the connection: it does not run, or does not listen there", nil},
		"a server without TLS": {func(*testing.T) string {
			return strings.Replace(server.DSN("postgres"), "disable", "require", 1)
		}, "the server does not speak TLS", nil},
		"a server that is read-only": {func(t *testing.T) string {
			name := made(t)
			server.Exec(t, name, "ALTER DATABASE "+name+" SET default_transaction_read_only = on")
			return server.DSN(name)
		}, "the server is read-only, as a standby is", nil},
		"a role that may not make tables": {func(t *testing.T) string {
			name := server.NewDatabase(t)
			return limited(t, server, name, "maker")
		}, `permission denied for schema public (SQLSTATE 42501): the role may not make the tables: run the SQL that caddy inkit-queue migrate --print shows`, nil},
		"a role without rights": {func(t *testing.T) string {
			name := made(t)
			dsn := limited(t, server, name, "reader")
			server.Exec(t, name, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", "GRANT INSERT, UPDATE ON inkit_queue_events TO reader")
			return dsn
		}, "the role lacks the right to DELETE on inkit_queue_events, INSERT on inkit_queue_backends, UPDATE on inkit_queue_backends, UPDATE on inkit_queue_counts", nil},
		"a table that is missing": {func(t *testing.T) string {
			return server.DSN(made(t, "DROP TABLE inkit_queue_backends"))
		}, "the table inkit_queue_backends is missing", nil},
		"a schema of an older version": {func(t *testing.T) string {
			return server.DSN(made(t, "UPDATE inkit_queue_schema SET version = 0"))
		}, "the database has the schema of an older version, which this one cannot migrate: 0, and this one needs 1", queue.ErrOlder},
		"a schema of a newer version": {func(t *testing.T) string {
			return server.DSN(made(t, "UPDATE inkit_queue_schema SET version = 2"))
		}, "the database has the schema of a later version: 2, and this one knows 1", queue.ErrNewer},
		"a schema without a version": {func(t *testing.T) string {
			return server.DSN(made(t, "DELETE FROM inkit_queue_schema"))
		}, "a row is missing that was made with the tables", nil},
		"a table that a crash would empty": {func(t *testing.T) string {
			return server.DSN(made(t, "ALTER TABLE inkit_queue_events SET UNLOGGED"))
		}, "the table inkit_queue_events is unlogged: a crash of the server would empty it", nil},
		"an encoding that cannot have every text": {func(t *testing.T) string {
			server.Exec(t, "postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
			return server.DSN("latin")
		}, "the database has the encoding LATIN1, and must have UTF8", nil},
		"a search path that leads nowhere": {func(t *testing.T) string {
			name := server.NewDatabase(t)
			server.Exec(t, name, "ALTER DATABASE "+name+" SET search_path = nowhere")
			return server.DSN(name)
		}, "no schema of the role's search path is there: name one", nil},
	} {
		t.Run(name, func(t *testing.T) {
			dsn := tt.dsn(t)
			_, err := opener(dsn).Open(t.Context())
			require.ErrorContains(t, err, tt.want)
			if tt.is != nil {
				require.ErrorIs(t, err, tt.is)
			}
			u, parseErr := url.Parse(dsn)
			require.NoError(t, parseErr)
			for _, secret := range []string{pgtest.Password, u.Host, u.Hostname(), "postgres:", u.Path[1:] + "?"} {
				assert.NotContains(t, fmt.Sprintf("%v %+v", err, err), secret)
			}
		})
	}
}

// proxy passes on what a client and the server say, until the client has spoken as many
// times as it may: from then on it swallows what comes on that connection.
type proxy struct {
	net.Listener
	server string
	may    atomic.Int64 // what is left
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

// A connection on which nothing comes back must be given up, whatever is on its way on
// it, and the next transaction must succeed on another one.
func TestPostgresConnectionThatHangs(t *testing.T) {
	const giveUp = 5*time.Second + 1500*time.Millisecond // a timeout, and what else it takes
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	require.NoError(t, openPostgres(t, opener(server.DSN(name))).Close())

	t.Run("while it is opened", func(t *testing.T) {
		t.Parallel()
		for may := range 20 {
			p := newProxy(t, server.Port, may)
			t.Run(fmt.Sprint("after ", may), func(t *testing.T) {
				t.Parallel()
				began := time.Now()
				store, err := opener(p.dsn(server.DSN(name))).Open(t.Context())
				assert.Less(t, time.Since(began), 2*giveUp)
				if err == nil {
					defer store.Close()
				} else {
					assert.ErrorContains(t, err, "the server does not answer in time")
					store, err = opener(p.dsn(server.DSN(name))).Open(t.Context())
					require.NoError(t, err)
					defer store.Close()
				}
			})
		}
	})
	for _, tt := range []struct {
		what string
		do   func(store queue.Store, id string) error
	}{
		{"in a transaction", func(store queue.Store, id string) error {
			return store.Apply(context.Background(), &queue.Batch{
				Owner: "me", Add: []*queue.Record{newRecord(id)},
				Finish:   []queue.Finish{{ID: id, Queue: "default", Outcome: queue.Delivered}},
				Backends: []queue.Backend{{Queue: id}},
				Claims:   []*queue.Claim{{Queue: id, Max: 1, Lease: time.Minute}, {Queue: id, Max: 1, Probe: true}},
			})
		}},
		{"in a look", func(store queue.Store, id string) error {
			_, err := store.Peek(context.Background(), "default")
			return err
		}},
		{"in a count", func(store queue.Store, _ string) error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_, err := store.(sharer).SharedCounts(ctx, func(time.Duration) time.Duration { return time.Hour })
			return err
		}},
	} {
		p := newProxy(t, server.Port, 1000)
		store := openPostgres(t, opener(p.dsn(server.DSN(server.NewDatabase(t)))))
		before := p.may.Load()
		require.NoError(t, tt.do(store, "a"))
		says := int(before - p.may.Load()) // how many times the client speaks
		t.Logf("%s the client speaks %d times", tt.what, says)
		for may := range says {
			t.Run(fmt.Sprint(tt.what, " after ", may), func(t *testing.T) {
				t.Parallel()
				name := server.NewDatabase(t) // whose rows no other transaction has locked
				p := newProxy(t, server.Port, 1000)
				store := openPostgres(t, opener(p.dsn(server.DSN(name))))
				p.may.Store(int64(may))
				began := time.Now()
				err := tt.do(store, "a")
				assert.Less(t, time.Since(began), giveUp)
				require.True(t, p.hung.Load())
				require.EqualError(t, err, "the server does not answer in time")
				began = time.Now()
				require.NoError(t, tt.do(store, "b"), "on another connection")
				assert.Less(t, time.Since(began), 2500*time.Millisecond)
			})
		}
	}
}

type sharer interface {
	SharedCounts(ctx context.Context, pause func(took time.Duration) time.Duration) ([]queue.Count, error)
}
