//go:build race

package e2e

// raceEnabled is true under go test -race. Then Caddy is built with the race detector too.
const raceEnabled = true
