// Package store says what a queue asks of a database, and in which terms. The packages
// below it keep that promise: sqlite and postgres, each a module of Caddy, with the SQL
// that both share in sqlstore.
package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
)

// The states of an event in a store.
const (
	Pending = "pending"   // waits for its next attempt, or an attempt is under way
	Dead    = "dead"      // set aside until an operator retries or drops it
	History = "delivered" // deleted, but for a small row of the history
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

	// Of the history: when the backend took the event, and the status of its answer.
	Finished time.Time
	Status   int

	// For Batch.Add: the digest of an event that is stored once, and for how long that is
	// remembered. Apply sets First to the id of an earlier event with this digest. The
	// record is not added then.
	Digest   []byte
	Remember time.Duration
	First    string
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
	Owner   string // holds the leases of Add and Claims
	Add     []*Record
	Finish  []Finish
	Claims  []*Claim
	History []*Record // rows of the history
	Keys    []Key     // for Copy: those that are there already stay as they are

	// Left are the finishes that Apply could not write, because another transaction has
	// locked their rows. The caller tries them again.
	Left []Finish
}

// Peek is a cheap look at a queue.
type Peek struct {
	Empty bool          // no event is pending
	Wait  time.Duration // until the next event is due, 0 if one is

	Paused time.Time // since when the queue is paused, zero if it is not
}

// Count is the number of events of a queue in a state.
type Count struct {
	Queue, State string
	Events       int
	Oldest       time.Duration // the age of the oldest
}

// Filter selects events for operators. Empty fields select all.
type Filter struct {
	Queue    string
	States   []string // nil for pending and dead
	Type     string
	Resource string
	Error    string    // a part of the last error
	Since    time.Time // received at this time or later
	Until    time.Time // received before this time
	IDs      []string  // not nil: only these
	Due      bool      // only pending events whose attempt is due

	After  string // a position: Page.Next, or an id
	Newest bool   // the newest first, instead of the oldest
	Limit  int    // how many at most, 0 for MaxPage
}

// MaxPage is how many events Search returns at most.
const MaxPage = 500

// Page is a part of what a filter selects.
type Page struct {
	Records []*Record // in the order of their ids

	// Next is the position to go on from, empty at the end. A search that takes long stops
	// early, perhaps without a record: it has looked at all events up to Next, whose time
	// TimeOf tells.
	Next string
}

// TimeOf returns the time in an id or a position, zero if there is none.
func TimeOf(id string) time.Time {
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 {
		return time.Time{}
	}
	return time.Unix(parsed.Time().UnixTime())
}

// Key says that an event was stored, so that no second one is.
type Key struct {
	Queue      string
	Digest     []byte
	ID         string    // of the first
	Expires    time.Time // when the key is forgotten
	Duplicates int       // how many more came
}

// Status is a look at a database for an operator.
type Status struct {
	Size   int64 // in bytes
	Queues []QueueStatus
	Kept   [24]int // events of all queues that are pending or dead, by the hour in which they arrived
}

// QueueStatus is a look at one queue. What it says of deliveries is as complete as the
// history: with a history of 0, it is nothing.
type QueueStatus struct {
	Queue         string
	Pending, Dead int
	Oldest        time.Duration // the age of the oldest pending event
	Next          time.Duration // until the next attempt is due; 0 if it is, or if none is pending
	Paused        time.Time     // since when; zero if it is not

	LastHour, LastDay int     // delivered
	Hours             [24]int // delivered an hour: the last one is the hour that ends now
	Retries           int     // attempts that failed at the events that were delivered in the last day
	Failed            [24]int // likewise, an hour
	Duplicates        int     // that came to keys which are remembered

	// Errors are the most frequent last errors of pending and dead events, five at most.
	// Of many events, the oldest and the newest are looked at.
	Errors []ErrorCount
}

// ErrorCount is how often an error is the last one of an event.
type ErrorCount struct {
	Error  string `json:"error"`
	Events int    `json:"events"`
}

// Keep says how much of the history of a queue stays.
type Keep struct {
	Queue string
	For   time.Duration
	Rows  int // 0 for not counted now
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

	// Search returns a page of events of all states that the filter names. Their requests
	// are left out unless withRequest is true; those of the history have none. It takes
	// about half a second at most.
	Search(ctx context.Context, filter Filter, withRequest bool) (Page, error)

	// Keys returns keys of Batch.Add in the order of queue and digest, a page of them.
	Keys(ctx context.Context, after Key) ([]Key, error)

	// Status looks at the queues that are in the database, and at those that are named.
	Status(ctx context.Context, queues ...string) (Status, error)

	// Pause makes a queue paused, or ends that, and reports whether that is a change.
	Pause(ctx context.Context, queue string, paused bool) (changed bool, err error)

	// Retry makes events pending and due with a fresh age, except those with an attempt
	// under way, and returns how many.
	Retry(ctx context.Context, filter Filter) (int, error)

	// Drop deletes events and returns how many. Their keys are forgotten: if one of them
	// is sent again, it is stored.
	Drop(ctx context.Context, filter Filter) (int, error)

	// Tidy does a small part of the upkeep: it deletes history and keys that are over, and
	// gives free space back to the disk.
	Tidy(ctx context.Context, keep []Keep) (Upkeep, error)

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

// Each calls f for all events that match, a page at a time. While f works, the database
// is not being read: f may wait for a terminal or write elsewhere, and the log of SQLite
// does not grow meanwhile.
func Each(ctx context.Context, s Store, filter Filter, withRequest bool, f func(page []*Record) error) error {
	for {
		page, err := s.Search(ctx, filter, withRequest)
		if err != nil {
			return err
		}
		if len(page.Records) > 0 {
			if err := f(page.Records); err != nil {
				return err
			}
		}
		if filter.After = page.Next; page.Next == "" {
			return nil
		}
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

// CopyMemory adds what a database remembers beside its events: the history, the keys, and
// which queues are paused. What is there already stays as it is.
func CopyMemory(ctx context.Context, to, from Store) error {
	err := Each(ctx, from, Filter{States: []string{History}}, false, func(page []*Record) error {
		return to.Apply(ctx, &Batch{History: page})
	})
	for after := (Key{}); err == nil; {
		var keys []Key
		if keys, err = from.Keys(ctx, after); err != nil || len(keys) == 0 {
			break
		}
		after = keys[len(keys)-1]
		err = to.Apply(ctx, &Batch{Keys: keys})
	}
	if err != nil {
		return err
	}
	status, err := from.Status(ctx)
	for _, q := range status.Queues {
		if err == nil && !q.Paused.IsZero() {
			_, err = to.Pause(ctx, q.Queue, true)
		}
	}
	return err
}
