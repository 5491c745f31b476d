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

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// A changed file can make two secrets of a running guard equal. A restart must then accept them.
func TestEqualSecretsLoadWithOneWarning(t *testing.T) {
	path := writeFile(t, filepath.Join(t.TempDir(), "secret"), "next\n")
	core, logs := observer.New(zapcore.DebugLevel)
	secrets := []Secret{{"next", "blue"}, {"other", "between"}, {"{file." + path + "}", "green"}}
	k, err := newKeyring(secrets, zap.New(core))
	require.NoError(t, err)
	k.reloads = newCounters("", secrets).reloads
	require.Equal(t, 1, logs.Len())
	line := logs.All()[0]
	assert.Equal(t, zapcore.WarnLevel, line.Level)
	assert.Equal(t, "two secrets have the same value: remove one", line.Message)
	assert.Equal(t, []any{"blue", "green"}, line.ContextMap()["secrets"])
	sig, err := parseSignature(Sign([]byte("next"), []byte("x")))
	require.NoError(t, err)
	i, err := k.verify(t.Context(), &sig, []byte("x"))
	require.NoError(t, err)
	assert.Equal(t, "blue", secrets[i].Name, "the first of the equal secrets counts")
}

// reloadsSince returns a function that counts the reloads after this call, by result.
func reloadsSince(h *Handler) func() string {
	count := func(result int) float64 { return testutil.ToFloat64(h.counters.reloads[result]) }
	changed, unchanged, failed := count(reloadChanged), count(reloadUnchanged), count(reloadFailed)
	return func() string {
		return fmt.Sprintf("%v changed, %v unchanged, %v failed",
			count(reloadChanged)-changed, count(reloadUnchanged)-unchanged, count(reloadFailed)-failed)
	}
}

// inBubble runs f in a synctest bubble, then waits one second of its clock for the last reload.
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
		Name:    fmt.Sprintf("file-guard-%d", fileGuards.Add(1)), // with its own counters
		Secrets: append([]Secret{{Value: "{file." + path + "}", Name: "file"}}, secrets...),
	})
	return &fileGuard{h, t, path, logs}
}

// status returns the status of an event that is signed with a secret.
func (g *fileGuard) status(secret string) int {
	g.t.Helper()
	return serve(g.t, g.Handler, post("x", Sign([]byte(secret), []byte("x")))).status
}

