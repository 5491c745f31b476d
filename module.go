// Package inkitwebhook lets through to a backend only the webhooks that Inkit
// (inkit.com) signed. It is a Caddy HTTP handler, http.handlers.inkit_webhook. Its
// Verifier can be used in any Go program, which then compiles Caddy too.
//
// Inkit sends events as POST requests with the header field Inkit-Signature, the
// HMAC-SHA256 of the raw body keyed with the secret of that webhook
// (docs.inkit.com/docs/connecting-webhooks).
//
// # What a signature does not cover
//
// The body is signed, and nothing else: not the method, the URL, the header, the
// trailers, nor the address a request came from. Whoever saw one signed body can
// replay it, to any URL guarded with the same secret, as long as that secret is in
// use. Nothing here can tell, since two genuine events may be equal byte for byte.
// What helps is TLS, logs without signatures, and a backend that does no harm when
// the same event comes twice.
package inkitwebhook

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

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

	// idempotencyKeyField is that of draft-ietf-httpapi-idempotency-key-header. With
	// it, net/http's Transport may send a POST again when the backend closes a
	// connection that was kept alive just as the request goes out.
	idempotencyKeyField = "Idempotency-Key"

	defaultMaxSize = 64 << 10        // in bytes; documented events have about 85
	firstRead      = 4 << 10         // how much room a body gets before any of it has arrived
	maxDiscard     = 1 << 20         // how much is read of the body of a rejected request
	discardTime    = 5 * time.Second // and for how long
	maxLogged      = 256             // how many bytes of a host or path a line of the log shows
)

// Handler verifies webhooks that Inkit signed and answers all other requests with an error.
//
// A verified request goes on to the next handler with the bytes that were
// signed and the length they have, and a proxy can send it more than once. What the
// sender asks of the connection (`Connection`, `Upgrade`, `Expect` and the like)
// does not go on. If no handler takes the event, that is an error with HTTP status
// 404, where Caddy itself would answer 200.
//
// Every other request ends here, and the next handler does not see it. The checks
// run in this order, and the first failure sets the outcome and the HTTP status of
// the error: the method is POST (405), there is one `Inkit-Signature` of 64
// lower-case hexadecimal digits (401), the body is no larger than `max_size` (413),
// it arrives whole (400) and in time (408), and one of the secrets made the
// signature (401).
//
// Error routes get a rejected request without its body. The placeholder
// `{http.inkit_webhook.outcome}` says what was wrong, in one word, or `verified`.
// Once a request is verified, and not before, these are set:
//
// Placeholder | Description
// ------------|-------------
// `{http.inkit_webhook.event_type}` | The `event_type` of the event, empty if the body is not the JSON that Inkit documents
// `{http.inkit_webhook.resource_id}` | The `resource_id` of the event, likewise
// `{http.inkit_webhook.secret_name}` | The name of the secret that signed
//
// The signature covers the body and nothing else: a recorded request can be replayed.
type Handler struct {
	// The secrets of the webhook, of which there must be one. An event is genuine if
	// any one of them signed it, so that a new secret can stand beside the old one.
	// One that is empty, unset or unreadable is an error at load.
	Secrets []Secret `json:"secrets,omitempty"`

	// What logs and metrics call this webhook: 1 to 64 of letters, digits, `.`,
	// `_` and `-`. Default: none, and an empty label.
	Name string `json:"name,omitempty"`

	// The maximum number of bytes that a body may have. If there are more, an
	// error with HTTP status 413 is returned. A request with a well-formed signature,
	// genuine or not, takes up to this much memory. Default: `65536` (64 KiB).
	MaxSize int64 `json:"max_size,omitempty"`

	// Whether a verified request gets an `Idempotency-Key` header field, in the place
	// of any from the sender: unique to this delivery, and the same each time that a
	// proxy sends it, so that the backend knows a double by it. With the key, net/http
	// lets a proxy send the request again if the backend closes a connection that was
	// kept alive, unless it does so in the middle of the request: only a proxy that is
	// told to retry, or the queue, loses no event to that. Default: `true`.
	IdempotencyKey *bool `json:"idempotency_key,omitempty"`

	keyring  *keyring
	counters counters
	logger   *zap.Logger

	keyPrefix string // of idempotency keys: random, so that nobody else has it
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
	err := h.provisionNames() // before they become labels of metrics
	if err != nil {
		return err
	}
	h.counters = newCounters(h.Name, h.Secrets)
	if h.keyring, err = newKeyring(h.Secrets, h.counters.reloads, h.logger); err != nil {
		return err
	}
	h.keyPrefix, h.keyCount = `"`+rand.Text()+"-", new(atomic.Uint64)
	return registerMetrics(ctx.GetMetricsRegistry())
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (h *Handler) provisionNames() error {
	const form = "name must be 1 to 64 of letters, digits, '.', '_' and '-'"
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
			return fmt.Errorf("secret %d: has the same name as an earlier one", i+1)
		}
		seen[name] = true
		h.Secrets[i].Name = name
	}
	return nil
}

