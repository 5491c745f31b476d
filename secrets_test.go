package inkitwebhook

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zapcore"
)

// confidential is part of every value that no error may show.
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
		{"a file that ends in a newline of Windows", "{file." + writeFile(t, filepath.Join(dir, "windows"), testSecret+"\r\n") + "}", testSecret},
		{"a file of 1 MiB", "{file." + writeFile(t, filepath.Join(dir, "large"), strings.Repeat("s", 1<<20)) + "}", strings.Repeat("s", 1<<20)},
		{"a file with a text that would be a reference in the Caddyfile", "{file." + writeFile(t, filepath.Join(dir, "dollar"), "$ecret") + "}", "$ecret"},
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
			assert.Equal(t, tt.value, h.Secrets[0].Value, "the configuration still shows the placeholder")
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
	const nameMessage = "name must have 1 to 64 characters: letters, digits, '.', '_' or '-'"
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
		{"a directory", one("{file." + dir + "}"), "secret 1: file cannot be read: not a regular file"},
		{"a device", one("{file." + os.DevNull + "}"), "secret 1: file cannot be read: not a regular file"},
		{"a file without a name", one("{file.}"), "secret 1: file cannot be read: no such file or directory"},
		{"a value that anybody can guess", one("{time.now.year}"), "secret 1: placeholder is not secret: anybody can guess its value"},
		{"the name of the machine", one("{system.hostname}"), "secret 1: placeholder is not secret: anybody can guess its value"},
		{"an empty file", one(file("empty", "")), "secret 1: file is empty"},
		{"a file of one newline", one(file("newline", "\n")), "secret 1: file is empty"},
		{"a file of several newlines", one(file("newlines", "\r\n\n\r\n")), "secret 1: file is empty"},
		{"a file with a blank line at its end", one(file("blank", confidential+"\n\n")), "secret 1: must not start or end with white space"},
		{"a file with white space before the secret", one(file("space", " "+confidential)), "secret 1: must not start or end with white space"},
		{"a file with a no-break space after the secret", one(file("nbsp", confidential+"\u00a0")), "secret 1: must not start or end with white space"},
		{"a file above 1 MiB", one(file("large", strings.Repeat(confidential, 1<<17))), "secret 1: file is larger than 1 MiB"},
		{"an unknown placeholder", one("{" + confidential + "}"), "secret 1: placeholder is unknown"},
		{"an environment variable for the Caddyfile, in JSON", one("{$TEST_INKIT_SECRET}"), "secret 1: placeholder is unknown"},
		{"empty braces", one("{}"), "secret 1: must be only the secret, not JSON or a template"},
		{"a placeholder of the request", one("{http.request.header.X-Secret}"), "secret 1: placeholder belongs to a request, and secrets are resolved before any request"},
		{"a placeholder in part, at the end", one(confidential + "{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in part, at the start", one("{env.TEST_INKIT_SECRET}" + confidential), partly},
		{"two placeholders", one("{env.TEST_INKIT_SECRET}{env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder in another pair of braces", one("{{env.TEST_INKIT_SECRET}}"), partly},
		{"a placeholder in quotes", one(`"{env.TEST_INKIT_SECRET}"`), partly},
		{"a variable for the Caddyfile in part", one(confidential + "{$TEST_INKIT_SECRET}"), partly},
		{"a placeholder in white space", one(" {env.TEST_INKIT_SECRET}"), partly},
		{"a placeholder without its last brace", one("{env.TEST_INKIT_SECRET"), partly},
		{"a placeholder that is escaped", one(`\{env.TEST_INKIT_SECRET\}`), partly},
		{"a file in part", one(confidential + "{file./etc/hostname}"), partly},
		{"a request placeholder in part", one(confidential + "{http.request.host}"), partly},
		{"another known placeholder in part", one(confidential + "{system.os}"), partly},
		{"white space before a literal", one(" " + confidential), "secret 1: must not start or end with white space"},
		{"white space after a literal", one(confidential + "\t"), "secret 1: must not start or end with white space"},
		{"nothing but white space", one(" "), "secret 1: must not start or end with white space"},
		{"white space after an environment variable", one("{env.TEST_INKIT_SPACE}"), "secret 1: must not start or end with white space"},
		{"the same name twice", []Secret{{confidential + "1", "a"}, {confidential + "2", "a"}}, "secret 2: has the same name as an earlier secret"},
		{"a name that is the position of another", []Secret{{confidential + "1", "2"}, {confidential + "2", ""}}, "secret 2: has the same name as an earlier secret"},
		{"name and value swapped", []Secret{{"current", "{env.TEST_INKIT_SECRET}"}}, "secret 1: " + nameMessage},
		{"a name with a space", []Secret{{confidential, "a b"}}, "secret 1: " + nameMessage},
		{"a name that is not UTF-8", []Secret{{confidential, "a\xff"}}, "secret 1: " + nameMessage},
		{"a name that is not ASCII", []Secret{{confidential, "ä"}}, "secret 1: " + nameMessage},
		{"a name of 65 letters", []Secret{{confidential, strings.Repeat("a", 65)}}, "secret 1: " + nameMessage},
		{"an empty secret that has a name", []Secret{{confidential, "old"}, {"", "new"}}, "secret new: must not be empty"},
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
		require.EqualError(t, load(t, &Handler{Secrets: one(folder + "/a/b")}), "secret 1: is the path of a file, not its content: write {file./path}")
	})
}

