package queue

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

const (
	// maxRetryAfter is the longest wait that a backend can ask for.
	maxRetryAfter = time.Hour

	// endMargin is how long handlers may go on after attempt_timeout. Some handlers ignore
	// attempt_timeout: php_fastcgi waits for its own read_timeout, which may be infinite.
	endMargin = time.Second

	// maxOverdue is how many attempts may go on after endMargin at the same time. There is a
	// limit, because each of these attempts uses a connection.
	maxOverdue = 256

	// maxError is how many bytes of the last error are stored with an event.
	maxError = 300

	// maxAnswer is the size in bytes of the largest response body that the sender gets.
	maxAnswer = 1 << 20
)

// result is the result of an attempt.
type result struct {
	answer      *answer
	status      int
	err         error         // nil if the backend accepted the event
	unreachable bool          // err is a sign that the backend is down
	retryAfter  time.Duration // from the Retry-After field
}

// attempt makes one attempt at an event, and returns the result when the handlers return. If they
// are still running endMargin after attempt_timeout, the result is an error. If an earlier attempt
// at the event is still running, or too many attempts are overdue, the result is an error too,
// and no handler is called.
func (q *queue) attempt(h *Handler, r *request.Request, rec *store.Record) (res result) {
	tooMany := false
	q.locked(func() { tooMany = q.overdue[rec.ID] || len(q.overdue) >= maxOverdue })
	if tooMany {
		return result{err: errors.New("an earlier attempt has not ended yet"), unreachable: true}
	}
	began, timeout := time.Now(), time.Duration(h.AttemptTimeout)
	ctx, cancel := context.WithTimeout(q.attempting, timeout)
	defer cancel()
	ended := make(chan result, 1)
	go func() {
		answer := newAnswer()
		err := q.run(h, prepare(ctx, r, h.server, answer, rec), answer, rec.ID)
		ended <- newResult(answer, err, ctx.Err() == context.DeadlineExceeded, timeout)
	}()
	select {
	case res = <-ended:
	case <-ctx.Done(): // the timeout has passed, or Caddy stops
		select {
		case res = <-ended:
		case <-time.After(endMargin):
			h.logger.Warn("an attempt goes on after attempt_timeout: set a timeout in its handler, such as read_timeout in php_fastcgi", zap.String("id", rec.ID))
			q.locked(func() { q.overdue[rec.ID] = true })
			go func() {
				<-ended
				q.locked(func() { delete(q.overdue, rec.ID) })
			}()
			res = result{err: fmt.Errorf("no answer within %v", timeout), unreachable: true}
		}
	}
	h.logger.Debug("attempt", zap.String("id", rec.ID), zap.String("event_type", rec.EventType), zap.String("resource_id", rec.ResourceID),
		zap.Int("attempt", rec.Attempts), zap.Int("status", res.status), zap.Duration("duration", time.Since(began)), zap.Error(res.err))
	return res
}

func (q *queue) locked(f func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f()
}

// run runs the handlers of the deliver block, and returns their error. A panic is an error
// too, and so is an event that no handler takes.
func (q *queue) run(h *Handler, req *http.Request, answer *answer, id string) (err error) {
	// reverse_proxy panics on an incomplete response, and here no net/http server recovers
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			err = errors.New("the backend's answer was cut short, or the directive abort ended the attempt")
		default:
			h.logger.Error("a handler panicked while an event was delivered", zap.String("id", id), zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			err = errors.New("a handler panicked")
		}
	}()
	unhandled := false
	next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		unhandled = answer.status == 0
		return nil
	})
	if err = h.Routes.Compile(next).ServeHTTP(answer, req); err == nil && unhandled { // even if a handler such as templates then writes a status
		err = errors.New("no directive of the deliver block handled the event")
	}
	return err
}

// newResult turns the response or the error of the handlers into a result. The event is
// delivered only if the status is 2xx.
func newResult(answer *answer, err error, timeUp bool, timeout time.Duration) result {
	res := result{answer: answer, status: answer.status}
	handlerErr, ok := errors.AsType[caddyhttp.HandlerError](err)
	if ok && res.status == 0 {
		res.status = handlerErr.StatusCode
	}
	switch {
	case timeUp && (err != nil || answer.status/100 != 2):
		res.err, res.unreachable = fmt.Errorf("no answer within %v", timeout), true
	case ok && handlerErr.Err == nil:
		res.err = fmt.Errorf("status %d", handlerErr.StatusCode)
	case ok: // without the id and trace that Caddy adds
		res.err = fmt.Errorf("status %d: %w", handlerErr.StatusCode, handlerErr.Err)
	case err != nil:
		res.err = err
	case answer.status == 0:
		res.err = errors.New("the backend gave no status")
	case answer.status/100 != 2:
		res.err = fmt.Errorf("status %d", answer.status)
	default:
		return res
	}
	switch res.status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusTooManyRequests:
		res.unreachable = true
	}
	res.retryAfter = retryAfter(answer.header.Get("Retry-After"), time.Now())
	return res
}

// retryAfter returns the wait that a Retry-After field asks for (RFC 9110, 10.2.3).
func retryAfter(value string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(value, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(seconds, uint64(maxRetryAfter/time.Second))) * time.Second
	}
	if date, err := http.ParseTime(value); err == nil {
		return min(max(0, date.Sub(now)), maxRetryAfter)
	}
	return 0
}

// lastError returns the text that the queue stores for an error: one line without control
// characters.
func lastError(err error) string {
	text := request.Printable(err.Error())
	if len(text) > maxError {
		text = strings.ToValidUTF8(text[:maxError], "") + "..."
	}
	return text
}

// answer is the response writer of an attempt. It stores the backend's response.
type answer struct {
	header http.Header
	sent   http.Header // a copy of header, made when the status was written
	status int         // 0 if no status was written
	body   []byte      // at most maxAnswer bytes, and one more if the backend's body is longer
}

func newAnswer() *answer { return &answer{header: make(http.Header)} }

func (a *answer) Header() http.Header { return a.header }

func (a *answer) WriteHeader(status int) {
	if a.status == 0 && status >= 200 {
		a.status, a.sent = status, a.header.Clone()
	}
}

func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body = append(a.body, p[:min(len(p), maxAnswer+1-len(a.body))]...)
	return len(p), nil
}

// Flush does nothing. Handlers that stream need the method.
func (a *answer) Flush() {}

// copyTo sends the backend's response to the sender.
func (a *answer) copyTo(w http.ResponseWriter) error {
	header := w.Header()
	maps.Copy(header, a.sent)
	header.Del("Trailer") // the trailers are not stored
	if len(a.body) > maxAnswer {
		a.body = nil // a part of the body would look complete
	}
	if header.Get("Content-Length") != strconv.Itoa(len(a.body)) { // handle_response can answer with another body
		header.Del("Content-Length")
	}
	w.WriteHeader(a.status)
	if len(a.body) == 0 {
		return nil // over HTTP/2, even an empty Write after status 204 is an error
	}
	_, err := w.Write(a.body)
	return err
}
