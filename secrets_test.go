package inkitwebhook

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"
)

// confidential stands in every value that must not show in an error.
const confidential = "c0nf1d3nt1al"

func writeFile(tb testing.TB, path, content string) string {
	tb.Helper()
	require.NoError(tb, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func TestSecretsThatAreResolved(t *testing.T) {
	t.Setenv("TEST_INKIT_SECRET", testSecret)
	dir := t.TempDir()
	for _, tt := range []struct{ name, value, secret string }{
		{"an environment variable", "{env.TEST_INKIT_SECRET}", testSecret},
		{"a file", "{file." + writeFile(t, filepath.Join(dir, "plain"), testSecret) + "}", testSecret},
		{"a file that ends in a newline", "{file." + writeFile(t, filepath.Join(dir, "newline"), testSecret+"\n") + "}", testSecret},
		{"a file with placeholders in it, which are its text", "{file." + writeFile(t, filepath.Join(dir, "braces"), "{env.TEST_INKIT_SECRET}") + "}", "{env.TEST_INKIT_SECRET}"},
		{"another global placeholder", "{system.os}", runtime.GOOS},
		{"a literal", testSecret, testSecret},
		{"a literal with white space inside", "a b", "a b"},
		{"a literal with braces in it", "a{b}c", "a{b}c"},
		{"a literal with empty braces", "{}", "{}"},
		{"a literal with one brace", "{abc", "{abc"},
		{"a literal that ends in a brace", "abc}", "abc}"},
		{"a literal in two pairs of braces", "{{abc}}", "{{abc}}"},
		{"a literal with braces that are escaped for Caddy", `\{abc\}x`, `\{abc\}x`},
		{"a literal that is not ASCII", "gehëim", "gehëim"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: tt.value}}})
			assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte(tt.secret), []byte("x")))).status)
			assert.Equal(t, tt.value, h.Secrets[0].Value, "the configuration shows the placeholder, as before")
		})
	}
}

