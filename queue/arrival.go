package queue

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"
)

const (
	// patience is the time for the backend to answer before the event is stored. An event
	// that it accepts in this time is never written to the disk. No sender is answered during
	// this time. If the attempt fails, or there is none, the event is stored immediately.
	patience = 25 * time.Millisecond

	// storeWait is how long a sender waits, at least, until its event is on the disk.
	storeWait = 5 * time.Second

	// onceWait is how long an event of a type in once waits to be stored. Then its first
	// attempt begins anyway: a double is better than a loss.
	onceWait = time.Second
)

// errNoPlace means that the maximum number of attempts is running.
var errNoPlace = errors.New("no attempt could begin")

// arrival is a new event whose sender waits.
type arrival struct {
	q       *queue
	h       *Handler
	request *request.Request
	record  *store.Record
	began   time.Time

	refused   bool // too many events are pending
	duplicate bool // it is logged as a duplicate

	mu       sync.Mutex
	addition *writer.Addition // once it is being stored
	finish   *store.Finish    // once the attempt has ended
}

// answer delivers or stores the event, and answers its sender when one of both is done.
func (a *arrival) answer(w http.ResponseWriter, r *http.Request) error {
	answerAfter := time.Duration(*a.h.AnswerAfter)
	deadline := a.began.Add(max(storeWait, answerAfter))
	begins := a.begins()
	stored := a.record.Digest != nil && a.storeOnce(deadline)
	if a.isDuplicate() {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	var attempted chan result
	if begins {
		if a.record.Digest != nil && !stored {
			a.q.warnOnce(a.h)
		}
		attempted = a.attempt()
	}
	waiting := begins // for the attempt
	if waiting {
		var first result
		select {
		case first = <-attempted:
			waiting = false
		case <-time.After(min(patience, answerAfter)):
		}
		if !waiting && first.err == nil {
			if a.addition == nil {
				a.q.metrics.stored[resultDelivered].Inc()
			}
			return first.answer.copyTo(w)
		}
	}
	if !waiting {
		attempted = nil
	}
	return a.answerKept(w, r, attempted, stored, deadline)
}

// answerKept answers the sender when the event is delivered or stored, if the backend did
// not accept it at once. attempted is nil if no attempt is running.
func (a *arrival) answerKept(w http.ResponseWriter, r *http.Request, attempted chan result, stored bool, deadline time.Time) error {
	var durable <-chan struct{}
	if !stored {
		durable = a.store(deadline)
	}
	answerAfter := time.Duration(*a.h.AnswerAfter)
	patient := time.After(time.Until(a.began.Add(answerAfter)))
	giveUp := time.After(time.Until(deadline))
	gone := r.Context().Done()
	impatient := answerAfter == 0
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
			stored, durable = a.addition.Err() == nil || a.isDuplicate(), nil
		case <-patient:
			impatient = true
		case <-giveUp:
			if !stored {
				return refuse(w, errors.New("the event could not be stored in time"))
			}
		case <-gone: // the sender may have closed only its half of the connection: the answer must be true
			gone, impatient = nil, true
		}
	}
}

// begins reports whether the first attempt begins now. It does not if the queue is paused.
// If the backend is down, or has just returned and is busy, it begins only while events
// cannot be stored.
func (a *arrival) begins() bool {
	q := a.q
	if q.isPaused() || !q.db.writer.Failing() && !q.breaker.Allows(q.inFlightNow()) {
		return false
	}
	a.record.Attempts, a.record.Lease = 1, time.Duration(a.h.AttemptTimeout)+delivery.LeaseMargin
	return true
}

// storeOnce stores an event of a type in once before its first attempt, and reports whether
// that succeeded.
func (a *arrival) storeOnce(deadline time.Time) bool {
	durable := a.store(deadline)
	if durable == nil {
		return false
	}
	timer := time.NewTimer(onceWait)
	defer timer.Stop()
	select {
	case <-durable:
		return a.addition.Err() == nil || a.isDuplicate()
	case <-timer.C:
		return false
	}
}

// isDuplicate reports whether an event of a type in once was stored before, and logs it.
func (a *arrival) isDuplicate() bool {
	if a.addition == nil {
		return false
	}
	select {
	case <-a.addition.Done():
	default:
		return false
	}
	if !errors.Is(a.addition.Err(), writer.ErrDuplicate) {
		return false
	}
	if !a.duplicate {
		a.duplicate = true
		a.h.logger.Info("an event came again, and is not delivered twice", zap.String("queue", a.q.name),
			zap.String("event_type", a.record.EventType), zap.String("resource_id", a.record.ResourceID), zap.String("first", a.record.First))
	}
	return true
}

// attempt begins the first attempt, and returns the channel for its result.
func (a *arrival) attempt() chan result {
	q := a.q
	storing := !q.db.writer.Failing()
	attempted := make(chan result, 1)
	placed := q.limits.TryNew()
	q.running.Add(1)
	go func() {
		if !placed && !a.waitForPlace(storing) {
			defer q.running.Done()
			a.end(store.Finish{ID: a.record.ID, Queue: q.name, Outcome: store.Unbegun})
			attempted <- result{err: errNoPlace}
			return
		}
		rec := &store.Record{ID: a.record.ID, Received: a.record.Received, Attempts: 1, EventType: a.record.EventType, ResourceID: a.record.ResourceID}
		q.attempt(a.h, a.request, rec, func(res result) {
			defer q.running.Done()
			q.limits.EndNew()
			a.end(q.settle(a.h, rec, res, time.Since(a.began)))
			attempted <- res
		})
	}()
	return attempted
}

// waitForPlace waits until the attempt may begin. If the event can be stored, the wait is
// short: the schedule attempts it later.
func (a *arrival) waitForPlace(storing bool) bool {
	wait := storeWait
	if storing {
		wait = patience
	}
	ctx, cancel := context.WithTimeout(a.q.attempting, wait)
	defer cancel()
	return a.q.limits.New(ctx)
}

// end records the result of the attempt.
func (a *arrival) end(f store.Finish) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finish = &f
	if a.addition != nil {
		a.q.db.writer.Finish(a.addition, f)
	}
}

// store begins to store the event, and returns a channel that is closed when this ends. It
// returns nil if the event is not stored: too many are pending, or the backend has just
// accepted it.
func (a *arrival) store(deadline time.Time) <-chan struct{} {
	if a.addition == nil && a.q.db.pending(a.q.name) >= a.h.MaxEvents {
		if !a.refused {
			a.refused = true
			a.q.refused(a.h)
		}
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.addition != nil { // before the attempt
		return a.addition.Done()
	}
	if f := a.finish; f != nil {
		if f.Outcome == store.Delivered {
			return nil
		}
		if f.Outcome == store.Unbegun {
			a.record.Attempts = 0
		}
		a.record.Lease, a.record.Delay, a.record.LastError = 0, f.After, f.LastError
	}
	a.addition = a.q.db.writer.Add(a.record, a.request.Encode, deadline, func(err error) { a.q.noteStored(err, time.Since(a.began)) })
	return a.addition.Done()
}
