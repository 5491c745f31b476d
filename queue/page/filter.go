package page

import (
	"fmt"
	"maps"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// filter has the fields that a user has filled in to filter a list, by their names in URLs and forms.
type filter struct{ url.Values }

func newFilter(form url.Values) filter {
	f := filter{make(url.Values)}
	for _, field := range []string{"queue", "state", "type", "resource", "error", "since", "until", "order", "after"} {
		if text := strings.TrimSpace(strings.ToValidUTF8(form.Get(field), string(unicode.ReplacementChar))); text != "" {
			f.Set(field, text)
		}
	}
	return f
}

// From returns the link to the events after a position in the list.
func (f filter) From(after string) string {
	query := maps.Clone(f.Values)
	query.Set("after", after)
	return "events?" + query.Encode()
}

// Narrow reports whether the filter has any condition.
func (f filter) Narrow() bool {
	conditions := maps.Clone(f.Values)
	conditions.Del("order")
	conditions.Del("after")
	return len(conditions) > 0
}

// toStore returns the filter in the form that the store needs.
func (f filter) toStore(now time.Time) (store.Filter, error) {
	s := store.Filter{After: f.Get("after"), Newest: f.Get("order") != "oldest"}
	for field := range f.Values {
		if err := operator.Set(&s, field, f.Get(field), now); err != nil {
			return s, fmt.Errorf("%s: %w", field, err)
		}
	}
	return s, nil
}