func TestSecretsThatAreRefused(t *testing.T) {
	t.Setenv("TEST_INKIT_SECRET", confidential)
	t.Setenv("TEST_INKIT_EMPTY", "")
	t.Setenv("TEST_INKIT_SPACE", confidential+"\n")
	t.Setenv("TEST_INKIT_NEWLINE", "\n")
	dir := t.TempDir()
	file := func(name, content string) string {
		return "{file." + writeFile(t, filepath.Join(dir, name), content) + "}"
	}
	one := func(value string) []Secret { return []Secret{{Value: value}} }
	const partly = "secret 1: must be either one placeholder and nothing else, or a text without placeholders"

	for _, tt := range []struct {
		name    string
		secrets []Secret
		message string
	}{
		{"no secret at all", nil, "secrets: must not be empty"},
		{"an empty literal", one(""), "secret 1: must not be empty"},
		{"the second of two is empty", []Secret{{Value: confidential}, {Name: "b"}}, "secret 2: must not be empty"},
		{"an unset environment variable", one("{env.TEST_INKIT_UNSET}"), "secret 1: environment variable is unset or empty"},
		{"an empty environment variable", one("{env.TEST_INKIT_EMPTY}"), "secret 1: environment variable is unset or empty"},
		{"an environment variable of one newline", one("{env.TEST_INKIT_NEWLINE}"), "secret 1: environment variable is unset or empty"},
		{"an environment variable without a name", one("{env.}"), "secret 1: environment variable is unset or empty"},
		{"a missing file", one("{file." + dir + "/" + confidential + "}"), "secret 1: file cannot be read: no such file or directory"},
		{"a directory", one("{file." + dir + "}"), "secret 1: file cannot be read: is not a regular file"},
		{"a device", one("{file." + os.DevNull + "}"), "secret 1: file cannot be read: is not a regular file"},
		{"a file without a name", one("{file.}"), "secret 1: file cannot be read: no such file or directory"},
		{"an empty file", one(file("empty", "")), "secret 1: file is empty"},
		{"a file of one newline", one(file("newline", "\n")), "secret 1: file is empty"},
		{"a file of several newlines", one(file("newlines", "\r\n\n\r\n")), "secret 1: file is empty"},
		{"a file with a blank line at its end", one(file("blank", confidential+"\n\n")), "secret 1: must not start or end with white space"},
		{"a file with white space before the secret", one(file("space", " "+confidential)), "secret 1: must not start or end with white space"},
		{"an unknown placeholder", one("{" + confidential + "}"), "secret 1: placeholder is not known"},
		{"an environment variable for the Caddyfile", one("{$TEST_INKIT_SECRET}"), "secret 1: placeholder is not known"},
		{"a placeholder of the request", one("{http.request.header.X-Secret}"), "secret 1: placeholder belongs to a request, and secrets are resolved before there is one"},
		{"a placeholder in part, at the end", one(confidential + "{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in part, at the start", one("{env.TEST_INKIT_SECRET}" + confidential), partly},
		{"two placeholders", one("{env.TEST_INKIT_SECRET}{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in another pair of braces", one("{{env.TEST_INKIT_SECRET}}"), partly},
		{"a placeholder in quotes", one(`"{env.TEST_INKIT_SECRET}"`), partly},
		{"a placeholder in white space", one(" {env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder that does not end", one("{env.TEST_INKIT_SECRET"), partly},
		{"a placeholder that is escaped", one(`\{env.TEST_INKIT_SECRET\}`), partly},
		{"a file in part", one(confidential + "{file./etc/hostname}"), partly},
		{"a request placeholder in part", one(confidential + "{http.request.host}"), partly},
		{"another known placeholder in part", one(confidential + "{system.os}"), partly},
		{"white space before a literal", one(" " + confidential), "secret 1: must not start or end with white space"},
		{"white space after a literal", one(confidential + "\t"), "secret 1: must not start or end with white space"},
		{"nothing but white space", one(" "), "secret 1: must not start or end with white space"},
		{"white space after an environment variable", one("{env.TEST_INKIT_SPACE}"), "secret 1: must not start or end with white space"},
		{"the same name twice", []Secret{{confidential + "1", "a"}, {confidential + "2", "a"}}, "secret 2: has the same name as secret 1"},
		{"a name that is the position of another", []Secret{{confidential + "1", "2"}, {confidential + "2", ""}}, "secret 2: has the same name as secret 1"},
		{"the same value twice", []Secret{{confidential, "a"}, {"x", "b"}, {confidential, "c"}}, "secret 3: has the same value as secret 1"},
		{"the same value by way of a placeholder", []Secret{{confidential, "a"}, {"{env.TEST_INKIT_SECRET}", "b"}}, "secret 2: has the same value as secret 1"},
		{"name and value in each other's place", []Secret{{"current", "{env.TEST_INKIT_SECRET}"}}, "secret 1: name must not hold braces"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := load(t, &Handler{Secrets: tt.secrets})
			require.EqualError(t, err, tt.message)
			assert.NotContains(t, err.Error(), confidential)
			assert.NotContains(t, err.Error(), "TEST_INKIT")
		})
	}

	t.Run("a file that may not be read", func(t *testing.T) {
		if os.Geteuid() == 0 {
			t.Skip("root may read every file")
		}
		path := writeFile(t, filepath.Join(dir, "forbidden"), confidential)
		require.NoError(t, os.Chmod(path, 0))
		require.EqualError(t, load(t, &Handler{Secrets: one("{file." + path + "}")}), "secret 1: file cannot be read: permission denied")
	})
}

func TestDefaultNamesArePositions(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "a"}, {Value: "b", Name: "named"}, {Value: "c"}}})
	assert.Equal(t, []Secret{{"a", "1"}, {"b", "named"}, {"c", "3"}}, h.Secrets)
}

