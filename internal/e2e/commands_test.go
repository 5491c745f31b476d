//go:build unix

package e2e

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// webhookCommand runs caddy inkit-webhook and returns its output and exit status. The
// parameter secret is the value of INKIT_WEBHOOK_SECRET.
func webhookCommand(t *testing.T, secret, stdin string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := exec.Command(caddyPath, append([]string{"inkit-webhook"}, args...)...)
	cmd.Env = append(os.Environ(), "INKIT_WEBHOOK_SECRET="+secret, "HOME="+t.TempDir())
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit)
	}
	if secret != "" {
		assert.NotContains(t, out.String()+errs.String(), secret)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCommandSignsLikeOpenSSL(t *testing.T) {
	t.Parallel()
	needs(t, "openssl")
	files := size(1000, 100)
	if raceEnabled {
		files = 10 // with the race detector, a start of Caddy takes a second
	}
	dir := t.TempDir()
	secretFile := writeFile(t, dir+"/secret", secret+"\n")
	inParallel(2, files, func(i int) {
		content := make([]byte, rand.IntN(10_000))
		for i := range content {
			content[i] = byte(rand.Uint32())
		}
		file := fmt.Sprintf("%s/%d", dir, i)
		err := os.WriteFile(file, content, 0o600)
		if err != nil {
			t.Error(err)
			return
		}
		want, wantErr := exec.Command("openssl", "dgst", "-sha256", "-hmac", secret, "-r", file).Output()
		got, gotErr := exec.Command(caddyPath, "inkit-webhook", "sign", "--secret-file", secretFile, file).Output()
		if err := errors.Join(wantErr, gotErr); err != nil {
			t.Error(err)
			return
		}
		signature, _, _ := strings.Cut(string(want), " ")
		assert.Equal(t, signature+"\n", string(got))
	})
	t.Logf("%d files", files)
}

func TestCommandSign(t *testing.T) {
	body := string(event("doc_1"))
	want := sign(secret, []byte(body)) + "\n"
	dir := t.TempDir()
	file := writeFile(t, dir+"/body", body)
	windows := writeFile(t, dir+"/windows", secret+"\r\n")
	empty := writeFile(t, dir+"/empty", "\n")
	large := writeFile(t, dir+"/large", strings.Repeat("s", 1<<20+1))
	for _, tt := range []struct {
		name, secret, stdin string
		args                []string
		stdout, stderr      string
	}{
		{"a file", secret, "", []string{"sign", file}, want, ""},
		{"standard input", secret, body, []string{"sign"}, want, ""},
		{"standard input, by name", secret, body, []string{"sign", "-"}, want, ""},
		{"a secret file that ends as Windows has it", "other", body, []string{"sign", "--secret-file", windows}, want, ""},
		{"no secret", "", body, []string{"sign"}, "", "no secret: set INKIT_WEBHOOK_SECRET, or use --secret-file"},
		{"an empty secret file", "other", body, []string{"sign", "--secret-file", empty}, "", "secret-file: " + empty + ": file is empty"},
		{"a secret file above 1 MiB", "other", body, []string{"sign", "--secret-file", large}, "", "secret-file: " + large + ": file is larger than 1 MiB"},
		{"a missing secret file", "other", body, []string{"sign", "--secret-file", dir + "/none"}, "", "no such file or directory"},
		{"a missing file", secret, "", []string{"sign", dir + "/none"}, "", "no such file or directory"},
		{"two files", secret, "", []string{"sign", file, file}, "", "accepts at most 1 arg(s), received 2"},
		{"a secret on the command line", "", body, []string{"sign", "--secret", "x"}, "", "unknown flag: --secret"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := webhookCommand(t, tt.secret, tt.stdin, tt.args...)
			if tt.stderr == "" {
				assert.Zero(t, status)
				assert.Equal(t, tt.stdout, stdout)
				return
			}
			assert.Equal(t, 1, status)
			assert.Contains(t, stderr, tt.stderr)
			assert.Empty(t, stdout)
		})
	}
}

