//go:build linux

package queue_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/storetest"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
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

func limitedDSN(server *pgtest.Server, database, role string) string {
	return strings.Replace(server.DSN(database), "postgres:"+pgtest.Password, role+":"+pgtest.Password, 1)
}

// limited makes a role, and returns the connection string of it.
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
	t.Parallel()
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
					require.ErrorContains(t, err, "the server does not answer in time")
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

func TestPostgresWritesToTheDisk(t *testing.T) {
	server := pgtest.Start(t, "synchronous_commit=off", "synchronous_standby_names=nobody")
	bouncer := server.Bouncer(t)
	for configured, want := range map[string]string{"off": "on", "local": "on", "remote_write": "on", "on": "on", "remote_apply": "remote_apply"} {
		for _, port := range []string{server.Port, bouncer} {
			t.Run(fmt.Sprintf("%s on the server, by port %s", configured, port), func(t *testing.T) {
				name := server.NewDatabase(t)
				// no transaction waits for the standby that is not there: its triggers undo it
				server.Exec(t, name, "ALTER DATABASE "+name+" SET synchronous_commit = "+configured,
					"SET synchronous_commit = local; "+(&queue.Postgres{}).Migration(),
					`CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''it is %'', current_setting(''synchronous_commit''); END'`,
					"CREATE TRIGGER fail BEFORE INSERT OR DELETE OR UPDATE ON inkit_queue_events FOR EACH STATEMENT EXECUTE FUNCTION fail()")
				p := opener(strings.Replace(server.DSN(name), server.Port, port, 1))
				store := openPostgres(t, p)
				require.EqualError(t, add(store, newRecord("a")), "it is "+want+" (SQLSTATE P0001)")
				_, err := store.Retry(t.Context(), queue.Filter{Dead: true})
				require.EqualError(t, err, "it is "+want+" (SQLSTATE P0001)")
			})
		}
	}

	t.Run("nobody is told of what no standby has confirmed", func(t *testing.T) {
		name := server.NewDatabase(t)
		server.Exec(t, name, "SET synchronous_commit = local; "+(&queue.Postgres{}).Migration())
		store := openPostgres(t, opener(server.DSN(name)))
		began := time.Now()
		require.EqualError(t, add(store, newRecord("a")), "the server does not answer in time")
		assert.Less(t, time.Since(began), 6*time.Second)
		failed := make(chan error)
		go func() { failed <- add(store, newRecord("b")) }()
		require.Eventually(t, func() bool {
			return server.Query(t, name, `SELECT count(*)::text FROM (SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'commit') c`) != "0"
		}, 4*time.Second, 10*time.Millisecond)
		require.EqualError(t, <-failed, "no standby has confirmed the commit: somebody has ended the wait for it")
		// both are there, though: whoever reads them may deliver them
		assert.Equal(t, "2", server.Query(t, name, "SELECT count(*)::text FROM inkit_queue_events"))
	})
}

