package inkitwebhook

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The signatures were computed with OpenSSL and with Python's hmac.
const (
	testSecret = "test_inkit_webhook_secret"

	compactBody      = `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs"}`
	compactSignature = "f1e17187f7a3a3a72ab9c6f7f23d4bdff836ec5d8eb75930533a2511b1acbb5b"

	spacedBody      = `{"event_type": "DOCUMENT_CREATE_FINISHED", "resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs"}`
	spacedSignature = "1bc844a104bb7235e0ed90c466c5ee3116562479557f964bbc5b57e067fd295b"
)

func TestVectors(t *testing.T) {
	unhex := func(s string) string {
		b, err := hex.DecodeString(s)
		require.NoError(t, err)
		return string(b)
	}
	for _, tt := range []struct{ name, secret, body, signature string }{
		{"Inkit's event, compact", testSecret, compactBody, compactSignature},
		{"Inkit's event, with spaces", testSecret, spacedBody, spacedSignature},
		{
			"RFC 4231, 4.2", strings.Repeat("\x0b", 20), "Hi There",
			"b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
		},
		{
			"RFC 4231, 4.3, a key shorter than the output", "Jefe", "what do ya want for nothing?",
			"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
		},
		{
			"RFC 4231, 4.4, data longer than a block", strings.Repeat("\xaa", 20), strings.Repeat("\xdd", 50),
			"773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
		},
		{
			"RFC 4231, 4.5", unhex("0102030405060708090a0b0c0d0e0f10111213141516171819"), strings.Repeat("\xcd", 50),
			"82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
		},
		{
			"RFC 4231, 4.7, a key longer than a block", strings.Repeat("\xaa", 131),
			"Test Using Larger Than Block-Size Key - Hash Key First",
			"60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
		},
		{
			"RFC 4231, 4.8, key and data longer than a block", strings.Repeat("\xaa", 131),
			"This is a test using a larger than block-size key and a larger than block-size data. The key needs to be hashed before being used by the HMAC algorithm.",
			"9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, err := NewVerifier(Secret{Value: tt.secret, Name: "vector"})
			require.NoError(t, err)
			name, err := v.Verify([]byte(tt.body), tt.signature)
			require.NoError(t, err)
			assert.Equal(t, "vector", name)
			assert.Equal(t, tt.signature, Sign([]byte(tt.secret), []byte(tt.body)))
		})
	}

	// The RFC shows only 128 bits of this signature. A truncated signature is refused.
	t.Run("RFC 4231, 4.6, a truncated output", func(t *testing.T) {
		v, err := NewVerifier(Secret{Value: strings.Repeat("\x0c", 20)})
		require.NoError(t, err)
		_, err = v.Verify([]byte("Test With Truncation"), "a3b6167473100ee06e0c796c2955552b")
		require.ErrorIs(t, err, ErrSignatureMalformed)
	})
}

// TestWycheproof runs the cases of Project Wycheproof. It reads them from a folder outside
// of this repository.
func TestWycheproof(t *testing.T) {
	path := os.Getenv("WYCHEPROOF_HMAC_SHA256")
	if path == "" {
		t.Skip("WYCHEPROOF_HMAC_SHA256 does not name hmac_sha256_test.json of github.com/C2SP/wycheproof")
	}
	file, err := os.ReadFile(path)
	require.NoError(t, err)
	var suite struct {
		NumberOfTests int
		TestGroups    []struct {
			TagSize int
			Tests   []struct {
				TcID                           int
				Comment, Key, Msg, Tag, Result string
			}
		}
	}
	require.NoError(t, json.Unmarshal(file, &suite))
	played := 0
	for _, group := range suite.TestGroups {
		for _, tt := range group.Tests {
			key, err := hex.DecodeString(tt.Key)
			require.NoError(t, err)
			msg, err := hex.DecodeString(tt.Msg)
			require.NoError(t, err)
			v, err := NewVerifier(Secret{Value: string(key)})
			require.NoError(t, err)

			_, err = v.Verify(msg, tt.Tag)
			var want error
			switch {
			case group.TagSize != 8*sha256.Size:
				want = ErrSignatureMalformed
			case tt.Result == "invalid":
				want = ErrSignatureMismatch
			}
			require.ErrorIs(t, err, want, "case %d: %s", tt.TcID, tt.Comment)
			played++
		}
	}
	assert.Equal(t, suite.NumberOfTests, played)
	t.Logf("%d cases", played)
}

func TestVerifyAgainstOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	v, err := NewVerifier(Secret{Value: testSecret})
	require.NoError(t, err)
	for _, body := range []string{"", compactBody, "\x00\xff\n", strings.Repeat("a", 100_000)} {
		cmd := exec.Command(openssl, "dgst", "-sha256", "-hmac", testSecret, "-r")
		cmd.Stdin = strings.NewReader(body)
		out, err := cmd.Output()
		require.NoError(t, err)
		_, err = v.Verify([]byte(body), strings.Fields(string(out))[0])
		require.NoError(t, err)
	}
}

