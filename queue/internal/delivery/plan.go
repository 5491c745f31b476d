package delivery

import (
	"cmp"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

// pollInterval is the longest delay until the schedule notices a due event that another
// process has stored or released.
const pollInterval = time.Second

// Backend is the state of the backend.
type Backend struct {
	Down  time.Time     // the time since which it is down, zero if it is up
	Probe time.Duration // if it is down: until the next probe may begin
	Ramp  int           // limit of parallel attempts after it was down, 0 for no limit
}

func (b Backend) isDown() bool { return !b.Down.IsZero() }

// Allows reports whether new events get an attempt before they are stored. If not, the newest
// events come first: an event that hangs the backend looks like an outage, and would be probed
// forever. New events are the least likely cause.
func (b Backend) Allows() bool { return !b.isDown() && b.Ramp == 0 }

// Plan decides how many due events to claim now, or how long to wait if it is none. The wait
// ends early when an event is stored or finished. The limit is for attempts at old events.
func Plan(b Backend, p store.Peek, limit, running int) (claim int, wait time.Duration) {
	switch {
	case b.isDown() && (b.Probe > 0 || running > 0):
		return 0, cmp.Or(b.Probe, pollInterval)
	case b.isDown():
		limit = 1
	case b.Ramp > 0:
		limit = min(limit, b.Ramp)
	}
	switch {
	case p.Empty, running >= limit:
		return 0, pollInterval
	case p.Wait > 0:
		return 0, min(p.Wait, pollInterval)
	}
	return limit - running, 0
}