func TestPostgresTellsOthers(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	listening := func(t *testing.T, dsn string) (store queue.Store, heard chan string) {
		t.Helper()
		heard = make(chan string, 100)
		store = openPostgres(t, opener(dsn))
		store.(interface{ Listen(func(string)) }).Listen(func(queue string) { heard <- queue })
		return store, heard
	}
	next := func(t *testing.T, heard chan string) string {
		t.Helper()
		select {
		case queue := <-heard:
			return queue
		case <-time.After(10 * time.Second):
			require.FailNow(t, "nothing is heard")
			return ""
		}
	}
	store := openPostgres(t, opener(server.DSN(name)))
	_, heard := listening(t, server.DSN(name))
	assert.Empty(t, next(t, heard), "all, at first")

	leased, later, due := newRecord("leased"), newRecord("later"), newRecord("due")
	leased.Lease, later.Delay, due.Queue = time.Minute, time.Minute, "other"
	leased.Queue, later.Queue = "quiet", "quiet"
	require.NoError(t, add(store, leased, later, due))
	assert.Equal(t, "other", next(t, heard), "what is due, and none that another one has or that is due later")
	require.NoError(t, store.Apply(t.Context(), &queue.Batch{Owner: "me", Finish: []queue.Finish{{ID: "leased", Queue: "released", Outcome: queue.Released}}}))
	assert.Equal(t, "released", next(t, heard))

	require.NoError(t, store.Apply(t.Context(), &queue.Batch{Owner: "me", Backends: []queue.Backend{{Queue: "default", Down: true}}}))
	_, err := store.Peek(t.Context(), "default")
	require.NoError(t, err)
	require.NoError(t, add(store, newRecord("for nobody, as the backend is down")))
	require.NoError(t, store.Apply(t.Context(), &queue.Batch{Owner: "me", Backends: []queue.Backend{{Queue: "back"}}}))
	assert.Equal(t, "back", next(t, heard))

	_, err = store.Retry(t.Context(), queue.Filter{IDs: []string{"due"}})
	require.NoError(t, err)
	assert.Empty(t, next(t, heard), "a command means all")

	server.Exec(t, name, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'`)
	assert.Empty(t, next(t, heard), "all, as something may have been missed")
	assert.Empty(t, heard)

	t.Run("but not behind a pooler", func(t *testing.T) {
		dsn := strings.Replace(server.DSN(name), server.Port, server.Bouncer(t), 1)
		store, heard := listening(t, dsn)
		require.NoError(t, store.Apply(t.Context(), &queue.Batch{Owner: "me", Backends: []queue.Backend{{Queue: "back"}}}))
		require.NoError(t, store.Close())
		assert.Empty(t, heard)
		assert.Equal(t, "0", server.Query(t, name, `SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND client_port IN (SELECT client_port FROM pg_stat_activity WHERE application_name LIKE '%bouncer%')`))
	})
}

func TestPostgresCountsOnceForAll(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	one, other := openPostgres(t, opener(server.DSN(name))), openPostgres(t, opener(server.DSN(name)))
	paused := 0
	count := func(store queue.Store, pause time.Duration) []queue.Count {
		t.Helper()
		counts, err := store.(sharer).SharedCounts(t.Context(), func(took time.Duration) time.Duration {
			assert.Positive(t, took)
			paused++
			return pause
		})
		require.NoError(t, err)
		return counts
	}
	require.NoError(t, add(one, newRecord("a")))
	counts := count(one, time.Second)
	require.Len(t, counts, 1)
	assert.Equal(t, 1, counts[0].Events)
	require.NoError(t, add(one, newRecord("b")))
	time.Sleep(20 * time.Millisecond)
	again := count(other, 0)
	assert.Equal(t, 1, paused, "the other one reads what was counted")
	require.Len(t, again, 1)
	assert.Equal(t, 1, again[0].Events)
	assert.Greater(t, again[0].Oldest, counts[0].Oldest, "which grows older")
	assert.Less(t, again[0].Oldest, 20*time.Second)
	require.Eventually(t, func() bool { return count(other, time.Hour)[0].Events == 2 }, 20*time.Second, 50*time.Millisecond)
	assert.Equal(t, 2, paused)
}

func TestPostgresCredentialsThatChange(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	file := filepath.Join(t.TempDir(), "dsn")
	require.NoError(t, os.WriteFile(file, []byte(limited(t, server, name, "rotated")+"\n"), 0o600))
	server.Exec(t, name, "GRANT CREATE ON SCHEMA public TO rotated")
	p := opener("{file." + file + "}")
	key := p.Key()
	store := openPostgres(t, p)
	require.NoError(t, add(store, newRecord("a")))

	server.Exec(t, name, "ALTER ROLE rotated PASSWORD 'n3w-pw'", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'")
	require.Eventually(t, func() bool {
		err := add(store, newRecord("b"))
		return err != nil && err.Error() == "the server refuses the role: wrong password, or none"
	}, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, os.WriteFile(file, []byte(strings.Replace(limitedDSN(server, name, "rotated"), pgtest.Password, "n3w-pw", 1)), 0o600))
	require.NoError(t, add(store, newRecord("c")))
	assert.Equal(t, key, p.Key())
	assert.NotContains(t, key, file)
}

// What the documentation says of a connection by TLS and of where a password may stand.
func TestPostgresConnecting(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	authority := pgtest.NewAuthority(t)
	server.Exec(t, name, "CREATE ROLE certified LOGIN", "CREATE ROLE known LOGIN PASSWORD '"+pgtest.Password+"'", "GRANT CREATE ON SCHEMA public TO certified")
	server.Exec(t, name, (&queue.Postgres{}).Migration(), "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO certified, known")
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
		want string // an error; none if it is empty
	}{
		"a client's certificate":           {address + " user=certified" + trusted + " sslcert=" + certificate + " sslkey=" + key, ""},
		"no certificate of the client's":   {address + " user=certified" + trusted, "the server refuses the role"},
		"a certificate that nobody knows":  {address + " user=certified" + trusted + " sslcert=" + foreign + " sslkey=" + foreignKey, "the server refuses TLS, or the client's certificate"},
		"a certificate for another role":   {address + " user=known" + trusted + " sslcert=" + certificate + " sslkey=" + key, "the server refuses the role: wrong password, or none"},
		"an authority that is not trusted": {address + " user=certified sslmode=verify-full sslrootcert=" + pgtest.NewAuthority(t).File, "the server's certificate is from an authority that is not trusted"},
		"a certificate for another name":   {strings.Replace(address, "127.0.0.1", "localhost", 1) + " user=known" + trusted, "the server's certificate is for another name"},
		"the authority alone": {strings.Replace(address, "127.0.0.1", "localhost", 1) + " user=known sslmode=verify-ca sslrootcert=" + authority.File +
			" password=" + pgtest.Password, ""},
		"no TLS where the server insists":          {address + " user=known sslmode=disable password=" + pgtest.Password, "pg_hba.conf does not let it in from here"},
		"a file of passwords":                      {address + " user=known" + trusted + " passfile=" + passwords, ""},
		"a file of passwords that is not there":    {address + " user=known" + trusted + " passfile=" + passwords + ".none", "the server refuses the role: wrong password, or none"},
		"a service":                                {"service=inkit servicefile=" + services + trusted + " password=" + pgtest.Password, ""},
		"two servers of which the first is away":   {strings.Replace(address, "host=127.0.0.1 port=", "host=127.0.0.1,127.0.0.1 port=1,", 1) + " user=known" + trusted + " passfile=" + anywhere, ""},
		"a certificate of the client's and no TLS": {address + " user=certified sslmode=disable sslcert=" + certificate + " sslkey=" + key, "pg_hba.conf does not let it in from here"},
	} {
		t.Run(name, func(t *testing.T) {
			store, err := opener(tt.dsn).Open(t.Context())
			if tt.want != "" {
				require.ErrorContains(t, err, tt.want)
				assert.NotContains(t, err.Error(), dir)
				assert.NotContains(t, err.Error(), "127.0.0.1")
				return
			}
			require.NoError(t, err)
			assert.NoError(t, add(store, newRecord(name)))
			assert.NoError(t, store.Close())
		})
	}
	t.Run("the variables of libpq", func(t *testing.T) {
		for name, value := range map[string]string{
			"PGHOST": "127.0.0.1", "PGPORT": server.Port, "PGDATABASE": name, "PGUSER": "known",
			"PGPASSFILE": passwords, "PGSSLMODE": "verify-full", "PGSSLROOTCERT": authority.File,
		} {
			t.Setenv(name, value)
		}
		require.NoError(t, add(openPostgres(t, opener("application_name=caddy")), newRecord("variables")))
	})
}

// A role that may do what the documentation says, and no more.
func TestPostgresRoleWithFourRights(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	name := server.NewDatabase(t)
	server.Exec(t, name, (&queue.Postgres{Schema: "In kit"}).Migration())
	dsn := limited(t, server, name, "runner")
	server.Exec(t, name, `GRANT USAGE ON SCHEMA "In kit" TO runner`, `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "In kit" TO runner`)
	storetest.Run(t, func(t *testing.T) storetest.Database {
		server.Exec(t, name, `TRUNCATE "In kit".inkit_queue_events, "In kit".inkit_queue_backends`, `UPDATE "In kit".inkit_queue_schema SET version = 1`)
		return storetest.Database{Opener: &queue.Postgres{DSN: dsn, Schema: "In kit"}, Exec: func(t *testing.T, statement string) {
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
			store, err := (&queue.Postgres{DSN: server.DSN(name), Schema: "inkit"}).Open(context.Background())
			if assert.NoError(t, err) {
				assert.NoError(t, store.Close())
			}
		})
	}
	wg.Wait()
	assert.Equal(t, "1", server.Query(t, name, "SELECT count(*)::text FROM inkit.inkit_queue_schema"))

	made, printed := server.NewDatabase(t), server.NewDatabase(t)
	require.NoError(t, openPostgres(t, opener(server.DSN(made))).Close())
	server.Exec(t, printed, (&queue.Postgres{}).Migration())
	const columns = `SELECT string_agg(c.relname || coalesce(a.attname || format_type(a.atttypid, a.atttypmod) || a.attnotnull::text, '') || coalesce(c.reloptions::text, ''), ' ' ORDER BY c.relname, a.attnum)
		FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 WHERE c.relname LIKE 'inkit%'`
	assert.Equal(t, server.Query(t, made, columns), server.Query(t, printed, columns), "what migrate --print shows is what is made")
}

// Two transactions that wait for each other: PostgreSQL undoes one, which is done again.
func TestPostgresConflict(t *testing.T) {
	server := pgtest.Start(t, "fsync=off", "deadlock_timeout=500ms")
	name := server.NewDatabase(t)
	store := openPostgres(t, opener(server.DSN(name)))
	a, b := newRecord("a"), newRecord("b")
	require.NoError(t, add(store, a, b))
	conn, err := pgx.Connect(t.Context(), server.DSN(name))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), "BEGIN; UPDATE inkit_queue_events SET attempts = 7 WHERE id = 'b'")
	require.NoError(t, err)
	done := make(chan error)
	go func() {
		done <- store.Apply(context.Background(), &queue.Batch{Owner: "me", Add: []*queue.Record{newRecord("c")}, Finish: []queue.Finish{
			{ID: "a", Queue: "default", Outcome: queue.Delivered}, {ID: "b", Queue: "default", Outcome: queue.Later, LastError: "status 500"},
		}})
	}()
	require.Eventually(t, func() bool {
		return server.Query(t, name, `SELECT count(*)::text FROM pg_locks WHERE NOT granted`) == "1"
	}, 4*time.Second, time.Millisecond)
	_, err = conn.Exec(t.Context(), "UPDATE inkit_queue_events SET attempts = 8 WHERE id = 'a'; COMMIT")
	require.NoError(t, err, "the one that has waited for longer is undone")
	require.NoError(t, <-done)
	assert.Contains(t, server.Log(), "deadlock detected")
	assert.Equal(t, "b 7 status 500, c 0 ", server.Query(t, name, `SELECT string_agg(id || ' ' || attempts || ' ' || last_error, ', ' ORDER BY id) FROM inkit_queue_events`))
}

