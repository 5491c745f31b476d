// Package event holds what the handlers of this module know of the webhook in a
// request: inkit_webhook writes it, and inkit_queue keeps it.
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

// Verified is the outcome of a request whose body one of the secrets signed. It
// is the only one with which a request may reach a backend.
const Verified = "verified"

// Event is a webhook once inkit_webhook has judged it. Unless the outcome is
// Verified, the other fields are empty: what an attacker wrote stays out.
type Event struct {
	Outcome        string // Verified, or the word for why the request was rejected
	Body           []byte // what was signed; nobody may write to it
	SecretName     string // of the secret that signed
	IdempotencyKey string // the value of that header field; empty if there is to be none

	parsed atomic.Pointer[[2]string] // event_type and resource_id, once somebody asks
	vars   map[string]any            // of the request
}

// Type returns the event_type, such as DOCUMENT_DELETED. It is empty if the body
// is not the JSON that Inkit documents.
func (e *Event) Type() string { return e.members()[0] }

// ResourceID returns the resource_id, likewise.
func (e *Event) ResourceID() string { return e.members()[1] }

// members returns the two members of the JSON object that Inkit documents
// (docs.inkit.com/docs/inkit-webhook-events). One that is absent, no string, or
// holds a control character, with which no header field can carry it, is empty.
func (e *Event) members() *[2]string {
	if parsed := e.parsed.Load(); parsed != nil {
		return parsed
	}
	// A map and not a struct, for whose fields encoding/json would accept the
	// names in any case.
	var object map[string]json.RawMessage
	_ = json.Unmarshal(e.Body, &object)
	var members [2]string
	for i, name := range []string{"event_type", "resource_id"} {
		var text string
		if json.Unmarshal(object[name], &text) == nil && !strings.ContainsFunc(text, unicode.IsControl) {
			members[i] = text
		}
	}
	e.parsed.Store(&members)
	return &members
}

// varName is where Caddy keeps the event among the variables of the request. They
// are the same for all copies of a request; a value of its context would be lost
// for error routes once a handler such as timeouts or tracing has made a copy.
const varName = "inkit_webhook"

// String is what {http.vars.inkit_webhook} shows.
func (e *Event) String() string { return e.Outcome }

// Attach makes e the event of the request with this context: what FromContext
// returns from now on, and what the placeholders show. It returns the verified
// event in whose place e comes, or nil.
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

// Unhandled reports whether the request has come to the end of its handlers, where
// Caddy answers 200 if none of them has written a status.
func (e *Event) Unhandled() bool { return e.vars["unhandled"] == true }

// placeholder answers for the event that is attached now, which may be a later one.
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
