package inkitwebhook_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	inkitwebhook "github.com/inkit-webhooks/caddy-inkit-webhook"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A program without Caddy checks the signature itself.
func Example() {
	const secret = "test_inkit_webhook_secret"
	verifier, err := inkitwebhook.NewVerifier(inkitwebhook.Secret{Name: "current", Value: secret})
	if err != nil {
		fmt.Println(err)
		return
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		// in the handler, with the bytes of the body as they arrived:
		name, err := verifier.Verify(body, r.Header.Get("Inkit-Signature")) // the name of the secret
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		fmt.Fprintln(w, "signed with the", name, "secret")
	}

	const event = `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_1"}`
	for _, signature := range []string{inkitwebhook.Sign([]byte(secret), []byte(event)), strings.Repeat("0", 64)} {
		r := httptest.NewRequest(http.MethodPost, "/webhook", strings.NewReader(event))
		r.Header.Set("Inkit-Signature", signature)
		w := httptest.NewRecorder()
		handler(w, r)
		fmt.Print(w.Code, " ", w.Body)
	}
	// Output:
	// 200 signed with the current secret
	// 401 signature does not match the body under any secret
}

// The example contains all lines of the Go code in docs/reference.md.
func TestGoOfTheReference(t *testing.T) {
	reference, err := os.ReadFile("docs/reference.md")
	require.NoError(t, err)
	_, block, found := strings.Cut(string(reference), "```go\n")
	require.True(t, found)
	block, _, _ = strings.Cut(block, "```\n")
	example, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(block), "\n")
	assert.NotEmpty(t, lines)
	for _, line := range lines {
		assert.Contains(t, string(example), "\t"+line+"\n")
	}
}
