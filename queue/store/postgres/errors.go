package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/jackc/pgx/v5/pgconn"
)

// lost has the SQLSTATEs of a server that does not accept writes, because the server stops,
// starts, or is now a standby.
var lost = []string{"25006", "57P01", "57P02", "57P03"}

const unanswered = "the server does not answer in time"

// explain returns the SQLSTATE of an error, and a hint. The SQLSTATE is empty if the error is
// not from the server. The hint is empty if the driver's own text says enough about the error.
func explain(err error) (state, hint string) {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		state = pgErr.Code
	}
	_, noHost := errors.AsType[*net.DNSError](err)
	switch {
	case state == "28P01":
		hint = "wrong password, or none"
	case state == "28000":
		hint = "the role is unknown, or pg_hba.conf does not let it in from here"
	case state == "25006", errors.Is(err, pgconn.ErrReadOnlyConnection):
		hint = "the server is read-only, as a standby is"
	case state != "":
	case noHost:
		hint = "the host of the server is not known, or cannot be looked up"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		hint = "the server does not run, or does not listen there"
	case errors.Is(err, context.DeadlineExceeded), pgconn.Timeout(err):
		hint = unanswered
	}
	return state, hint
}

// wrap translates an error of the driver. If one connection is lost, wrap closes all
// connections, because all lead to the same server.
//
// The driver's text shows host and role of a failed connection, but not the password. If the server
// refused a value, wrap leaves out the driver's text, because it could show a part of an event.
func (s *database) wrap(err error) error {
	if err == nil {
		return err
	}
	state, hint := explain(err)
	if hint == unanswered || slices.Contains(lost, state) {
		s.pool.Reset()
	}
	text := strings.Join(strings.Fields(err.Error()), " ")
	if hint != "" {
		text = hint + ": " + text
	}
	switch {
	case state == "53100":
		return fmt.Errorf("%w: %s", store.ErrFull, text)
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case strings.HasPrefix(state, "22"), strings.HasPrefix(state, "23"):
		return errors.New("the server refuses a value (SQLSTATE " + state + ")")
	}
	return errors.New(text)
}
