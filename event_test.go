package inkitwebhook

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParseEvent(t *testing.T) {
	for _, tt := range []struct{ name, body, eventType, resourceID string }{
		{"compact", compactBody, "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs"},
		{"with spaces", spacedBody, "DOCUMENT_CREATE_FINISHED", "doc_2N0X2g4f3b1JJU75fqzDZs"},
		{"the other order, with line breaks", "\n{\"resource_id\": \"r\",\r\n\t\"event_type\": \"E\"}\n", "E", "r"},
		{"further members", `{"event_type":"E","resource_id":"r","x":{"event_type":"no"},"y":[1]}`, "E", "r"},
		{"escapes", `{"event\u005ftype":"\u0045","resource_id":"\"\\"}`, "E", `"\`},
		{"repeated members, the last of which counts", `{"event_type":"A","event_type":"B","resource_id":"r"}`, "B", "r"},

		{"names in another case", `{"Event_Type":"E","RESOURCE_ID":"r"}`, "", ""},
		{"another case after the exact name", `{"event_type":"E","EVENT_TYPE":"no","resource_id":"r"}`, "E", "r"},
		{"a name that only folds to it", `{"reſource_id":"r","event_type":"E"}`, "E", ""},
		{"a number", `{"event_type":1,"resource_id":"r"}`, "", "r"},
		{"null", `{"event_type":null,"resource_id":"r"}`, "", "r"},
		{"an object", `{"event_type":{"a":"b"},"resource_id":["r"]}`, "", ""},
		{"one is absent", `{"event_type":"E"}`, "E", ""},
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
			eventType, resourceID := parseEvent([]byte(tt.body))
			assert.Equal(t, tt.eventType, eventType)
			assert.Equal(t, tt.resourceID, resourceID)
		})
	}
}

func FuzzParseEvent(f *testing.F) {
	for _, s := range []string{compactBody, spacedBody, `{"Event_Type":"E"}`, `{"event_type":1}`, `null`, `[]`, "\ufeff{}", `{"event_type":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		eventType, resourceID := parseEvent(body)

		var oracle map[string]any
		if err := json.Unmarshal(body, &oracle); err != nil {
			oracle = nil
		}
		want := func(name string) string {
			s, _ := oracle[name].(string)
			return s
		}
		require.Equal(t, want("event_type"), eventType)
		require.Equal(t, want("resource_id"), resourceID)
	})
}
