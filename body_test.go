package inkitwebhook

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReadBody(t *testing.T) {
	broken := errors.New("broken")
	const large = 300_000
	data := bytes.Repeat([]byte("0123456789abcdef"), large/16)
	for _, tt := range []struct {
		name   string
		r      io.Reader
		length int64
		max    int64
		want   int64
		err    error
	}{
		{"nothing, declared", bytes.NewReader(nil), 0, 10, 0, nil},
		{"nothing, undeclared", bytes.NewReader(nil), -1, 10, 0, nil},
		{"a short one, declared", bytes.NewReader(data[:85]), 85, 100, 85, nil},
		{"a short one, undeclared", bytes.NewReader(data[:85]), -1, 100, 85, nil},
		{"just max_size", bytes.NewReader(data[:100]), 100, 100, 100, nil},
		{"just max_size, undeclared", bytes.NewReader(data[:100]), -1, 100, 100, nil},
		{"as much as the first piece", bytes.NewReader(data[:firstPiece]), -1, large, firstPiece, nil},
		{"a large one, declared", bytes.NewReader(data), large, large, large, nil},
		{"a large one, undeclared", bytes.NewReader(data), -1, large, large, nil},
		{"one byte at a time", iotest.OneByteReader(bytes.NewReader(data[:5000])), -1, large, 5000, nil},
		{"the end together with the data", iotest.DataErrReader(bytes.NewReader(data[:5000])), 5000, large, 5000, nil},
		{"more than declared", bytes.NewReader(data[:5000]), 10, large, 5000, nil},
		{"less than declared", bytes.NewReader(data[:10]), 5000, large, 10, nil},

		{"one byte above max_size", bytes.NewReader(data[:101]), -1, 100, 101, errBodyTooLarge},
		{"far above max_size", bytes.NewReader(data), -1, 100, 101, errBodyTooLarge},
		{"above max_size in spite of what was declared", bytes.NewReader(data), 50, 100, 101, errBodyTooLarge},
		{"above a large max_size", bytes.NewReader(data), -1, large - 1, large, errBodyTooLarge},
		{"broken at the start", iotest.ErrReader(broken), 10, 100, 0, broken},
		{"broken later", io.MultiReader(bytes.NewReader(data[:5000]), iotest.ErrReader(broken)), -1, large, 5000, broken},
		{"cut short", io.MultiReader(bytes.NewReader(data[:50]), iotest.ErrReader(io.ErrUnexpectedEOF)), 80, 100, 50, io.ErrUnexpectedEOF},
		{
			"cut short together with data",
			iotest.DataErrReader(io.MultiReader(bytes.NewReader(data[:50]), iotest.ErrReader(io.ErrUnexpectedEOF))),
			80, 100, 50, io.ErrUnexpectedEOF,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b body
			n, err := b.readFrom(tt.r, tt.length, tt.max)
			require.Equal(t, tt.err, err)
			assert.Equal(t, tt.want, n)
			assert.True(t, bytes.Equal(data[:n], bytes.Join(b, nil)), "the bytes differ")
		})
	}
}

// Memory is paid for what arrived: at no time does a body hold more than twice
// that, plus the first piece, whatever was declared.
func TestReadBodyPaysForWhatArrived(t *testing.T) {
	const declared = 64 << 20
	for _, arrived := range []int{0, 1, 64, firstPiece, firstPiece + 1, 100_000, 1 << 20} {
		var b body
		r := io.MultiReader(bytes.NewReader(make([]byte, arrived)), iotest.ErrReader(io.ErrUnexpectedEOF))
		_, err := b.readFrom(r, declared, declared)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		room := 0
		for _, piece := range b {
			room += cap(piece)
		}
		assert.LessOrEqual(t, room, 2*arrived+firstPiece+1, "%d bytes arrived", arrived)
	}
}

func TestBodyReader(t *testing.T) {
	b := body{[]byte("abc"), nil, []byte("defgh"), []byte{}}
	require.NoError(t, iotest.TestReader(&bodyReader{rest: b}, []byte("abcdefgh")))
	require.NoError(t, iotest.TestReader(&bodyReader{}, nil))

	t.Run("two read at the same time, each from the start", func(t *testing.T) {
		one, two := &bodyReader{rest: b}, &bodyReader{rest: b}
		head := make([]byte, 4)
		_, err := io.ReadFull(one, head)
		require.NoError(t, err)
		all, err := io.ReadAll(two)
		require.NoError(t, err)
		assert.Equal(t, "abcdefgh", string(all))
		rest, err := io.ReadAll(one)
		require.NoError(t, err)
		assert.Equal(t, "abcdefgh", string(head)+string(rest))
	})
	t.Run("closing it does not end it", func(t *testing.T) {
		r := &bodyReader{rest: b}
		require.NoError(t, r.Close())
		all, err := io.ReadAll(r)
		require.NoError(t, err)
		assert.Equal(t, "abcdefgh", string(all))
	})
	t.Run("the body is as it was", func(t *testing.T) {
		assert.Equal(t, "abcdefgh", string(bytes.Join(b, nil)))
	})
}

func FuzzBody(f *testing.F) {
	f.Add([]byte("abc"), int64(3), int64(10), 2)
	f.Add([]byte(strings.Repeat("x", 5000)), int64(-1), int64(4096), 100)
	f.Fuzz(func(t *testing.T, data []byte, length, maxSize int64, step int) {
		if length < -1 || maxSize < 0 || step < 1 {
			return // that cannot be
		}
		var b body
		n, err := b.readFrom(&stepReader{data, step}, length, maxSize)
		if int64(len(data)) > maxSize {
			require.Equal(t, errBodyTooLarge, err)
			return
		}
		require.NoError(t, err)
		require.EqualValues(t, len(data), n)
		require.True(t, bytes.Equal(data, bytes.Join(b, nil)))
		got, err := io.ReadAll(&bodyReader{rest: b})
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	})
}

// stepReader yields at most step bytes a Read.
type stepReader struct {
	data []byte
	step int
}

func (r *stepReader) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.data[:min(r.step, len(r.data))])
	r.data = r.data[n:]
	return n, nil
}
