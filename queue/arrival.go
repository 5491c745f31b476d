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
)

const (
	// patience is how long an event waits for its first attempt before it is stored. If the
	// backend accepts the event in this time, the event is never written to the disk. If the
	// attempt fails, or there is none, the event is stored immediately.
	patience = 25 * time.Millisecond

	// storeWait is the timeout for storing an event, unless answer_after is longer.
	storeWait = 5 * time.Second

	// onceWait is the timeout for storing an event of a type in once before its first attempt.
	// After it, the attempt begins anyway: a double delivery is better than a lost event.
	onceWait = time.Second
)

// errNoPlace means that the maximum number of attempts is running.
var errNoPlace = errors.New("no attempt could begin")

// arrival is a new event with its waiting sender.
type arrival struct {
	q        *queue
	h        *Handler
	request  *request.Request
	record   *store.Record
	addition *writer.Addition
	began    time.Time
	deadline time.Time // for the response to the sender

	storing bool // store was called
}

func newArrival(q *queue, h *Handler, r *request.Request, record *store.Record) *arrival {
	a := &arrival{q: q, h: h, request: r, record: record, began: record.Received}
	a.deadline = a.began.Add(max(storeWait, time.Duration(*h.AnswerAfter)))
	a.addition = writer.NewAddition(record, r.Encode, a.deadline, func(err error) { q.noteStored(err, time.Since(a.began)) })
	return a
}

// answer delivers or stores the event, and answers its sender when one of them succeeds.
func (a *arrival) answer(w http.ResponseWriter, r *http.Request) error {
	answerAfter := time.Duration(*a.h.AnswerAfter)
	var attempted chan result // nil if no attempt is running
	if a.begins() && (a.record.Digest == nil || a.storeOnce()) {
		attempted = a.attempt()
		select {
		case first := <-attempted:
			if attempted = nil; first.err == nil {
				return first.answer.copyTo(w)
			}
		case <-time.After(min(patience, answerAfter)):
		}
	}
	stored, durable := false, a.store()
	impatient, patient := answerAfter == 0, time.After(time.Until(a.began.Add(answerAfter)))
	giveUp := time.After(time.Until(a.deadline))
	gone := r.Context().Done()
	for {
		switch {
		case stored && (impatient || attempted == nil):
			w.WriteHeader(http.StatusOK)
			return nil
		case !stored && durable == nil && attempted == nil:
			return refuse(w, errors.New("the event could not be stored, and the backend has not accepted it"))
		}
		select {
		case res := <-attempted:
			if attempted = nil; res.err == nil {
				return res.answer.copyTo(w)
			}
		case <-durable:
			stored, durable = a.isStored(), nil
		case <-patient:
			impatient = true
		case <-giveUp:
			if !stored {
				return refuse(w, errors.New("the event could not be stored in time"))
			}
		case <-gone: // the sender may have closed only its half of the connection: then it can still read the response
			gone, impatient = nil, true
		}
	}
}

// begins reports whether the first attempt begins now. A paused queue begins no attempts.
// While the backend is down, or is recovering and busy, an attempt begins only if events
// cannot be stored.
func (a *arrival) begins() bool {
	q := a.q
	if q.isPaused() || !q.db.writer.Failing() && !q.breaker.Backend().Allows(q.inFlightNow()) {
		return false
	}
	a.record.Attempts, a.record.Lease = 1, time.Duration(a.h.AttemptTimeout)+delivery.LeaseMargin
	return true
}

// storeOnce stores an event of a type in once before its first attempt, and reports whether
// the attempt may begin. A duplicate gets no attempt. If storing fails, the attempt begins.
func (a *arrival) storeOnce() bool {
	if !a.q.isFull(a.h) {
		select {
		case <-a.store():
			if err := a.addition.Err(); err == nil || errors.Is(err, writer.ErrDuplicate) {
				return err == nil
			}
		case <-time.After(onceWait):
		}
	}
	if a.q.onceLog.may() {
		a.h.logger.Warn("cannot store events before their first attempt: events of the types in once are attempted anyway, perhaps twice", zap.String("queue", a.q.name))
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
	storing := !q.db.writer.Failing()
	attempted := make(chan result, 1)
	q.running.Add(1)
	go func() {
		if !a.waitForPlace(storing) {
			defer q.running.Done()
			q.db.writer.Finish(a.addition, store.Finish{ID: a.record.ID, Queue: q.name, Outcome: store.Unbegun})
			attempted <- result{err: errNoPlace}
			return
		}
		rec := &store.Record{ID: a.record.ID, Received: a.record.Received, Attempts: 1, EventType: a.record.EventType, ResourceID: a.record.ResourceID}
		q.attempt(a.h, a.request, rec, func(res result) {
			defer q.running.Done()
			q.limits.Free(1)
			q.db.writer.Finish(a.addition, q.settle(a.h, rec, res, time.Since(a.began)))
			attempted <- res
		})
	}()
	return attempted
}

// waitForPlace waits until the attempt may begin. If the event can be stored, the wait is
// short, because the schedule can attempt the event later.
func (a *arrival) waitForPlace(storing bool) bool {
	wait := storeWait
	if storing {
		wait = patience
	}
	ctx, cancel := context.WithTimeout(a.q.attempting, wait)
	defer cancel()
	return a.q.limits.Take(ctx, 1) == 1
}

// store begins to store the event, or refuses it if too many events are pending. It returns
// a channel that is closed when storing ends.
func (a *arrival) store() <-chan struct{} {
	switch {
	case a.storing:
	case a.q.isFull(a.h):
		a.q.db.writer.Refuse(a.addition, errFull)
		a.q.warnFull(a.h)
	default:
		a.q.db.writer.Add(a.addition)
	}
	a.storing = true
	return a.addition.Done()
}
