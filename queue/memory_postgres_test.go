//go:build linux

package queue

import (
	"testing"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/pgtest"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/postgres"
)

func TestOnceAnswersInPostgreSQL(t *testing.T) {
	server := pgtest.Start(t, "fsync=off")
	onceAnswers(t, func(t *testing.T) store.Opener {
		return &postgres.Postgres{DSN: server.DSN(server.NewDatabase(t))}
	})
}