func TestVerify(t *testing.T) {
	v, err := NewVerifier(Secret{"first secret", "first"}, Secret{testSecret, "second"}, Secret{"third secret", "third"})
	require.NoError(t, err)
	flipped := func(i int) string {
		b := []byte(compactSignature)
		b[i] = map[bool]byte{true: '1', false: '0'}[b[i] == '0']
		return string(b)
	}
	for _, tt := range []struct {
		name, body, signature string
		want                  string
		err                   error
	}{
		{"signed with the first secret", "x", Sign([]byte("first secret"), []byte("x")), "first", nil},
		{"signed with the second secret", compactBody, compactSignature, "second", nil},
		{"signed with the third secret", "x", Sign([]byte("third secret"), []byte("x")), "third", nil},
		{"an empty body that is signed", "", Sign([]byte(testSecret), nil), "second", nil},

		{"no signature", compactBody, "", "", ErrSignatureMissing},

		{"one digit too few", compactBody, compactSignature[1:], "", ErrSignatureMalformed},
		{"one digit too many", compactBody, compactSignature + "0", "", ErrSignatureMalformed},
		{"upper case", compactBody, strings.ToUpper(compactSignature), "", ErrSignatureMalformed},
		{"one digit in upper case", compactBody, "F" + compactSignature[1:], "", ErrSignatureMalformed},
		{"a prefix", compactBody, "sha256=" + compactSignature, "", ErrSignatureMalformed},
		{"a prefix instead of the first digits", compactBody, "sha256=" + compactSignature[7:], "", ErrSignatureMalformed},
		{"two signatures", compactBody, compactSignature + "," + compactSignature, "", ErrSignatureMalformed},
		{"white space before the signature", compactBody, " " + compactSignature, "", ErrSignatureMalformed},
		{"a letter after f", compactBody, "g" + compactSignature[1:], "", ErrSignatureMalformed},
		{"the character before 0", compactBody, "/" + compactSignature[1:], "", ErrSignatureMalformed},
		{"the character after 9", compactBody, ":" + compactSignature[1:], "", ErrSignatureMalformed},
		{"the character before a", compactBody, "`" + compactSignature[1:], "", ErrSignatureMalformed},
		{"64 bytes, not digits", compactBody, strings.Repeat("\x00", 64), "", ErrSignatureMalformed},
		{"one character", compactBody, "f", "", ErrSignatureMalformed},

		{"another digit at the start", compactBody, flipped(0), "", ErrSignatureMismatch},
		{"another digit in the middle", compactBody, flipped(31), "", ErrSignatureMismatch},
		{"another digit at the end", compactBody, flipped(63), "", ErrSignatureMismatch},
		{"the signature of another body", spacedBody, compactSignature, "", ErrSignatureMismatch},
		{"a body with one byte more", compactBody + "\n", compactSignature, "", ErrSignatureMismatch},
		{"no body", "", compactSignature, "", ErrSignatureMismatch},
		{"another secret", compactBody, Sign([]byte("other"), []byte(compactBody)), "", ErrSignatureMismatch},
		{"the empty secret", compactBody, Sign(nil, []byte(compactBody)), "", ErrSignatureMismatch},
		{"the hash without a key", compactBody, fmt.Sprintf("%x", sha256.Sum256([]byte(compactBody))), "", ErrSignatureMismatch},
		{"zeros", compactBody, strings.Repeat("0", 64), "", ErrSignatureMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name, err := v.Verify([]byte(tt.body), tt.signature)
			require.ErrorIs(t, err, tt.err)
			assert.Equal(t, tt.want, name)
		})
	}
}

// The time that the function match takes must not depend on which digits differ, or on which
// secret matches. Clocks are too coarse for such a test, so this test reads the code: only
// crypto/subtle compares sums, and the function match skips no secret.
func TestComparesInConstantTime(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "verifier.go", nil, 0)
	require.NoError(t, err)
	var loop *ast.RangeStmt
	ast.Inspect(file, func(n ast.Node) bool {
		if fn, ok := n.(*ast.FuncDecl); ok && fn.Name.Name == "match" {
			for _, stmt := range fn.Body.List {
				if loop == nil {
					loop, _ = stmt.(*ast.RangeStmt)
				}
			}
		}
		return true
	})
	require.NotNil(t, loop, "match ranges over the secrets")
	compared := 0
	ast.Inspect(loop, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ReturnStmt, *ast.BranchStmt:
			t.Error("the loop over the secrets ends early")
		case *ast.BinaryExpr:
			_, isConstant := n.Y.(*ast.BasicLit)
			assert.True(t, isConstant, "only the verdict of crypto/subtle is compared with ==")
		case *ast.SelectorExpr:
			switch n.Sel.Name {
			case "ConstantTimeCompare":
				compared++
			case "Equal", "Compare":
				t.Errorf("%s is not known to take constant time", n.Sel.Name)
			}
		}
		return true
	})
	assert.Equal(t, 1, compared)
}

