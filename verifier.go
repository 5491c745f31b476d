package inkitwebhook

import (
	"cmp"
	"crypto/fips140"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// The errors for a refused signature or secret. They contain no data of the request and
// no part of a secret, so they are safe to log.
var (
	// ErrSignatureMissing means that there is no signature, or an empty one.
	ErrSignatureMissing = errors.New("signature is missing")
	// ErrSignatureMalformed means that no secret can make such a signature.
	ErrSignatureMalformed = errors.New("signature is not 64 lower-case hexadecimal digits")
	// ErrSignatureMismatch means that none of the secrets made the signature for this body.
	ErrSignatureMismatch = errors.New("signature does not match the body under any secret")
	// ErrEmptySecret means that there is no secret, or an empty secret: anybody could sign.
	ErrEmptySecret = errors.New("must not be empty")
)

// Secret is a signing secret and its name.
type Secret struct {
	// The secret, exactly as Inkit's web app shows it: its UTF-8 bytes are the key, and hex or
	// base64 are not decoded. In the configuration of a Handler, write one global placeholder, such
	// as `{env.INKIT_WEBHOOK_SECRET}` or `{file./run/secrets/inkit}`, or the secret itself. The
	// admin API and the disk show a secret that is written in the configuration. Required.
	Value string `json:"value"`

	// The name of this secret in logs, metrics and the placeholder
	// `{http.inkit_webhook.secret_name}`: 1 to 64 of letters, digits, `.`, `_` and
	// `-`. It must be unique within the handler, and should not reveal the secret.
	// Default: the position of the secret, starting at `1`.
	Name string `json:"name,omitempty"`
}

// Verifier checks whether one of its secrets signed a body.
//
// A signature is genuine if it is the HMAC-SHA256 of the body's bytes, keyed with the bytes of
// one of the secrets, written as 64 lower-case hexadecimal digits. The listener in Inkit's
// documentation compares the same strings (docs.inkit.com/docs/connecting-webhooks). Unlike in
// that listener, the time of a check does not reveal which digits differ or which secret
// matched. The time reveals only the number of secrets and the length of the body.
//
// A Verifier never changes, and is safe for concurrent use.
type Verifier struct {
	keys []key
}

// key is a secret, with a pool of hashes that have already processed the secret. Before each
// body, the method Reset brings a hash back to this state, so that the hash does not process
// the secret again.
type key struct {
	name string
	macs *sync.Pool // of *mac
}

type mac struct {
	hash.Hash
	sum [sha256.Size]byte // memory for Sum, so that Sum allocates nothing
}

// NewVerifier returns a Verifier that accepts signatures made with any of the secrets. If
// there is no secret, or a secret is empty, the error wraps ErrEmptySecret. For an empty
// secret, the error has the name or the position of the secret, starting at 1. A secret of
// only NUL bytes counts as empty, because HMAC pads every key with NULs.
func NewVerifier(secrets ...Secret) (*Verifier, error) {
	if len(secrets) == 0 {
		return nil, fmt.Errorf("secrets: %w", ErrEmptySecret)
	}
	v := &Verifier{keys: make([]key, len(secrets))}
	for i, secret := range secrets {
		name := cmp.Or(secret.Name, strconv.Itoa(i+1))
		if strings.Trim(secret.Value, "\x00") == "" {
			return nil, fmt.Errorf("secret %s: %w", name, ErrEmptySecret)
		}
		// FIPS 140-3 requires HMAC keys of at least 112 bits (SP 800-131A). Under
		// GODEBUG=fips140=only, crypto/hmac panics on a shorter key.
		if fips140.Enforced() && len(secret.Value) < 14 {
			return nil, fmt.Errorf("secret %s: must be at least 14 bytes long in FIPS 140-only mode", name)
		}
		value := []byte(secret.Value)
		v.keys[i] = key{secret.Name, &sync.Pool{New: func() any {
			return &mac{Hash: hmac.New(sha256.New, value)}
		}}}
	}
	return v, nil
}

// Verify returns the name of the secret that made the signature for body.
//
// The signature is the value of the one Inkit-Signature field of the request,
// and the body is the bytes on the wire, before any decoding or parsing. The
// error is ErrSignatureMissing, ErrSignatureMalformed or ErrSignatureMismatch.
//
// Verify cannot check when or for which URL Inkit signed the body, or whether the same
// body arrived before: see the package documentation.
func (v *Verifier) Verify(body []byte, signature string) (name string, err error) {
	sig, err := parseSignature(signature)
	if err != nil {
		return "", err
	}
	i, err := v.match(&sig, body)
	if err != nil {
		return "", err
	}
	return v.keys[i].name, nil
}

// match returns the index of the first secret that made sig for body. It always tries every
// secret, so that the time does not reveal which secret matched.
func (v *Verifier) match(sig *[sha256.Size]byte, body []byte) (matched int, err error) {
	err = ErrSignatureMismatch
	for i, key := range slices.Backward(v.keys) {
		m := key.macs.Get().(*mac)
		m.Reset()
		m.Write(body)
		if subtle.ConstantTimeCompare(m.Sum(m.sum[:0]), sig[:]) == 1 {
			matched, err = i, nil
		}
		key.macs.Put(m)
	}
	return matched, err
}

// parseSignature decodes the only form that Inkit sends. Like Inkit's own listener, it refuses
// upper case, which encoding/hex alone would accept.
func parseSignature(s string) (sig [sha256.Size]byte, err error) {
	if s == "" {
		return sig, ErrSignatureMissing
	}
	if len(s) != hex.EncodedLen(len(sig)) || s != strings.ToLower(s) {
		return sig, ErrSignatureMalformed
	}
	if _, err := hex.Decode(sig[:], []byte(s)); err != nil {
		return sig, ErrSignatureMalformed
	}
	return sig, nil
}

// Sign returns the signature that Inkit sends with body: the HMAC-SHA256 with secret as
// the key, in lower-case hexadecimal digits. It is for tests and tools. In a receiver,
// use a Verifier: the time of a comparison with == shows an attacker how many digits
// are right.
func Sign(secret, body []byte) string {
	m := hmac.New(sha256.New, secret)
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}
