package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/jackc/pgx/v5/pgconn"
)

// The variable "lost" has the SQLSTATEs of a server that does not accept writes, because the
// server stops, starts, or is now a standby.
var lost = []string{"25006", "57P01", "57P02", "57P03"}

// sqlState returns the SQLSTATE of an error. It is empty if the error is not from the server.
func sqlState(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pgErr.Code
	}
	return ""
}

// wrap translates an error of the driver. If the server does not answer or accepts no writes, wrap
// closes all connections, because all connections lead to the same server.
//
// The driver's text shows host and role of a failed connection, but not the password. If the server
// refused a value, wrap leaves out the driver's text, because it could show a part of an event.
func (s *database) wrap(err error) error {
	if err == nil {
		return err
	}
	state, text := sqlState(err), strings.Join(strings.Fields(err.Error()), " ")
	unanswered := errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err)
	if unanswered {
		text = "the server does not answer in time: " + text
	}
	if unanswered || slices.Contains(lost, state) {
		s.pool.Reset()
	}
	switch {
	case state == "53100":
		return fmt.Errorf("%w: %s", store.ErrFull, text)
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case strings.HasPrefix(state, "22"), strings.HasPrefix(state, "23"):
		pgErr, _ := errors.AsType[*pgconn.PgError](err)
		return fmt.Errorf("the server refuses a value (SQLSTATE %s, constraint %q)", state, pgErr.ConstraintName)
	}
	return errors.New(text)
}
