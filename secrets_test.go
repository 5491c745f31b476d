package inkitwebhook

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
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
		{"a file that ends as Windows has it", "{file." + writeFile(t, filepath.Join(dir, "windows"), testSecret+"\r\n") + "}", testSecret},
		{"a file of 1 MiB", "{file." + writeFile(t, filepath.Join(dir, "large"), strings.Repeat("s", 1<<20)) + "}", strings.Repeat("s", 1<<20)},
		{"a file whose text would be a reference on a line of the Caddyfile", "{file." + writeFile(t, filepath.Join(dir, "dollar"), "$ecret") + "}", "$ecret"},
		{"a literal", testSecret, testSecret},
		{"a literal with white space inside", "a b", "a b"},
		{"a literal with braces in it", "a{b}c", "a{b}c"},
		{"a literal of base64 with its padding", "c2VjcmV0cw==", "c2VjcmV0cw=="},
		{"a literal of base64 that looks like an assignment", "c2VjcmV0czE=", "c2VjcmV0czE="},
		{"a literal of digits", "1234567890123456", "1234567890123456"},
		{"a literal that starts with a slash", "/abc", "/abc"},
		{"a literal that starts with a quote", `"abc`, `"abc`},
		{"a literal with one brace", "{a+b", "{a+b"},
		{"a literal that ends in a brace", "abc}", "abc}"},
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
	const nameMessage = "name must be 1 to 64 of letters, digits, '.', '_' and '-'"
	const partly = "secret 1: must be either one placeholder and nothing else, or a text without placeholders"

	for _, tt := range []struct {
		name    string
		secrets []Secret
		message string
	}{
		{"no secret at all", nil, "secrets: must not be empty"},
		{"an empty literal", one(""), "secret 1: must not be empty"},
		{"the second of two is empty", []Secret{{Value: confidential}, {}}, "secret 2: must not be empty"},
		{"an unset environment variable", one("{env.TEST_INKIT_UNSET}"), "secret 1: environment variable is unset or empty"},
		{"an empty environment variable", one("{env.TEST_INKIT_EMPTY}"), "secret 1: environment variable is unset or empty"},
		{"an environment variable of one newline", one("{env.TEST_INKIT_NEWLINE}"), "secret 1: environment variable is unset or empty"},
		{"an environment variable without a name", one("{env.}"), "secret 1: environment variable is unset or empty"},
		{"a missing file", one("{file." + dir + "/" + confidential + "}"), "secret 1: file cannot be read: no such file or directory"},
		{"a directory", one("{file." + dir + "}"), "secret 1: file cannot be read: is not a regular file"},
		{"a device", one("{file." + os.DevNull + "}"), "secret 1: file cannot be read: is not a regular file"},
		{"a file without a name", one("{file.}"), "secret 1: file cannot be read: no such file or directory"},
		{"what anybody can guess", one("{time.now.year}"), "secret 1: placeholder is no secret: anybody can guess what it stands for"},
		{"the name of the machine", one("{system.hostname}"), "secret 1: placeholder is no secret: anybody can guess what it stands for"},
		{"an empty file", one(file("empty", "")), "secret 1: file is empty"},
		{"a file of one newline", one(file("newline", "\n")), "secret 1: file is empty"},
		{"a file of several newlines", one(file("newlines", "\r\n\n\r\n")), "secret 1: file is empty"},
		{"a file with a blank line at its end", one(file("blank", confidential+"\n\n")), "secret 1: must not start or end with white space"},
		{"a file with white space before the secret", one(file("space", " "+confidential)), "secret 1: must not start or end with white space"},
		{"a file with a space that does not break after the secret", one(file("nbsp", confidential+"\u00a0")), "secret 1: must not start or end with white space"},
		{"a file above 1 MiB", one(file("large", strings.Repeat(confidential, 1<<17))), "secret 1: file is larger than 1 MiB"},
		{"an unknown placeholder", one("{" + confidential + "}"), "secret 1: placeholder is not known"},
		{"an environment variable for the Caddyfile, in JSON", one("{$TEST_INKIT_SECRET}"), "secret 1: placeholder is not known"},
		{"empty braces", one("{}"), "secret 1: must be the secret alone, and not JSON or a template"},
		{"a placeholder of the request", one("{http.request.header.X-Secret}"), "secret 1: placeholder belongs to a request, and secrets are resolved before there is one"},
		{"a placeholder in part, at the end", one(confidential + "{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in part, at the start", one("{env.TEST_INKIT_SECRET}" + confidential), partly},
		{"two placeholders", one("{env.TEST_INKIT_SECRET}{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in another pair of braces", one("{{env.TEST_INKIT_SECRET}}"), partly},
		{"a placeholder in quotes", one(`"{env.TEST_INKIT_SECRET}"`), partly},
		{"a variable for the Caddyfile in part", one(confidential + "{$TEST_INKIT_SECRET}"), partly},
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
		{"the same name twice", []Secret{{confidential + "1", "a"}, {confidential + "2", "a"}}, "secret 2: has the same name as an earlier one"},
		{"a name that is the position of another", []Secret{{confidential + "1", "2"}, {confidential + "2", ""}}, "secret 2: has the same name as an earlier one"},
		{"name and value in each other's place", []Secret{{"current", "{env.TEST_INKIT_SECRET}"}}, "secret 1: " + nameMessage},
		{"a name with a space", []Secret{{confidential, "a b"}}, "secret 1: " + nameMessage},
		{"a name that is not UTF-8", []Secret{{confidential, "a\xff"}}, "secret 1: " + nameMessage},
		{"a name that is not ASCII", []Secret{{confidential, "ä"}}, "secret 1: " + nameMessage},
		{"a name of 65 letters", []Secret{{confidential, strings.Repeat("a", 65)}}, "secret 1: " + nameMessage},
		{"the secret that has a name", []Secret{{confidential, "old"}, {"", "new"}}, "secret new: must not be empty"},
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
		folder := t.TempDir()
		require.NoError(t, os.Chmod(folder, 0))
		require.EqualError(t, load(t, &Handler{Secrets: one(folder + "/a/b")}), "secret 1: is the path of a file, and not what stands in it: write {file./path}")
	})
}

