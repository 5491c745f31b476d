// Package inkitwebhook lets through to a backend only the webhooks that Inkit
// (inkit.com) signed. It is a Caddy HTTP handler, http.handlers.inkit_webhook,
// and a Verifier that Go programs can use without Caddy.
//
// Inkit sends events as POST requests with the header field Inkit-Signature, the
// HMAC-SHA256 of the raw body keyed with the secret of that webhook
// (docs.inkit.com/docs/connecting-webhooks).
//
// # What a signature does not cover
//
// The body is signed, and nothing else: not the method, the URL, the header, the
// trailers, nor the address a request came from. Whoever saw one signed body can
// send it again, to any URL guarded with the same secret, as long as that secret
// is in use. There is no protection against such replays, and there cannot be:
// the body holds no time and no id of the delivery, so that two genuine events
// may be equal byte for byte. What helps is TLS, logs without signatures, and a
// backend that does no harm when the same event comes twice.
package inkitwebhook

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(Handler{})
}

// idempotencyKeyOff is the one value of Handler.IdempotencyKey.
const idempotencyKeyOff = "off"

// signatureField is the header field with the signature, in canonical form.
const signatureField = "Inkit-Signature"

// defaultMaxSize is the max_size of a handler that sets none. Documented events
// have about 85 bytes.
const defaultMaxSize = 64 << 10

// Handler verifies webhooks that Inkit signed and answers all other requests with an error.
//
// A verified request goes on to the next handler with the bytes that were
// signed and the length they have, whether or not it came with one. Its body can
// be read any number of times by a proxy that has to send it again, and by error
// routes. It goes on even if the client hangs up meanwhile.
//
// Every other request ends here, and the next handler does not see it. The first
// thing that is wrong decides:
//
// - A method other than POST is an error with HTTP status 405.
//
// - An `Inkit-Signature` that is missing, empty, repeated or in any other form
// than 64 lower-case hexadecimal digits is an error with status 401. The body
// is not read.
//
// - A body larger than `max_size` is an error with status 413.
//
// - A body that does not arrive whole is an error with status 400, or 408 if it
// takes too long.
//
// - A signature that none of the secrets made is an error with status 401.
//
// Errors can be handled with error routes. The placeholder
// `{http.inkit_webhook.outcome}` says what was wrong, in one word, or
// `verified`. Once a request is verified, and not before, these are set:
//
// Placeholder | Description
// ------------|-------------
// `{http.inkit_webhook.event_type}` | The `event_type` of the event, empty if the body is not the JSON that Inkit documents
// `{http.inkit_webhook.resource_id}` | The `resource_id` of the event, likewise
// `{http.inkit_webhook.secret_name}` | The name of the secret that signed
//
// The signature covers the body and nothing else, so this is no protection
// against a request that was recorded and is sent again.
type Handler struct {
	// The secrets of the webhook. An event is genuine if any one of them signed
	// it, so that a new secret can stand beside the old one. At least one is
	// required, and no two may have the same name or the same value. One that is
	// empty, unset or unreadable is an error when the configuration is loaded.
	Secrets []Secret `json:"secrets,omitempty"`

	// The maximum number of bytes that a body may have. If there are more, an
	// error with HTTP status 413 is returned. Up to this much memory is used for
	// every request with a well-formed signature, genuine or not, while its body
	// arrives. Default: `65536` (64 KiB).
	MaxSize int64 `json:"max_size,omitempty"`

	// `off` leaves the request without the `Idempotency-Key` header field that a
	// verified request gets by default: a key that is unique to this delivery and
	// the same each time a proxy sends it to a backend, instead of whatever the
	// client sent. With the key, a proxy may send the request again if the backend
	// closes a connection that was kept alive. A backend may then see an event
	// twice, and knows it by the key. Without it, such an event is lost, with
	// status 502, unless the proxy is told to retry. Default: a key is set.
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	keyring    *keyring
	deliveries *deliveries
	counters   counters
	logger     *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.inkit_webhook",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision sets the defaults and resolves the secrets.
func (h *Handler) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	if h.MaxSize == 0 {
		h.MaxSize = defaultMaxSize
	}
	for i := range h.Secrets {
		if h.Secrets[i].Name == "" {
			h.Secrets[i].Name = strconv.Itoa(i + 1)
		}
	}
	var err error
	if h.keyring, err = newKeyring(h.Secrets, h.logger); err != nil {
		return err
	}
	h.deliveries = &deliveries{prefix: rand.Text()}
	h.counters = newCounters(h.Secrets)
	return registerMetrics(ctx.GetMetricsRegistry())
}

