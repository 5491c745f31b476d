package queue

import (
	"maps"
	"net/http"
)

// maxAnswer is the size in bytes of the largest response body that the sender gets.
const maxAnswer = 1 << 20

// answer is the response writer of an attempt. It stores the backend's response.
type answer struct {
	header http.Header
	sent   http.Header // a copy of header, made when the status was written
	status int         // 0 if no status was written
	body   []byte      // up to maxAnswer, and one byte more if it is longer
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
		header.Del("Content-Length")
		a.body = nil // a part of the body would look complete
	}
	w.WriteHeader(a.status)
	if len(a.body) == 0 {
		return nil // over HTTP/2, even an empty Write after status 204 is an error
	}
	_, err := w.Write(a.body)
	return err
}
