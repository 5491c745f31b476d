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

// The ways in which a signature or a secret is refused. The errors carry no
// data of the request and no part of a secret, so they are safe to log.
var (
	// ErrSignatureMissing says that there is no signature: the empty string.
	ErrSignatureMissing = errors.New("signature is missing")
	// ErrSignatureMalformed says that no secret can have made the signature.
	ErrSignatureMalformed = errors.New("signature is not 64 lower-case hexadecimal digits")
	// ErrSignatureMismatch says that none of the secrets made it for this body.
	ErrSignatureMismatch = errors.New("signature does not match the body under any secret")
	// ErrEmptySecret says that a secret is empty, so that anybody can sign, or that there is none.
	ErrEmptySecret = errors.New("must not be empty")
)

// Secret is one signing secret and the name it goes by.
type Secret struct {
	// The secret, exactly as Inkit's web app shows it: its UTF-8 bytes are the
	// key, and hex or base64 are not decoded. In the configuration of a Handler
	// it is either one global placeholder, such as `{env.INKIT_WEBHOOK_SECRET}`
	// or `{file./run/secrets/inkit}`, or the secret itself, which then shows in
	// the admin API and on disk. Required.
	Value string `json:"value"`

	// What logs, metrics and the placeholder `{http.inkit_webhook.secret_name}`
	// call this secret: 1 to 64 of letters, digits, `.`, `_` and `-`. Each name
	// must be unique within the handler, and should reveal nothing.
	// Default: the position of the secret, starting at `1`.
	Name string `json:"name,omitempty"`
}

// Verifier tells whether one of its secrets signed a body.
//
// A signature is genuine if it is the HMAC-SHA256 of the body's bytes, keyed
// with the bytes of one of the secrets, written as 64 lower-case hexadecimal
// digits. The listener in Inkit's documentation compares the same strings
// (docs.inkit.com/docs/connecting-webhooks). Other than there, the time does not
// tell which digits differ, nor which of several secrets matched. It does tell how
// many secrets there are, and how long the body is.
//
// A Verifier is safe for concurrent use. It does not change.
type Verifier struct {
	keys []key
}

// key is a secret that is ready to hash with. A hash that was used once starts again
// from the state that the secret leads to, hence a pool of them for each secret.
type key struct {
	name string
	macs *sync.Pool // of *mac
}

type mac struct {
	hash.Hash
	sum [sha256.Size]byte // what Sum writes to, so that it allocates nothing
}

// NewVerifier returns a Verifier for one secret or more, any one of which may
// have signed. If there is none, or one is empty, the error is an ErrEmptySecret,
// with the name of that secret or else its position, starting at 1. One of NUL
// bytes alone counts as empty, because HMAC fills every key up with NULs.
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
		// FIPS 140-3 wants HMAC keys of 112 bits (SP 800-131A), and under
		// GODEBUG=fips140=only crypto/hmac panics on anything shorter.
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
// and the body is what was on the wire, before any decoding or parsing. The
// error is ErrSignatureMissing, ErrSignatureMalformed or ErrSignatureMismatch.
//
// What Verify cannot tell is when the body was signed, for which URL, and how
// often it was seen before: see the package documentation.
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

// match returns the index of the secret that made sig for body, the first one if
// there are several. It tries every secret, whether or not one has matched.
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

// parseSignature decodes the only form that Inkit sends. encoding/hex also accepts
// upper case, which Inkit's listener does not.
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

// Sign returns the signature that Inkit sends with body: the HMAC-SHA256 keyed
// with secret, in lower-case hexadecimal digits. It is for tests and tools. A
// receiver that compares it with == tells an attacker, by the time it takes, how
// many digits are right: use a Verifier.
func Sign(secret, body []byte) string {
	m := hmac.New(sha256.New, secret)
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}