func TestSecretsAreReloaded(t *testing.T) {
	bubble := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { inBubble(t, f) })
	}
	bubble("an event signed with a new secret waits for the reload and passes", func(t *testing.T) {
		g := newFileGuard(t)
		counted := reloadsSince(g.Handler)
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		assert.Equal(t, "1 changed, 0 unchanged, 0 failed", counted())
		lines := g.logs.FilterMessage("secrets changed").All()
		require.Len(t, lines, 1)
		assert.Equal(t, []any{"file"}, lines[0].ContextMap()["secrets"], "the line names the changed secret")
	})
	bubble("a new secret is used, although it appeared just after a reload", func(t *testing.T) {
		g := newFileGuard(t)
		assert.Equal(t, 401, g.status("new"))
		writeFile(t, g.path, "new\n")
		began := time.Now()
		assert.Equal(t, 200, g.status("new"))
		assert.LessOrEqual(t, time.Since(began), reloadInterval)
	})
	bubble("the old value stays valid for 10 s after a change", func(t *testing.T) {
		g := newFileGuard(t)
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		time.Sleep(previousAge - time.Millisecond)
		assert.Equal(t, 200, g.status("old"))
		time.Sleep(time.Millisecond)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 200, g.status("new"))
	})
	bubble("the old value stays valid during two changes within 10 s", func(t *testing.T) {
		g := newFileGuard(t)
		for i, value := range []string{"n", "newer"} { // the first value is half written
			writeFile(t, g.path, value)
			time.Sleep(time.Second)
			assert.Equal(t, 200, g.status(value), i)
			assert.Equal(t, 200, g.status("old"), i)
		}
		time.Sleep(previousAge - time.Second)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 200, g.status("newer"))
	})
	bubble("a withdrawn secret is refused within 11 s of traffic, although it matched", func(t *testing.T) {
		g := newFileGuard(t)
		writeFile(t, g.path, "new\n")
		began := time.Now()
		for g.status("old") == 200 && time.Since(began) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		assert.Less(t, time.Since(began), 11*time.Second)
	})
	bubble("a flood of wrong signatures causes only 4 reloads a second", func(t *testing.T) {
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
		assert.LessOrEqual(t, intervals, time.Duration(10), "each event waits for one reload")
		var changed, unchanged, failed float64
		_, err := fmt.Sscanf(counted(), "%g changed, %g unchanged, %g failed", &changed, &unchanged, &failed)
		require.NoError(t, err, counted())
		assert.LessOrEqual(t, unchanged, float64(intervals)+2)
	})
	bubble("matching signatures cause at most 4 reloads a second, and do not wait for them", func(t *testing.T) {
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
		"missing":           func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
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
				assert.Equal(t, 401, g.status(""), "a signature with the empty key is rejected")
			}
			assert.Regexp(t, "^0 changed, 0 unchanged, [0-9]+ failed$", counted())
			lines := g.logs.FilterLevelExact(zapcore.ErrorLevel).All()
			require.Len(t, lines, 2, "one line a minute")
			assert.Equal(t, "cannot reload secrets: the last good ones stay in use, repair this before Caddy restarts", lines[0].Message)
			assert.Contains(t, lines[0].ContextMap()["error"], "secret file: ")
			assert.NotContains(t, lines[0].ContextMap()["error"], g.path)

			require.NoError(t, os.RemoveAll(g.path))
			writeFile(t, g.path, "new\n")
			assert.Equal(t, 200, g.status("new"), "a valid value is used at the next reload")
		})
	}
	bubble("a withdrawn secret does not come back if its file is unreadable and another file changes", func(t *testing.T) {
		other := writeFile(t, filepath.Join(t.TempDir(), "other"), "other\n")
		g := newFileGuard(t, Secret{Value: "{file." + other + "}", Name: "other"})
		writeFile(t, g.path, "new\n")
		assert.Equal(t, 200, g.status("new"))
		time.Sleep(previousAge)
		require.NoError(t, os.Remove(g.path))
		writeFile(t, other, "newer\n")
		assert.Equal(t, 200, g.status("newer"), "the unreadable secret does not block the reload of this one")
		time.Sleep(previousAge)
		assert.Equal(t, 401, g.status("old"))
		assert.Equal(t, 401, g.status("other"))
		assert.Equal(t, 200, g.status("new"))
	})
	bubble("two secrets that get the same value cause one warning and no error", func(t *testing.T) {
		g := newFileGuard(t, Secret{Value: "next", Name: "next"})
		writeFile(t, g.path, "next\n")
		assert.Equal(t, 401, g.status("wrong"))
		assert.Equal(t, 200, g.status("next"))
		assert.Len(t, g.logs.FilterMessage("two secrets have the same value: remove one").All(), 1)
		require.NoError(t, load(t, &Handler{Secrets: g.Secrets}), "and the next load accepts them")
	})
	bubble("a request does not wait after its sender has disconnected", func(t *testing.T) {
		g := newFileGuard(t)
		assert.Equal(t, 401, g.status("wrong")) // the next reload is in 250 ms
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		assert.Equal(t, 401, serve(t, g.Handler, post("x", Sign([]byte("wrong"), []byte("x"))).WithContext(ctx)).status)
		assert.Zero(t, time.Since(began))
	})
	t.Run("a value that cannot change is not read again", func(t *testing.T) {
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

// After each of 20 rotations, 50 events with the new secret and 50 forged events arrive at the
// same moment. A request must also wait for a reload that another request has asked for.
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
		assert.Zero(t, refused, "of 1,000 events")
	})
}

// A hanging file system does not delay an event whose secret is known, and delays other
// events for two seconds.
func TestFileSystemThatHangs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newFileGuard(t)
		g.keyring.reloading.Store(true) // as during a reload that never returns
		began := time.Now()
		assert.Equal(t, 200, g.status("old"))
		assert.Zero(t, time.Since(began))
		assert.Equal(t, 401, g.status("new"))
		assert.Equal(t, reloadWait, time.Since(began))
	})
}

// Four senders use one secret, while the file of the other secret is replaced again and again.
// All events must pass, also those with a new secret.
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
