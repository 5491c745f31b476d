package inkitwebhook

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

const (
	reloadInterval    = 250 * time.Millisecond // the pause between two reloads
	reloadWait        = 2 * time.Second        // how long a request waits for one before it is refused
	reloadLogInterval = time.Minute            // the pause between two lines on a secret that cannot be read
	loadWait          = 10 * time.Second       // how long reading one secret may take at a load
	previousAge       = 10 * time.Second       // how long a value stays good when another is found, which may be half written
)

// keyring holds the secrets of a handler and follows their placeholders to new
// values while it runs. There is no file watcher, which would miss the symbolic
// links that Kubernetes swaps: requests ask for reloads.
type keyring struct {
	secrets    []Secret             // as configured
	changeable bool                 // whether a value can change while the process runs
	reloads    []prometheus.Counter // by index of reloadResults
	logger     *zap.Logger

	inUse     atomic.Pointer[[]generation] // newest first
	reloading atomic.Bool                  // whether reloadLoop runs
	mu        sync.Mutex                   // for next
	next      chan struct{}                // closed at the end of a reload that is asked for and has not begun

	values    []Secret  // with the last good value of each; for reload alone
	lastError time.Time // when a reload failed and the log said so; likewise
}

// generation is a set of values. It stays good for previousAge once there is a newer.
type generation struct {
	verifier *Verifier
	until    time.Time
}

// newKeyring resolves the secrets. An error shows no part of a value: not even of a
// placeholder, since what looks like one may be a secret in braces.
func newKeyring(secrets []Secret, reloads []prometheus.Counter, logger *zap.Logger) (k *keyring, err error) {
	k = &keyring{secrets: secrets, reloads: reloads, logger: logger}
	k.inUse.Store(new([]generation))
	values := slices.Clone(secrets)
	for i, secret := range secrets {
		if values[i].Value, err = resolveInTime(secret.Value); err != nil {
			return nil, fmt.Errorf("secret %s: %w", secret.Name, err)
		}
		name, ok := placeholder.Name(secret.Value)
		k.changeable = k.changeable || ok && !strings.HasPrefix(name, "env.")
	}
	return k, k.use(values)
}

// use makes values the newest generation.
func (k *keyring) use(values []Secret) error {
	verifier, err := NewVerifier(values...)
	if err != nil {
		return err
	}
	for i, one := range values {
		for _, other := range values[:i] {
			if one.Value == other.Value {
				k.logger.Warn("two secrets have the same value", zap.Strings("secrets", []string{other.Name, one.Name}))
			}
		}
	}
	generations := []generation{{verifier: verifier}}
	for i, g := range *k.inUse.Load() {
		if i == 0 {
			g.until = time.Now().Add(previousAge)
		}
		if time.Now().Before(g.until) {
			generations = append(generations, g)
		}
	}
	k.values = values
	k.inUse.Store(&generations)
	return nil
}

// verify returns the index of the secret that made sig for body. What matches waits
// for nothing. What does not waits for a reload that begins after it has arrived.
func (k *keyring) verify(ctx context.Context, sig *[sha256.Size]byte, body []byte) (secret int, err error) {
	secret, err = k.match(sig, body)
	switch {
	case !k.changeable:
	case err != nil:
		select {
		case <-k.askForReload():
			return k.match(sig, body)
		case <-time.After(reloadWait):
		case <-ctx.Done():
		}
	case !k.reloading.Load():
		k.askForReload()
	}
	return secret, err
}

func (k *keyring) match(sig *[sha256.Size]byte, body []byte) (secret int, err error) {
	for i, g := range *k.inUse.Load() {
		if i == 0 || time.Now().Before(g.until) {
			if secret, err = g.verifier.match(sig, body); err == nil {
				break
			}
		}
	}
	return secret, err
}

// askForReload has the secrets reloaded, and returns a channel that is closed at
// the end of a reload that begins after this call.
func (k *keyring) askForReload() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next == nil {
		k.next = make(chan struct{})
		if k.reloading.CompareAndSwap(false, true) {
			go k.reloadLoop()
		}
	}
	return k.next
}

// reloadLoop reloads for as long as somebody asks for it, in a goroutine of its own:
// a file system that hangs holds nothing else.
func (k *keyring) reloadLoop() {
	for {
		k.mu.Lock()
		done := k.next
		k.next = nil
		k.reloading.Store(done != nil)
		k.mu.Unlock()
		if done == nil {
			return
		}
		k.reload()
		close(done)
		time.Sleep(reloadInterval)
	}
}