// Validate refuses what cannot work. The secrets were checked on being resolved.
func (h *Handler) Validate() error {
	if h.MaxSize < 0 {
		return errors.New("max_size: must not be negative")
	}
	if h.IdempotencyKey != "" && h.IdempotencyKey != idempotencyKeyOff {
		return errors.New("idempotency_key: must be off or left out")
	}
	return nil
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	ctx := r.Context()
	repl := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	sig, err := h.admit(r)
	if err != nil {
		return h.reject(w, r, repl, 0, err)
	}
	e := newEvent()
	secret, err := h.verify(&sig, r, e)
	if err != nil {
		return h.reject(w, r, repl, e.size, err)
	}
	e.secretName = h.Secrets[secret].Name
	e.attach(r)
	if h.IdempotencyKey != idempotencyKeyOff {
		e.idempotencyKey[0] = h.deliveries.key()
		r.Header[idempotencyKeyField] = e.idempotencyKey[:]
	}
	if ctx.Value(caddyhttp.ErrorCtxKey) == nil {
		repl.Map(e.placeholder) // the look-up costs half of what hashing an event does
	} else {
		setPlaceholders(repl, e.placeholder) // in an error route, for the handler that failed, too
	}
	h.counters.verified[secret].Inc()
	if c := h.logger.Check(zapcore.DebugLevel, "verified webhook"); c != nil {
		c.Write(zap.String("secret_name", e.secretName), zap.Int64("body_bytes", e.size))
	}
	if err = next.ServeHTTP(w, r); err != nil {
		// The error routes may have another backend for the event. The reader so far
		// is left alone: a Transport may still be at it.
		r.Body, _ = e.newReader()
	}
	return err
}

// The ways of failing that are not the verifier's.
var (
	errMethodNotAllowed = errors.New("method is not POST")
	errBodyUnreadable   = errors.New("body did not arrive whole")
)

// admit and verify go one way, from the cheapest test to the dearest, and the
// first one that fails ends it: what has no well-formed signature costs no
// reading, and what cannot be read to its end costs no hashing.

// admit checks all that can be told without the body.
func (h *Handler) admit(r *http.Request) (sig [sha256.Size]byte, err error) {
	if r.Method != http.MethodPost {
		return sig, errMethodNotAllowed
	}
	if sig, err = signature(r.Header); err != nil {
		return sig, err
	}
	if r.ContentLength > h.MaxSize {
		return sig, errBodyTooLarge
	}
	return sig, nil
}

// verify reads the body and returns the index of the secret that signed it.
func (h *Handler) verify(sig *[sha256.Size]byte, r *http.Request, e *event) (secret int, err error) {
	if e.size, err = e.body.readFrom(r.Body, r.ContentLength, h.MaxSize); err != nil {
		if err == errBodyTooLarge {
			return -1, err
		}
		return -1, fmt.Errorf("%w: %w", errBodyUnreadable, err)
	}
	verifier := h.keyring.fresh(secretMaxAge)
	secret, err = verifier.match(sig, e.body...)
	if err != nil {
		if newer := h.keyring.fresh(secretMinAge); newer != verifier {
			return newer.match(sig, e.body...)
		}
	}
	return secret, err
}

