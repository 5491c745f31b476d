// Package store is the interface between a queue and its database. The Caddy modules sqlite
// and postgres implement the interface. They share the SQL in sqlstore.
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
	Pending = "pending"   // waits for an attempt, or an attempt is running
	Dead    = "dead"      // not attempted again, unless an operator retries it
	History = "delivered" // deleted: only a row of the history is left
)

// Latest is longer than any lease and any wait for the next attempt: at most an hour plus a margin.
// An event with a later due time counts as due now, because that time comes from a wrong clock.
const Latest = 72 * time.Minute

// Record is an event in a store. An attempt sends Request. The other fields are for the queue
// and for operators.
type Record struct {
	ID         string // unique across all queues; the order of ids is the order of their times
	Queue      string
	State      string
	Received   time.Time // by the clock of the Caddy that received the event
	Attempts   int       // how many attempts have begun
	LastError  string    // the error of the last failed attempt
	EventType  string    // the type in the body, empty if the body is not Inkit's JSON
	ResourceID string
	Request    []byte // the encoded request
	Checksum   []byte // the checksum of ID and Request

	// For Batch.Add: the lease, if the batch's owner is attempting the event now. During the
	// lease, other owners must not attempt the event.
	Lease time.Duration

	// Set by a store, with the store's clock. The next attempt is due at Due. The lease of the
	// running attempt ends at LeasedUntil. Age is the event's age when it was claimed or found.
	Due, LeasedUntil time.Time
	Age              time.Duration

	// Only in the history: when the backend accepted the event, and the status of the answer.
	Finished time.Time
	Status   int

	// For Batch.Add, if the option `once` lists the event's type: the event's digest, and how
	// long the store remembers the digest. If an earlier event has the same digest, Apply sets
	// First to the id of the earlier event, and does not add the record.
	Digest   []byte
	Remember time.Duration
	First    string
}

// Sum returns the checksum of ID and Request. A record whose Checksum has another value is damaged.
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
	After     time.Duration // for Later: the wait before the next attempt
	LastError string        // for Later and SetAside; if it is empty, the event keeps its last error
}

// Outcome is the result of an attempt.
type Outcome int

const (
	Delivered Outcome = iota // the event is deleted
	Later                    // the event is attempted again, by any owner
	SetAside                 // the event is dead
	Unbegun                  // like Later, but the attempt did not begin and does not count
)

// Claim asks for due events. Store.Apply fills Records.
type Claim struct {
	Queue   string
	Max     int           // the maximum number of events
	Lease   time.Duration // how long other owners must not attempt the events
	Newest  bool          // if true, the newest events first, otherwise the earliest due events first
	Records []*Record

	Without map[string]bool // for Store.Due: events to leave out, because the owner attempts them, or could not finish them yet
}

// Batch is the work of one transaction.
type Batch struct {
	Owner   string    // the owner of the leases in Add and Claims
	Add     []*Record // a few thousand at most, because one statement writes all keys
	Finish  []Finish
	Claims  []*Claim
	History []*Record // rows of the history
	Copied  Rows      // rows from another store: they do not replace existing rows

	// Left has the finishes that Apply could not write because another transaction has
	// locked their rows. The caller must try these finishes again.
	Left []Finish
}

// Peek is the part of a queue's state that a store reads fast, even with many events.
type Peek struct {
	Empty bool          // no event is pending
	Wait  time.Duration // the time until the next event is due, 0 if an event is due now

	Paused time.Time // start of the pause, zero if the queue is not paused
}

// Count is the number of a queue's events in one state.
type Count struct {
	Queue, State string
	Events       int
	Oldest       time.Duration // the age of the oldest event
}

// Filter selects events for operators. A field with its zero value sets no condition. Only States
// is different: nil selects pending and dead events.
type Filter struct {
	Queue    string
	States   []string // nil for pending and dead
	Type     string
	Resource string
	Error    string    // a part of the last error
	Since    time.Time // received at this time or later
	Until    time.Time // received before this time
	IDs      []string  // only events with these ids, nil for all events

	After  string // start after this position: Page.Next, or an id
	Newest bool   // the newest event first, otherwise the oldest first
	Limit  int    // the maximum number of events, 0 for MaxPage
}

// MaxPage is the maximum number of events that Search returns.
const MaxPage = 500

// Page is a part of the events that a filter selects.
type Page struct {
	Records []*Record // in the order of their ids

	// Next is the position of the next page. It is empty on the last page. A slow search
	// stops early: it has read all events up to Next, and Records may be empty.
	Next string
}

// TimeOf returns the time in an id or a position. It returns zero for an id without a time.
func TimeOf(id string) time.Time {
	parsed, err := uuid.Parse(id)
	if err != nil || parsed.Version() != 7 {
		return time.Time{}
	}
	return time.Unix(parsed.Time().UnixTime())
}

// Rows are rows of one table ("events", "history", "once" or "paused") as in the database.
type Rows struct {
	Table string
	Rows  [][]any // with the columns as in schema.sql
}

// Status is the state of a database for an operator.
type Status struct {
	Size   int64 // in bytes
	Queues []QueueStatus
	Kept   Hours // pending and dead events of all queues, by their hour of arrival
}

// Hours has a number for each of the last 24 hours. The last hour ends now.
type Hours [24]int

// Sum returns the sum of the 24 hours.
func (h Hours) Sum() (sum int) {
	for _, n := range h {
		sum += n
	}
	return sum
}

