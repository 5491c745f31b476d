// Package inkitwebhook passes only webhooks that Inkit (inkit.com) signed to a backend. It is
// a Caddy HTTP handler, http.handlers.inkit_webhook. Any Go program can use the Verifier of
// this package, but must compile Caddy too.
//
// Inkit sends events as POST requests with the header field Inkit-Signature, the
// HMAC-SHA256 of the raw body with the webhook's secret as the key
// (docs.inkit.com/docs/connecting-webhooks).
//
// # Limits of a signature
//
// Inkit signs only the body: not the method, the URL, the header, the trailers or the
// sender's address. Anybody who saw a signed body can replay it to any URL with
// the same secret, as long as that secret is in use. This package cannot detect a
// replay, because two genuine events may be equal byte for byte. Use TLS, logs without
// signatures, and a backend that does no harm when the same event comes twice.
package inkitwebhook

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/event"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(Handler{})
}

const (
	signatureField = "Inkit-Signature"

	// idempotencyKeyField comes from draft-ietf-httpapi-idempotency-key-header. With
	// this field, net/http's Transport may send a POST again if the backend closes a
	// kept-alive connection at the moment when the request goes out.
	idempotencyKeyField = "Idempotency-Key"

	defaultMaxSize = 64 << 10 // in bytes; the events in Inkit's documentation have about 85
	maxLogged      = 256      // maximum bytes of a host or path in a log line
)