// reloads counts the readings since it was called.
func reloads() func() string {
	count := func(result string) float64 { return testutil.ToFloat64(secretReloadsTotal.WithLabelValues(result)) }
	changed, unchanged, failed := count(reloadChanged), count(reloadUnchanged), count(reloadFailed)
	return func() string {
		return fmt.Sprintf("%v changed, %v unchanged, %v failed",
			count(reloadChanged)-changed, count(reloadUnchanged)-unchanged, count(reloadFailed)-failed)
	}
}

func TestSecretsAreReadAgain(t *testing.T) {
	// setUp returns the path of the secret, and what an event signed with a secret comes to.
	setUp := func(t *testing.T, secrets ...Secret) (path string, status func(secret string) int, h *Handler, errorLines func() []string) {
		path = writeFile(t, filepath.Join(t.TempDir(), "secret"), "old\n")
		h, logs := provision(t, &Handler{Secrets: append([]Secret{{Value: "{file." + path + "}", Name: "file"}}, secrets...)})
		status = func(secret string) int {
			return serve(t, h, post("x", Sign([]byte(secret), []byte("x")))).status
		}
		errorLines = func() (lines []string) {
			for _, line := range logs.FilterLevelExact(zapcore.ErrorLevel).All() {
				lines = append(lines, fmt.Sprint(line.Message, ": ", line.ContextMap()["error"]))
			}
			return lines
		}
		return path, status, h, errorLines
	}
	bubble := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
	}

	bubble("a new secret is in use for the very event that did not match", func(t *testing.T) {
		path, status, _, _ := setUp(t)
		counted := reloads()
		writeFile(t, path, "new\n")
		time.Sleep(secretMinAge)
		assert.Equal(t, 200, status("new"))
		assert.Equal(t, 401, status("old"), "and the old one is out")
		assert.Equal(t, "1 changed, 0 unchanged, 0 failed", counted())
	})
	bubble("a withdrawn secret is out after 10 s, though it matches", func(t *testing.T) {
		path, status, _, _ := setUp(t)
		writeFile(t, path, "new\n")
		time.Sleep(secretMaxAge - time.Millisecond)
		assert.Equal(t, 200, status("old"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, 401, status("old"))
	})
	bubble("signatures that do not match cause one reading a second", func(t *testing.T) {
		_, status, _, _ := setUp(t)
		counted := reloads()
		for range 10_000 {
			time.Sleep(time.Millisecond)
			assert.Equal(t, 401, status("wrong"))
		}
		assert.Equal(t, "0 changed, 10 unchanged, 0 failed", counted())
	})
	bubble("signatures that match cause one reading in 10 s", func(t *testing.T) {
		_, status, _, _ := setUp(t)
		counted := reloads()
		for range 1000 {
			time.Sleep(100 * time.Millisecond)
			assert.Equal(t, 200, status("old"))
		}
		assert.Equal(t, "0 changed, 10 unchanged, 0 failed", counted())
	})
	for name, breakIt := range map[string]func(t *testing.T, path string){
		"empty":             func(t *testing.T, path string) { writeFile(t, path, "") },
		"one newline":       func(t *testing.T, path string) { writeFile(t, path, "\n") },
		"with a blank line": func(t *testing.T, path string) { writeFile(t, path, "new\n\n") },
		"gone":              func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
		"a directory instead": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		},
	} {
		bubble("the last good set stays if the file is "+name, func(t *testing.T) {
			path, status, _, errorLines := setUp(t)
			counted := reloads()
			breakIt(t, path)
			for range 119 {
				time.Sleep(time.Second)
				assert.Equal(t, 200, status("old"))
				assert.Equal(t, 401, status(""), "the empty key opens nothing")
			}
			assert.Equal(t, "0 changed, 0 unchanged, 119 failed", counted())
			assert.Len(t, errorLines(), 2, "one line a minute")
			assert.Contains(t, errorLines()[0], "reading secrets again, the last good values stay in use: secret 1: ")
			assert.NotContains(t, errorLines()[0], path)

			require.NoError(t, os.RemoveAll(path))
			writeFile(t, path, "new\n")
			time.Sleep(time.Second)
			assert.Equal(t, 200, status("new"), "once it is good, it is taken")
		})
	}
	bubble("a secret that cannot be read does not keep another from changing", func(t *testing.T) {
		other := writeFile(t, filepath.Join(t.TempDir(), "other"), "other\n")
		path, status, _, _ := setUp(t, Secret{Value: "{file." + other + "}", Name: "other"})
		require.NoError(t, os.Remove(path))
		writeFile(t, other, "newer\n")
		time.Sleep(time.Second)
		assert.Equal(t, 200, status("newer"))
		assert.Equal(t, 200, status("old"))
		assert.Equal(t, 401, status("other"))
	})
	bubble("two that become the same do no harm", func(t *testing.T) {
		path, status, _, _ := setUp(t, Secret{Value: "next", Name: "next"})
		writeFile(t, path, "next\n")
		time.Sleep(time.Second)
		assert.Equal(t, 401, status("wrong"))
		assert.Equal(t, 200, status("next"))
		assert.Equal(t, 401, status("old"))
	})
	bubble("no one waits for the one who reads", func(t *testing.T) {
		_, status, h, _ := setUp(t)
		time.Sleep(secretMaxAge)
		h.keyring.mu.Lock()
		defer h.keyring.mu.Unlock()
		assert.Equal(t, 200, status("old"))
		assert.Equal(t, 401, status("wrong"))
	})
	t.Run("what cannot change is not read again", func(t *testing.T) {
		t.Setenv("TEST_INKIT_SECRET", testSecret)
		synctest.Test(t, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "literal"}, {Value: "{env.TEST_INKIT_SECRET}"}}})
			counted := reloads()
			time.Sleep(time.Hour)
			assert.Equal(t, 401, serve(t, h, post("x", compactSignature)).status)
			assert.Equal(t, "0 changed, 0 unchanged, 0 failed", counted())
		})
	})
}

