package queue

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
)

// origin has the options that select the databases of a command.
type origin struct {
	db, config, adapter string
	create              bool // otherwise a missing database is an error
}

// target is a database that a command works on.
type target struct {
	store.Store // nil unless it is open
	opener      store.Opener
	queues      []string // the queues in the configuration
}

// targets returns each database once.
func (o *origin) targets(ctx context.Context) (found []*target, err error) {
	caddyCtx, _ := caddy.NewContext(caddy.Context{Context: ctx}) // never cancelled: a command ends soon
	configs := []json.RawMessage{json.RawMessage(`{}`)}
	switch {
	case o.db != "":
		configs[0], _ = json.Marshal(map[string]any{"store": map[string]string{"module": "sqlite", "path": o.db}})
	case o.config != "":
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
		opener, err := h.loadStore(caddyCtx)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(found, func(d *target) bool { return d.opener.Key() == opener.Key() })
		if i < 0 {
			i, found = len(found), append(found, &target{opener: opener})
		}
		if o.config != "" {
			found[i].queues = append(found[i].queues, cmp.Or(h.Name, defaultName))
		}
	}
	if len(found) == 0 {
		return nil, errors.New("there is no inkit_queue in the configuration")
	}
	return found, nil
}

// queueConfigs returns the JSON of all handlers of this module in a configuration.
func queueConfigs(config json.RawMessage) (found []json.RawMessage) {
	var object map[string]json.RawMessage
	var list []json.RawMessage
	if json.Unmarshal(config, &list) != nil {
		_ = json.Unmarshal(config, &object)
	}
	if string(object["handler"]) == `"inkit_queue"` {
		found = append(found, config)
	}
	for _, value := range list {
		found = append(found, queueConfigs(value)...)
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		found = append(found, queueConfigs(object[key])...)
	}
	return found
}

// each opens one database after the other, calls f, and closes the database.
func (o *origin) each(ctx context.Context, f func(*target) error) error {
	targets, err := o.targets(ctx)
	for _, d := range targets {
		d.Store, err = d.opener.Open(ctx, store.Opening{Logger: caddy.Log(), Command: true, Existing: !o.create})
		if err != nil {
			return fmt.Errorf("%s: %w", d.opener.Key(), err)
		}
		if err = errors.Join(f(d), d.Close()); err != nil {
			return err
		}
	}
	return err
}