// Handler passes on webhooks that Inkit signed, and answers all other requests with an error.
//
// The next handler gets a verified request with exactly the signed bytes and their length, and a
// proxy can send this request more than once. The handler removes the sender's fields about the
// connection (`Connection`, `Upgrade`, `Expect` and the like). If no handler takes the event, an
// error with HTTP status 404 is returned. Without this error, Caddy would answer 200.
//
// The next handler never sees a rejected request. The checks run in this order, and the
// first failure sets the outcome and the HTTP status of the error: the method is POST
// (405), the request has one `Inkit-Signature` of 64 lower-case hexadecimal digits
// (401), the body is not larger than `max_size` (413), it arrives completely (400) and in
// time (408), and one of the secrets made the signature (401).
//
// Error routes get a rejected request without its body. The placeholder
// `{http.inkit_webhook.outcome}` is `verified`, or one word for the cause of the rejection.
// These placeholders have a value only for a verified request:
//
// Placeholder | Description
// ------------|-------------
// `{http.inkit_webhook.event_type}` | The `event_type` of the event, empty if the body is not the JSON that Inkit documents
// `{http.inkit_webhook.resource_id}` | The `resource_id` of the event, empty in the same case
// `{http.inkit_webhook.secret_name}` | The name of the secret that made the signature
//
// The signature covers only the body: a recorded request can be replayed.
type Handler struct {
	// The secrets of the webhook, at least one. An event is genuine if any of them
	// signed it, so you can add a new secret before you remove the old one. An empty,
	// unset or unreadable secret is an error at load.
	Secrets []Secret `json:"secrets,omitempty"`

	// The name of this webhook in logs and metrics: 1 to 64 characters, which are letters,
	// digits, `.`, `_` or `-`. Default: no name, which gives an empty label.
	Name string `json:"name,omitempty"`

	// The maximum size of a body in bytes. If a body is larger, an error with HTTP
	// status 413 is returned. A request with a well-formed signature, genuine or not,
	// takes up to this much memory. Default: `65536` (64 KiB).
	MaxSize int64 `json:"max_size,omitempty"`

	// Whether a verified request gets an `Idempotency-Key` header field, which replaces the
	// sender's field. The key is unique to this delivery and the same for each attempt, so the
	// backend can detect a duplicate. If the backend closes an idle connection at the moment when a
	// proxy sends a request with the key, the proxy sends the request again. If the connection
	// breaks later, only a proxy with retries, or the queue, saves the event. Default: `true`.
	IdempotencyKey *bool `json:"idempotency_key,omitempty"`

	keyring  *keyring
	counters counters
	logger   *zap.Logger

	keyPrefix string // of idempotency keys: random, so no other process uses it
	keyCount  *atomic.Uint64
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
	h.logger = ctx.Logger().With(zap.String("webhook", h.Name))
	if h.MaxSize == 0 {
		h.MaxSize = defaultMaxSize
	}
	err := h.provisionNames() // before the names become labels of metrics
	if err != nil {
		return err
	}
	if h.keyring, err = newKeyring(h.Secrets, h.logger); err != nil {
		return err
	}
	h.counters = newCounters(h.Name, h.Secrets) // last, because a configuration that does not load must add no series
	h.keyring.reloads = h.counters.reloads
	h.keyPrefix, h.keyCount = `"`+rand.Text()+"-", new(atomic.Uint64)
	return registerMetrics(ctx.GetMetricsRegistry())
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (h *Handler) provisionNames() error {
	const form = "name must have 1 to 64 characters: letters, digits, '.', '_' or '-'"
	if h.Name != "" && !nameForm.MatchString(h.Name) {
		return errors.New(form)
	}
	seen := make(map[string]bool)
	for i := range h.Secrets {
		name := cmp.Or(h.Secrets[i].Name, strconv.Itoa(i+1))
		if !nameForm.MatchString(name) {
			return fmt.Errorf("secret %d: %s", i+1, form)
		}
		if seen[name] {
			return fmt.Errorf("secret %d: has the same name as an earlier secret", i+1)
		}
		seen[name] = true
		h.Secrets[i].Name = name
	}
	return nil
}

// Validate refuses a negative maximum size.
func (h *Handler) Validate() error {
	if h.MaxSize < 0 {
		return errors.New("max_size: must not be negative")
	}
	return nil
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	sig, err := h.checkHeader(r)
	if err != nil {
		return h.reject(w, r, nil, err)
	}
	body, err := readBody(r.Body, r.ContentLength, h.MaxSize)
	if err != nil {
		return h.reject(w, r, body, err)
	}
	secret, err := h.keyring.verify(r.Context(), &sig, body)
	if err != nil {
		return h.reject(w, r, body, err)
	}
	return h.deliver(w, r, next, body, secret)
}

var errMethodNotAllowed = errors.New("method is not POST")

// rejections has a row for each error with which the guard rejects a request. Logs,
// metrics and the placeholder {http.inkit_webhook.outcome} show the outcome. The last
// row is also for errors without a row.
var rejections = []struct {
	err     error
	status  int
	outcome string
	level   zapcore.Level // of the log line
	broken  bool          // whether reading the rest of the body is pointless
}{
	{errMethodNotAllowed, http.StatusMethodNotAllowed, "method_not_allowed", zapcore.InfoLevel, false}, // mostly health checks
	{ErrSignatureMissing, http.StatusUnauthorized, "signature_missing", zapcore.WarnLevel, false},
	{ErrSignatureMalformed, http.StatusUnauthorized, "signature_malformed", zapcore.WarnLevel, false},
	{ErrSignatureMismatch, http.StatusUnauthorized, "signature_mismatch", zapcore.WarnLevel, false},
	{errBodyTooLarge, http.StatusRequestEntityTooLarge, "body_too_large", zapcore.WarnLevel, false},
	{errBodyTimeout, http.StatusRequestTimeout, "body_unreadable", zapcore.WarnLevel, true},
	{errBodyUnreadable, http.StatusBadRequest, "body_unreadable", zapcore.WarnLevel, true},
}

// rejectionOf returns the index of the row for `err` in `rejections`.
func rejectionOf(err error) (row int) {
	for row < len(rejections)-1 && !errors.Is(err, rejections[row].err) {
		row++
	}
	return row
}

// checkHeader makes all checks that need no body, and returns the signature.
func (h *Handler) checkHeader(r *http.Request) (sig [sha256.Size]byte, err error) {
	if r.Method != http.MethodPost {
		return sig, errMethodNotAllowed
	}
	switch lines := r.Header[signatureField]; len(lines) {
	case 0:
		err = ErrSignatureMissing
	case 1:
		sig, err = parseSignature(lines[0])
	default: // the backend may read another line than this handler; equal lines are refused, too
		err = ErrSignatureMalformed
	}
	if err == nil && r.ContentLength > h.MaxSize {
		err = errBodyTooLarge
	}
	return sig, err
}

// reject returns the error for a rejected request. It removes the body, so that a proxy
// in an error route cannot forward an unsigned body.
func (h *Handler) reject(w http.ResponseWriter, r *http.Request, body []byte, err error) error {
	row := rejectionOf(err)
	why := rejections[row]
	handlerErr := caddyhttp.Error(why.status, err) // leaves an error of another handler unchanged
	h.counters.rejected[row].Inc()
	(&event.Event{Outcome: why.outcome}).Attach(r.Context())

	header, length := w.Header(), r.ContentLength
	switch why.status {
	case http.StatusMethodNotAllowed:
		header["Allow"] = []string{http.MethodPost} // RFC 9110, 15.5.6
	case http.StatusUnauthorized:
		header["Www-Authenticate"] = []string{signatureField} // RFC 9110, 15.5.2
	}
	if err != ErrSignatureMismatch && !endBody(w, r, !why.broken) && r.ProtoMajor == 1 { // with a mismatch, the whole body has already been read
		header["Connection"] = []string{"close"} // otherwise net/http waits for the rest of a short body
	}
	setBody(r, 0)
	removeControls(r)
	if c := h.logger.Check(why.level, "rejected webhook"); c != nil {
		clientIP, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		path := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request).URL.Path
		malformed := zap.Skip()
		if err == ErrSignatureMalformed {
			malformed = zap.String("malformed", malformation(r.Header[signatureField]))
		}
		c.Write(
			zap.String("outcome", why.outcome), malformed, zap.NamedError("cause", err),
			zap.String("err_id", handlerErr.ID), // as in Caddy's own log lines
			zap.String("client_ip", clientIP),
			zap.String("host", r.Host[:min(len(r.Host), maxLogged)]),
			zap.String("path", path[:min(len(path), maxLogged)]),
			zap.Int64("content_length", length), zap.Int("body_bytes", len(body)), zap.Int64("max_size", h.MaxSize),
		)
	}
	return handlerErr
}