// Validate refuses what was not checked on being used.
func (h *Handler) Validate() error {
	if h.MaxSize < 0 {
		return errors.New("max_size: must not be negative")
	}
	return nil
}

// Cleanup gives up what the handler has in the metrics.
func (h *Handler) Cleanup() error { return h.counters.release() }

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

var ( // beside those of the verifier
	errMethodNotAllowed = errors.New("method is not POST")
	errBodyTooLarge     = errors.New("body is larger than max_size")
	errBodyTimeout      = errors.New("body did not arrive in time")
	errBodyUnreadable   = errors.New("body did not arrive whole")
)

// rejections says for each way of failing what the answer is, and what logs,
// metrics and the placeholder {http.inkit_webhook.outcome} call it.
var rejections = []struct {
	err     error
	status  int
	outcome string
}{
	{errMethodNotAllowed, http.StatusMethodNotAllowed, "method_not_allowed"},
	{ErrSignatureMissing, http.StatusUnauthorized, "signature_missing"},
	{ErrSignatureMalformed, http.StatusUnauthorized, "signature_malformed"},
	{errBodyTooLarge, http.StatusRequestEntityTooLarge, "body_too_large"},
	{errBodyTimeout, http.StatusRequestTimeout, "body_unreadable"},
	{errBodyUnreadable, http.StatusBadRequest, "body_unreadable"},
	{ErrSignatureMismatch, http.StatusUnauthorized, "signature_mismatch"},
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
	default: // even equal ones: whoever comes next may take another one than we do
		err = ErrSignatureMalformed
	}
	if err == nil && r.ContentLength > h.MaxSize {
		err = errBodyTooLarge
	}
	return sig, err
}

// readBody returns what r yields up to its end. If that is more than max bytes or
// less than length, or if r fails, the error is one of rejections, and the body is
// what did arrive. A length of -1 says that nobody knows it.
//
// Memory is paid for what arrived and not for what was promised: the room is at
// most firstRead, or four times the body. It is never used again, since the
// Transport behind reverse_proxy may read on when the handler has returned.
func readBody(r io.Reader, length, max int64) (body []byte, err error) {
	if r == nil {
		return nil, nil
	}
	for size := int64(firstRead); ; size *= 4 {
		// one byte more than the length, since only a further Read says EOF
		if int64(len(body)) <= length && length <= size {
			size = length + 1
		}
		if max < size {
			size = max + 1
		}
		body = append(make([]byte, 0, size), body...)
		for len(body) < cap(body) {
			n, err := r.Read(body[len(body):cap(body)])
			body = body[:len(body)+n]
			switch {
			case int64(len(body)) > max:
				return body, errBodyTooLarge
			case err == io.EOF && int64(len(body)) < length: // an earlier handler has swallowed the error
				return body, readError(io.ErrUnexpectedEOF)
			case err == io.EOF:
				return body, nil
			case err != nil:
				return body, readError(err)
			}
		}
	}
}

// readError says in terms of rejections why a body cannot be read. err may be that
// of another handler, such as of request_body for a body above its own limit.
func readError(err error) error {
	reason := errBodyUnreadable
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		reason = errBodyTooLarge
	} else if netErr, ok := errors.AsType[net.Error](err); ok && netErr.Timeout() {
		reason = errBodyTimeout
	}
	return fmt.Errorf("%w: %w", reason, err)
}

