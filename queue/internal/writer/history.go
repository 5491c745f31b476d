package writer

import (
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// History is written with the next transaction, or after historyPause. A transaction has
	// at most maxHistory rows, so that no event waits for long. While the database fails,
	// memory keeps at most historyRoom rows, and further rows are lost.
	maxHistory   = 1000
	historyPause = time.Second
	historyRoom  = 100_000
)

// Remember writes a row of the history with a later transaction.
func (w *Writer) Remember(r *store.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.history) == 0 {
		time.AfterFunc(historyPause, w.poke)
	}
	if len(w.history) < historyRoom {
		w.history = append(w.history, r)
	}
}

// remembered reports whether all history is written.
func (w *Writer) remembered() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.history) == 0
}
