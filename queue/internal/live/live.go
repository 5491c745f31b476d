// Package live gives access to the queues of the running Caddy, for packages that must not
// import the engine.
package live

import (
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// Queue is a queue of the running Caddy.
type Queue struct {
	Name      string
	Database  string        // the key of the database, without credentials
	History   time.Duration // how long the history keeps an event, 0 for no history
	MaxEvents int

	// Store returns the database, or nil with the reason why it is not open.
	Store func() (store.Store, error)

	// Down returns the time since which the backend counts as down, zero if it is up.
	Down func() time.Time

	// Wake makes the queue check for due events and for a pause.
	Wake func()
}

// Queues is the app of inkit_queue.
type Queues interface {
	// Queues returns the queues of the app's configuration.
	Queues() []Queue
}