func TestCommandVerify(t *testing.T) {
	body := string(event("doc_1"))
	signature := sign(secret, []byte(body))
	dir := t.TempDir()
	file := writeFile(t, dir+"/body", body)
	old, current := writeFile(t, dir+"/old", "an older secret"), writeFile(t, dir+"/current", secret)
	for _, tt := range []struct {
		name, secret, stdin string
		args                []string
		status              int
		stdout              string
	}{
		{"a secret in the environment", secret, "", []string{"--signature", signature, file}, 0, "INKIT_WEBHOOK_SECRET\n"},
		{"the second of two files", "other", body, []string{"--signature", signature, "--secret-file", old, "--secret-file", current}, 0, current + "\n"},
		{"a body with a newline", secret, body + "\n", []string{"--signature", signature, "-"}, 1, "a newline was added at the end of the body\n"},
		{"upper case", secret, "", []string{"--signature", strings.ToUpper(signature), file}, 1, "the signature is in upper-case hexadecimal digits, and Inkit sends lower case\n"},
		{"an empty signature", secret, "", []string{"--signature", "", file}, 1, "Inkit-Signature is missing or empty: the request is not from Inkit, or a program on the way removed the header field\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := webhookCommand(t, tt.secret, tt.stdin, append([]string{"verify"}, tt.args...)...)
			assert.Equal(t, tt.status, status, stderr)
			assert.Equal(t, tt.stdout, stdout)
		})
	}
}

func TestCommandUsage(t *testing.T) {
	for _, tt := range []struct {
		name, stderr string
		args         []string
	}{
		{"an unknown command", `unknown command "explain" for "caddy inkit-webhook"`, []string{"explain"}},
		{"verify without a signature", `required flag(s) "signature" not set`, []string{"verify"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := webhookCommand(t, secret, "x", tt.args...)
			assert.Equal(t, 1, status)
			assert.Contains(t, stderr, tt.stderr)
			assert.Empty(t, stdout)
		})
	}
	stdout, _, status := webhookCommand(t, "", "")
	assert.Zero(t, status, "alone, it shows its help")
	assert.Contains(t, stdout, "Signs bodies as Inkit does")
}

// A hostile server can write escape sequences into its response, even into the status.
func TestCommandSendPrintsNothingThatATerminalObeys(t *testing.T) {
	l, err := net.Listen("tcp", freeAddr(t))
	require.NoError(t, err)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = http.ReadRequest(bufio.NewReader(conn))
		fmt.Fprint(conn, "HTTP/1.1 200 O\x1b[2JK\r\nConnection: close\r\n\r\none\x1b]0;title\x07\rtwo\u202e\u009b1m\nthree")
	}()
	stdout, stderr, status := webhookCommand(t, secret, "", "send", "http://"+l.Addr().String())
	require.Zero(t, status, stderr)
	assert.Equal(t, "200 O\ufffd[2JK\none\ufffd]0;title\ufffd\ufffdtwo\ufffd\ufffd1m\nthree\n", stdout)
}

