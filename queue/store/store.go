// Package store says what a queue asks of a database, and in which terms. The packages
// below it keep that promise: sqlite and postgres, each a module of Caddy, with the SQL
// that both share in sqlstore.
package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"go.uber.org/zap"
)

// The states of an event in a store. A delivered event is deleted.
const (
	Pending = "pending" // waits for its next attempt, or an attempt is under way
	Dead    = "dead"    // set aside until an operator retries or drops it
)

// Latest is the longest time from now at which an event may be due: the longest
// Retry-After and its jitter. An event that is due later was written by a clock that was
// wrong, and is due now. An attempt_timeout that is longer raises the bound.
const Latest = 72 * time.Minute

// Record is an event in a store. An operator may want to read its columns; an attempt
// needs Request.
type Record struct {
	ID         string // unique over all queues, in the order of time
	Queue      string
	State      string
	Received   time.Time // by the clock of the Caddy that received it
	Attempts   int       // how many have begun
	LastError  string    // of the last attempt that failed
	EventType  string    // as inkit_webhook reads it: empty if the body is not Inkit's JSON
	ResourceID string
	Request    []byte // the encoded request
	Checksum   []byte // of ID and Request

	// For Batch.Add: how long from now the event is due, and, if the owner of the batch
	// is attempting it at this moment, for how long nobody else may.
	Delay time.Duration
	Lease time.Duration

	// As a store returns it, by the clock of the store: when its age began to count, when
	// its next attempt is due, and when the lease of the attempt under way ends.
	Queued, Due, LeasedUntil time.Time

	// Age is how long the event had been queued when it was claimed.
	Age time.Duration
}

// Sum returns the checksum of the fields that must not change in the store.
func (r *Record) Sum() []byte {
	hash := sha256.New()
	hash.Write([]byte(r.ID))
	hash.Write([]byte{0})
	hash.Write(r.Request)
	return hash.Sum(nil)
}

// Finish ends an attempt.
type Finish struct {
	ID, Queue string
	Outcome   Outcome
	After     time.Duration // for Later: how long from now the next attempt is due
	LastError string        // for Later and Dead
}

// Outcome says how an attempt ended.
type Outcome int

// The outcomes of an attempt.
const (
	Delivered Outcome = iota // the event is deleted
	Later                    // it is attempted again
	SetAside                 // it is set aside as dead
	Released                 // Caddy stops: the event is due at once, for any owner
	Unbegun                  // likewise, and the attempt that was counted did not begin
)

// Claim asks for events that are due. Store.Apply fills Records.
type Claim struct {
	Queue   string
	Max     int           // how many events at most
	Lease   time.Duration // for how long no other owner may attempt them
	Newest  bool          // the latest arrivals first, instead of the longest due
	Records []*Record
}

// Batch is the work of one transaction.
type Batch struct {
	Owner  string // holds the leases of Add and Claims
	Add    []*Record
	Finish []Finish
	Claims []*Claim

	// Left are the finishes that Apply could not write, because another transaction has
	// locked their rows. The caller tries them again.
	Left []Finish
}

// Peek is a cheap look at a queue.
type Peek struct {
	Empty bool          // no event is pending
	Wait  time.Duration // until the next event is due, 0 if one is
}

// Count is the number of events of a queue in a state.
type Count struct {
	Queue, State string
	Events       int
	Oldest       time.Duration // the age of the oldest
}

// Filter selects events for the commands.
type Filter struct {
	Queue string // empty for all
	Dead  bool   // only dead events
	Due   bool   // only pending events whose attempt is due
	After string // only events with a greater id; empty for all
	IDs   []string
	Limit int // how many at most, 0 for all
}

// Upkeep is the result of Store.Tidy.
type Upkeep struct {
	More         bool // there is more to tidy
	DamagedFiles int  // damaged databases that were moved aside and are still there
}