// QueueStatus is the state of one queue. Its numbers of deliveries come from the history.
// If the history is off, these numbers are 0.
type QueueStatus struct {
	Queue         string
	Pending, Dead int
	Oldest        time.Duration // the age of the oldest pending event
	Next          time.Duration // the time until the next attempt is due, 0 if an attempt is due now or no event is pending
	Paused        time.Time     // start of the pause, zero if the queue is not paused

	Delivered  Hours // delivered events
	Failed     Hours // failed attempts at the delivered events, by the hour of the delivery
	Duplicates int   // duplicates of all events whose digests the store remembers

	// Errors has up to five errors: the most frequent last errors of pending and dead events.
	// If there are many events, only the oldest and the newest events count.
	Errors []ErrorCount
}

// ErrorCount is the number of events with the same last error.
type ErrorCount struct {
	Error  string `json:"error"`
	Events int    `json:"events"`
}

// Keep limits the history of a queue.
type Keep struct {
	Queue string
	For   time.Duration
	Rows  int // the maximum number of rows
}

// Store keeps events in a database. Apply, Peek, Counts and Tidy repair the database. After a
// repair, the other methods succeed too. Several goroutines may call the methods of a store,
// but for each owner, only one goroutine may call Apply. Errors show no part of an event, and
// no credentials.
type Store interface {
	// Apply writes either a whole batch, except the finishes in Left, or nothing. If it returns no
	// error, the batch is on the disk, and Left and the claims have their results. After a connection
	// error, the batch may be on the disk or not. Adding an existing event changes nothing. If another
	// owner has the lease of an event, a finish changes the event only if its Outcome is Delivered.
	Apply(ctx context.Context, b *Batch) error

	// Due fills the Records of a claim with due events, but sets no lease, so that events in a
	// read-only database are delivered too. Call Due after Apply has failed. The argument `cause`
	// is the error of Apply. Due returns `cause` if no event is due, or if another process could
	// attempt the same events.
	Due(ctx context.Context, c *Claim, cause error) error

	// Peek reads the state of a queue. It is as fast with many events as with few.
	Peek(ctx context.Context, queue string) (Peek, error)

	// Counts returns a count for each queue and state with events. It is slower with more
	// events.
	Counts(ctx context.Context) ([]Count, error)

	// Search returns a page of the events that the filter selects. The events have their
	// requests only if withRequest is true. Events of the history never have a request. A
	// search stops after about half a second.
	Search(ctx context.Context, filter Filter, withRequest bool) (Page, error)

	// ReadRows returns the next page of a table after a given page, sorted by id, or by queue
	// in the table `paused`. If idle is true, ReadRows leaves out events with a running attempt.
	ReadRows(ctx context.Context, after Rows, idle bool) (Rows, error)

	// Status returns the state of all queues in the database, and of the queues in the argument
	// `queues`, even if the database has nothing of these.
	Status(ctx context.Context, queues ...string) (Status, error)

	// Pause starts or ends the pause of a queue. It returns false if the queue was in this
	// state already.
	Pause(ctx context.Context, queue string, paused bool) (changed bool, err error)

	// Retry makes events pending and due, with an age of 0. It leaves out events with a
	// running attempt. It returns the number of changed events.
	Retry(ctx context.Context, filter Filter) (int, error)

	// Drop deletes events and their keys (rows of the table `once`), and returns the number of
	// deleted events. If Inkit sends a dropped event again, the queue stores that event. The
	// filter must have the ids of the events to delete. Drop can delete up to a few thousand
	// events.
	Drop(ctx context.Context, filter Filter) (int, error)

	// Tidy deletes expired keys and expired rows of the history, and gives free space back to
	// the disk. It returns how many damaged databases were moved aside and still exist.
	Tidy(ctx context.Context, keep []Keep) (damagedFiles int, err error)

	Close() error
}

// The errors that callers of a store distinguish.
var (
	// ErrFull means that the disk has no space for more events. Deleting events still works.
	ErrFull = errors.New("no space is left for the database")

	// ErrLocked means that another process is writing, or has not ended its transaction.
	ErrLocked = errors.New("the database is locked")
)

// Opening has the settings for Open.
type Opening struct {
	Logger *zap.Logger // logs repairs by the store; required

	// Command is true for an operator's command. Caddy may run at the same time, so the
	// store waits longer for locks, and repairs nothing.
	Command bool

	// If Existing is true, a missing database is an error. If Existing is false, Open creates
	// a missing database.
	Existing bool
}

// Opener is a module in the namespace inkit_queue.stores.
type Opener interface {
	// Key identifies the database, so that queues can share it. It contains no credentials.
	Key() string

	// Open opens the database, and creates the schema if it is missing.
	Open(ctx context.Context, o Opening) (Store, error)

	// Migration returns the SQL that an operator can run to create the schema. It is empty if
	// Open can always create the schema, as in SQLite.
	Migration() string
}

// Each calls f with every page of the events that the filter selects, without their requests. The
// function f may be slow: Each has no read open while f runs. An open read would let SQLite's log
// grow.
func Each(ctx context.Context, s Store, filter Filter, f func(page []*Record) error) error {
	for {
		page, err := s.Search(ctx, filter, false)
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

// Merge combines pages into one page. All parts are pages of the same filter, but from different
// tables or databases.
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
			all.Next = part.Next // all parts are complete up to this position
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

// Copy copies all rows of the store `from` into the store `to`. After each page of events, Copy
// calls the function `copied` with the ids of the events. If `idle` is true, Copy leaves out events
// with a running attempt. Copy does not change rows that the store `to` already has. If ctx ends,
// Copy stops before the next page.
func Copy(ctx context.Context, to, from Store, idle bool, copied func(ids []string) error) error {
	for _, table := range []string{"paused", "once", "history", "events"} { // the events come last, because the function copied may drop an event and its key from the source
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
