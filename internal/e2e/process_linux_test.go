package e2e

import "syscall"

// On Linux, what a test has started ends with it even if it is killed.
func init() { sysProcAttr.Pdeathsig = syscall.SIGKILL }
