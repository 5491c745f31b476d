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

// Each golden file holds a Caddyfile, a line of dashes, and the JSON it stands for.
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

func TestExampleAdaptsWithoutWarnings(t *testing.T) {
	example, err := os.ReadFile("example.Caddyfile")
	require.NoError(t, err)
	got, err := adapt(t, string(example))
	require.NoError(t, err)
	assert.Contains(t, got, `"handler": "inkit_webhook"`)
	assert.Contains(t, got, `"value": "{env.INKIT_WEBHOOK_SECRET}"`)
}

// The errors name the key and the line, and no word of the input: any that is in
// the wrong place may be a secret.
func TestCaddyfileErrorsShowNoInput(t *testing.T) {
	const none = "secret: at least one is required"
	for _, tt := range []struct{ name, directive, message string }{
		{"no secret at all", "inkit_webhook", none},
		{"no secret in an empty block", "inkit_webhook {\n}", none},
		{"no secret in a block", "inkit_webhook {\nmax_size 1KiB\n}", none},
		{"a matcher and no secret", "inkit_webhook /hook", none},
		{"two secrets on the line", "inkit_webhook x c0nf1d3nt1al", "inkit_webhook: takes one secret at most, more go into the block"},
		{"a secret without a value", "inkit_webhook {\nsecret\n}", "secret: takes a secret and a name at most"},
		{"a surplus word after a name", "inkit_webhook {\nsecret c0nf1d3nt1al name c0nf1d3nt1al\n}", "secret: takes a secret and a name at most"},
		{"a block after a secret", "inkit_webhook {\nsecret c0nf1d3nt1al {\nmax_size 1KiB\n}\n}", "secret: must not have a block"},
		{"an unknown word", "inkit_webhook x {\nc0nf1d3nt1al\n}", "inkit_webhook: must hold secret, max_size and idempotency_key only"},
		{"a known word in another case", "inkit_webhook x {\nMax_Size 1KiB\n}", "inkit_webhook: must hold secret, max_size and idempotency_key only"},
		{"max_size without a size", "inkit_webhook x {\nmax_size\n}", "max_size: takes one size"},
		{"max_size with two", "inkit_webhook x {\nmax_size 1KiB c0nf1d3nt1al\n}", "max_size: takes one size"},
		{"max_size of 0", "inkit_webhook x {\nmax_size 0\n}", "max_size: must be a size above 0, such as 64KiB"},
		{"max_size of 0 KiB", "inkit_webhook x {\nmax_size 0KiB\n}", "max_size: must be a size above 0, such as 64KiB"},
		{"a negative max_size", "inkit_webhook x {\nmax_size -1\n}", "max_size: must be a size above 0, such as 64KiB"},
		{"a max_size that is no size", "inkit_webhook x {\nmax_size c0nf1d3nt1al\n}", "max_size: must be a size above 0, such as 64KiB"},
		{"a max_size of 16 EiB", "inkit_webhook x {\nmax_size 15.9EiB\n}", "max_size: must be a size above 0, such as 64KiB"},
		{"max_size repeated", "inkit_webhook x {\nmax_size 1KiB\nmax_size 1KiB\n}", "max_size: must not be repeated"},
		{"a block after max_size", "inkit_webhook x {\nmax_size 1KiB {\nsecret y\n}\n}", "max_size: must not have a block"},
		{"idempotency_key without a word", "inkit_webhook x {\nidempotency_key\n}", "idempotency_key: must be off or left out"},
		{"idempotency_key on", "inkit_webhook x {\nidempotency_key on\n}", "idempotency_key: must be off or left out"},
		{"idempotency_key with two words", "inkit_webhook x {\nidempotency_key off c0nf1d3nt1al\n}", "idempotency_key: must be off or left out"},
		{"idempotency_key repeated", "inkit_webhook x {\nidempotency_key off\nidempotency_key off\n}", "idempotency_key: must not be repeated"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := adapt(t, ":8080 {\n"+tt.directive+"\n}\n")
			require.ErrorContains(t, err, tt.message+", at Caddyfile:")
			assert.NotContains(t, err.Error(), "c0nf1d3nt1al")
		})
	}
}

// The grammar in the documentation of UnmarshalCaddyfile stands in the README, to
// the letter.
func TestGrammarIsInTheREADME(t *testing.T) {
	source, err := os.ReadFile("caddyfile.go")
	require.NoError(t, err)
	var grammar strings.Builder
	for line := range strings.Lines(string(source)) {
		if rest, ok := strings.CutPrefix(line, "//\t"); ok {
			grammar.WriteString(rest)
		}
	}
	require.True(t, strings.HasPrefix(grammar.String(), "inkit_webhook [<matcher>] [<secret>] {\n"))
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	assert.Contains(t, string(readme), "```\n"+grammar.String()+"```\n")
}

func FuzzCaddyfile(f *testing.F) {
	for _, s := range []string{
		"inkit_webhook {env.X}", "inkit_webhook", "inkit_webhook x {\nsecret y z\nmax_size 1KiB\nidempotency_key off\n}",
		"inkit_webhook x {\nsecret y {\nz\n}\n}", "inkit_webhook {", "inkit_webhook x {\nmax_size 99999999999EiB\n}", "inkit_webhook \"a b\" {\n}",
		"inkit_webhook x <<<EOF\nEOF", // found: what does not even fall into tokens
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

		// what the Caddyfile means, its JSON means as well
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