// malformation returns the fault of a malformed signature, for the log.
func malformation(lines []string) string {
	switch _, err := parseSignature(strings.ToLower(lines[0])); {
	case len(lines) > 1:
		return "several_lines"
	case strings.Contains(lines[0], "="):
		return "prefix"
	case len(lines[0]) != 2*sha256.Size:
		return "length"
	case err == nil:
		return "upper_case"
	}
	return "characters"
}

// delivery is a verified event, and the response writer of the next handlers.
type delivery struct {
	caddyhttp.ResponseWriterWrapper
	event     event.Event
	reader    bodyReader // the first reader of the body
	status    int        // 0 if no status was written
	unhandled bool       // whether a handler such as templates wrote a status, although no handler took the event
}

// WriteHeader records the first final status. If no handler took the event, WriteHeader turns
// a status 2xx into 404.
func (d *delivery) WriteHeader(status int) {
	if d.status == 0 && status >= 200 {
		if status < 300 && d.event.Unhandled() {
			d.unhandled, status = true, http.StatusNotFound
		}
		d.status = status
	}
	d.ResponseWriterWrapper.WriteHeader(status)
}

// deliver passes a verified event to the next handler, and counts the result.
func (h *Handler) deliver(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, body []byte, secret int) error {
	h.counters.verified[secret].Inc()
	if c := h.logger.Check(zapcore.DebugLevel, "verified webhook"); c != nil {
		c.Write(zap.String("secret_name", h.Secrets[secret].Name), zap.Int("body_bytes", len(body)))
	}
	d := &delivery{event: event.Event{Outcome: event.Verified, Body: body, SecretName: h.Secrets[secret].Name}}
	d.ResponseWriter = w
	setBody(r, len(body))
	removeControls(r)
	d.attachBody(r, &d.reader)
	earlier := d.event.Attach(r.Context())
	if h.IdempotencyKey == nil || *h.IdempotencyKey {
		if earlier != nil { // an earlier inkit_webhook has verified this delivery
			d.event.IdempotencyKey = earlier.IdempotencyKey
		}
		if d.event.IdempotencyKey == "" {
			d.event.IdempotencyKey = h.newIdempotencyKey()
		}
		r.Header[idempotencyKeyField] = []string{d.event.IdempotencyKey}
	}

	result := deliveryFailed // also after a panic
	defer func() { h.counters.deliveries[result].Inc() }()
	err := next.ServeHTTP(d, r)
	level := zapcore.WarnLevel
	switch {
	case err != nil || d.status >= 500:
		level = zapcore.ErrorLevel
	case d.unhandled:
		result = deliveryUnhandled
	case d.status == 0 && d.event.Unhandled(): // Caddy would answer 200
		result = deliveryUnhandled
		err = caddyhttp.Error(http.StatusNotFound, errors.New("no handler takes this verified event: add a backend after inkit_webhook"))
	case d.status >= 300:
		result = deliveryRefused
	default:
		result = deliveryAccepted
		return nil
	}
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && d.status == 0 {
		d.status = handlerErr.StatusCode // error routes write this status later
	}
	if c := h.logger.Check(level, "verified webhook was not accepted"); c != nil {
		c.Write(
			zap.String("result", deliveryResults[result]), zap.Int("status", d.status), zap.Error(err),
			zap.String("event_type", d.event.Type()), zap.String("resource_id", d.event.ResourceID()),
			zap.String("idempotency_key", d.event.IdempotencyKey),
		)
	}
	// Attach a new reader for the backends of error routes, because a Transport may still use
	// the old reader. If a later handler has replaced the body, that body stays.
	if err != nil && r.Body == &d.reader {
		d.attachBody(r, new(bodyReader))
	}
	return err
}

// newIdempotencyKey returns a key that no other delivery has, in quotes as the IETF draft requires.
// The key does not depend on the request, because two equal events are still two deliveries.
func (h *Handler) newIdempotencyKey() string {
	key := strconv.AppendUint(append(make([]byte, 0, 64), h.keyPrefix...), h.keyCount.Add(1), 10)
	return string(append(key, '"'))
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
	_ caddyfile.Unmarshaler       = (*Handler)(nil)
)
