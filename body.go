package inkitwebhook

import (
	"errors"
	"io"
)

// errBodyTooLarge says that a body has more bytes than max_size.
var errBodyTooLarge = errors.New("body is larger than max_size")

// Sizes of pieces, in bytes. The first is the room that a body of unknown length,
// or of more than that, gets before any of it has arrived. The largest is what Go
// allocates from a size class: it clears anything above in a way that leaves it
// cold in the cache, which costs as much again as reading and hashing it.
const (
	firstPiece   = 4 << 10
	largestPiece = 32 << 10
)

// body holds the bytes of a request body, in pieces that are never written to
// again. The reason for pieces is that memory is to be paid for what arrived
// and not for what was promised: every piece is at most as large as all those
// before it together, and nothing is copied when a body outgrows its room.
//
// Pieces are left to the garbage collector and not pooled: the Transport behind
// reverse_proxy may still be reading them after the handler has returned.
type body [][]byte

// readFrom appends to b what r yields up to its end; a nil r has ended. A length
// of -1 says that nobody knows how much that is, any other is taken as a hint. If
// it is more than max bytes, the error is errBodyTooLarge; any other error is r's
// own. In either case read says how many bytes did arrive.
func (b *body) readFrom(r io.Reader, length, max int64) (read int64, err error) {
	if r == nil {
		return 0, nil
	}
	for {
		// one byte more than the length, since only a further Read says EOF
		size := firstPiece
		if read > 0 {
			size = int(min(read, largestPiece))
		}
		if rest := length - read; rest >= 0 && rest < int64(size) {
			size = int(rest) + 1
		}
		if rest := max - read; rest < int64(size) {
			size = int(rest) + 1
		}
		piece := make([]byte, size)
		n, err := readFull(r, piece)
		read += int64(n)
		*b = append(*b, piece[:n])
		switch {
		case read > max:
			return read, errBodyTooLarge
		case err == io.EOF:
			return read, nil
		case err != nil:
			return read, err
		}
	}
}

// readFull reads until p is full or r fails. Other than io.ReadFull, it hands on
// the error as it is: a body that was cut short fails with io.ErrUnexpectedEOF,
// and that must not look like one that ended in the middle of p.
func readFull(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// bodyReader reads a body from its start. Any number of them may read the same
// body at the same time.
type bodyReader struct {
	rest  body   // the pieces not begun
	piece []byte // what is left of the one begun
}

func (r *bodyReader) Read(p []byte) (n int, err error) {
	for len(r.piece) == 0 {
		if len(r.rest) == 0 {
			return 0, io.EOF
		}
		r.piece, r.rest = r.rest[0], r.rest[1:]
	}
	n = copy(p, r.piece)
	r.piece = r.piece[n:]
	return n, nil
}

// Close does nothing: there is nothing to release.
func (r *bodyReader) Close() error { return nil }

// Interface guard
var _ io.ReadCloser = (*bodyReader)(nil)
