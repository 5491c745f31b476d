// Package live says which queues the running Caddy has, for whoever must not import the
// engine.
package live

import (
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Queue is a queue of the running Caddy.
type Queue struct {
	Name      string
	Database  string        // the key of its database, which shows no credentials
	History   time.Duration // how long the history stays, 0 for none
	MaxEvents int

	// Store returns the database, or nil with the reason why it is not open.
	Store func() (store.Store, error)

	// Down returns since when this Caddy takes the backend for down, zero if it does not.
	Down func() time.Time

	// Wake has the queue look for events that are due, and whether it is paused.
	Wake func()
}

// Queues is the app of inkit_queue.
type Queues interface {
	// Queues returns the queues of its configuration, none before it has started.
	Queues() []Queue
}
