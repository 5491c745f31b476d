// Package store is the interface between a queue and its database. The packages below
// implement it: sqlite and postgres, each a module of Caddy, with the SQL that both share
// in sqlstore.
package store

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
)

// The states of an event in a store.
const (
	Pending = "pending"   // waits for its next attempt, or is in one
	Dead    = "dead"      // not attempted until an operator retries or drops it
	History = "delivered" // deleted, except for a small row of the history
)

// Latest is the longest time until an event may be due: the longest Retry-After and its
// jitter, or attempt_timeout if that is longer. An event with a later due time was written
// with a wrong clock, and is due now.
const Latest = 72 * time.Minute

// Record is an event in a store. Operators read its columns; an attempt needs Request.
type Record struct {
	ID         string // unique over all queues, in the order of time
	Queue      string
	State      string
	Received   time.Time // by the clock of the Caddy that received it
	Attempts   int       // how many attempts have begun
	LastError  string    // of the last attempt that failed
	EventType  string    // as inkit_webhook reads it: empty if the body is not Inkit's JSON
	ResourceID string
	Request    []byte // the encoded request
	Checksum   []byte // of ID and Request

	// For Batch.Add: the time until the event is due and, if the owner of the batch is
	// attempting it now, until other owners may attempt it.
	Delay time.Duration
	Lease time.Duration

	// From a store, by its clock: the start of the event's age, the time of its next
	// attempt, and the end of the lease of its running attempt.
	Queued, Due, LeasedUntil time.Time

	// Age is the age of the event when it was claimed.
	Age time.Duration

	// In the history: when the backend accepted the event, and the status of its answer.
	Finished time.Time
	Status   int

	// For Batch.Add, of an event of a type in once: its digest, and how long to remember
	// it. If an earlier event has the same digest, Apply sets First to its id, and does
	// not add the record.
	Digest   []byte
	Remember time.Duration
	First    string
}

// Sum returns the checksum of ID and Request, which must not change in the store.
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
	After     time.Duration // for Later: the time until the next attempt is due
	LastError string        // for Later and SetAside
}

// Outcome is the result of an attempt.
type Outcome int

// The outcomes of an attempt.
const (
	Delivered Outcome = iota // the event is deleted
	Later                    // the event is attempted again
	SetAside                 // the event is dead
	Released                 // Caddy stops: the event is due at once, for any owner
	Unbegun                  // as Released, and the attempt does not count: it did not begin
)

// Claim asks for events that are due. Store.Apply fills Records.
type Claim struct {
	Queue   string
	Max     int           // how many events at most
	Lease   time.Duration // until other owners may attempt them
	Newest  bool          // the newest events first, not those that are due the longest
	Records []*Record
}

// Batch is the work of one transaction.
type Batch struct {
	Owner   string // of the leases of Add and Claims
	Add     []*Record
	Finish  []Finish
	Claims  []*Claim
	History []*Record // rows of the history
	Copied  Rows      // of another store: existing rows do not change

	// Left are the finishes that Apply could not write, because another transaction has
	// locked their rows. The caller tries again.
	Left []Finish
}

// Peek is a cheap look at a queue.
type Peek struct {
	Empty bool          // no event is pending
	Wait  time.Duration // until the next event is due, 0 if one is due now

	Paused time.Time // start of the pause, zero if there is none
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
	IDs      []string  // only these, unless nil
	Due      bool      // only pending events whose attempt is due

	After  string // start after this position: Page.Next, or an id
	Newest bool   // the newest first, not the oldest
	Limit  int    // how many at most, 0 for MaxPage
}

// MaxPage is how many events Search returns at most.
const MaxPage = 500

