package store_test

import (
	"testing"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/stretchr/testify/assert"
)

func TestMerge(t *testing.T) {
	page := func(next string, ids ...string) (p store.Page) {
		p.Next = next
		for _, id := range ids {
			p.Records = append(p.Records, &store.Record{ID: id})
		}
		return p
	}
	for _, tt := range []struct {
		name   string
		filter store.Filter
		parts  []store.Page
		want   store.Page
	}{
		{"no parts", store.Filter{Limit: 9}, nil, page("")},
		{"complete parts", store.Filter{Limit: 9}, []store.Page{page("", "b", "d"), page("", "a", "c")}, page("", "a", "b", "c", "d")},
		{"a part that stopped early", store.Filter{Limit: 9}, []store.Page{page("c", "b"), page("", "a", "d")}, page("c", "a", "b")},
		{"two parts that stopped early", store.Filter{Limit: 9}, []store.Page{page("e", "b", "d"), page("c", "a")}, page("c", "a", "b")},
		{"newest first", store.Filter{Limit: 9, Newest: true}, []store.Page{page("b", "e", "c"), page("d", "d")}, page("d", "e", "d")},
		{"more than the limit", store.Filter{Limit: 2}, []store.Page{page("", "b", "d"), page("", "a")}, page("b", "a", "b")},
	} {
		t.Run(tt.name, func(t *testing.T) { assert.Equal(t, tt.want, store.Merge(tt.filter, tt.parts...)) })
	}
}