// reject makes the error that ends a request. The error routes get the request without
// its body: a proxy in there must not forward what nobody signed.
func (h *Handler) reject(w http.ResponseWriter, r *http.Request, body []byte, err error) error {
	row := 0
	for !errors.Is(err, rejections[row].err) {
		row++
	}
	why := rejections[row]
	handlerErr := caddyhttp.Error(why.status, err) // that of another handler stays what it is
	h.counters.rejected[row].Inc()
	(&event.Event{Outcome: why.outcome}).Attach(r.Context())

	header, length, level := w.Header(), r.ContentLength, zapcore.WarnLevel
	switch why.status {
	case http.StatusMethodNotAllowed: // mostly health checks and crawlers
		level = zapcore.InfoLevel
		header["Allow"] = []string{http.MethodPost} // RFC 9110, 15.5.6
	case http.StatusUnauthorized:
		header["Www-Authenticate"] = []string{signatureField} // RFC 9110, 15.5.2
	}
	broken := why.err == errBodyTimeout || why.err == errBodyUnreadable
	if err != ErrSignatureMismatch && !endBody(w, r, !broken) && r.ProtoMajor == 1 {
		header["Connection"] = []string{"close"} // or net/http waits for the rest, if it takes it to be short
	}
	setBody(r, 0)
	if c := h.logger.Check(level, "rejected webhook"); c != nil {
		clientIP, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		path := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request).URL.Path
		malformed := zap.Skip()
		if err == ErrSignatureMalformed {
			malformed = zap.String("malformed", malformation(r.Header[signatureField]))
		}
		c.Write(
			zap.String("outcome", why.outcome), malformed, zap.NamedError("cause", err),
			zap.String("err_id", handlerErr.ID), // as in Caddy's own lines
			zap.String("client_ip", clientIP),
			zap.String("host", r.Host[:min(len(r.Host), maxLogged)]),
			zap.String("path", path[:min(len(path), maxLogged)]),
			zap.Int64("content_length", length), zap.Int("body_bytes", len(body)), zap.Int64("max_size", h.MaxSize),
		)
	}
	return handlerErr
}

// endBody closes the body of a rejected request, for whoever holds it by a copy of
// the request. Before that, it discards what is left of it, if that is to be, and
// reports whether it was all. Without that, the connection is reset under a sender
// that is still busy: it does not see the answer, and a proxy in front takes the
// site to be down.
func endBody(w http.ResponseWriter, r *http.Request, discard bool) (all bool) {
	if r.Body == nil || r.Body == http.NoBody {
		return true
	}
	now, controller := time.Now(), http.NewResponseController(w)
	end := now
	if discard && r.Header["Expect"] == nil { // whose sender waits to be told to go on
		end = now.Add(discardTime)
	}
	if controller.SetReadDeadline(end) != nil {
		return false
	}
	defer func() { _ = controller.SetReadDeadline(time.Time{}) }()
	buffer := make([]byte, firstRead)
	for total := 0; total < maxDiscard && time.Now().Before(end); {
		n, err := r.Body.Read(buffer)
		if total += n; err != nil {
			all, end = err == io.EOF, now
		}
	}
	if !all {
		_ = controller.SetReadDeadline(now) // or closing it would wait for more
	}
	r.Body.Close()
	return all
}

// malformation says in what way the lines of the signature are malformed.
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

// delivery is a verified event, and the response writer of the handlers behind.
type delivery struct {
	caddyhttp.ResponseWriterWrapper
	event     event.Event
	reader    bodyReader // the first one
	status    int        // 0 if none was written
	unhandled bool       // whether it is of a handler that had none of its own, such as templates
}

// WriteHeader notes the status, unless it is not the final one.
func (d *delivery) WriteHeader(status int) {
	if d.status == 0 && status >= 200 {
		if status < 300 && d.event.Unhandled() {
			d.unhandled, status = true, http.StatusNotFound
		}
		d.status = status
	}
	d.ResponseWriterWrapper.WriteHeader(status)
}

// bodyReader reads the bytes of a body. There is nothing to close.
type bodyReader struct{ bytes.Reader }

func (*bodyReader) Close() error { return nil }

// attachBody has the request read the body by reader. GetBody is for net/http's
// Transport, which may have to send it again.
func (d *delivery) attachBody(r *http.Request, reader *bodyReader) {
	reader.Reset(d.event.Body)
	r.Body = reader
	r.GetBody = func() (io.ReadCloser, error) {
		if r.Body != reader {
			return nil, errors.New("the body was replaced after it was verified")
		}
		return &bodyReader{*bytes.NewReader(d.event.Body)}, nil
	}
}

