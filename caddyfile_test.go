package inkitwebhook

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func adapt(tb testing.TB, input string) (string, error) {
	tb.Helper()
	out, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return "", err
	}
	assert.Empty(tb, warnings, "also: caddy fmt has nothing to change")
	var pretty bytes.Buffer
	require.NoError(tb, json.Indent(&pretty, out, "", "\t"))
	return pretty.String(), nil
}

// Each golden file has a Caddyfile, a line of dashes, and the JSON of the Caddyfile.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			input, want, found := strings.Cut(string(content), "----------\n")
			require.True(t, found, "no line of dashes")
			got, err := adapt(t, input)
			require.NoError(t, err)
			assert.Equal(t, strings.TrimSpace(want), got)
		})
	}
}

// The errors name the option and the line, but repeat no other word of the input, because
// a misplaced word may be a secret.
func TestCaddyfileErrorsShowNoInput(t *testing.T) {
	const (
		none     = "secret: at least one is required"
		onLine   = "inkit_webhook: takes only a placeholder in braces: write any other secret into the block, in quotes"
		onSecret = "secret: must be one placeholder or a text in quotes, and only name <name> may follow"
		onSize   = "max_size: must be one size above 0, such as 64KiB"
		unknown  = "inkit_webhook: only secret, name, max_size and idempotency_key are allowed"
	)
	block := func(line string) string { return "inkit_webhook {env.X} {\n" + line + "\n}" }
	for _, tt := range []struct{ name, directive, message string }{
		{"no secret at all", "inkit_webhook", none},
		{"no secret in an empty block", "inkit_webhook {\n}", none},
		{"no secret in a block", "inkit_webhook {\nmax_size 1KiB\n}", none},
		{"a matcher and no secret", "inkit_webhook /hook", none},
		{"a text on the line", "inkit_webhook c0nf1d3nt1al", onLine},
		{"a text in quotes on the line", `inkit_webhook "c0nf1d3nt1al {env.X}"`, onLine},
		{"a text on the line that starts with a slash: a matcher", "inkit_webhook /c0nf1d3nt1al", none},
		{"a text with a placeholder on the line", "inkit_webhook c0nf1d3nt1al{env.X}", onLine},
		{"a text in quotes on the line without a placeholder", `inkit_webhook "c0nf1d3nt1al"`, onLine},
		{"empty quotes on the line, from an unset variable", `inkit_webhook ""`, onLine},
		{"two placeholders on the line", "inkit_webhook {env.X} {env.Y}", "inkit_webhook: takes at most one placeholder: further secrets go into the block"},
		{"a placeholder and a text on the line", "inkit_webhook {env.X} c0nf1d3nt1al", "inkit_webhook: takes at most one placeholder: further secrets go into the block"},
		{"a secret without a value", block("secret"), onSecret},
		{"a secret without quotes", block("secret c0nf1d3nt1al"), onSecret},
		{"a secret without quotes that has a name", block("secret c0nf1d3nt1al name current"), onSecret},
		{"a secret without quotes that has a quoted name", block(`secret c0nf1d3nt1al name "current"`), onSecret},
		{"a secret without quotes and a name without the word", block("secret c0nf1d3nt1al current"), onSecret},
		{"a secret and a name without the word", block(`secret "c0nf1d3nt1al" current`), onSecret},
		{"a placeholder and a name without the word", block("secret {env.Y} current"), onSecret},
		{"a text with a placeholder, without quotes", block("secret c0nf1d3nt1al{env.Y}"), onSecret},
		{"the word name without a name", block(`secret "c0nf1d3nt1al" name`), onSecret},
		{"the word name without a secret", block("secret name"), onSecret},
		{"a name without a secret", block("secret name current"), onSecret},
		{"the word name twice", block("secret name " + "name current"), onSecret},
		{"a surplus word after a name", block(`secret "c0nf1d3nt1al" name a c0nf1d3nt1al`), onSecret},
		{"a block after a secret", block("secret \"c0nf1d3nt1al\" {\nmax_size 1KiB\n}"), "secret: must not have a block"},
		{"an unknown word", block("c0nf1d3nt1al"), unknown},
		{"a known word in another case", block("Max_Size 1KiB"), unknown},
		{"max_size without a size", block("max_size"), onSize},
		{"max_size with two sizes", block("max_size 1KiB c0nf1d3nt1al"), onSize},
		{"max_size with a unit as a separate word", block("max_size 1 KiB"), onSize},
		{"max_size of 0", block("max_size 0"), onSize},
		{"max_size of 0 KiB", block("max_size 0KiB"), onSize},
		{"a negative max_size", block("max_size -1"), onSize},
		{"a malformed max_size", block("max_size c0nf1d3nt1al"), onSize},
		{"a max_size of 16 EiB", block("max_size 15.9EiB"), onSize},
		{"max_size repeated", block("max_size 1KiB\nmax_size 1KiB"), "max_size: must not be repeated"},
		{"a block after max_size", block("max_size 1KiB {\nsecret y\n}"), "max_size: must not have a block"},
		{"idempotency_key without a word", block("idempotency_key"), "idempotency_key: must be off or left out"},
		{"idempotency_key on", block("idempotency_key on"), "idempotency_key: must be off or left out"},
		{"idempotency_key with two words", block("idempotency_key off c0nf1d3nt1al"), "idempotency_key: must be off or left out"},
		{"idempotency_key repeated", block("idempotency_key off\nidempotency_key off"), "idempotency_key: must not be repeated"},
		{"name without a name", block("name"), "name: takes one name"},
		{"an empty name", block(`name ""`), "name: takes one name"},
		{"name with two names", block("name a c0nf1d3nt1al"), "name: takes one name"},
		{"name repeated", block("name a\nname a"), "name: must not be repeated"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := adapt(t, ":8080 {\n"+tt.directive+"\n}\n")
			require.ErrorContains(t, err, tt.message+", at Caddyfile:")
			assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		})
	}
}

