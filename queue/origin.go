package queue

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
)

// origin selects the databases that a command works on.
type origin struct {
	db, config, adapter string
	make                bool // whether a missing database is made

	// forget is called for an id without an event, and reports whether the database knew it
	// all the same; nil for commands that need the event.
	forget func(s store.Store, id string) (bool, error)

	names map[string][]string // the configured queues of each database, by its key
	key   string              // of the current database in each
}

// openers returns the databases, each of them once.
func (o *origin) openers(ctx context.Context) (openers []store.Opener, err error) {
	caddyCtx, _ := caddy.NewContext(caddy.Context{Context: ctx}) // never cancelled: a command ends soon
	o.names = make(map[string][]string)
	configs := []json.RawMessage{json.RawMessage(`{}`)}
	if o.config != "" {
		config, _, _, err := caddycmd.LoadConfig(o.config, o.adapter)
		if err != nil {
			return nil, err
		}
		configs = queueConfigs(config)
	}
	for _, config := range configs {
		h := new(Handler)
		if err := json.Unmarshal(config, h); err != nil {
			return nil, err
		}
		if o.db != "" {
			h.StoreRaw, _ = json.Marshal(map[string]string{"module": "sqlite", "path": o.db})
		}
		opener, err := h.loadStore(caddyCtx)
		if err != nil {
			return nil, err
		}
		if o.config != "" {
			o.names[opener.Key()] = append(o.names[opener.Key()], cmp.Or(h.Name, defaultName))
		}
		if !slices.ContainsFunc(openers, func(other store.Opener) bool { return other.Key() == opener.Key() }) {
			openers = append(openers, opener)
		}
	}
	if len(openers) == 0 {
		return nil, errors.New("there is no inkit_queue in the configuration")
	}
	return openers, nil
}

// queueConfigs returns the JSON of all handlers of this module in a configuration.
func queueConfigs(config json.RawMessage) (found []json.RawMessage) {
	var object map[string]json.RawMessage
	var list []json.RawMessage
	switch {
	case json.Unmarshal(config, &object) == nil:
		if string(object["handler"]) == `"inkit_queue"` {
			found = append(found, config)
		}
		for _, value := range object {
			found = append(found, queueConfigs(value)...)
		}
	case json.Unmarshal(config, &list) == nil:
		for _, value := range list {
			found = append(found, queueConfigs(value)...)
		}
	}
	return found
}

// each calls f for each database.
func (o *origin) each(ctx context.Context, f func(store.Store) error) error {
	openers, err := o.openers(ctx)
	if err != nil {
		return err
	}
	for _, opener := range openers {
		s, err := opener.Open(ctx, store.Opening{Logger: caddy.Log(), Command: true, Existing: !o.make})
		if err != nil {
			return fmt.Errorf("%s: %w", opener.Key(), err)
		}
		o.key = opener.Key()
		if err := errors.Join(f(s), s.Close()); err != nil {
			return err
		}
	}
	return nil
}

// eachID calls f for each event of ids. Then it returns an error for each id that is in no
// database.
func (o *origin) eachID(ctx context.Context, ids []string, f func(store.Store, *store.Record) error) error {
	unknown := make(map[string]bool)
	for _, id := range ids {
		unknown[id] = true
	}
	var failed []error
	err := o.each(ctx, func(s store.Store) error {
		for some := range slices.Chunk(ids, store.MaxPage) { // a statement has a maximum of arguments
			all := []string{store.Pending, store.Dead, store.History}
			err := store.Each(ctx, s, store.Filter{IDs: some, States: all}, true, func(page []*store.Record) error {
				for _, r := range page {
					delete(unknown, r.ID)
					failed = append(failed, f(s, r))
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		for id := range unknown {
			if o.forget == nil {
				break
			}
			known, err := o.forget(s, id)
			if err != nil {
				return err
			}
			if known {
				delete(unknown, id)
			}
		}
		return nil
	})
	for _, id := range ids {
		if unknown[id] && err == nil {
			failed = append(failed, fmt.Errorf("there is no event %s", request.Printable(id)))
		}
	}
	return errors.Join(append(failed, err)...)
}