// deliver hands a verified event to the next handler, and counts what becomes of it.
func (h *Handler) deliver(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler, body []byte, secret int) error {
	h.counters.verified[secret].Inc()
	if c := h.logger.Check(zapcore.DebugLevel, "verified webhook"); c != nil {
		c.Write(zap.String("secret_name", h.Secrets[secret].Name), zap.Int("body_bytes", len(body)))
	}
	d := &delivery{event: event.Event{Outcome: event.Verified, Body: body, SecretName: h.Secrets[secret].Name}}
	d.ResponseWriter = w
	setBody(r, len(body))
	d.attachBody(r, &d.reader)
	earlier := d.event.Attach(r.Context())
	if h.IdempotencyKey == nil || *h.IdempotencyKey {
		if earlier != nil { // another handler has verified this delivery before
			d.event.IdempotencyKey = earlier.IdempotencyKey
		}
		if d.event.IdempotencyKey == "" {
			d.event.IdempotencyKey = h.newIdempotencyKey()
		}
		r.Header[idempotencyKeyField] = []string{d.event.IdempotencyKey}
	}

	result := deliveryFailed // as a panic leaves it
	defer func() { h.counters.deliveries[result].Inc() }()
	err := next.ServeHTTP(d, r)
	level := zapcore.WarnLevel
	switch {
	case err != nil || d.status >= 500:
		level = zapcore.ErrorLevel
	case d.unhandled:
		result = deliveryUnhandled
	case d.status == 0 && d.event.Unhandled(): // which Caddy answers 200
		result = deliveryUnhandled
		err = caddyhttp.Error(http.StatusNotFound, errors.New("no handler takes this verified event"))
	case d.status >= 300:
		result = deliveryRefused
	default:
		result = deliveryAccepted
		return nil
	}
	if handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err); ok && d.status == 0 {
		d.status = handlerErr.StatusCode // as it will be
	}
	if c := h.logger.Check(level, "verified webhook was not accepted"); c != nil {
		c.Write(
			zap.String("result", deliveryResults[result]), zap.Int("status", d.status), zap.Error(err),
			zap.String("event_type", d.event.Type()), zap.String("resource_id", d.event.ResourceID()),
			zap.String("idempotency_key", d.event.IdempotencyKey),
		)
	}
	// The error routes may have another backend. The reader so far is left alone, since
	// a Transport may still be at it, and so is what a later handler put in its place.
	if err != nil && r.Body == &d.reader {
		d.attachBody(r, new(bodyReader))
	}
	return err
}

// newIdempotencyKey returns a key that no other delivery has: a string in quotes, as
// the draft wants it. It comes from nothing in the request, since two deliveries of
// events that are equal byte for byte are two.
func (h *Handler) newIdempotencyKey() string {
	key := strconv.AppendUint(append(make([]byte, 0, 64), h.keyPrefix...), h.keyCount.Add(1), 10)
	return string(append(key, '"'))
}

// setBody makes room in the request for a body of that length, which a FastCGI
// backend has to know. Nothing is left with which the sender could steer what comes
// next: trailers would bring back chunks; Connection could have a proxy drop the
// fields set here or, with Upgrade or the :protocol of HTTP/2 and HTTP/3, open a
// tunnel; Incremental would forbid it to hold the body.
func setBody(r *http.Request, length int) {
	r.Body, r.GetBody = http.NoBody, nil
	r.ContentLength, r.TransferEncoding, r.Trailer = int64(length), nil, nil
	if !strings.HasPrefix(r.Proto, "HTTP/") { // in HTTP/3, it is the :protocol of a CONNECT, which error routes see again
		r.Proto = fmt.Sprintf("HTTP/%d.%d", r.ProtoMajor, r.ProtoMinor)
	}
	text := strconv.Itoa(length)
	if lines := r.Header["Content-Length"]; len(lines) != 1 || lines[0] != text {
		r.Header["Content-Length"] = []string{text}
	}
	for field := range r.Header {
		switch field {
		case "Connection", "Upgrade", "Expect", "Te", "Keep-Alive", "Proxy-Connection", "Incremental", ":protocol",
			idempotencyKeyField, "X-Idempotency-Key":
			delete(r.Header, field)
		}
	}
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Handler)(nil)
	_ caddy.Validator             = (*Handler)(nil)
	_ caddy.CleanerUpper          = (*Handler)(nil)
	_ caddyhttp.MiddlewareHandler = (*Handler)(nil)
	_ caddyfile.Unmarshaler       = (*Handler)(nil)
)