// The kinds of text that cannot be a secret of Inkit's, wherever it comes from. The
// first is the empty key, since HMAC fills every key up with NULs.
func TestTextThatIsNoSecret(t *testing.T) {
	const invisible = "secret 1: must not hold a line break, a control character or another invisible one"
	const alone = "secret 1: must be the secret alone, and not "
	const reference = "secret 1: stands for a secret in a way that Caddy does not know: write {env.NAME} or {file./path}"
	const path = "secret 1: is the path of a file, and not what stands in it: write {file./path}"
	t.Setenv("test.inkit-name", confidential)
	for _, tt := range []struct{ name, text, message string }{
		{"33 NULs", strings.Repeat("\x00", 33), invisible},
		{"a NUL at the end", confidential + "\x00", invisible},
		{"a line break inside", confidential + "\n" + confidential, invisible},
		{"a tab inside", confidential + "\t" + confidential, invisible},
		{"an escape sequence", confidential + "\x1b[0m", invisible},
		{"a byte order mark", "\ufeff" + confidential, invisible},
		{"a space of no width", confidential + "\u200b", invisible},
		{"a soft hyphen", confidential + "\u00ad" + confidential, invisible},
		{"a change of direction", confidential + "\u202e", invisible},
		{"a line separator inside", confidential + "\u2028" + confidential, invisible},
		{"a paragraph separator inside", confidential + "\u2029" + confidential, invisible},
		{"bytes that are not UTF-8", confidential + "\xff", "secret 1: must be UTF-8"},
		{"UTF-16", "\xff\xfes\x00", "secret 1: must be UTF-8"},
		{"what stands for bytes that were not UTF-8", confidential + "\ufffd", "secret 1: must be UTF-8"},
		{"double quotes", `"` + confidential + `"`, "secret 1: must not stand in quotes"},
		{"single quotes", `'` + confidential + `'`, "secret 1: must not stand in quotes"},
		{"backquotes", "`" + confidential + "`", "secret 1: must not stand in quotes"},
		{"a JSON object", `{"secret":"` + confidential + `"}`, alone + "JSON or a template"},
		{"a JSON array", `["` + confidential + `"]`, alone + "JSON or a template"},
		{"JSON's null, as jq prints what is not there", "null", alone + "JSON or a template"},
		{"a template", "{{ ." + confidential + " }}", alone + "JSON or a template"},
		{"what Python prints for nothing", "None", alone + "JSON or a template"},
		{"what JavaScript prints for nothing", "undefined", alone + "JSON or a template"},
		{"what is to be replaced", "<" + confidential + ">", alone + "JSON or a template"},
		{"a variable that was not expanded", "${INKIT_WEBHOOK_SECRET}", reference},
		{"a variable without braces that was not expanded", "$INKIT_WEBHOOK_SECRET", reference},
		{"a command that was not run", "$(cat /run/secrets/inkit)", reference},
		{"a variable of Windows", "%INKIT_WEBHOOK_SECRET%", reference},
		{"a placeholder without braces", "env.INKIT_WEBHOOK_SECRET", reference},
		{"a file's placeholder without braces", "file./run/secrets/inkit", reference},
		{"a placeholder of another program", "ENV:INKIT_WEBHOOK_SECRET", reference},
		{"a variable in JavaScript", "process.env.INKIT_WEBHOOK_SECRET", reference},
		{"a placeholder whose brace is not closed", "{INKIT_WEBHOOK_SECRET", reference},
		{"the name of a variable", "INKIT_WEBHOOK_SECRET", reference},
		{"the URL of a file", "file:///run/secrets/inkit", reference},
		{"the URL of a store for secrets", "op://vault/inkit", reference},
		{"a path from the folder of the user", "~/inkit", reference},
		{"a path from the current folder", "../inkit", reference},
		{"a path that curl would read", "@/run/secrets/inkit", reference},
		{"the name of a variable that is set", "test.inkit-name", "secret 1: is the name of an environment variable, and not what stands in it: write {env.NAME}"},
		{"the path of a file", writeFile(t, filepath.Join(t.TempDir(), "inkit"), confidential), path},
		{"the path of a file that is missing in its folder", filepath.Join(t.TempDir(), "inkit"), path},
		{"the dots that hide a secret", "••••••••", "secret 1: must be the secret itself, and not the dots that hide it"},
		{"the asterisks that hide a secret", "********", "secret 1: must be the secret itself, and not the dots that hide it"},
		{"a line of a dotenv file", "INKIT_WEBHOOK_SECRET=" + confidential, alone + "NAME=value"},
		{"a line for a shell", "export INKIT=" + confidential, alone + "NAME=value"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, filepath.Join(t.TempDir(), "secret"), tt.text)
			require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}"}}}), tt.message)
			if _, ok := placeholder.Name(tt.text); !ok {
				require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: tt.text}}}), tt.message, "as a literal, too")
			}
			// and at every later reading, where the last good one stays
			inBubble(t, func(t *testing.T) {
				path := writeFile(t, filepath.Join(t.TempDir(), "secret"), testSecret)
				h, logs := provision(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}"}}})
				writeFile(t, path, tt.text)
				assert.Equal(t, 401, serve(t, h, post("x", Sign(nil, []byte("x")))).status, "the empty key opens nothing")
				assert.Equal(t, 401, serve(t, h, post("x", Sign([]byte(tt.text), []byte("x")))).status)
				time.Sleep(2 * previousAge)
				assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte(testSecret), []byte("x")))).status)
				lines := logs.FilterLevelExact(zapcore.ErrorLevel).All()
				require.Len(t, lines, 1)
				assert.Equal(t, tt.message, lines[0].ContextMap()["error"])
			})
		})
	}
}

