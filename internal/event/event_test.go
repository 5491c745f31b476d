package event

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	compactBody = `{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs"}`
	spacedBody  = `{"event_type": "DOCUMENT_CREATE_FINISHED", "resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs"}`
)

func TestMembers(t *testing.T) {
	for _, tt := range []struct{ name, body, eventType, resourceID string }{
		{"compact", compactBody, "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs"},
		{"with spaces", spacedBody, "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs"},
		{"the other order, with line breaks", "\n{\"resource_id\": \"r\",\r\n\t\"event_type\": \"E\"}\n", "E", "r"},
		{"further members", `{"event_type":"E","resource_id":"r","x":{"event_type":"no"},"y":[1]}`, "E", "r"},
		{"escapes", `{"event\u005ftype":"\u0045","resource_id":"\"\\"}`, "E", `"\`},
		{"a number that Go cannot store", `{"event_type":"E","resource_id":"r","x":1e999}`, "E", "r"},
		{"repeated members: the last one counts", `{"event_type":"A","event_type":"B","resource_id":"r"}`, "B", "r"},

		{"names in another case", `{"Event_Type":"E","RESOURCE_ID":"r"}`, "", ""},
		{"another case after the exact name", `{"event_type":"E","EVENT_TYPE":"no","resource_id":"r"}`, "E", "r"},
		{"a name with the letter ſ, which only case folding turns into s", `{"reſource_id":"r","event_type":"E"}`, "E", ""},
		{"a number", `{"event_type":1,"resource_id":"r"}`, "", "r"},
		{"null", `{"event_type":null,"resource_id":"r"}`, "", "r"},
		{"an object", `{"event_type":{"a":"b"},"resource_id":["r"]}`, "", ""},
		{"one member is absent", `{"event_type":"E"}`, "E", ""},
		{"an array", `[{"event_type":"E"}]`, "", ""},
		{"a string", `"event_type"`, "", ""},
		{"null alone", `null`, "", ""},
		{"two objects", compactBody + compactBody, "", ""},
		{"cut short", compactBody[:len(compactBody)-1], "", ""},
		{"a byte order mark", "\ufeff" + compactBody, "", ""},
		{"nothing", "", "", ""},
		{"not JSON", "event_type=E", "", ""},
		{"nested too deeply", strings.Repeat(`{"event_type":`, 20_000), "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := &Event{Body: []byte(tt.body)}
			assert.Equal(t, tt.eventType, e.Type())
			assert.Equal(t, tt.resourceID, e.ResourceID())
		})
	}
}

func TestMemberWithControlCharacterIsAbsent(t *testing.T) {
	for _, character := range []string{"\\n", "\\r", "\\t", "\\u0000", "\\u001b", "\\u007f", "\\u0085"} {
		e := &Event{Body: []byte(`{"event_type":"DOCUMENT` + character + `DELETED","resource_id":"doc"}`)}
		assert.Empty(t, e.Type(), character)
		assert.Equal(t, "doc", e.ResourceID(), character)
	}
}

func prepare(tb testing.TB) (*http.Request, *caddy.Replacer) {
	tb.Helper()
	repl := caddy.NewReplacer()
	return caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodPost, "/", nil), repl, nil, nil), repl
}

// Some handlers, such as "timeouts", pass on a copy of the request, but an error route gets the
// original request. The event is in the copy and in the original.
func TestEventIsThatOfAllCopiesOfARequest(t *testing.T) {
	r, repl := prepare(t)
	type key struct{}
	inner := r.WithContext(context.WithValue(r.Context(), key{}, "x"))
	e := &Event{Outcome: Verified, Body: []byte(compactBody), SecretName: "current"}
	assert.Nil(t, e.Attach(inner.Context()))
	assert.Same(t, e, FromContext(r.Context()))
	for name, want := range map[string]string{
		"outcome": "verified", "secret_name": "current", "event_type": "DOCUMENT_CREATE_FINISHED", "resource_id": "doc_2N0X2g4f3b1JJU75fqzDZs",
	} {
		got, known := repl.GetString("http.inkit_webhook." + name)
		assert.True(t, known, name)
		assert.Equal(t, want, got, name)
	}
	_, known := repl.Get("http.inkit_webhook.other")
	assert.False(t, known)

	shown, _ := repl.GetString("http.vars.inkit_webhook")
	assert.Equal(t, "verified", shown, "the text of the event contains no body")
}

func TestLastEventCounts(t *testing.T) {
	r, repl := prepare(t)
	first, second := &Event{Outcome: Verified, SecretName: "first"}, &Event{Outcome: Verified, SecretName: "second"}
	assert.Nil(t, first.Attach(r.Context()))
	assert.Same(t, first, second.Attach(r.Context()))
	assert.Same(t, second, FromContext(r.Context()))
	name, _ := repl.GetString("http.inkit_webhook.secret_name")
	assert.Equal(t, "second", name)

	rejected := &Event{Outcome: "signature_mismatch"}
	assert.Same(t, second, rejected.Attach(r.Context()))
	assert.Nil(t, FromContext(r.Context()), "a rejected request has no event")
	assert.Nil(t, second.Attach(r.Context()))
}

func TestNoEventWithoutAGuard(t *testing.T) {
	r, repl := prepare(t)
	assert.Nil(t, FromContext(r.Context()))
	assert.Nil(t, FromContext(t.Context()), "a context outside of Caddy has no event")
	caddyhttp.SetVar(r.Context(), varName, "verified") // as the directive "vars" can do
	assert.Nil(t, FromContext(r.Context()))
	_, known := repl.Get("http.inkit_webhook.outcome")
	assert.False(t, known)
}

func FuzzMembers(f *testing.F) {
	for _, s := range []string{compactBody, spacedBody, `{"Event_Type":"E"}`, `{"event_type":1}`, `null`, `[]`, "\ufeff{}", `{"event_type":"\ud800"}`, `{"event_type":"\n"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		e := &Event{Body: body}
		var oracle map[string]json.RawMessage
		_ = json.Unmarshal(body, &oracle)
		want := func(name string) (s string) {
			if json.Unmarshal(oracle[name], &s) != nil || strings.ContainsFunc(s, unicode.IsControl) {
				return ""
			}
			return s
		}
		require.Equal(t, want("event_type"), e.Type())
		require.Equal(t, want("resource_id"), e.ResourceID())
	})
}