// Each row is a text that cannot be a secret of Inkit: the guard refuses it from any source.
// The first text would work like the empty key, because HMAC pads every key with NULs.
func TestTextThatIsNoSecret(t *testing.T) {
	const invisible = "secret 1: must not contain a line break, a control character or another invisible character"
	const alone = "secret 1: must be only the secret, not "
	const reference = "secret 1: refers to a secret in a form that Caddy does not know: write {env.NAME} or {file./path}"
	const path = "secret 1: is the path of a file, not its content: write {file./path}"
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
		{"the replacement character for bytes that were not UTF-8", confidential + "\ufffd", "secret 1: must be UTF-8"},
		{"double quotes", `"` + confidential + `"`, "secret 1: must not be in quotes"},
		{"single quotes", `'` + confidential + `'`, "secret 1: must not be in quotes"},
		{"backquotes", "`" + confidential + "`", "secret 1: must not be in quotes"},
		{"a JSON object", `{"secret":"` + confidential + `"}`, alone + "JSON or a template"},
		{"a JSON array", `["` + confidential + `"]`, alone + "JSON or a template"},
		{"JSON's null, which jq prints for a missing member", "null", alone + "JSON or a template"},
		{"a template", "{{ ." + confidential + " }}", alone + "JSON or a template"},
		{"None, which Python prints for no value", "None", alone + "JSON or a template"},
		{"undefined, which JavaScript prints for no value", "undefined", alone + "JSON or a template"},
		{"an example text in angle brackets", "<" + confidential + ">", alone + "JSON or a template"},
		{"a variable that was not expanded", "${INKIT_WEBHOOK_SECRET}", reference},
		{"a variable without braces that was not expanded", "$INKIT_WEBHOOK_SECRET", reference},
		{"a command that was not run", "$(cat /run/secrets/inkit)", reference},
		{"a variable of Windows", "%INKIT_WEBHOOK_SECRET%", reference},
		{"a placeholder without braces", "env.INKIT_WEBHOOK_SECRET", reference},
		{"a file's placeholder without braces", "file./run/secrets/inkit", reference},
		{"a placeholder of another program", "ENV:INKIT_WEBHOOK_SECRET", reference},
		{"a variable in JavaScript", "process.env.INKIT_WEBHOOK_SECRET", reference},
		{"a placeholder without its last brace", "{INKIT_WEBHOOK_SECRET", reference},
		{"the name of a variable", "INKIT_WEBHOOK_SECRET", reference},
		{"the URL of a file", "file:///run/secrets/inkit", reference},
		{"the URL of a store for secrets", "op://vault/inkit", reference},
		{"a path from the folder of the user", "~/inkit", reference},
		{"a path from the current folder", "../inkit", reference},
		{"a path that curl would read", "@/run/secrets/inkit", reference},
		{"the name of a variable that is set", "test.inkit-name", "secret 1: is the name of an environment variable, not its value: write {env.NAME}"},
		{"the path of a file", writeFile(t, filepath.Join(t.TempDir(), "inkit"), confidential), path},
		{"the path of a missing file in an existing folder", filepath.Join(t.TempDir(), "inkit"), path},
		{"the dots that hide a secret", "••••••••", "secret 1: must be the secret itself, not the dots that hide it"},
		{"the asterisks that hide a secret", "********", "secret 1: must be the secret itself, not the dots that hide it"},
		{"a line of a dotenv file", "INKIT_WEBHOOK_SECRET=" + confidential, alone + "NAME=value"},
		{"a line for a shell", "export INKIT=" + confidential, alone + "NAME=value"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, filepath.Join(t.TempDir(), "secret"), tt.text)
			require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}"}}}), tt.message)
			if _, ok := placeholder.Name(tt.text); !ok {
				require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Value: tt.text}}}), tt.message, "as a literal, too")
			}
			// a reload refuses the text as well, and the last good secret stays in use
			inBubble(t, func(t *testing.T) {
				path := writeFile(t, filepath.Join(t.TempDir(), "secret"), testSecret)
				h, logs := provision(t, &Handler{Secrets: []Secret{{Value: "{file." + path + "}"}}})
				writeFile(t, path, tt.text)
				assert.Equal(t, 401, serve(t, h, post("x", Sign(nil, []byte("x")))).status, "a signature with the empty key is rejected")
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

// Each rule has examples that it refuses, and similar texts that it accepts.
func TestRules(t *testing.T) {
	examples := map[string]struct{ refused, passes []string }{
		"not UTF-8":                          {[]string{"a\xff", "a\ufffdb"}, []string{"gehëim"}},
		"white space around it":              {[]string{" a", "a\u00a0"}, []string{"a b"}},
		"invisible character":                {[]string{"a\x00b", "a\u200bb", "a\u2028b"}, []string{"a\u00a0b"}},
		"quotes":                             {[]string{`"a"`, "'a'", "`a`"}, []string{`"a`, `a"`, `"a'`}},
		"JSON or template":                   {[]string{"[a]", "<a>", "{a b}"}, []string{"[a", "a>", "{a+b", "a}"}},
		"no value in a programming language": {[]string{"null", "None", "TRUE"}, []string{"nullable", "nil1"}},
		"variable of a shell":                {[]string{"$A", "$A_1"}, []string{"$a", "$A-B"}},
		"expression of a shell":              {[]string{"${a}", "$(a b)"}, []string{"$a{", "a$(b)"}},
		"variable of Windows":                {[]string{"%a%"}, []string{"%a", "%a b%"}},
		"placeholder without braces":         {[]string{"env.a", "file:a", "process.env.a", "ENV(a)"}, []string{"env-a", "profile.a"}},
		"URL":                                {[]string{"op://a", "https://a/b"}, []string{"a:/b", "://a"}},
		"name of a variable":                 {[]string{"A_B", "INKIT_WEBHOOK_SECRET"}, []string{"AB", "A_1", "A_b"}},
		"placeholder without its last brace": {[]string{"{a", "{a.b"}, []string{"{a+b"}},
		"path from a known folder":           {[]string{"~/a", "./a", "../a", "@/a"}, []string{"~a", "..a", ".../a"}},
		"placeholder inside a text":          {[]string{"a{$B}c", "a{env.B}c", "a{file.b}c"}, []string{"a{b}c", "a{envb}c"}},
		"dots that hide the secret":          {[]string{"***", "•••", "●"}, []string{"**a**"}},
		"assignment":                         {[]string{"a=b", "export A=b"}, []string{"a=", "a==", "1=b"}},
		"variable without braces":            {[]string{"$a", "$env:a", "$a.b"}, []string{"$a-b"}},
		"text around a placeholder":          {[]string{"a{b.c}d", "a{$b}c"}, []string{"a{b}c"}},
	}
	for _, rule := range slices.Concat(literalRules, rules) {
		rows, ok := examples[rule.name]
		require.True(t, ok, rule.name)
		for _, text := range rows.refused {
			assert.True(t, rule.form.MatchString(text), "%s: %q", rule.name, text)
			_, err := resolve(text)
			require.Error(t, err, "%s: %q", rule.name, text)
		}
		for _, text := range rows.passes {
			assert.False(t, rule.form.MatchString(text), "%s: %q", rule.name, text)
		}
		delete(examples, rule.name)
	}
	assert.Empty(t, examples, "examples without a rule")
}

func TestReferenceWithoutBracesIsNoSecret(t *testing.T) {
	const message = "secret 1: refers to a secret in a form that Caddy does not know: write {env.NAME} or {file./path}"
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

func FuzzResolve(f *testing.F) {
	for _, s := range []string{"", "{env.PATH}", "x{env.PATH}", "{env.", "{file.}", "{}", "{{}}", "a{b}c", `\{env.PATH\}`, " x", "{http.request.host}", "{time.now}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		if strings.Contains(value, "{file.") {
			return // such a value would read files of this machine
		}
		secret, err := resolve(value)
		if err != nil {
			return
		}
		require.NotEmpty(t, secret)
		require.Equal(t, strings.TrimSpace(secret), secret)
		if !strings.HasPrefix(value, "{") || !strings.HasSuffix(value, "}") {
			require.Equal(t, value, secret, "a literal is used unchanged")
		}
		require.NotContains(t, secret, "{env.")
	})
}
