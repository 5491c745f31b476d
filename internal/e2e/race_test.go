//go:build race

package e2e

// raceEnabled: under go test -race, Caddy is built and run with the race detector too.
const raceEnabled = true
