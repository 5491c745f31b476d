// Package delivery decides when each event is attempted. It imports neither Caddy nor SQL.
package delivery

import "time"

const (
	// As in Postfix, the wait before the next attempt is about the age of the event, within
	// these bounds.
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute

	// jitter is the largest random addition, as a fraction of the wait.
	jitter = 0.2
)

// Backoff returns the wait before the next attempt at an event of this age. The argument
// `random` is a number between 0 and 1.
func Backoff(age time.Duration, random float64) time.Duration {
	wait := float64(min(max(age, minBackoff), maxBackoff))
	return time.Duration(wait * (1 + jitter*random))
}
