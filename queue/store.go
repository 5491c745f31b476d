package queue

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"
)

// The states of an event in a store. One that was delivered is not there any more.
const (
	statePending = "pending" // waits for its next attempt, or is being delivered
	stateDead    = "dead"    // set aside, until an operator retries or drops it
)

// Record is an event as a store keeps it. The columns are what an operator may want
// to read; what an attempt needs is in Request.
type Record struct {
	ID         string // unique over all queues, and in the order of time
	Queue      string
	State      string
	Received   time.Time // by the clock of the Caddy that took it
	Attempts   int       // how many have begun
	LastError  string    // of the last attempt that failed
	EventType  string    // as inkit_webhook has it: empty if the body is another one
	ResourceID string
	Request    []byte // see request
	Checksum   []byte // of ID and Request

	// For Add: when the first attempt after this one is due, from now on; and whether
	// the owner of the batch has begun an attempt, and for how long nobody else may.
	Delay time.Duration
	Lease time.Duration

	// As a store returns it: since when the age of the event counts, when the next
	// attempt is due, and until when an attempt may last that has begun. A store that
	// several machines share has them by its own clock.
	Queued, Due, LeasedUntil time.Time

	// Age is how long the event had been queued when it was claimed.
	Age time.Duration
}

// checksum is the SHA-256 of what must not change while it is stored.
func (r *Record) checksum() []byte {
	hash := sha256.New()
	hash.Write([]byte(r.ID))
	hash.Write([]byte{0})
	hash.Write(r.Request)
	return hash.Sum(nil)
}

// Finish is the end of an attempt.
type Finish struct {
	ID, Queue string
	Outcome   Outcome
	After     time.Duration // for Later: when the next attempt is due, from now on
	LastError string        // for Later and Dead
}

// Outcome is what becomes of an event after an attempt.
type Outcome int

const (
	Delivered Outcome = iota // the event is deleted
	Later                    // it is attempted again
	Dead                     // it is set aside
	Released                 // the owner stops: it is due at once, for whoever comes
	Unbegun                  // likewise, and the attempt that was counted has not begun
)

// Claim asks for events that are due. Store.Apply adds them to Records.
type Claim struct {
	Queue   string
	Max     int           // how many events at most
	Lease   time.Duration // for how long nobody else may deliver them
	Probe   bool          // whether the backend is down: one event then, and only if no other owner probes
	Newest  bool          // whether the events come first that arrived last
	Records []*Record
}

// Backend is what the owners of a queue tell each other of its backend.
type Backend struct {
	Queue string
	Down  bool
	Probe time.Duration // if it is down: when the next probe may begin, from now on
}

// Batch is what a store does in one transaction.
type Batch struct {
	Owner    string // whose leases those of Add and Claims are
	Add      []*Record
	Finish   []Finish
	Backends []Backend
	Claims   []*Claim
}

// Peek is what a queue may look at often.
type Peek struct {
	Wait  time.Duration // until the next event is due; 0 if one is
	Last  time.Duration // until the last one is
	Empty bool          // no event is pending
	Down  bool          // some owner has found the backend to be down
	Probe time.Duration // until the next probe of it is due; 0 if one is
}

// Count is how many events of a queue are in a state.
type Count struct {
	Queue, State string
	Events       int
	Oldest       time.Duration // the age of the oldest of them
}

func (c Count) plus(events int) Count {
	c.Events = max(0, c.Events+events)
	if c.Events == 0 {
		c.Oldest = 0
	}
	return c
}

// Filter selects events for the commands.
type Filter struct {
	Queue string // empty for all
	Dead  bool   // the dead ones alone
	Due   bool   // the pending ones alone whose attempt is due
	After string // those whose id comes after that; empty for all
	IDs   []string
}

// Store keeps events in a database. All methods can be called by several goroutines;
// Apply is called by one of each owner at a time. Errors hold no part of an event
// and no credentials.
type Store interface {
	// Apply does all of a batch in this order, or nothing. When it returns without an
	// error, all of it is on the disk. If the error is that of a connection, nobody
	// knows. It adds no event that is there already. Of the events of Finish, it leaves
	// alone those that another owner has.
	Apply(ctx context.Context, b *Batch) error

	// Peek changes nothing, and costs little however many events there are.
	Peek(ctx context.Context, queue string) (Peek, error)

	// Counts returns a count for each queue and state of which there are events. It
	// may take as long as there are many.
	Counts(ctx context.Context) ([]Count, error)

	// Select calls f for events, the oldest first, without their requests unless
	// with says so, until f returns false.
	Select(ctx context.Context, filter Filter, withRequest bool, f func(*Record) bool) error

	// Retry makes events pending and due, with a fresh age, and returns how many.
	Retry(ctx context.Context, filter Filter) (int, error)

	// Drop deletes events, and returns how many.
	Drop(ctx context.Context, filter Filter) (int, error)

	Close() error
}

// The ways of failing that callers tell apart.
var (
	// ErrFull says that there is no room for more events: deleting still works.
	ErrFull = errors.New("no space is left for the database")

	// ErrDamaged says that what is in the database cannot be read as one.
	ErrDamaged = errors.New("the database is damaged")

	// ErrNewer says that a later version of this module made the database.
	ErrNewer = errors.New("the database has the schema of a later version")

	// ErrOlder says that a version of this module made the database that this one cannot
	// migrate from.
	ErrOlder = errors.New("the database has the schema of an older version, which this one cannot migrate")

	// ErrReplaced says that the database is not the one any more that was opened.
	ErrReplaced = errors.New("the database was deleted or replaced while it was open")
)

// Opener is a module of the namespace inkit_queue.stores.
type Opener interface {
	// Key names the database, so that queues can share it. It holds no credentials.
	Key() string

	// Open opens the database, and makes or migrates its schema.
	Open(ctx context.Context) (Store, error)
}
