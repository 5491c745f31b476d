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
	Down  time.Time     // the time since which the backend is down, zero if it is up
	Probe time.Duration // if the backend is down: the time until the next probe may begin
	Ramp  int           // limit of parallel attempts after an outage, 0 for no limit
}

func (b Backend) isDown() bool { return !b.Down.IsZero() }

// Allows reports whether new events get an attempt before they are stored. If not, the schedule
// attempts the newest events first. If it attempted the oldest event first, all probes could be
// attempts at the event that makes the backend hang.
func (b Backend) Allows() bool { return !b.isDown() && b.Ramp == 0 }

// Plan returns how many due events the schedule claims now. If this number is 0, Plan returns
// how long the schedule waits. The wait ends early when an event is stored or finished. The argument
// `limit` is the allowed number of attempts at old events. The argument `running` is how many of
// these attempts run now.
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