func TestCommandSend(t *testing.T) {
	b := newBackend(t, good)
	c := startCaddy(t, "", strings.Replace(strings.ReplaceAll(bareSite, "UPSTREAMS", b.addr), "{\n", "{\n\tredir /moved http://"+b.addr+"/\n", 1))
	url := webhookURL(c, "/webhook")
	file := writeFile(t, t.TempDir()+"/body", "any bytes\x00")
	const onRate = "rate: must be from 0.001 to 1000000"

	t.Run("without the proxy of the environment", func(t *testing.T) {
		t.Setenv("HTTP_PROXY", "http://"+freeAddr(t))
		t.Setenv("http_proxy", "http://"+freeAddr(t))
		name := "guard.localhost" // for an IP address of loopback, Go never uses a proxy
		_, stderr, _ := webhookCommand(t, secret, "", "send", "http://"+name+":1/")
		assert.NotContains(t, stderr, "proxyconnect")
		assert.NotContains(t, stderr, os.Getenv("HTTP_PROXY")[len("http://"):])
	})
	t.Run("an event", func(t *testing.T) {
		stdout, stderr, status := webhookCommand(t, secret, "", "send", "--event-type", "MAIL_CREATE_FAILED", "--resource-id", `"<é>`, url)
		require.Zero(t, status, stderr)
		records := b.records()
		require.Len(t, records, 1)
		var got map[string]string
		require.NoError(t, json.Unmarshal(records[0].Body, &got))
		assert.Equal(t, map[string]string{"event_type": "MAIL_CREATE_FAILED", "resource_id": `"<é>`}, got)
		assert.Equal(t, fmt.Sprintf("200 OK\n%x\n", sha256.Sum256(records[0].Body)), stdout)
	})
	t.Run("a file, and standard input", func(t *testing.T) {
		_, stderr, status := webhookCommand(t, secret, "", "send", "--body", file, url)
		require.Zero(t, status, stderr)
		_, stderr, status = webhookCommand(t, secret, "any bytes\x00", "send", "--body", "-", url)
		require.Zero(t, status, stderr)
		records := b.records()
		require.Len(t, records, 3)
		assert.Equal(t, "any bytes\x00", string(records[1].Body))
		assert.Equal(t, "any bytes\x00", string(records[2].Body))
	})
	t.Run("several at a rate", func(t *testing.T) {
		began := time.Now()
		stdout, stderr, status := webhookCommand(t, secret, "", "send", "--count", "10", "--rate", "20", url)
		require.Zero(t, status, stderr)
		assert.Equal(t, 10, strings.Count(stdout, "200 OK\n"))
		assert.True(t, strings.HasSuffix(stdout, "\n10 sent: 10 answered 2xx, 0 answered otherwise, 0 not answered\n"), stdout)
		assert.Len(t, b.records(), 13)
		assert.GreaterOrEqual(t, time.Since(began), 450*time.Millisecond)
	})
	for _, tt := range []struct {
		name, secret, stdout, stderr string
		args                         []string
	}{
		{"what is refused", "wrong", "401 Unauthorized\n", "not every response has status 2xx", []string{url}},
		{"a redirect, which is not followed", secret, "302 Found\n", "not every response has status 2xx", []string{webhookURL(c, "/moved")}},
		{"where nothing listens", secret, "", "connection refused", []string{"http://" + freeAddr(t)}},
		{"no URL", secret, "", "accepts 1 arg(s), received 0", nil},
		{"several that are refused", "wrong", "401 Unauthorized\n401 Unauthorized\n2 sent: 0 answered 2xx, 2 answered otherwise, 0 not answered\n", "not every response has status 2xx", []string{"--count", "2", url}},
		{"several where nothing listens", secret, "2 sent: 0 answered 2xx, 0 answered otherwise, 2 not answered\n", "connection refused", []string{"--count", "2", "http://" + freeAddr(t)}},
		{"nothing to send", secret, "", "count: must be at least 1", []string{"--count", "0", url}},
		{"a negative rate", secret, "", onRate, []string{"--rate", "-1", url}},
		{"a rate of 0", secret, "", onRate, []string{"--rate", "0", url}},
		{"a rate that is no number", secret, "", onRate, []string{"--rate", "NaN", url}},
		{"an infinite rate", secret, "", onRate, []string{"--rate", "Inf", url}},
		{"a rate whose pause is longer than a life", secret, "", onRate, []string{"--rate", "1e-300", url}},
		{"a body and an event", secret, "", "[body event-type] were all set", []string{"--body", file, "--event-type", "X", url}},
		{"a body and a resource", secret, "", "[body resource-id] were all set", []string{"--body", file, "--resource-id", "X", url}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := webhookCommand(t, tt.secret, "", append([]string{"send"}, tt.args...)...)
			assert.Equal(t, 1, status)
			assert.Equal(t, tt.stdout, stdout)
			assert.Contains(t, stderr, tt.stderr)
			assert.Len(t, b.records(), 13, "the backend sees nothing")
		})
	}
}

// TestCommandHelp runs the example at the end of each help text.
func TestCommandHelp(t *testing.T) {
	options, site, _ := exampleSites(t)
	c := startCaddy(t, options, site, "INKIT_WEBHOOK_SECRET=demo")
	dir := t.TempDir()
	require.NoError(t, os.Symlink(caddyPath, dir+"/caddy"))
	for name, want := range map[string]string{
		"sign":   sign("demo", []byte(`{"event_type":"DOCUMENT_DELETED"}`)) + "\n",
		"verify": "INKIT_WEBHOOK_SECRET\n",
		"send":   "200 OK\nverified DOCUMENT_DELETED doc_test\n",
	} {
		t.Run(name, func(t *testing.T) {
			help, _, status := webhookCommand(t, "", "", name, "--help")
			require.Zero(t, status)
			_, example, found := strings.Cut(help, "Examples:\n")
			require.True(t, found, help)
			example, _, _ = strings.Cut(example, "\n")
			example = strings.Replace(example, "localhost:8080", "localhost:"+port(c.addr), 1)
			cmd := exec.Command("sh", "-ec", example)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir)
			out, err := cmd.Output()
			require.NoError(t, err)
			assert.Equal(t, want, string(out))
		})
	}
}
