package operator

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Minute: "0 s", 59 * time.Second: "59 s", time.Minute: "1 min", time.Hour - 1: "59 min", 2*time.Hour + time.Minute: "2 h",
		48*time.Hour - 1: "47 h", 48 * time.Hour: "2 days",
	} {
		assert.Equal(t, want, Age(d))
	}
}
