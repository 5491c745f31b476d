package delivery

import "time"

// pollInterval is how long an event may be due that another process has stored or given
// back.
const pollInterval = time.Second

// Look is what is known when the schedule decides.
type Look struct {
	Failed  bool          // the database could not be asked
	Empty   bool          // no event is pending
	Wait    time.Duration // until the next one is due
	Down    bool          // the backend is down
	Probe   time.Duration // until the next probe of it may begin
	Ramp    int           // how many attempts there may be at a time since it is back, 0 for no limit
	Limit   int           // how many attempts at old events there may be at a time
	Running int           // how many there are
}

// Step is what the schedule does next: claim events, if Claim is not 0, and otherwise wait.
type Step struct {
	Claim int

	// Newest is for a backend that is or was down: an event that makes it hang looks like a
	// dead backend and would be probed forever. New events are the least likely cause.
	Newest bool

	Wait time.Duration // an event that is stored or finished meanwhile ends it
}

// Plan decides how many events are claimed now, or how long to wait.
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