func TestReferenceWithoutBracesIsNoSecret(t *testing.T) {
	const message = "secret 1: stands for a secret in a way that Caddy does not know: write {env.NAME} or {file./path}"
	for _, value := range []string{
		"env.INKIT_WEBHOOK_SECRET", "file./run/secrets/inkit", "$INKIT_WEBHOOK_SECRET", "${INKIT_WEBHOOK_SECRET}",
		"${INKIT_WEBHOOK_SECRET:-none}", "$(cat /run/secrets/inkit)", "$env:INKIT_WEBHOOK_SECRET", "%INKIT_WEBHOOK_SECRET%",
	} {
		require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: value}}}), message, value)
	}
}

func TestDefaultNamesArePositions(t *testing.T) {
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "a"}, {Value: "b", Name: "named"}, {Value: "c"}}})
	assert.Equal(t, []Secret{{"a", "1"}, {"b", "named"}, {"c", "3"}}, h.Secrets)
}

// What a running guard may come to must load after a restart.
func TestEqualSecretsLoadWithOneWarning(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "secret"), "next\n")
	core, logs := observer.New(zapcore.DebugLevel)
	secrets := []Secret{{"next", "blue"}, {"other", "between"}, {"{file." + path + "}", "green"}}
	k, err := newKeyring(secrets, newCounters("", secrets).reloads, zap.New(core))
	require.NoError(t, err)
	require.Equal(t, 1, logs.Len())
	line := logs.All()[0]
	assert.Equal(t, zapcore.WarnLevel, line.Level)
	assert.Equal(t, "two secrets have the same value", line.Message)
	assert.Equal(t, []any{"blue", "green"}, line.ContextMap()["secrets"])
	sig, err := parseSignature(Sign([]byte("next"), []byte("x")))
	require.NoError(t, err)
	i, err := k.verify(t.Context(), &sig, []byte("x"))
	require.NoError(t, err)
	assert.Equal(t, "blue", secrets[i].Name, "the first one counts")
}

