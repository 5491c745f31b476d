package queue

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// patience is how long a new event waits for the result of its first attempt before it is
	// stored. If the backend accepts the event within this time, the event is never written to
	// the disk. If the attempt fails, or no attempt begins, the event is stored immediately.
	patience = 25 * time.Millisecond

	// storeWait is the timeout for storing an event, unless the option `answer_after` is longer.
	// Then the timeout is `answer_after`.
	storeWait = 5 * time.Second

	// lastChance is how long before its deadline an event gets an attempt that is still not stored,
	// even if the backend counts as down.
	lastChance = time.Second

	// If the option `once` lists the type of an event, the first attempt waits until the event is
	// stored. After onceWait, the attempt begins even if the event is not stored, because a double
	// delivery is better than a lost event.
	onceWait = time.Second
)

// arrival is a new event with its waiting sender.
type arrival struct {
	q        *queue
	h        *Handler
	request  *request.Request
	record   *store.Record
	addition *writer.Addition
	deadline time.Time // for the response to the sender
}

func newArrival(q *queue, h *Handler, r *request.Request, record *store.Record) *arrival {
	a := &arrival{q: q, h: h, request: r, record: record}
	a.deadline = record.Received.Add(max(storeWait, time.Duration(*h.AnswerAfter)))
	a.addition = writer.NewAddition(record, a.encode, a.deadline, func(err error) { q.noteStored(err, time.Since(record.Received)) })
	return a
}

// answer attempts and stores the event. The sender gets the backend's response if the backend
// accepts the event in time, and status 200 if the event is stored. If the event is neither
// accepted nor stored, answer returns an error with status 503.
func (a *arrival) answer(w http.ResponseWriter) error {
	answerAfter := time.Duration(*a.h.AnswerAfter)
	var attempted chan result   // nil if no attempt is running
	var durable <-chan struct{} // nil if the event is not being stored
	begins := a.begins()
	if begins && a.record.Digest != nil {
		durable = a.store()
		begins = a.storedOnce()
	}
	if begins {
		attempted = a.attempt()
		select {
		case first := <-attempted:
			if attempted = nil; first.err == nil {
				return first.answer.copyTo(w)
			}
		case <-time.After(min(patience, answerAfter)):
		}
	}
	if durable == nil {
		durable = a.store()
	}
	tried, stored := begins, false
	limit, late := time.After(time.Until(a.deadline)), time.After(time.Until(a.deadline)-lastChance)
	for attempted != nil || durable != nil {
		select {
		case res := <-attempted:
			if attempted = nil; res.err == nil {
				return res.answer.copyTo(w)
			}
		case <-durable:
			stored, durable = a.isStored(), nil
			switch {
			case stored:
				limit, late = time.After(time.Until(a.record.Received.Add(answerAfter))), nil
			case !tried && !a.q.isPaused(): // storing has failed, and the backend may be up again
				tried, attempted = true, a.attempt()
			}
		case <-late: // storing takes long, and may fail
			if !tried && !a.q.isPaused() && a.q.db.writer.Attempt(a.addition) {
				tried, attempted = true, a.attempt()
			}
		case <-limit:
			attempted, durable = nil, nil
		}
	}
	if !stored {
		w.Header().Set("Retry-After", "30")
		return caddyhttp.Error(http.StatusServiceUnavailable, errors.New("the event could not be stored, and the backend has not accepted it"))
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// begins reports whether the first attempt begins now. A paused queue begins no attempts.
// While the backend is down or recovering, an attempt begins only if events cannot be stored.
// Before it returns true, the method sets Attempts and Lease of the record.
func (a *arrival) begins() bool {
	q := a.q
	if q.isPaused() || !q.db.writer.Failing() && !q.breaker.Backend().Allows() {
		return false
	}
	a.record.Attempts, a.record.Lease = 1, time.Duration(a.h.AttemptTimeout)+delivery.LeaseMargin
	return true
}

// storedOnce is for an event whose type is in the list of the option `once`. It waits until the
// event is stored, and reports whether the first attempt may begin. A duplicate gets no attempt.
// If storing fails, or takes longer than onceWait, the attempt may begin.
func (a *arrival) storedOnce() bool {
	select {
	case <-a.addition.Done():
		if err := a.addition.Err(); err == nil || errors.Is(err, writer.ErrDuplicate) {
			return err == nil
		}
	case <-time.After(onceWait):
	}
	if a.q.onceLog.Allow() {
		a.h.logger.Warn("cannot store events before their first attempt: events of the types in the option 'once' are attempted anyway, perhaps twice", zap.String("queue", a.q.name))
	}
	return true
}

// isStored reports whether the event is on the disk, or is a duplicate of a stored event.
func (a *arrival) isStored() bool {
	err := a.addition.Err()
	if !errors.Is(err, writer.ErrDuplicate) {
		return err == nil
	}
	a.h.logger.Info("an event came again, and is not delivered twice", zap.String("queue", a.q.name),
		zap.String("event_type", a.record.EventType), zap.String("resource_id", a.record.ResourceID), zap.String("first", a.record.First))
	return true
}

// attempt begins the first attempt, and returns the channel for its result.
func (a *arrival) attempt() chan result {
	q := a.q
	attempted := make(chan result, 1)
	q.running.Go(func() {
		if !a.waitForPlace() {
			f := store.Finish{ID: a.record.ID, Queue: q.name, Outcome: store.Unbegun}
			if a.record.Lease == 0 { // the last attempt before a refusal, which the database does not count
				f.Outcome = store.Later
			}
			q.db.writer.Finish(a.addition, f)
			attempted <- result{err: errors.New("no attempt could begin")}
			return
		}
		rec := &store.Record{ID: a.record.ID, Received: a.record.Received, Attempts: 1, EventType: a.record.EventType, ResourceID: a.record.ResourceID}
		res := q.attempt(a.h, a.request, rec)
		q.limits.Free(1)
		q.db.writer.Finish(a.addition, q.settle(a.h, rec, res, time.Since(a.record.Received)))
		attempted <- res
	})
	return attempted
}

// waitForPlace waits until the limit of parallel attempts allows this attempt, and returns true.
// It returns false at the deadline. After `patience`, it also returns false as soon as the event
// is stored, because the schedule attempts a stored event later.
func (a *arrival) waitForPlace() bool {
	if a.q.attempting.Err() == nil && time.Now().Before(a.deadline) && a.q.limits.TryTake() {
		return true
	}
	ctx, cancel := context.WithDeadline(a.q.attempting, a.deadline)
	defer cancel()
	defer time.AfterFunc(patience, func() {
		select {
		case <-a.addition.Done():
			if a.addition.Err() == nil {
				cancel()
			}
		case <-ctx.Done():
		}
	}).Stop()
	return a.q.limits.Take(ctx, 1) == 1
}

// store begins to store the event. It returns a channel that is closed when storing ends.
func (a *arrival) store() <-chan struct{} {
	a.q.db.writer.Add(a.addition)
	return a.addition.Done()
}

// encode returns the encoded request, or errFull if too many events are pending.
func (a *arrival) encode() ([]byte, error) {
	q := a.q
	if q.db.pending(q.name) < a.h.MaxEvents {
		return a.request.Encode()
	}
	q.db.outdated.Store(true) // other processes may have delivered some events
	if q.refusedLog.Allow() {
		a.h.logger.Error("cannot store events: max_events are pending", zap.String("queue", q.name), zap.Int("max_events", a.h.MaxEvents))
	}
	return nil, errFull
}
