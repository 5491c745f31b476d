package inkitwebhook

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// This file reads the body of a request, and prepares it for the next handler.

const (
	firstRead   = 4 << 10         // bytes of memory for a body before its first byte arrives
	maxDiscard  = 1 << 20         // maximum bytes of a rejected body to read and discard
	discardTime = 5 * time.Second // time limit for discarding
)

var (
	errBodyTooLarge   = errors.New("body is larger than max_size")
	errBodyTimeout    = errors.New("body did not arrive in time")
	errBodyUnreadable = errors.New("body did not arrive whole")
)

// readBody reads r to its end. If r fails, or has more than `max` bytes, or has fewer than `length`
// bytes, readBody returns the bytes that arrived, and an error of the table rejections. If the
// length is unknown, `length` is -1.
//
// The memory for a body grows with the bytes that arrive, not with the announced length. It is at
// most firstRead or four times the body, whichever is larger. No other request reuses this memory,
// because the Transport of reverse_proxy may still read the body after the handler has returned.
func readBody(r io.Reader, length, max int64) (body []byte, err error) {
	if r == nil {
		return nil, nil
	}
	for size := int64(firstRead); ; size *= 4 {
		// one byte more than the length: the Read that returns EOF needs free space
		if int64(len(body)) <= length && length <= size {
			size = length + 1
		}
		if max < size {
			size = max + 1
		}
		body = append(make([]byte, 0, size), body...)
		for len(body) < cap(body) {
			n, err := r.Read(body[len(body):cap(body)])
			body = body[:len(body)+n]
			switch {
			case int64(len(body)) > max:
				return body, errBodyTooLarge
			case err == io.EOF && int64(len(body)) < length: // an earlier handler turned the error into io.EOF
				return body, readError(io.ErrUnexpectedEOF)
			case err == io.EOF:
				return body, nil
			case err != nil:
				return body, readError(err)
			}
		}
	}
}

// readError wraps a read error in the matching error of the table rejections. The read error
// may come from another handler. For example, request_body has its own limit for a body.
func readError(err error) error {
	reason := errBodyUnreadable
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		reason = errBodyTooLarge
	} else if netErr, ok := errors.AsType[net.Error](err); ok && netErr.Timeout() {
		reason = errBodyTimeout
	}
	return fmt.Errorf("%w: %w", reason, err)
}

// endBody closes a rejected body, so that no handler with a copy of the request can read it. If
// `discard` is true, endBody first reads and discards the rest of the body. If the rest is unread,
// a reset of the connection hides the answer from a client that is still sending, and a proxy in
// front believes that the site is down. endBody reports whether it has read the body to its end.
func endBody(w http.ResponseWriter, r *http.Request, discard bool) (all bool) {
	if r.Body == nil || r.Body == http.NoBody {
		return true
	}
	now, controller := time.Now(), http.NewResponseController(w)
	end := now
	if discard && r.Header["Expect"] == nil { // with Expect, the client waits before it sends the body
		end = now.Add(discardTime)
	}
	if controller.SetReadDeadline(end) != nil {
		return false
	}
	defer func() { _ = controller.SetReadDeadline(time.Time{}) }()
	buffer := make([]byte, firstRead)
	for total := 0; total < maxDiscard && time.Now().Before(end); {
		n, err := r.Body.Read(buffer)
		if total += n; err != nil {
			all, end = err == io.EOF, now
		}
	}
	if !all {
		_ = controller.SetReadDeadline(now) // otherwise Close would wait for more bytes
	}
	r.Body.Close()
	return all
}

// setBody removes the body and the trailers. With trailers, a proxy would send chunks. setBody also
// sets the length of the body that attachBody may attach later: FastCGI backends need the length.
func setBody(r *http.Request, length int) {
	r.Body, r.GetBody = http.NoBody, nil
	r.ContentLength, r.TransferEncoding, r.Trailer = int64(length), nil, nil
	text := strconv.Itoa(length)
	if lines := r.Header["Content-Length"]; len(lines) != 1 || lines[0] != text {
		r.Header["Content-Length"] = []string{text}
	}
}

// removeControls removes header fields that could control the next handlers. With Connection,
// a proxy would drop our fields. With Upgrade, or the :protocol of HTTP/2 and HTTP/3, a proxy
// would open a tunnel. With Incremental, a proxy could not buffer the body. The sender's
// idempotency key could be the key of another event.
func removeControls(r *http.Request) {
	if !strings.HasPrefix(r.Proto, "HTTP/") { // a CONNECT in HTTP/3 has its :protocol here, and error routes would see it
		r.Proto = fmt.Sprintf("HTTP/%d.%d", r.ProtoMajor, r.ProtoMinor)
	}
	for field := range r.Header {
		switch field {
		case "Connection", "Upgrade", "Expect", "Te", "Keep-Alive", "Proxy-Connection", "Incremental", ":protocol",
			idempotencyKeyField, "X-Idempotency-Key":
			delete(r.Header, field)
		}
	}
}

// bodyReader reads the bytes of a body.
type bodyReader struct{ bytes.Reader }

func (*bodyReader) Close() error { return nil }

// attachBody makes `reader` the body of the request. It also sets GetBody, with which net/http's
// Transport can send the body again.
func (d *delivery) attachBody(r *http.Request, reader *bodyReader) {
	reader.Reset(d.event.Body)
	r.Body = reader
	r.GetBody = func() (io.ReadCloser, error) {
		if r.Body != reader {
			return nil, errors.New("the body was replaced after it was verified")
		}
		return &bodyReader{*bytes.NewReader(d.event.Body)}, nil
	}
}