// reloadsSince returns what reloads of the secrets came to since it was called.
func reloadsSince(h *Handler) func() string {
	count := func(result int) float64 { return testutil.ToFloat64(h.counters.reloads[result]) }
	changed, unchanged, failed := count(reloadChanged), count(reloadUnchanged), count(reloadFailed)
	return func() string {
		return fmt.Sprintf("%v changed, %v unchanged, %v failed",
			count(reloadChanged)-changed, count(reloadUnchanged)-unchanged, count(reloadFailed)-failed)
	}
}

// inBubble runs f with a clock of its own, and waits for a reload that it has left.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		defer time.Sleep(time.Second)
		f(t)
	})
}

// fileGuard is a guard with its first secret in a file.
type fileGuard struct {
	*Handler
	t    *testing.T
	path string
	logs *observer.ObservedLogs
}

var fileGuards atomic.Int64

func newFileGuard(t *testing.T, secrets ...Secret) *fileGuard {
	t.Helper()
	path := writeFile(t, filepath.Join(t.TempDir(), "secret"), "old\n")
	h, logs := provision(t, &Handler{
		Name:    fmt.Sprintf("file-guard-%d", fileGuards.Add(1)), // with counters of its own
		Secrets: append([]Secret{{Value: "{file." + path + "}", Name: "file"}}, secrets...),
	})
	return &fileGuard{h, t, path, logs}
}

// status is what an event comes to that is signed with a secret.
func (g *fileGuard) status(secret string) int {
	g.t.Helper()
	return serve(g.t, g.Handler, post("x", Sign([]byte(secret), []byte("x")))).status
}

