package delivery

import "time"

// pollInterval is the longest delay until the schedule notices a due event that another
// process has stored or released.
const pollInterval = time.Second

// Look is the state of a queue, from which Plan decides.
type Look struct {
	Failed  bool          // the query of the database failed
	Empty   bool          // no event is pending
	Wait    time.Duration // until the next event is due
	Down    bool          // the backend is down
	Probe   time.Duration // until the next probe of the backend may begin
	Ramp    int           // limit of parallel attempts after the backend was down, 0 for no limit
	Limit   int           // limit of parallel attempts at old events
	Running int           // running attempts at old events
}

// Step is the next step of the schedule: claim events, or wait if Claim is 0.
type Step struct {
	Claim int

	// Newest is for a backend that is or was down. An event that hangs the backend looks like
	// an outage, and would be probed forever. New events are the least likely cause.
	Newest bool

	Wait time.Duration // ends early when an event is stored or finished
}

// Plan decides how many events to claim now, or how long to wait.
func Plan(l Look) Step {
	limit := l.Limit
	switch {
	case l.Down:
		limit = 1
	case l.Ramp > 0:
		limit = min(limit, l.Ramp)
	}
	switch {
	case l.Failed, l.Empty, l.Running >= limit:
		return Step{Wait: pollInterval}
	case l.Wait > 0:
		return Step{Wait: min(l.Wait, pollInterval)}
	case l.Down && l.Probe > 0:
		return Step{Wait: min(l.Probe, pollInterval)}
	}
	return Step{Claim: limit - l.Running, Newest: l.Down || l.Ramp > 0}
}
