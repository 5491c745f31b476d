//go:build unix

package queue_test

import (
	"strings"
	"testing"

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