func TestPostgresDiskFull(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	dir := filepath.Join(server.Dir, "small")
	server.Mount(t, dir, "12m")
	server.Exec(t, "postgres", "CREATE TABLESPACE small LOCATION '"+dir+"'", "CREATE DATABASE small TABLESPACE small")
	server.Exec(t, "small", "CREATE TABLE filler AS SELECT generate_series(1, 20000)")
	store := openPostgres(t, opener(server.DSN("small")))
	var err error
	n := 0
	for ; err == nil && n < 1000; n++ {
		r := newRecord(fmt.Sprint(n))
		r.Request = make([]byte, 64<<10)
		_, _ = rand.Read(r.Request)
		err = add(store, r)
	}
	require.ErrorIs(t, err, queue.ErrFull)
	require.ErrorContains(t, err, "No space left on device")
	assert.NotContains(t, err.Error(), pgtest.Password)
	for i := range n {
		require.NoError(t, store.Apply(t.Context(), &queue.Batch{Owner: "me", Finish: []queue.Finish{{ID: fmt.Sprint(i), Queue: "default", Outcome: queue.Delivered}}}), "deleting works")
	}
	server.Exec(t, "small", "DROP TABLE filler", "VACUUM inkit_queue_events") // which takes some room too
	require.NoError(t, add(store, newRecord("again")))
}