// Page is a part of the events that a filter selects.
type Page struct {
	Records []*Record // in the order of their ids

	// Next is the position of the next page, empty at the end. A long search stops early,
	// perhaps without a record, after it has read all events up to Next. TimeOf returns
	// the time of Next.
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

// Rows are rows of the table events, history, once or paused, as they are in a database.
type Rows struct {
	Table string
	Rows  [][]any // with the columns as in schema.sql
}

// Status is the state of a database for an operator.
type Status struct {
	Size   int64 // in bytes
	Queues []QueueStatus
	Kept   [24]int // events of all queues that are pending or dead, by the hour in which they arrived
}

// QueueStatus is the state of one queue. Its numbers of deliveries come from the history:
// with a history of 0, they are 0.
type QueueStatus struct {
	Queue         string
	Pending, Dead int
	Oldest        time.Duration // the age of the oldest pending event
	Next          time.Duration // until the next attempt is due; 0 if one is due, or none is pending
	Paused        time.Time     // start of the pause, zero if there is none

	LastHour, LastDay int     // delivered
	Hours             [24]int // delivered an hour: the last one is the hour that ends now
	Retries           int     // failed attempts at the events delivered in the last day
	Failed            [24]int // likewise, an hour
	Duplicates        int     // of all remembered keys

	// Errors are the most frequent last errors of pending and dead events, five at most.
	// With many events, only the oldest and the newest count.
	Errors []ErrorCount
}

// ErrorCount is the number of events with a last error.
type ErrorCount struct {
	Error  string `json:"error"`
	Events int    `json:"events"`
}

// Keep is the limit of the history of a queue.
type Keep struct {
	Queue string
	For   time.Duration
	Rows  int // 0 for no limit now
}

// Upkeep is the result of Store.Tidy.
type Upkeep struct {
	More         bool // there is more to tidy
	DamagedFiles int  // damaged databases that were moved aside and are still there
}

// Store keeps events in a database. It repairs itself: a method returns an error only if
// it fails after that. All methods may be called by several goroutines, but Apply by only
// one goroutine of each owner. No error shows a part of an event, or credentials.
type Store interface {
	// Apply writes all of a batch except Left, or nothing. Without an error, the batch is
	// on the disk. After a connection error, it may be. Adding an existing event changes
	// nothing. A finish of an event with the lease of another owner changes nothing,
	// unless it is Delivered.
	Apply(ctx context.Context, b *Batch) error

	// Due fills Records with due events without a lease, after Apply has failed with why:
	// events of a read-only database must be delivered too. It returns why if another
	// process could attempt the same events.
	Due(ctx context.Context, c *Claim, why error) error

	// Peek changes nothing. It is as fast with many events as with few.
	Peek(ctx context.Context, queue string) (Peek, error)

	// Counts returns a count for each queue and state that has events. Its time grows with
	// their number.
	Counts(ctx context.Context) ([]Count, error)

	// Search returns a page of the events that the filter selects. They have their requests
	// only if withRequest is true, and events of the history never have one. It takes about
	// half a second at most.
	Search(ctx context.Context, filter Filter, withRequest bool) (Page, error)

	// ReadRows returns the page of a table after another page, in the order of its primary key.
	// With idle, it leaves out events with a running attempt.
	ReadRows(ctx context.Context, after Rows, idle bool) (Rows, error)

	// Status returns the state of all queues in the database, and of the named queues.
	Status(ctx context.Context, queues ...string) (Status, error)

	// Pause pauses a queue, or ends the pause, and reports whether that is a change.
	Pause(ctx context.Context, queue string, paused bool) (changed bool, err error)

	// Retry makes events pending and due, with an age of 0, except events with a running
	// attempt, and returns how many.
	Retry(ctx context.Context, filter Filter) (int, error)

	// Drop deletes events with their keys, and returns how many. If one of them is sent
	// again, it is stored.
	Drop(ctx context.Context, filter Filter) (int, error)

	// Tidy does a small part of the upkeep: it deletes expired history and keys, and gives
	// free space back to the disk.
	Tidy(ctx context.Context, keep []Keep) (Upkeep, error)

	Close() error
}

// The errors that callers of a store distinguish.
var (
	// ErrFull means that there is no space for more events. Deleting still works.
	ErrFull = errors.New("no space is left for the database")

	// ErrLocked means that another process is writing, or has not ended its transaction.
	ErrLocked = errors.New("the database is locked")

	// ErrVersion means that an earlier or a later version of this module made the database.
	ErrVersion = errors.New("the database has the schema of another version")
)

// Opening has the settings for Open.
type Opening struct {
	Logger *zap.Logger // for repairs by the store; required

	// Command is true for a command of an operator, which may run beside Caddy: the store
	// waits longer for locks, and repairs nothing.
	Command bool

	// Existing makes a missing database an error. Otherwise Open makes one.
	Existing bool
}

// Opener is a module of the namespace inkit_queue.stores.
type Opener interface {
	// Key identifies the database, so that queues can share it. It has no credentials.
	Key() string

	// Open opens the database, and makes a missing schema.
	Open(ctx context.Context, o Opening) (Store, error)

	// Migration returns the SQL of the schema for an operator to run. It is empty for a
	// database that needs no operator.
	Migration() string
}

// Each calls f for all matching events, a page at a time. No read of the database is open
// while f runs: f may wait for a terminal or write elsewhere, and the log of SQLite does
// not grow.
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

// Merge returns the page of a filter from its pages in several tables or databases.
func Merge(f Filter, parts ...Page) (all Page) {
	order := func(a, b string) int {
		if f.Newest {
			a, b = b, a
		}
		return cmp.Compare(a, b)
	}
	for _, part := range parts {
		all.Records = append(all.Records, part.Records...)
		if part.Next != "" && (all.Next == "" || order(part.Next, all.Next) < 0) {
			all.Next = part.Next // all parts are searched up to this one
		}
	}
	slices.SortStableFunc(all.Records, func(a, b *Record) int { return order(a.ID, b.ID) })
	if all.Next != "" {
		all.Records = slices.DeleteFunc(all.Records, func(r *Record) bool { return order(r.ID, all.Next) > 0 })
	}
	if len(all.Records) > f.Limit {
		all.Records = all.Records[:f.Limit]
		all.Next = all.Records[f.Limit-1].ID
	}
	return all
}

// Copy copies all rows of a store, and calls copied with the ids of each page of events.
// With idle, it leaves out events with a running attempt. It does not change existing rows.
// An end of ctx takes effect between two pages.
func Copy(ctx context.Context, to, from Store, idle bool, copied func(ids []string) error) error {
	for _, table := range []string{"paused", "once", "history", "events"} { // with its key, an event is dropped from the source
		for page := (Rows{Table: table}); ; {
			var err error
			if page, err = from.ReadRows(ctx, page, idle); err != nil {
				return err
			}
			if len(page.Rows) == 0 {
				break
			}
			if err := to.Apply(context.WithoutCancel(ctx), &Batch{Copied: page}); err != nil {
				return err
			}
			if table != "events" {
				continue
			}
			ids := make([]string, len(page.Rows))
			for i, row := range page.Rows {
				ids[i] = fmt.Sprint(row[0])
			}
			if err := copied(ids); err != nil {
				return err
			}
		}
	}
	return nil
}
