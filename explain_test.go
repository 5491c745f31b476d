package inkitwebhook

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Each row has one mistake: the sender has signed another body, used another secret, or
// changed the signature. explain must find this mistake.
func TestExplain(t *testing.T) {
	const (
		key     = "a2V5IGZvciB0ZXN0cw==" // valid base64
		hexKey  = "6b657920666f72207465737473"
		pretty  = "{\n  \"event_type\": \"E\",\n  \"resource_id\": \"r\"\n}"
		compact = `{"event_type":"E","resource_id":"r"}`
		nested  = `{"b":"é 😀 \"\\, x: y","a":[1.10,{"c":"a, b: c"}]}`
	)
	signatureOf := func(key, signed string) string { return Sign([]byte(key), []byte(signed)) }
	sum := func(key, signed string) []byte {
		b, err := hex.DecodeString(signatureOf(key, signed))
		require.NoError(t, err)
		return b
	}
	rewritten := "the JSON was parsed and written again: the signed body is "
	for _, tt := range []struct{ name, secret, body, signature, cause string }{
		{"no signature", key, compact, "", "Inkit-Signature is missing"},
		{"signature in quotes", key, compact, `"` + signatureOf(key, compact) + `"`, "white space or quotes around it"},
		{"signature in upper case", key, compact, strings.ToUpper(signatureOf(key, compact)), "upper-case"},
		{"signature with a prefix", key, compact, "sha256=" + signatureOf(key, compact), "prefix such as sha256="},
		{"signature in base64", key, compact, base64.StdEncoding.EncodeToString(sum(key, compact)), "the signature is in base64"},
		{"signature in base64 for URLs", key, compact, base64.RawURLEncoding.EncodeToString(sum(key, compact)), "the signature is in base64"},
		{"signature of no known form", key, compact, "v1=abc", "Inkit sends 64 lower-case hexadecimal digits and nothing else"},

		{"newline lost", key, compact, signatureOf(key, compact+"\n"), "newline at the end of the body was removed"},
		{"newline of Windows lost", key, compact, signatureOf(key, compact+"\r\n"), "newline at the end of the body was removed"},
		{"newline added", key, compact + "\n", signatureOf(key, compact), "a newline was added"},
		{"newline of Windows added", key, compact + "\r\n", signatureOf(key, compact), "a newline was added"},
		{"LF became CRLF", key, strings.ReplaceAll(pretty, "\n", "\r\n"), signatureOf(key, pretty), "from LF to CRLF"},
		{"CRLF became LF", key, pretty, signatureOf(key, strings.ReplaceAll(pretty, "\n", "\r\n")), "from CRLF to LF"},
		{"byte order mark lost", key, compact, signatureOf(key, "\ufeff"+compact), "byte order mark at the start of the body was removed"},
		{"byte order mark added", key, "\ufeff" + compact, signatureOf(key, compact), "a byte order mark was added"},
		{"empty body was signed", key, compact, signatureOf(key, ""), "of an empty body"},

		{"compact JSON became pretty", key, pretty, signatureOf(key, compact), rewritten + "compact"},
		{"spaced JSON became compact", key, compact, signatureOf(key, `{"event_type": "E", "resource_id": "r"}`), rewritten + "on one line with spaces after commas and colons"},
		{"pretty JSON became compact", key, compact, signatureOf(key, pretty), rewritten + `indented by "  "`},
		{"pretty JSON with a newline became compact", key, compact, signatureOf(key, pretty+"\n"), rewritten + `indented by "  ", with a newline at its end`},
		{"JSON indented by tabs became compact", key, compact, signatureOf(key, strings.ReplaceAll(pretty, "  ", "\t")), rewritten + `indented by "\t"`},
		{"spaced JSON with strings became compact", key, nested, signatureOf(key, `{"b": "é 😀 \"\\, x: y", "a": [1.10, {"c": "a, b: c"}]}`), rewritten + "on one line with spaces after commas and colons"},
		{"sorted JSON became unsorted", key, `{"resource_id":"r","event_type":"E"}`, signatureOf(key, compact), rewritten + "compact, with its members sorted"},

		{"secret with white space", " " + key + "\n", compact, signatureOf(key, compact), "white space around it"},
		{"secret in quotes", `"` + key + `"`, compact, signatureOf(key, compact), "quotes around it"},
		{"secret that was signed with a newline", key, compact, signatureOf(key+"\n", compact), "a newline at the end of the secret"},
		{"secret decoded from base64 by the sender", key, compact, signatureOf("key for tests", compact), "decoded from base64, and Inkit"},
		{"secret decoded from base64 here", "key for tests", compact, signatureOf(key, compact), "decoded from base64 here"},
		{"secret decoded from hex by the sender", hexKey, compact, signatureOf("key for tests", compact), "decoded from hexadecimal digits, and Inkit"},
		{"secret decoded from hex here", "key for tests", compact, signatureOf(hexKey, compact), "decoded from hexadecimal digits here"},

		{"another secret", key, compact, signatureOf("another", compact), "none of the usual causes"},
		{"another body", key, compact, signatureOf(key, `{"event_type":"F","resource_id":"r"}`), "none of the usual causes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			secrets := []Secret{{Value: "not this one", Name: "first"}, {Value: tt.secret, Name: "second"}}
			cause := explain(secrets, []byte(tt.body), tt.signature)
			assert.Contains(t, cause, tt.cause)
			if !strings.Contains(tt.cause, "at its end") && strings.HasPrefix(tt.cause, rewritten) {
				assert.Equal(t, tt.cause, cause)
			}
			assert.NotContains(t, cause, strings.TrimSpace(tt.secret))
		})
	}
}

// explain does not indent deeply nested or large JSON, so it needs little memory and time.
// When explain indented all JSON, it needed 9 GiB for 14 kB of nested JSON.
func TestExplainIsBounded(t *testing.T) {
	secrets := []Secret{{Value: testSecret}}
	for name, body := range map[string]string{
		"nested deeply":          strings.Repeat("[", 7000) + strings.Repeat("]", 7000),
		"nested deeply and wide": strings.Repeat(`{"a":[1,`, 9) + strings.Repeat("1,", 20_000) + "1" + strings.Repeat("]}", 9),
		"larger than 64 KiB":     "[" + strings.Repeat("1,", 40_000) + "1]",
	} {
		t.Run(name, func(t *testing.T) {
			require.True(t, json.Valid([]byte(body)))
			tryLayouts(body, func(string, string) { t.Fatal("is laid out") })
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			assert.Contains(t, explain(secrets, []byte(body), compactSignature), "none of the usual causes")
			runtime.ReadMemStats(&after)
			assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(64*len(body)))
		})
	}
	layouts := 0
	tryLayouts(strings.Repeat("[", 8)+strings.Repeat("]", 8), func(string, string) { layouts++ })
	assert.Positive(t, layouts, "8 levels are laid out")
}

func FuzzExplain(f *testing.F) {
	f.Add([]byte(compactBody), "secret", compactSignature)
	f.Add([]byte(`{"a":"\ud83d\ude00\u00e9"}`), "c2VjcmV0", "sha256=x")
	f.Add([]byte(`"\u`), "x", "")
	f.Fuzz(func(t *testing.T, body []byte, secret, signature string) {
		if cause := explain([]Secret{{Value: secret, Name: "name"}}, body, signature); cause == "" {
			t.Error("no answer")
		}
		if json.Valid(body) { // each variant must be valid, too
			tryLayouts(string(body), func(variant, layout string) {
				require.True(t, json.Valid([]byte(variant)), "%s: %q", layout, variant)
			})
		}
	})
}
