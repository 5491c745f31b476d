//go:build unix

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestExamplesKeepSignaturesOutOfLogs: each Caddyfile that people copy has a filter for
// Caddy's own log. TestRecipeSignatureInLogs shows the purpose of the filter.
func TestExamplesKeepSignaturesOutOfLogs(t *testing.T) {
	t.Parallel()
	paths := []string{"../../example.Caddyfile"}
	for _, pattern := range []string{"../../examples/*/Caddyfile", "../../examples/*/*/Caddyfile"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		require.NotEmpty(t, found)
		paths = append(paths, found...)
	}
	for _, path := range paths {
		cmd := exec.Command(caddyPath, "adapt", "--adapter", "caddyfile", "--config", path)
		cmd.Env = append(os.Environ(), "CREDENTIALS_DIRECTORY=/run/credentials")
		out, err := cmd.Output()
		require.NoError(t, err, path)
		var config struct {
			Logging struct {
				Logs map[string]struct {
					Encoder struct {
						Fields map[string]struct{ Filter string }
					}
				}
			}
		}
		require.NoError(t, json.Unmarshal(out, &config), path)
		assert.Equal(t, "delete", config.Logging.Logs["default"].Encoder.Fields["request>headers>Inkit-Signature"].Filter, path)
	}
}