// Store keeps events in a database. It heals itself: a method returns an error only if
// it could not do its work after that. All methods may be called by several goroutines;
// each owner calls Apply from one goroutine. No error shows a part of an event, or
// credentials.
type Store interface {
	// Apply writes all of a batch except Left, or nothing. Without an error, it is on
	// the disk. After an error of a connection, nobody knows. Adding an event that is
	// there already changes nothing. A finish of an event that another owner has leased
	// changes nothing, unless it is Delivered.
	Apply(ctx context.Context, b *Batch) error

	// Due fills Records with events that are due, without leasing them, after Apply has
	// failed with why: a database that cannot be written must still be emptied. It returns
	// why if another process could attempt the same events.
	Due(ctx context.Context, c *Claim, why error) error

	// Peek changes nothing. It costs the same for few events and for many.
	Peek(ctx context.Context, queue string) (Peek, error)

	// Counts returns a count for each queue and state that has events. The time it takes
	// grows with their number.
	Counts(ctx context.Context) ([]Count, error)

	// Select calls f for events, the oldest first, until f returns false. Their requests
	// are left out unless withRequest is true. f must be quick: the database is being read.
	Select(ctx context.Context, filter Filter, withRequest bool, f func(*Record) bool) error

	// Retry makes events pending and due with a fresh age, except those with an attempt
	// under way, and returns how many.
	Retry(ctx context.Context, filter Filter) (int, error)

	// Drop deletes events and returns how many.
	Drop(ctx context.Context, filter Filter) (int, error)

	// Tidy does a small part of the upkeep, such as giving free space back to the disk.
	Tidy(ctx context.Context) (Upkeep, error)

	Close() error
}

// The errors that callers of a store tell apart.
var (
	// ErrFull means that there is no room for more events. Deleting still works.
	ErrFull = errors.New("no space is left for the database")

	// ErrLocked means that another process is writing, or has not ended its transaction.
	ErrLocked = errors.New("the database is locked")

	// ErrNewer means that a later version of this module made the database.
	ErrNewer = errors.New("the database has the schema of a later version")

	// ErrOlder means that an earlier version made the database, which cannot be migrated.
	ErrOlder = errors.New("the database has the schema of an older version, which cannot be migrated")
)

// Opening says who opens a store.
type Opening struct {
	Logger *zap.Logger // for what the store does to heal itself; required

	// Command is true for a command of an operator, beside a Caddy that runs: it waits
	// longer for locks and leaves nothing behind.
	Command bool

	// Existing refuses a database that is not there yet, instead of making it.
	Existing bool
}

// Opener is a module of the namespace inkit_queue.stores.
type Opener interface {
	// Key identifies the database, so that queues can share it. It shows no credentials.
	Key() string

	// Open opens the database, and makes its schema if that is missing.
	Open(ctx context.Context, o Opening) (Store, error)

	// Migration returns the SQL that makes the schema, for an operator to run. It is empty
	// for a database that needs no operator.
	Migration() string
}

// Page is how many events Each reads at a time.
const Page = 500

// Each calls f for all events that match, the oldest first, a page at a time. While f
// works, the database is not being read: f may wait for a terminal or write elsewhere,
// and the log of SQLite does not grow meanwhile.
func Each(ctx context.Context, s Store, filter Filter, withRequest bool, f func(page []*Record) error) error {
	filter.Limit = Page
	for {
		var page []*Record
		if err := s.Select(ctx, filter, withRequest, func(r *Record) bool { page = append(page, r); return true }); err != nil {
			return err
		}
		if len(page) == 0 {
			return nil
		}
		if err := f(page); err != nil {
			return err
		}
		if len(page) < Page {
			return nil
		}
		filter.After = page[len(page)-1].ID
	}
}

// Copy adds a page of events to a store as they are, dead ones included. Those that are
// there already stay as they are.
func Copy(ctx context.Context, to Store, owner string, page []*Record) error {
	b := &Batch{Owner: owner, Add: page}
	for _, r := range page {
		r.Delay, r.Lease = max(0, time.Until(r.Due)), max(0, time.Until(r.LeasedUntil))
		if r.State == Dead {
			r.Lease = time.Minute // a finish needs the lease
			b.Finish = append(b.Finish, Finish{ID: r.ID, Queue: r.Queue, Outcome: SetAside, LastError: r.LastError})
		}
	}
	return to.Apply(ctx, b)
}
