package e2e

import "syscall"

// On Linux, a test's processes end with it, even if the test is killed.
func init() { sysProcAttr.Pdeathsig = syscall.SIGKILL }