// Caddy expands {$VARIABLE} before it splits the line into words. An unset variable
// disappears, and a variable with a space becomes two words. In both cases, the next word
// must not become the secret. A set variable without quotes is refused, too: otherwise
// the mistake would show only when the variable is unset.
func TestUnsetVariableMakesNoSecret(t *testing.T) {
	t.Setenv("TEST_INKIT_SET", "c0nf1d3nt1al")
	t.Setenv("TEST_INKIT_TWO_WORDS", "c0nf1d3nt1al current")
	for _, line := range []string{
		"inkit_webhook {\nsecret {$TEST_INKIT_UNSET} current\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_SET}\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_SET} current\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_SET} name current\n}",
		"inkit_webhook {$TEST_INKIT_SET}",
		"inkit_webhook {\nsecret {$TEST_INKIT_TWO_WORDS} current\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_UNSET} name current\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_UNSET} name\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_UNSET}\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_TWO_WORDS}\n}",
		"inkit_webhook {\nsecret {$TEST_INKIT_TWO_WORDS} name newer\n}",
		"inkit_webhook {$TEST_INKIT_UNSET}",
		"inkit_webhook {$TEST_INKIT_TWO_WORDS}",
		"inkit_webhook {$TEST_INKIT_UNSET} {\nmax_size 1KiB\n}",
	} {
		_, err := adapt(t, ":8080 {\n"+line+"\n}\n")
		require.Error(t, err, line)
		assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		if strings.Contains(line, "\nsecret ") || strings.Contains(line, "_SET}") {
			require.ErrorContains(t, err, "in quotes", line)
		}
	}
	t.Run("in quotes, it is one word: the secret", func(t *testing.T) {
		config, err := adapt(t, ":8080 {\n\tinkit_webhook {\n\t\tsecret \"{$TEST_INKIT_TWO_WORDS}\" name current\n\t\tsecret `{$TEST_INKIT_SET}`\n\t}\n}\n")
		require.NoError(t, err)
		assert.Contains(t, config, `"value": "c0nf1d3nt1al current"`)
		assert.Contains(t, config, `"value": "c0nf1d3nt1al"`)
	})
	t.Run("in quotes, it stays one word, and the load fails", func(t *testing.T) {
		config, err := adapt(t, ":8080 {\n\tinkit_webhook {\n\t\tsecret \"{$TEST_INKIT_UNSET}\" name current\n\t}\n}\n")
		require.NoError(t, err)
		assert.Contains(t, config, `"value": ""`)
		require.EqualError(t, load(t, &Handler{Secrets: []Secret{{Name: "current"}}}), "secret current: must not be empty")
	})
}

func FuzzCaddyfile(f *testing.F) {
	for _, s := range []string{
		"inkit_webhook {env.X}", "inkit_webhook", "inkit_webhook {\nsecret \"y\" name z\nname n\nmax_size 1KiB\nidempotency_key off\n}",
		"inkit_webhook {\nsecret \"y\" {\nz\n}\n}", "inkit_webhook {", "inkit_webhook {env.X} {\nmax_size 99999999999EiB\n}", "inkit_webhook \"a b\" {\n}",
		"inkit_webhook x <<<EOF\nEOF", // found by fuzzing: not even valid tokens
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, input string) {
		tokens, err := caddyfile.Tokenize([]byte(input), "Caddyfile")
		if err != nil {
			return
		}
		h := new(Handler)
		if err := h.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
			return
		}
		require.NotEmpty(t, h.Secrets)
		require.GreaterOrEqual(t, h.MaxSize, int64(0))

		// the JSON must keep each value of the Caddyfile
		encoded, err := json.Marshal(h)
		require.NoError(t, err)
		again := new(Handler)
		decoder := json.NewDecoder(bytes.NewReader(encoded))
		decoder.DisallowUnknownFields()
		require.NoError(t, decoder.Decode(again))
		encodedAgain, err := json.Marshal(again)
		require.NoError(t, err)
		require.Equal(t, string(encoded), string(encodedAgain))
	})
}
