package inkitwebhook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
)

const (
	// secretMaxAge is how old the values of the secrets may be when a request
	// is verified, before they are read again: how long a withdrawn secret still
	// opens the door.
	secretMaxAge = 10 * time.Second

	// secretMinAge is how old they must be to be read again for a signature that
	// does not match, however many of those there are.
	secretMinAge = time.Second

	// secretLogInterval is how long a secret that cannot be read again is not
	// worth another line in the log.
	secretLogInterval = time.Minute
)

// keyring holds the secrets of a handler and follows their placeholders to new
// values while it runs. There is no goroutine to that and no file watcher (which
// would miss the symbolic links that Kubernetes swaps): requests look, seldom
// enough for it to cost nothing.
type keyring struct {
	secrets    []Secret // as configured
	changeable bool     // whether a value can change while the process runs
	logger     *zap.Logger

	verifier atomic.Pointer[Verifier]
	lastRead atomic.Pointer[time.Time]

	mu        sync.Mutex // held while reading again
	values    []Secret   // with the last good value of each
	lastError time.Time  // when reading failed and the log said so
}

// newKeyring resolves the secrets. An error names the position of the secret and
// shows no part of it: not even of a placeholder, since what looks like one may
// be a literal secret in braces.
func newKeyring(secrets []Secret, logger *zap.Logger) (*keyring, error) {
	now := time.Now()
	k := &keyring{secrets: secrets, logger: logger, values: slices.Clone(secrets)}
	k.lastRead.Store(&now)
	for i, secret := range secrets {
		value, err := resolve(secret.Value)
		if err != nil {
			return nil, fmt.Errorf("secret %d: %w", i+1, err)
		}
		if strings.ContainsAny(secret.Name, "{}") {
			return nil, fmt.Errorf("secret %d: name must not hold braces", i+1)
		}
		for j, other := range k.values[:i] {
			if other.Name == secret.Name {
				return nil, fmt.Errorf("secret %d: has the same name as secret %d", i+1, j+1)
			}
			if other.Value == value {
				return nil, fmt.Errorf("secret %d: has the same value as secret %d", i+1, j+1)
			}
		}
		k.values[i].Value = value
		key, ok := placeholderKey(secret.Value)
		k.changeable = k.changeable || ok && !strings.HasPrefix(key, envPrefix)
	}
	verifier, err := NewVerifier(k.values...)
	if err != nil {
		return nil, err
	}
	k.verifier.Store(verifier)
	return k, nil
}

// fresh returns the Verifier for the secrets as they are. If their values are at
// least minAge old, it reads them again first, unless another request is doing
// that now, for which it does not wait.
func (k *keyring) fresh(minAge time.Duration) *Verifier {
	if k.changeable && time.Since(*k.lastRead.Load()) >= minAge && k.mu.TryLock() {
		if now := time.Now(); now.Sub(*k.lastRead.Load()) >= minAge {
			k.readAgain(now)
			k.lastRead.Store(&now)
		}
		k.mu.Unlock()
	}
	return k.verifier.Load()
}

// readAgain takes over every value that has changed. One that is empty or
// unreadable now stays what it was: losing events is worse than a secret that is
// in use for longer. k.mu is held.
func (k *keyring) readAgain(now time.Time) {
	result := reloadUnchanged
	var failure error
	values := slices.Clone(k.values)
	for i, secret := range k.secrets {
		value, err := resolve(secret.Value)
		if err != nil {
			failure = fmt.Errorf("secret %d: %w", i+1, err)
			continue
		}
		if value != values[i].Value {
			values[i].Value = value
			result = reloadChanged
		}
	}
	if result == reloadChanged {
		verifier, err := NewVerifier(values...)
		if err != nil {
			failure = err
		} else {
			k.values = values
			k.verifier.Store(verifier)
			k.logger.Info("secrets changed")
		}
	}
	if failure != nil {
		result = reloadFailed
		if now.Sub(k.lastError) >= secretLogInterval {
			k.lastError = now
			k.logger.Error("reading secrets again, the last good values stay in use", zap.Error(failure))
		}
	}
	secretReloadsTotal.WithLabelValues(result).Inc()
}

// The prefixes of placeholders that need more than a look-up.
const (
	envPrefix  = "env."
	filePrefix = "file."
	httpPrefix = "http."
)

// The ways in which the value of a secret is refused, beside ErrEmptySecret.
var (
	errSecretSpace       = errors.New("must not start or end with white space")
	errSecretPartly      = errors.New("must be either one placeholder and nothing else, or a text without placeholders")
	errSecretUnknown     = errors.New("placeholder is not known")
	errSecretOfRequest   = errors.New("placeholder belongs to a request, and secrets are resolved before there is one")
	errSecretEnv         = errors.New("environment variable is unset or empty")
	errSecretFile        = errors.New("file cannot be read")
	errSecretFileEmpty   = errors.New("file is empty")
	errSecretPlaceholder = errors.New("placeholder is empty")
)

// resolve returns the secret that a configured value stands for. The errors show
// no part of either.
func resolve(value string) (secret string, err error) {
	if key, ok := placeholderKey(value); ok {
		secret, err = lookUp(key)
	} else if value == "" {
		err = ErrEmptySecret
	} else if holdsPlaceholder(value) {
		err = errSecretPartly
	} else {
		secret = value
	}
	if err == nil && strings.TrimSpace(secret) != secret {
		err = errSecretSpace
	}
	return secret, err
}

// placeholderKey returns what stands between the braces if value is exactly one
// placeholder.
func placeholderKey(value string) (key string, ok bool) {
	key, ok = strings.CutPrefix(value, "{")
	if !ok {
		return "", false
	}
	key, ok = strings.CutSuffix(key, "}")
	if !ok || key == "" || strings.ContainsAny(key, "{}") {
		return "", false
	}
	return key, true
}

// lookUp returns the value of a placeholder. The replacer alone would not fail
// for an environment variable that is unset or a file that is missing.
func lookUp(key string) (string, error) {
	empty := errSecretPlaceholder
	switch {
	case strings.HasPrefix(key, httpPrefix):
		return "", errSecretOfRequest
	case strings.HasPrefix(key, envPrefix):
		empty = errSecretEnv
	case strings.HasPrefix(key, filePrefix):
		empty = errSecretFileEmpty
		if err := readable(strings.TrimPrefix(key, filePrefix)); err != nil {
			return "", fmt.Errorf("%w: %w", errSecretFile, err)
		}
	}
	secret, known := caddy.NewReplacer().GetString(key)
	if !known {
		return "", errSecretUnknown
	}
	if strings.Trim(secret, "\r\n") == "" {
		return "", empty
	}
	return secret, nil
}

// readable tells why a file cannot be read, without its name. The replacer only
// logs that, and as often as it is asked, and a pipe would have it wait for good.
func readable(name string) error {
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		return errors.New("is not a regular file")
	}
	if err == nil {
		var file *os.File
		if file, err = os.Open(name); err == nil {
			file.Close()
		}
	}
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		return pathErr.Err
	}
	return err
}

// holdsPlaceholder reports whether a part of value is, or is meant to be, a
// placeholder that Caddy knows.
func holdsPlaceholder(value string) bool {
	for {
		_, rest, found := strings.Cut(value, "{")
		if !found {
			return false
		}
		key, _, _ := strings.Cut(rest, "}")
		for _, prefix := range []string{envPrefix, filePrefix, httpPrefix} {
			if strings.HasPrefix(key, prefix) {
				return true
			}
		}
		if _, known := caddy.NewReplacer().Get(key); known {
			return true
		}
		value = rest
	}
}
