package inkitwebhook

import (
	"context"
	"crypto/sha256"
	"fmt"
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
	reloadInterval    = 250 * time.Millisecond // pause between two reloads
	reloadWait        = 2 * time.Second        // how long a request waits for a reload; then the request is rejected
	reloadLogInterval = time.Minute            // pause between two log lines about failed reloads
	previousAge       = 10 * time.Second       // how long an old value stays valid, because the file of the new value may be half written
)

// keyring has the secrets of a running handler, and reloads them when a request asks for a reload.
// It watches no files, because a watcher would miss the symbolic links that Kubernetes swaps.
type keyring struct {
	secrets    []Secret             // as configured
	changeable bool                 // whether a value can change while the process runs
	reloads    []prometheus.Counter // by index of reloadResults; set before the first request
	logger     *zap.Logger

	inUse     atomic.Pointer[[]generation] // newest first
	reloading atomic.Bool                  // whether reloadLoop runs
	mu        sync.Mutex                   // for next
	next      chan struct{}                // closed at the end of the next reload; nil if no request has asked for one

	values    []Secret  // the secrets with their last good values; only reload uses them
	lastError time.Time // time of the last log line about a failed reload; only reload uses it
}

// generation is a set of values of the secrets. It stays valid for previousAge after a newer
// generation exists.
type generation struct {
	verifier *Verifier
	until    time.Time
}

// newKeyring resolves the secrets. Errors show no part of a value. They also show no part of a
// placeholder, because a placeholder may be a secret in braces.
func newKeyring(secrets []Secret, logger *zap.Logger) (k *keyring, err error) {
	k = &keyring{secrets: secrets, logger: logger}
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

// use adds a generation with these values, and drops the generations that are no longer valid.
func (k *keyring) use(values []Secret) error {
	verifier, err := NewVerifier(values...)
	if err != nil {
		return err
	}
	for i, one := range values {
		for _, other := range values[:i] {
			if one.Value == other.Value {
				k.logger.Warn("two secrets have the same value: remove one", zap.Strings("secrets", []string{other.Name, one.Name}))
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

// verify returns the index of the secret that made sig for body. If no secret matches, verify waits
// for a reload and tries again, because the secret may be new. After a match, verify also asks for
// a reload, but does not wait for it. If no value can change, verify asks for no reload.
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

// askForReload asks for a reload that begins after this call. The returned channel is closed
// at the end of that reload.
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

// reloadLoop reloads the secrets as long as requests ask for a reload. It runs in its own
// goroutine, so that a hanging file system blocks nothing else.
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

// reload reads all secrets, and uses every new value that is valid. Instead of an invalid value, it
// keeps the last good one, because losing events is worse than using an old secret longer.
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
			k.logger.Error("cannot reload secrets: the last good ones stay in use, repair this before Caddy restarts", zap.Error(failure))
		}
	}
	k.reloads[result].Inc()
}
