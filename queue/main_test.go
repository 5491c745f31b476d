package queue_test

import (
	"flag"
	"fmt"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	// Tests in parallel wait for what hangs, so there may be more of them than there
	// are processors. -parallel on the command line has the last word.
	if err := flag.Set("test.parallel", "24"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	flag.Parse()
	m.Run()
}