// signature returns the signature of a request. Two lines could be told apart
// differently by whoever comes next, so even two equal ones are malformed.
func signature(header http.Header) (sig [sha256.Size]byte, err error) {
	switch lines := header[signatureField]; len(lines) {
	case 0:
		return sig, ErrSignatureMissing
	case 1:
		return parseSignature(lines[0])
	default:
		return sig, ErrSignatureMalformed
	}
}

// reject makes the error that ends a request, and leaves it to the error routes
// to write a response.
func (h *Handler) reject(w http.ResponseWriter, r *http.Request, repl *caddy.Replacer, bodyBytes int64, err error) error {
	status, outcome := classify(err)
	h.counters.rejected[outcome].Inc()
	setPlaceholders(repl, rejected(outcome).placeholder)

	header := w.Header()
	switch status {
	case http.StatusMethodNotAllowed:
		header["Allow"] = []string{http.MethodPost} // RFC 9110, 15.5.6
	case http.StatusUnauthorized:
		header["Www-Authenticate"] = []string{signatureField} // RFC 9110, 15.5.2
	}
	// Without this, net/http waits for the rest of a body that it takes to be
	// short before it sends the response.
	if outcome != outcomeSignatureMismatch && r.ContentLength != 0 && r.ProtoMajor == 1 {
		header["Connection"] = []string{"close"}
	}

	if c := h.logger.Check(zapcore.WarnLevel, "rejected webhook"); c != nil {
		clientIP, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		fields := []zapcore.Field{
			zap.String("outcome", outcome),
			zap.String("client_ip", clientIP),
			zap.Int64("body_bytes", bodyBytes),
		}
		if outcome == outcomeSignatureMismatch {
			fields = append(fields, zap.Int("secrets_tried", len(h.Secrets)))
		}
		c.Write(fields...)
	}
	if outcome == outcomeBodyUnreadable || outcome == outcomeBodyTooLarge {
		return caddyhttp.Error(status, err) // a HandlerError of another handler stays what it is
	}
	// Here, caddyhttp.Error would look up the line of this call and make a random id,
	// for five times what it takes to hash an event: too much to spend on a
	// request that cost its sender nothing.
	return caddyhttp.HandlerError{StatusCode: status, Err: err}
}

// The words for what became of a request. Logs, metrics and the placeholder
// {http.inkit_webhook.outcome} use these and no others.
const (
	outcomeVerified           = "verified"
	outcomeMethodNotAllowed   = "method_not_allowed"
	outcomeSignatureMissing   = "signature_missing"
	outcomeSignatureMalformed = "signature_malformed"
	outcomeSignatureMismatch  = "signature_mismatch"
	outcomeBodyTooLarge       = "body_too_large"
	outcomeBodyUnreadable     = "body_unreadable"
)

// classify gives the status and the outcome for an error of admit or verify.
func classify(err error) (status int, outcome string) {
	switch err {
	case errMethodNotAllowed:
		return http.StatusMethodNotAllowed, outcomeMethodNotAllowed
	case ErrSignatureMissing:
		return http.StatusUnauthorized, outcomeSignatureMissing
	case ErrSignatureMalformed:
		return http.StatusUnauthorized, outcomeSignatureMalformed
	case ErrSignatureMismatch:
		return http.StatusUnauthorized, outcomeSignatureMismatch
	case errBodyTooLarge:
		return http.StatusRequestEntityTooLarge, outcomeBodyTooLarge
	}
	// The rest are errors of reading, which may be those of another handler, such
	// as of request_body for a body above its own limit.
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return http.StatusRequestEntityTooLarge, outcomeBodyTooLarge
	}
	if netErr, ok := errors.AsType[net.Error](err); ok && netErr.Timeout() {
		return http.StatusRequestTimeout, outcomeBodyUnreadable
	}
	return http.StatusBadRequest, outcomeBodyUnreadable
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
)