func TestPostgresCaddyfile(t *testing.T) {
	t.Setenv("QUEUE_DSN", "postgres://role:c0nf1d3nt1al@host/database")
	t.Setenv("QUEUE_BROKEN", "postgres://role:c0nf1d3nt1al@host:c0nf1d3nt1al/database")
	for name, tt := range map[string]struct {
		store, want string // the JSON, or a part of the error
	}{
		"a placeholder":              {"store postgres {env.QUEUE_DSN}", `{"dsn":"{env.QUEUE_DSN}","module":"postgres"}`},
		"a placeholder and a schema": {"store postgres {env.QUEUE_DSN} {\n schema inkit\n }", `{"dsn":"{env.QUEUE_DSN}","module":"postgres","schema":"inkit"}`},
		"a text in the block":        {"store postgres {\n dsn postgres://c0nf1d3nt1al@host/database\n }", `{"dsn":"postgres://c0nf1d3nt1al@host/database","module":"postgres"}`},
		"a text in quotes":           {"store postgres {\n dsn \"host=host password=c0nf1d3nt1al\"\n }", `{"dsn":"host=host password=c0nf1d3nt1al","module":"postgres"}`},

		"nothing":                         {"store postgres", "dsn: is required"},
		"a text on its own line":          {"store postgres postgres://c0nf1d3nt1al@host/database", "store: postgres takes a placeholder in braces"},
		"a text in the place of the kind": {"store postgres://c0nf1d3nt1al@host/database", "store: takes the kind of a database first"},
		"two placeholders":                {"store postgres {env.QUEUE_DSN} {env.c0nf1d3nt1al}", "store: postgres takes one placeholder at most"},
		"a connection string twice":       {"store postgres {env.QUEUE_DSN} {\n dsn c0nf1d3nt1al\n }", "dsn: must not be repeated"},
		"spaces without quotes":           {"store postgres {\n dsn host=host password=c0nf1d3nt1al\n }", "dsn: takes one value, in quotes"},
		"an unknown word":                 {"store postgres {env.QUEUE_DSN} {\n c0nf1d3nt1al\n }", "store: postgres must hold dsn and schema only"},
		"a variable that is unset":        {"store postgres {env.c0nf1d3nt1al}", "dsn: environment variable is unset or empty"},
		"a file that is missing":          {"store postgres {file./c0nf1d3nt1al}", "dsn: file cannot be read: no such file or directory"},
		"what is no connection string":    {"store postgres {\n dsn postgres//c0nf1d3nt1al@host\n }", "dsn: cannot be parsed as a connection string of PostgreSQL"},
		"a port that is none":             {"store postgres {env.QUEUE_BROKEN}", "dsn: cannot be used: invalid port"},
		"a certificate that is missing":   {"store postgres {\n dsn \"host=c0nf1d3nt1al sslmode=verify-full sslrootcert=/c0nf1d3nt1al\"\n }", "dsn: names a file that cannot be read: no such file or directory"},
		"a mode that is none":             {"store postgres {\n dsn \"host=c0nf1d3nt1al sslmode=c0nf1d3nt1al\"\n }", "dsn: cannot be used: failed to configure TLS"},
		"a placeholder within a text":     {"store postgres {\n dsn postgres://role:{env.c0nf1d3nt1al}@host/database\n }", "dsn: must be either one placeholder and nothing else"},
		"a way that Caddy does not know":  {"store postgres {\n dsn ${c0nf1d3nt1al}\n }", "dsn: stands for a text in a way that Caddy does not know"},
		"a schema that is too long":       {"store postgres {env.QUEUE_DSN} {\n schema " + strings.Repeat("s", 64) + "\n }", "schema: must be the name of one"},
	} {
		t.Run(name, func(t *testing.T) {
			adapter := caddyconfig.GetAdapter("caddyfile")
			config, _, err := adapter.Adapt([]byte("http://localhost:1\nroute {\ninkit_queue {\n"+tt.store+"\ndeliver {\nrespond 200\n}\n}\n}\n"), nil)
			if err == nil {
				var c caddy.Config
				require.NoError(t, json.Unmarshal(config, &c))
				err = caddy.Validate(&c)
			}
			if strings.HasPrefix(tt.want, "{") {
				require.NoError(t, err)
				assert.Contains(t, string(config), `"store":`+tt.want)
				return
			}
			require.ErrorContains(t, err, tt.want)
			assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		})
	}
}
