package e2e

import "syscall"

// On Linux, the processes of a test end with the test, even if the test is killed.
func init() { sysProcAttr.Pdeathsig = syscall.SIGKILL }
