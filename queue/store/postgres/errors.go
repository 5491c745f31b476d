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

// lost has the codes (SQLSTATE) of a server that does not accept writes: the server stops,
// starts, or is now a standby.
var lost = []string{"25006", "57P01", "57P02", "57P03"}

// wrap translates an error of the driver. If one connection is lost, it closes all
// connections, because they lead to the same server.
func (s *database) wrap(err error) error {
	if err == nil || errors.Is(err, store.ErrVersion) {
		return err
	}
	state := sqlState(err)
	if slices.Contains(lost, state) || timedOut(err) {
		s.pool.Reset()
	}
	switch {
	case state == "53100":
		return fmt.Errorf("%w: %s", store.ErrFull, describe(err))
	case errors.Is(err, context.Canceled):
		return context.Canceled
	}
	return errors.New(describe(err))
}

func timedOut(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err)
}

// sqlState returns the SQLSTATE of an error from the server, "" for other errors.
func sqlState(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pgErr.Code
	}
	return ""
}

// hints explains common codes to operators.
var hints = map[string]string{
	"28P01": "wrong password, or none",
	"28000": "the role is unknown, or pg_hba.conf does not let it in from here",
	"3D000": "there is no such database",
	"25006": "the server is read-only, as a standby is",
	"53300": "the server has no connection left",
	"08P01": "a pooler or the server refuses the connection",
}

// describe returns the driver's text. For common errors, a hint comes first. If a connection
// failed, the text shows host, role and database, but not the password. If the server refused
// a value, describe leaves out the text: the text could show a part of an event.
func describe(err error) string {
	state := sqlState(err)
	if strings.HasPrefix(state, "22") || strings.HasPrefix(state, "23") {
		return "the server refuses a value (SQLSTATE " + state + ")"
	}
	text := strings.Join(strings.Fields(err.Error()), " ")
	hint := hints[state]
	if state == "" {
		hint = connectionHint(err)
	}
	if hint != "" {
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
	case opErr != nil && opErr.Op == "remote error": // a TLS alert from the server
		return "the server refuses TLS, or the client's certificate"
	case errors.Is(err, pgconn.ErrReadOnlyConnection):
		return hints["25006"]
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return "the server does not run, or does not listen there"
	case timedOut(err):
		return "the server does not answer in time"
	}
	return ""
}
