package queue

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/delivery"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/writer"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// patience is how long the backend has for an event before the event is stored. An event
	// that the backend takes within it never goes to the disk. No sender is answered during
	// this time. If the attempt fails, or there is none, the event is stored immediately.
	patience = 25 * time.Millisecond

	// storeWait is how long a sender waits at least for its event to be on the disk.
	storeWait = 5 * time.Second
)

// errNoPlace means that as many attempts as may be are under way.
var errNoPlace = errors.New("no attempt could begin")

// arrival is a new event whose sender waits.
type arrival struct {
	q       *queue
	h       *Handler
	request *request
	record  *store.Record
	began   time.Time

	mu       sync.Mutex
	addition *writer.Addition // once it is being stored
	finish   *store.Finish    // once the attempt has ended
}

// answer delivers or stores the event, and answers its sender as soon as one of both is
// done.
func (a *arrival) answer(w http.ResponseWriter, r *http.Request) error {
	attempted := a.attempt()
	answerAfter := time.Duration(*a.h.AnswerAfter)
	var first result
	waiting := attempted != nil // for the attempt
	if waiting {
		select {
		case first = <-attempted:
			waiting = false
		case <-time.After(min(patience, answerAfter)):
		}
		if !waiting && first.err == nil {
			a.q.metrics.stored[resultDelivered].Inc()
			return first.answer.copyTo(w)
		}
	}
	deadline := a.began.Add(max(storeWait, answerAfter))
	durable := a.store(deadline)
	patient := time.After(time.Until(a.began.Add(answerAfter)))
	giveUp := time.After(time.Until(deadline))
	gone := r.Context().Done()
	stored, impatient := false, answerAfter == 0
	for {
		switch {
		case stored && (impatient || !waiting):
			w.WriteHeader(http.StatusOK)
			return nil
		case !stored && durable == nil && !waiting:
			return refuse(w, errors.New("the event could not be stored, and the backend has not taken it"))
		}
		select {
		case res := <-attempted:
			if waiting = false; res.err == nil {
				return res.answer.copyTo(w)
			}
			attempted = nil
		case <-durable:
			stored, durable = a.addition.Err() == nil, nil
		case <-patient:
			impatient = true
		case <-giveUp:
			if !stored {
				return refuse(w, errors.New("the event could not be stored in time"))
			}
		case <-gone: // or it has ended its side of the connection, and waits: the answer must be true
			gone, impatient = nil, true
		}
	}
}

// attempt begins the first attempt, and returns where its result comes. It returns nil if
// there is none, since the backend is down, or was and has enough to do. While events
// cannot be stored there always is one.
func (a *arrival) attempt() chan result {
	q := a.q
	storing := !q.db.writer.Failing()
	if storing && !q.breaker.Allows(q.inFlightNow()) {
		return nil
	}
	attempted := make(chan result, 1)
	a.record.Attempts, a.record.Lease = 1, time.Duration(a.h.AttemptTimeout)+delivery.LeaseMargin
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

// waitForPlace waits until the attempt may begin. An event that can be stored does not wait
// long: its turn comes as an old one.
func (a *arrival) waitForPlace(storing bool) bool {
	wait := storeWait
	if storing {
		wait = patience
	}
	ctx, cancel := context.WithTimeout(a.q.attempting, wait)
	defer cancel()
	return a.q.limits.New(ctx)
}

// end notes how the attempt ended.
func (a *arrival) end(f store.Finish) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finish = &f
	if a.addition != nil {
		a.q.db.writer.Finish(a.addition, f)
	}
}

// store begins to store the event, and returns the channel that is closed when that has
// ended. It returns nil if the event is not stored, because too many are or because the
// backend has taken it at this moment.
func (a *arrival) store(deadline time.Time) <-chan struct{} {
	if a.q.db.pending(a.q.name) >= a.h.MaxEvents {
		a.q.refused(a.h)
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if f := a.finish; f != nil {
		if f.Outcome == store.Delivered {
			return nil
		}
		if f.Outcome == store.Unbegun {
			a.record.Attempts = 0
		}
		a.record.Lease, a.record.Delay, a.record.LastError = 0, f.After, f.LastError
	}
	a.addition = a.q.db.writer.Add(a.record, a.request.encode, deadline, func(err error) { a.q.noteStored(err, time.Since(a.began)) })
	return a.addition.Done()
}
