// Package delivery decides which event is attempted when. It knows neither Caddy nor SQL.
package delivery

import "time"

const (
	// An event is attempted again after about as long as it has waited so far, as Postfix
	// does it, within these bounds.
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute

	// jitter is by how much a wait is longer at most, as a part of it.
	jitter = 0.2
)

// Backoff returns how long an event of that age waits for its next attempt. random is
// between 0 and 1.
func Backoff(age time.Duration, random float64) time.Duration {
	wait := float64(min(max(age, minBackoff), maxBackoff))
	return time.Duration(wait * (1 + jitter*random))
}