// reload takes over every value that has changed and would load. Any other stays as
// it was: losing events is worse than a secret that is in use for longer.
func (k *keyring) reload() {
	var failure error
	var changed []string
	values := slices.Clone(k.values)
	for i, secret := range k.secrets {
		value, err := resolve(secret.Value)
		if err != nil {
			failure = fmt.Errorf("secret %s: %w", secret.Name, err)
		} else if value != values[i].Value {
			values[i].Value = value
			changed = append(changed, secret.Name)
		}
	}
	result := reloadUnchanged
	if len(changed) > 0 {
		if err := k.use(values); err != nil {
			failure = err
		} else {
			result = reloadChanged
			k.logger.Info("secrets changed", zap.Strings("secrets", changed))
		}
	}
	if failure != nil {
		result = reloadFailed
		if time.Since(k.lastError) >= reloadLogInterval {
			k.lastError = time.Now()
			k.logger.Error("reloading secrets, the last good values stay in use", zap.Error(failure))
		}
	}
	k.reloads[result].Inc()
}

// mistakes are what can be no secret of Inkit's: a cut file, a paste with more than the
// secret in it, or what was meant to stand for the secret, which anybody can guess.
var mistakes = []struct {
	form    *regexp.Regexp
	message string
}{
	{regexp.MustCompile(`\x{FFFD}`), "must be UTF-8"}, // for which regexp takes what is not
	{regexp.MustCompile(`^[\s\pZ]|[\s\pZ]$`), "must not start or end with white space"},
	{regexp.MustCompile(`[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]`), "must not hold a line break, a control character or another invisible one"},
	{regexp.MustCompile("^(\".*\"|'.*'|`.*`)$"), "must not stand in quotes"},
	{regexp.MustCompile(`^(\{.*\}|\[.*\]|<.*>|(?i:null|nil|none|undefined|true|false))$`), "must be the secret alone, and not JSON or a template"},
	{
		regexp.MustCompile(`^(\$[A-Z_][A-Z0-9_]*|\$[{(].*|%\w+%|(?i:env|file|process\.env)[.:(].*|\w+://.*|[A-Z]+(_[A-Z]+)+|\{[\w.$]+|(~|@|\.\.?)/.*)$|\{(\$|env\.|file\.)`),
		unknownReference,
	},
	{regexp.MustCompile(`^[*•●]+$`), "must be the secret itself, and not the dots that hide it"},
	{regexp.MustCompile(`^(export\s+)?[A-Za-z_]\w*=[^=]`), "must be the secret alone, and not NAME=value"},
}

// resolveInTime is resolve for a load, which must not hang with a file system.
func resolveInTime(value string) (secret string, err error) {
	results := make(chan func() (string, error), 1)
	go func() {
		secret, err := resolve(value)
		results <- func() (string, error) { return secret, err }
	}()
	select {
	case result := <-results:
		return result()
	case <-time.After(loadWait):
		return "", errors.New("could not be read within 10 s")
	}
}

// resolve returns the secret that a configured value stands for. The errors show
// no part of either.
func resolve(value string) (secret string, err error) {
	if name, ok := placeholder.Name(value); ok {
		secret, err = placeholder.Value(name)
	} else {
		secret, err = value, checkLiteral(value)
	}
	if err != nil {
		return "", err
	}
	for _, mistake := range mistakes {
		if mistake.form.MatchString(secret) {
			return "", errors.New(mistake.message)
		}
	}
	if _, ok := os.LookupEnv(secret); ok {
		return "", errors.New("is the name of an environment variable, and not what stands in it: write {env.NAME}")
	}
	if isPath(secret) {
		return "", errors.New("is the path of a file, and not what stands in it: write {file./path}")
	}
	return secret, nil
}

// isPath reports whether there is such a file, or at least such a folder as it would be
// in. A secret in Base64 may start with a slash, too.
func isPath(text string) bool {
	if !strings.HasPrefix(text, "/") {
		return false
	}
	folder := filepath.Dir(text)
	for _, path := range []string{text, folder} {
		if _, err := os.Stat(path); path != "/" && (err == nil || errors.Is(err, fs.ErrPermission)) {
			return true
		}
	}
	return false
}

const unknownReference = "stands for a secret in a way that Caddy does not know: write {env.NAME} or {file./path}"

var (
	literalReference = regexp.MustCompile(`^\$[\w:.]+$`) // and no more, as a secret in a file may start with a dollar sign
	placeholderStart = regexp.MustCompile(`\{(\w+\.|\$)`)
)

// checkLiteral refuses a text of the configuration that was meant to stand for the
// secret, and not to be it. What mistakes has is refused later.
func checkLiteral(value string) error {
	switch {
	case value == "":
		return ErrEmptySecret
	case literalReference.MatchString(value):
		return errors.New(unknownReference)
	case placeholderStart.MatchString(value):
		return errors.New("must be either one placeholder and nothing else, or a text without placeholders")
	}
	return nil
}