func TestNewVerifierRefusesTheEmptySecret(t *testing.T) {
	for _, tt := range []struct {
		name    string
		secrets []Secret
		message string
	}{
		{"no secret at all", nil, "secrets: must not be empty"},
		{"the only secret is empty", []Secret{{}}, "secret 1: must not be empty"},
		{"an empty secret that has a name", []Secret{{Name: "a"}}, "secret a: must not be empty"},
		{"a secret of one NUL", []Secret{{Value: "\x00"}}, "secret 1: must not be empty"},
		{"33 NULs, the empty key for HMAC", []Secret{{Value: strings.Repeat("\x00", 33)}}, "secret 1: must not be empty"},
		{"65 NULs", []Secret{{Value: strings.Repeat("\x00", 65)}}, "secret 1: must not be empty"},
		{"the second of two is empty", []Secret{{Value: "x"}, {}}, "secret 2: must not be empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewVerifier(tt.secrets...)
			require.ErrorIs(t, err, ErrEmptySecret)
			assert.EqualError(t, err, tt.message)
		})
	}
}

// In FIPS 140-only mode, crypto/hmac panics on short keys. A process chooses this mode at
// its start, so the test starts itself again in that mode.
func TestShortSecretInFIPSMode(t *testing.T) {
	if os.Getenv("TEST_FIPS") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestShortSecretInFIPSMode$", "-test.v")
		cmd.Env = append(os.Environ(), "TEST_FIPS=1", "GODEBUG=fips140=only")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		assert.Contains(t, string(out), "--- PASS")
		return
	}
	_, err := NewVerifier(Secret{Value: "14 bytes long."}, Secret{Value: "13 bytes long"})
	require.EqualError(t, err, "secret 2: must be at least 14 bytes long in FIPS 140-only mode")
	v, err := NewVerifier(Secret{Value: testSecret})
	require.NoError(t, err)
	_, err = v.Verify([]byte(compactBody), compactSignature)
	require.NoError(t, err)
}

func FuzzVerify(f *testing.F) {
	f.Add([]byte(compactBody), []byte(testSecret), compactSignature)
	f.Add([]byte(compactBody), []byte(testSecret), "sha256="+compactSignature)
	f.Add([]byte(""), []byte("k"), "")
	f.Add([]byte{0xff, 0}, []byte{0}, strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, body, secret []byte, signature string) {
		v, err := NewVerifier(Secret{Value: "another secret", Name: "other"}, Secret{Value: string(secret), Name: "this"})
		if len(bytes.Trim(secret, "\x00")) == 0 {
			require.ErrorIs(t, err, ErrEmptySecret)
			return
		}
		require.NoError(t, err)

		m := hmac.New(sha256.New, secret)
		m.Write(body)
		genuine := hex.EncodeToString(m.Sum(nil))
		name, err := v.Verify(body, genuine)
		require.NoError(t, err)
		if string(secret) != "another secret" {
			require.Equal(t, "this", name)
		}

		_, err = v.Verify(body, signature)
		other := Sign([]byte("another secret"), body)
		if accepted := err == nil; accepted != (signature == genuine || signature == other) {
			t.Fatalf("Verify(%q, %q): %v", body, signature, err)
		}
	})
}

func FuzzParseSignature(f *testing.F) {
	for _, s := range []string{"", compactSignature, strings.ToUpper(compactSignature), compactSignature[1:], "sha256=" + compactSignature} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sig, err := parseSignature(s)
		if s == "" {
			require.ErrorIs(t, err, ErrSignatureMissing)
			return
		}
		decoded, hexErr := hex.DecodeString(s)
		if hexErr != nil || len(decoded) != sha256.Size || hex.EncodeToString(decoded) != s {
			require.ErrorIs(t, err, ErrSignatureMalformed)
			return
		}
		require.NoError(t, err)
		require.Equal(t, decoded, sig[:])
	})
}

func ExampleVerifier() {
	v, err := NewVerifier(
		Secret{Name: "old", Value: "the secret before Regenerate Secret Key"},
		Secret{Name: "new", Value: testSecret},
	)
	if err != nil {
		fmt.Println(err)
		return
	}

	body := []byte(`{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs"}`)
	fmt.Println(v.Verify(body, "f1e17187f7a3a3a72ab9c6f7f23d4bdff836ec5d8eb75930533a2511b1acbb5b"))
	fmt.Println(v.Verify(body, "f1e17187f7a3a3a72ab9c6f7f23d4bdff836ec5d8eb75930533a2511b1acbb5c"))
	// Output:
	// new <nil>
	//  signature does not match the body under any secret
}