func TestSecretsAreReloaded(t *testing.T) {
	bubble := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { inBubble(t, f) })
	}
	bubble("a new secret is in use for the very event that did not match", func(t *testing.T) {
		g := newFileGuard(t)
		counted := reloadsSince(g.Handler)
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		assert.Equal(t, "1 changed, 0 unchanged, 0 failed", counted())
		lines := g.logs.FilterMessage("secrets changed").All()
		require.Len(t, lines, 1)
		assert.Equal(t, []any{"file"}, lines[0].ContextMap()["secrets"], "the line names which")
	})
	bubble("a new secret is in use though a reload has just missed it", func(t *testing.T) {
		g := newFileGuard(t)
		assert.Equal(t, 401, g.status("new"))
		writeFile(t, g.path, "new\n")
		began := time.Now()
		assert.Equal(t, 200, g.status("new"))
		assert.LessOrEqual(t, time.Since(began), reloadInterval)
	})
	bubble("the value before a change stays good for 10 s", func(t *testing.T) {
		g := newFileGuard(t)
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		time.Sleep(previousAge - time.Millisecond)
		assert.Equal(t, 200, g.status("old"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 200, g.status("new"))
	})
	bubble("a value stays good over two changes within its 10 s", func(t *testing.T) {
		g := newFileGuard(t)
		for i, value := range []string{"n", "newer"} { // the first is half written
			writeFile(t, g.path, value)
			time.Sleep(time.Second)
			assert.Equal(t, 200, g.status(value), i)
			assert.Equal(t, 200, g.status("old"), i)
		}
		time.Sleep(previousAge - time.Second)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 200, g.status("newer"))
	})
	bubble("a withdrawn secret is out within 11 s of traffic, though it matches", func(t *testing.T) {
		g := newFileGuard(t)
		writeFile(t, g.path, "new\n")
		began := time.Now()
		for g.status("old") == 200 && time.Since(began) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		assert.Less(t, time.Since(began), 11*time.Second)
	})
	bubble("a flood of signatures that do not match causes 4 reloads a second", func(t *testing.T) {
		g := newFileGuard(t)
		counted := reloadsSince(g.Handler)
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				for range 10 {
					assert.Equal(t, 401, g.status("wrong"))
				}
			})
		}
		began := time.Now()
		wg.Wait()
		intervals := time.Since(began) / reloadInterval
		assert.LessOrEqual(t, intervals, time.Duration(10), "each waits for one reload")
		var changed, unchanged, failed float64
		_, err := fmt.Sscanf(counted(), "%g changed, %g unchanged, %g failed", &changed, &unchanged, &failed)
		require.NoError(t, err, counted())
		assert.LessOrEqual(t, unchanged, float64(intervals)+2)
	})
	bubble("signatures that match cause no more than that, and wait for none", func(t *testing.T) {
		g := newFileGuard(t)
		counted := reloadsSince(g.Handler)
		began := time.Now()
		for range 1000 {
			assert.Equal(t, 200, g.status("old"))
		}
		assert.Zero(t, time.Since(began))
		for range 100 {
			time.Sleep(10 * time.Millisecond)
			assert.Equal(t, 200, g.status("old"))
		}
		synctest.Wait()
		assert.Regexp(t, "^0 changed, [45] unchanged, 0 failed$", counted())
	})
	for name, breakIt := range map[string]func(t *testing.T, path string){
		"empty":             func(t *testing.T, path string) { writeFile(t, path, "") },
		"one newline":       func(t *testing.T, path string) { writeFile(t, path, "\n") },
		"with a blank line": func(t *testing.T, path string) { writeFile(t, path, "new\n\n") },
		"too large":         func(t *testing.T, path string) { writeFile(t, path, strings.Repeat("n", 1<<20+1)) },
		"gone":              func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
		"a directory instead": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		},
	} {
		bubble("the last good value stays if the file is "+name, func(t *testing.T) {
			g := newFileGuard(t)
			counted := reloadsSince(g.Handler)
			breakIt(t, g.path)
			for began := time.Now(); time.Since(began) < 2*reloadLogInterval-2*time.Second; time.Sleep(time.Second) {
				assert.Equal(t, 200, g.status("old"))
				assert.Equal(t, 401, g.status(""), "the empty key opens nothing")
			}
			assert.Regexp(t, "^0 changed, 0 unchanged, [0-9]+ failed$", counted())
			lines := g.logs.FilterLevelExact(zapcore.ErrorLevel).All()
			require.Len(t, lines, 2, "one line a minute")
			assert.Equal(t, "reloading secrets, the last good values stay in use", lines[0].Message)
			assert.Contains(t, lines[0].ContextMap()["error"], "secret file: ")
			assert.NotContains(t, lines[0].ContextMap()["error"], g.path)

			require.NoError(t, os.RemoveAll(g.path))
			writeFile(t, g.path, "new\n")
			assert.Equal(t, 200, g.status("new"), "once it is good, it is taken")
		})
	}
	bubble("a withdrawn secret does not come back when another file changes while this one is unreadable", func(t *testing.T) {
		other := writeFile(t, filepath.Join(t.TempDir(), "other"), "other\n")
		g := newFileGuard(t, Secret{Value: "{file." + other + "}", Name: "other"})
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		time.Sleep(previousAge)
		require.NoError(t, os.Remove(g.path))
		writeFile(t, other, "newer\n")
		assert.Equal(t, 200, g.status("newer"), "which the unreadable one does not keep from changing")
		time.Sleep(previousAge)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 401, g.status("other"))
		assert.Equal(t, 200, g.status("new"))
	})
	bubble("two that become the same do no harm", func(t *testing.T) {
		g := newFileGuard(t, Secret{Value: "next", Name: "next"})
		writeFile(t, g.path, "next\n")
		assert.Equal(t, 401, g.status("wrong"))
		assert.Equal(t, 200, g.status("next"))
		assert.Len(t, g.logs.FilterMessage("two secrets have the same value").All(), 1)
		require.NoError(t, load(t, &Handler{Secrets: g.Secrets}), "and the next load accepts them")
	})
	bubble("a request whose sender is gone waits no longer", func(t *testing.T) {
		g := newFileGuard(t)
		assert.Equal(t, 401, g.status("wrong")) // the next reload is in 250 ms
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		assert.Equal(t, 401, serve(t, g.Handler, post("x", Sign([]byte("wrong"), []byte("x"))).WithContext(ctx)).status)
		assert.Zero(t, time.Since(began))
	})
	t.Run("what cannot change is not read again", func(t *testing.T) {
		t.Setenv("TEST_INKIT_SECRET", testSecret)
		inBubble(t, func(t *testing.T) {
			h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "literal"}, {Value: "{env.TEST_INKIT_SECRET}"}}})
			counted := reloadsSince(h)
			began := time.Now()
			assert.Equal(t, 401, serve(t, h, post("x", compactSignature)).status)
			assert.Zero(t, time.Since(began))
			assert.Equal(t, "0 changed, 0 unchanged, 0 failed", counted())
		})
	})
}

