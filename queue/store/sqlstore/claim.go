package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// claim leases due events of a queue for the owner, and sets the Records of the claim.
func (d *DB) claim(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim) error {
	// No event waits longer than store.Latest. If the due time of an event is further away than that,
	// a clock was wrong: this statement sets it to now.
	_, err := d.exec(ctx, tx, `
		UPDATE {schema}inkit_queue_events SET due = {now}, lease = NULL, owner = NULL WHERE id IN (
			SELECT e.id FROM {schema}inkit_queue_events AS e
			WHERE e.queue = ? AND e.state = 'pending' AND e.due > {now} + CAST(? AS BIGINT) LIMIT 500 {skip})`,
		claim.Queue, store.Latest.Milliseconds())
	claim.Records = nil
	if err == nil && claim.Newest { // search the last arrivals first, because sorting all due events is slow
		err = d.claimFrom(ctx, tx, owner, claim, fmt.Sprintf(`(SELECT id FROM {schema}inkit_queue_events ORDER BY id DESC LIMIT %d) AS n
			CROSS JOIN {schema}inkit_queue_events AS e WHERE e.id = n.id AND`, 16+4*claim.Max), `e.id DESC`)
	}
	if err == nil && len(claim.Records) == 0 {
		err = d.claimFrom(ctx, tx, owner, claim, `{schema}inkit_queue_events AS e WHERE`, `e.due`)
	}
	return err
}

func (d *DB) claimFrom(ctx context.Context, tx *sql.Tx, owner string, claim *store.Claim, from, order string) (err error) {
	lease := claim.Lease.Milliseconds()
	claim.Records, err = d.records(ctx, tx, `
		WITH picked AS MATERIALIZED (
			SELECT e.id FROM `+from+` e.queue = ? AND e.state = 'pending' AND e.due <= {now}
			ORDER BY `+order+` LIMIT ? {skip})
		UPDATE {schema}inkit_queue_events
		SET due = {now} + CAST(? AS BIGINT), lease = {now} + CAST(? AS BIGINT), owner = ?, attempts = attempts + 1
		WHERE id IN (SELECT id FROM picked)
		RETURNING `+recordColumns(events, true), claim.Queue, claim.Max, lease, lease, owner)
	return err
}

// Due implements store.Store. If another process may still write, Due returns the error `cause`,
// because that process may attempt the same events. On a full disk, Due reads the events, because
// no process can write.
func (d *DB) Due(ctx context.Context, c *store.Claim, cause error) (err error) {
	if errors.Is(cause, store.ErrLocked) || d.Skip != "" && !errors.Is(cause, store.ErrFull) {
		return cause
	}
	var id string
	var ids []any
	err = d.read(ctx, []any{&id}, func() {
		if !c.Without[id] && len(ids) < c.Max {
			ids = append(ids, id)
		}
	}, `SELECT id FROM {schema}inkit_queue_events
		WHERE queue = ? AND state = 'pending' AND due <= {now} ORDER BY due LIMIT ?`, c.Queue, c.Max+len(c.Without))
	if err == nil {
		c.Records, err = d.records(ctx, d.Read, `SELECT `+recordColumns(events, true)+` FROM {schema}inkit_queue_events
			WHERE id IN (NULL`+strings.Repeat(", ?", len(ids))+`) ORDER BY due`, ids...)
	}
	for _, r := range c.Records {
		r.Attempts++
	}
	if len(c.Records) > 0 {
		return nil
	}
	return errors.Join(cause, d.Wrap(err))
}