// Events signed with either secret go through while the file that holds one of
// them is replaced over and over, as they arrive on many connections.
func TestSecretsAreReadAgainUnderLoad(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "secret"), "first\n")
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}", Name: "file"}, {Value: "stays"}}})
	past := time.Now().Add(-time.Hour)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					h.keyring.lastRead.Store(&past) // so that every request reads
					assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte("stays"), []byte("x")))).status)
				}
			}
		})
	}
	for i := range 50 {
		secret := strings.Repeat("n", i+1)
		require.NoError(t, os.Rename(writeFile(t, filepath.Join(dir, "next"), secret+"\n"), path))
		h.keyring.lastRead.Store(&past)
		assert.Eventually(t, func() bool {
			h.keyring.lastRead.Store(&past)
			return serve(t, h, post("x", Sign([]byte(secret), []byte("x")))).status == 200
		}, 5*time.Second, time.Millisecond)
	}
	close(stop)
	wg.Wait()
}

func FuzzResolve(f *testing.F) {
	for _, s := range []string{"", "{env.PATH}", "x{env.PATH}", "{env.", "{file.}", "{}", "{{}}", "a{b}c", `\{env.PATH\}`, " x", "{http.request.host}", "{time.now}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		if strings.Contains(value, "{file.") {
			return // it would read files of this machine
		}
		secret, err := resolve(value)
		if err != nil {
			return
		}
		require.NotEmpty(t, secret)
		require.Equal(t, strings.TrimSpace(secret), secret)
		if !strings.HasPrefix(value, "{") || !strings.HasSuffix(value, "}") {
			require.Equal(t, value, secret, "a literal is taken as it stands")
		}
		require.NotContains(t, secret, "{env.")
	})
}