// 20 rotations, each followed by 50 events at once with the new secret, among forged
// ones: whoever does not get to reload the secrets must not take the old ones as final.
func TestNoGenuineEventIsRefusedAfterARotation(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newFileGuard(t)
		refused := 0
		for i := range 20 {
			secret := fmt.Sprintf("secret_%d", i)
			writeFile(t, g.path, secret+"\n")
			statuses := make([]int, 50)
			var wg sync.WaitGroup
			for j := range statuses {
				wg.Go(func() { statuses[j] = g.status(secret) })
				wg.Go(func() { assert.Equal(t, 401, g.status("wrong")) })
			}
			wg.Wait()
			for _, status := range statuses {
				if status != 200 {
					refused++
				}
			}
		}
		assert.Zero(t, refused, "of 1,000")
	})
}

// A file system that hangs holds no event whose secret is known, and any other for
// two seconds.
func TestFileSystemThatHangs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newFileGuard(t)
		g.keyring.reloading.Store(true) // as a reload that never returns leaves it
		began := time.Now()
		assert.Equal(t, 200, g.status("old"))
		assert.Zero(t, time.Since(began))
		assert.Equal(t, 401, g.status("new"))
		assert.Equal(t, reloadWait, time.Since(began))
	})
}

// Events signed with either secret go through while the file that holds one of
// them is replaced over and over, as they arrive on many connections.
func TestSecretsAreReloadedUnderLoad(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "secret"), "first\n")
	h, _ := provision(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}", Name: "file"}, {Value: "stays"}}})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte("stays"), []byte("x")))).status)
				}
			}
		})
	}
	for i := range 10 {
		secret := strings.Repeat("n", i+1)
		require.NoError(t, os.Rename(writeFile(t, filepath.Join(dir, "next"), secret+"\n"), path))
		assert.Equal(t, 200, serve(t, h, post("x", Sign([]byte(secret), []byte("x")))).status)
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
