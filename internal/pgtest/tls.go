//go:build linux

package pgtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Authority signs certificates.
type Authority struct {
	File string // the certificate of the authority

	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// NewAuthority creates an Authority in a temporary folder of the test.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{File: filepath.Join(t.TempDir(), "root.crt")}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "pgtest"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, key := a.sign(t, template)
	writePEM(t, a.File, "CERTIFICATE", der)
	a.key = key
	var err error
	a.certificate, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	return a
}

// sign creates a key, and a certificate for the key. The certificate is self-signed if the
// authority has no certificate yet.
func (a *Authority) sign(t testing.TB, template *x509.Certificate) (der []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err = x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(t, err)
	return der, key
}

// Issue creates a client certificate for a role. Without a role, it creates a server
// certificate for 127.0.0.1. Only the user who runs the tests may read the files.
func (a *Authority) Issue(t testing.TB, role string) (certificateFile, keyFile string) {
	t.Helper()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: role}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if role == "" {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, key := a.sign(t, template)
	dir := t.TempDir()
	certificateFile, keyFile = filepath.Join(dir, "crt"), filepath.Join(dir, "key")
	writePEM(t, certificateFile, "CERTIFICATE", der)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	writePEM(t, keyFile, "PRIVATE KEY", der)
	return certificateFile, keyFile
}

func writePEM(t testing.TB, file, kind string, der []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// TLS turns on TLS in the server, with a certificate of the authority. It writes a pg_hba.conf
// with which the role postgres can connect as before. The argument hba has its lines for other roles.
func (s *Server) TLS(t testing.TB, a *Authority, hba ...string) {
	t.Helper()
	certificate, key := a.Issue(t, "")
	write := func(name string, content []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(s.data(), name), content, 0o600)) //nolint:gosec // this function's own file names
	}
	for _, file := range [][2]string{{"server.crt", certificate}, {"server.key", key}, {"root.crt", a.File}} {
		content, err := os.ReadFile(file[1])
		require.NoError(t, err)
		write(file[0], content)
	}
	hba = append([]string{"host all postgres 127.0.0.1/32 scram-sha-256"}, hba...)
	write("pg_hba.conf", []byte(strings.Join(hba, "\n")+"\n"))
	unprivileged(t, new(exec.Cmd), s.data())
	s.Exec(t, "postgres", "ALTER SYSTEM SET ssl = on", "ALTER SYSTEM SET ssl_ca_file = 'root.crt'", "SELECT pg_reload_conf()")
	for deadline := time.Now().Add(20 * time.Second); s.Query(t, "postgres", "SELECT current_setting('ssl')") != "on"; time.Sleep(10 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "the server does not speak TLS: %s", s.Log())
	}
}
