// Package delivery decides which event is attempted when. It knows neither Caddy nor SQL.
package delivery

import "time"

const (
	// The wait before the next attempt is about the age of the event, as in Postfix, within
	// these bounds.
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute

	// jitter is the largest part that is added to a wait.
	jitter = 0.2
)

// Backoff returns the wait before the next attempt at an event of this age. random is
// between 0 and 1.
func Backoff(age time.Duration, random float64) time.Duration {
	wait := float64(min(max(age, minBackoff), maxBackoff))
	return time.Duration(wait * (1 + jitter*random))
}
