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

// The codes of errors without a SQLSTATE: no server has answered.
const (
	unknownHost = "unknown host"
	refused     = "refused"
	timedOut    = "timed out"
	readOnly    = "25006" // has a SQLSTATE too
)

// lost has the codes of a server that does not answer or accept writes: it hangs, stops,
// starts, or is now a standby.
var lost = []string{timedOut, readOnly, "57P01", "57P02", "57P03"}

// hints explains common errors to operators. The driver's own text says enough about others.
var hints = map[string]string{
	"28P01":     "wrong password, or none",
	"28000":     "the role is unknown, or pg_hba.conf does not let it in from here",
	readOnly:    "the server is read-only, as a standby is",
	unknownHost: "the host of the server is not known, or cannot be looked up",
	refused:     "the server does not run, or does not listen there",
	timedOut:    "the server does not answer in time",
}

// code returns the SQLSTATE of an error, or a code from above, or "".
func code(err error) string {
	pgErr, fromServer := errors.AsType[*pgconn.PgError](err)
	_, noHost := errors.AsType[*net.DNSError](err)
	switch {
	case fromServer:
		return pgErr.Code
	case noHost:
		return unknownHost
	case errors.Is(err, pgconn.ErrReadOnlyConnection):
		return readOnly
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return refused
	case errors.Is(err, context.DeadlineExceeded), pgconn.Timeout(err):
		return timedOut
	}
	return ""
}

// wrap translates an error of the driver. If one connection is lost, it closes all
// connections, because they lead to the same server.
//
// The driver's text shows host and role of a failed connection, but not the password. If the
// server refused a value, wrap leaves out the text: it could show a part of an event.
func (s *database) wrap(err error) error {
	if err == nil {
		return err
	}
	state := code(err)
	if slices.Contains(lost, state) {
		s.pool.Reset()
	}
	text := strings.Join(strings.Fields(err.Error()), " ")
	if hint := hints[state]; hint != "" {
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
