package inkitwebhook

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
)

const (
	placeholderOutcome    = "http.inkit_webhook.outcome"
	placeholderEventType  = "http.inkit_webhook.event_type"
	placeholderResourceID = "http.inkit_webhook.resource_id"
	placeholderSecretName = "http.inkit_webhook.secret_name"
)

// event is a request body on its way through the handler, and once it is
// verified, what the rest of the request needs of it.
type event struct {
	body body
	size int64 // in bytes

	secretName     string
	idempotencyKey [1]string // the lines of the header field, of which there is one

	parse                 sync.Once
	eventType, resourceID string

	reader bodyReader // the first of those that newReader makes
	pieces [1][]byte  // room for a body of one piece, as all but large ones are
}

func newEvent() *event {
	e := new(event)
	e.body = e.pieces[:0]
	return e
}

// attach gives the request the body that was verified, together with the length
// that it really has: a FastCGI backend refuses one that it does not know.
//
// The event is delivered even if its sender hangs up meanwhile, as one does that
// waits for less time than the backend takes to restart. So the request gets a
// context that does not end with the connection.
//
// GetBody lets net/http's Transport send the body again. Trailers are not signed,
// and the proxy would go back to chunks for them.
func (e *event) attach(r *http.Request) {
	*r = *r.WithContext(context.WithoutCancel(r.Context()))
	if e.size == 0 {
		r.Body = http.NoBody
	} else {
		e.reader = bodyReader{rest: e.body}
		r.Body = &e.reader
	}
	r.GetBody = e.newReader
	r.ContentLength = e.size
	r.TransferEncoding = nil
	r.Trailer = nil
	length := strconv.AppendInt(make([]byte, 0, 20), e.size, 10)
	if lines := r.Header["Content-Length"]; len(lines) != 1 || lines[0] != string(length) {
		r.Header["Content-Length"] = []string{string(length)}
	}
}

// newReader is the GetBody of the request.
func (e *event) newReader() (io.ReadCloser, error) {
	return &bodyReader{rest: e.body}, nil
}

// idempotencyKeyField is the header field of draft-ietf-httpapi-idempotency-key-header.
// It is what tells net/http's Transport that it may send a POST again when the
// backend closes a connection that was kept alive just as the request goes out.
const idempotencyKeyField = "Idempotency-Key"

// deliveries makes the idempotency keys of one handler. A key comes from nothing
// in the request: two deliveries of events that are equal byte for byte are two.
type deliveries struct {
	prefix string // random, so that no other handler and no other process has it
	last   atomic.Uint64
}

// key returns a key that no other delivery has.
func (d *deliveries) key() string {
	key := make([]byte, 0, 48)
	key = append(key, d.prefix...)
	key = append(key, '-')
	key = strconv.AppendUint(key, d.last.Add(1), 10)
	return string(key)
}

// setPlaceholders has answer say what the placeholders are. If an earlier handler
// did so, its answers would come first, so then values take their place.
func setPlaceholders(repl *caddy.Replacer, answer caddy.ReplacerFunc) {
	if _, earlier := repl.Get(placeholderOutcome); !earlier {
		repl.Map(answer)
		return
	}
	for _, key := range []string{placeholderOutcome, placeholderEventType, placeholderResourceID, placeholderSecretName} {
		value, _ := answer(key)
		repl.Set(key, value)
	}
}

// placeholder answers for a verified event. The body is parsed when the first
// placeholder asks for a part of it, if any does.
func (e *event) placeholder(key string) (any, bool) {
	switch key {
	case placeholderOutcome:
		return outcomeVerified, true
	case placeholderSecretName:
		return e.secretName, true
	case placeholderEventType:
		e.parse.Do(e.parseBody)
		return e.eventType, true
	case placeholderResourceID:
		e.parse.Do(e.parseBody)
		return e.resourceID, true
	}
	return nil, false
}

func (e *event) parseBody() {
	e.eventType, e.resourceID = parseEvent(bytes.Join(e.body, nil))
}

// parseEvent returns the two members of the JSON object that Inkit documents
// (docs.inkit.com/docs/inkit-webhook-events). One that is absent or no string is
// empty, and so are both if body is not a JSON object.
func parseEvent(body []byte) (eventType, resourceID string) {
	// A map and not a struct, for whose fields encoding/json would accept the
	// names in any case.
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return "", ""
	}
	return stringMember(members, "event_type"), stringMember(members, "resource_id")
}

func stringMember(members map[string]json.RawMessage, name string) (s string) {
	if err := json.Unmarshal(members[name], &s); err != nil {
		return ""
	}
	return s
}

// rejected is the outcome of a request that holds no verified event.
type rejected string

// placeholder answers for a rejected request: what an attacker wrote stays out.
func (outcome rejected) placeholder(key string) (any, bool) {
	switch key {
	case placeholderOutcome:
		return string(outcome), true
	case placeholderEventType, placeholderResourceID, placeholderSecretName:
		return "", true
	}
	return nil, false
}
