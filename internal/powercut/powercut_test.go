//go:build linux

package powercut
