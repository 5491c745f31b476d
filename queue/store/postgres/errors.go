package postgres

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/jackc/pgx/v5/pgconn"
)

// errConflict means that the server has undone a transaction because of another one.
var errConflict = errors.New("the transaction was in conflict with another one")

// lost are the states (SQLSTATE) of a server that cannot be written to any more: it stops,
// it starts, or it has become a standby.
var lost = []string{"25006", "57P01", "57P02", "57P03"}

// shownError is an error whose text may be shown: it holds nothing of the connection
// string and of events.
type shownError struct{ text string }

func (e shownError) Error() string { return e.text }

// wrap translates an error of the driver. If one connection is of no use any more, neither
// are the others, which are to the same server.
func (s *database) wrap(err error) error {
	if err == nil {
		return nil
	}
	if slices.ContainsFunc(lost, func(code string) bool { return isSQLState(err, code) }) ||
		errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err) {
		s.pool.Reset()
	}
	return wrap(err)
}

func isSQLState(err error, code string) bool {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pgErr.Code == code
}

func wrap(err error) error {
	if _, ok := errors.AsType[shownError](err); ok || errors.Is(err, store.ErrNewer) || errors.Is(err, store.ErrOlder) {
		return err
	}
	text := shownError{describe(err)}
	switch {
	case isSQLState(err, "53100"):
		return fmt.Errorf("%w: %w", store.ErrFull, text)
	case isSQLState(err, "40001"), isSQLState(err, "40P01"):
		return fmt.Errorf("%w: %w", errConflict, text)
	case errors.Is(err, context.Canceled):
		return context.Canceled
	}
	return text
}

// hints are for the states of a server that operators meet.
var hints = map[string]string{
	"28P01": "wrong password, or none",
	"28000": "the role is unknown, or pg_hba.conf does not let it in from here",
	"3D000": "there is no such database",
	"25006": "the server is read-only, as a standby is",
	"53300": "the server has no connection left",
	"08P01": "a pooler or the server refuses the connection",
}

// describe returns the driver's own text, after a hint for the errors that operators meet.
// The text of a connection that cannot be made shows host, role and database, and never the
// password. The text of a refused value could show a part of an event, and is left out.
func describe(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		if strings.HasPrefix(pgErr.Code, "22") || strings.HasPrefix(pgErr.Code, "23") {
			return "the server refuses a value (SQLSTATE " + pgErr.Code + ")"
		}
		if hint := hints[pgErr.Code]; hint != "" {
			return hint + ": " + text
		}
		return text
	}
	if hint := connectionHint(err); hint != "" {
		return hint + ": " + text
	}
	return text
}

func connectionHint(err error) string {
	_, unknownAuthority := errors.AsType[x509.UnknownAuthorityError](err)
	_, otherName := errors.AsType[x509.HostnameError](err)
	_, noHost := errors.AsType[*net.DNSError](err)
	opErr, _ := errors.AsType[*net.OpError](err)
	switch {
	case unknownAuthority:
		return "the server's certificate is from an authority that is not trusted"
	case otherName:
		return "the server's certificate is for another name"
	case noHost:
		return "the host of the server is not known, or cannot be looked up"
	case opErr != nil && opErr.Op == "remote error": // an alert of TLS
		return "the server refuses TLS, or the client's certificate"
	case errors.Is(err, pgconn.ErrReadOnlyConnection):
		return hints["25006"]
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return "the server does not run, or does not listen there"
	case errors.Is(err, context.DeadlineExceeded), pgconn.Timeout(err):
		return "the server does not answer in time"
	}
	return ""
}
