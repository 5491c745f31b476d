// Package event has the event that the handlers of this module share: inkit_webhook
// creates it, and inkit_queue stores it.
package event

import (
	"context"
	"encoding/json"
	"strings"
	"sync/atomic"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// Verified is the outcome of a request with a body that one of the secrets signed. Only
// such a request may reach a backend.
const Verified = "verified"

// Event is a webhook after the checks of inkit_webhook. Unless the outcome is Verified,
// the other fields are empty: they never contain an attacker's data.
type Event struct {
	Outcome        string // Verified, or a word for the cause of the rejection
	Body           []byte // the signed bytes; no code may change them
	SecretName     string // the name of the secret that made the signature
	IdempotencyKey string // the value of the field Idempotency-Key; empty without this field

	parsed atomic.Pointer[[2]string] // event_type and resource_id; nil until the first use
	vars   map[string]any            // Caddy's variables of the request
}

// Type returns the event_type, such as DOCUMENT_DELETED. It is empty if the body
// is not the JSON that Inkit documents.
func (e *Event) Type() string { return e.members()[0] }

// ResourceID returns the resource_id. It is empty if the body is not the JSON that Inkit documents.
func (e *Event) ResourceID() string { return e.members()[1] }

// members returns event_type and resource_id of the JSON object in Inkit's documentation
// (docs.inkit.com/docs/inkit-webhook-events). A member is empty if it is absent, not a
// string, or contains a control character, which no header field can contain.
func (e *Event) members() *[2]string {
	if parsed := e.parsed.Load(); parsed != nil {
		return parsed
	}
	// object is a map: for a struct, encoding/json ignores upper and lower case in names.
	var object map[string]any
	_ = json.Unmarshal(e.Body, &object)
	var members [2]string
	for i, name := range []string{"event_type", "resource_id"} {
		if text, _ := object[name].(string); !strings.ContainsFunc(text, unicode.IsControl) {
			members[i] = text
		}
	}
	e.parsed.Store(&members)
	return &members
}

// varName is the event's name among Caddy's variables of the request. The event is a variable,
// because all copies of a request share the variables. The handlers `timeouts` and `tracing` copy
// the request: a value in the context of their copy would not reach the error routes.
const varName = "inkit_webhook"

// String returns the text of the placeholder {http.vars.inkit_webhook}.
func (e *Event) String() string { return e.Outcome }

// Attach makes e the event of the request with this context, for the placeholders and for
// FromContext. It returns the verified event that e replaces, or nil.
func (e *Event) Attach(ctx context.Context) (earlier *Event) {
	e.vars = ctx.Value(caddyhttp.VarsCtxKey).(map[string]any)
	earlier = verified(e.vars)
	e.vars[varName] = e
	ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Map(e.placeholder)
	return earlier
}

// FromContext returns the verified event of the request with this context, or nil.
func FromContext(ctx context.Context) *Event {
	vars, _ := ctx.Value(caddyhttp.VarsCtxKey).(map[string]any)
	return verified(vars)
}

func verified(vars map[string]any) *Event {
	if e, ok := vars[varName].(*Event); ok && e.Outcome == Verified {
		return e
	}
	return nil
}

// Unhandled reports whether the request reached the end of its handlers. At that end, Caddy
// answers 200 if no handler wrote a status.
func (e *Event) Unhandled() bool { return e.vars["unhandled"] == true }

// placeholder returns the value of a placeholder. If another event has replaced e in the request,
// the value comes from that event.
func (e *Event) placeholder(name string) (any, bool) {
	now, ok := e.vars[varName].(*Event)
	if !ok {
		return nil, false
	}
	switch name {
	case "http.inkit_webhook.outcome":
		return now.Outcome, true
	case "http.inkit_webhook.secret_name":
		return now.SecretName, true
	case "http.inkit_webhook.event_type":
		return now.Type(), true
	case "http.inkit_webhook.resource_id":
		return now.ResourceID(), true
	}
	return nil, false
}
