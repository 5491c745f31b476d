// Command bench measures the cost of verifying Inkit's webhooks in Caddy with this
// module and, in the same run, in other programs: nginx with njs, HAProxy with its hmac
// converter, the program webhook, and the Flask listener of Inkit's documentation. It
// measures each program with and without verification, on the loopback interface, with
// the same signed events, and where possible with the same backend. It prints the tables
// of docs/performance.md:
//
//	go run -C bench .
//	go run -C bench . -queue
//
// The second command compares Caddy with and without the queue. With -beside, it also
// measures other binaries of Caddy, such as the binary of an older commit. With -dsn, the
// queue is in PostgreSQL.
//
// The command builds cmd/caddy, installs nothing, and prints the missing programs. Debian
// has them in the packages nginx-light, libnginx-mod-http-js, haproxy, webhook, gunicorn
// and python3-flask.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

func main() {
	rounds := flag.Int("rounds", 5, "how many times to measure each row; 0 only checks that each row verifies as it should")
	each := flag.Duration("time", 2*time.Second, "how long to measure a row in each round, once for each of the two loads")
	queue := flag.Bool("queue", false, "measure the queue instead of the verification")
	beside := flag.String("beside", "", "other binaries of Caddy to measure too, with -queue; separated by commas")
	dsn := flag.String("dsn", "", "the connection string of a PostgreSQL for the queue; SQLite if left out")
	flag.Parse()
	caddys := strings.FieldsFunc(*beside, func(r rune) bool { return r == ',' })
	if err := run(*rounds, *each, *queue, caddys, *dsn); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(rounds int, each time.Duration, queue bool, beside []string, dsn string) error {
	if missing := missing(); len(missing) > 0 && !queue {
		return fmt.Errorf("missing: %s", strings.Join(missing, ", "))
	}
	if err := raiseFileLimit(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "inkit-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	caddy := filepath.Join(dir, "caddy")
	build := exec.Command("go", "build", "-o", caddy, "./cmd/caddy")
	build.Dir = ".." // bench is a separate module; cmd/caddy is in the main module
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building cmd/caddy: %w: %s", err, out)
	}
	backend, err := startBackend()
	if err != nil {
		return err
	}

	if rounds == 0 {
		each = 100 * time.Millisecond
	}
	if queue || rounds == 0 {
		if err := measureQueue(dir, append([]string{caddy}, beside...), backend, dsn, rounds, each); err != nil || queue {
			return err
		}
	}
	rows := rows(caddy, backend)
	for _, r := range rows {
		if err := r.check(dir); err != nil {
			return fmt.Errorf("%s: %w", r.name(), err)
		}
	}
	if rounds == 0 {
		fmt.Printf("%d rows: each verifies as it should\n", len(rows))
		return nil
	}
	for round := range rounds {
		for _, r := range rows {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, rounds, r.name())
			if err := r.measureLoad(dir, each); err != nil {
				return fmt.Errorf("%s: %w", r.name(), err)
			}
		}
	}
	for _, r := range rows {
		fmt.Fprintf(os.Stderr, "floods: %s\n", r.name())
		if err := r.measureMemory(dir); err != nil {
			return fmt.Errorf("%s: %w", r.name(), err)
		}
	}
	print(rows, rounds, each)
	return nil
}

// The function "missing" returns the programs that the rows need but that are not installed.
func missing() (names []string) {
	for _, name := range []string{"go", "nginx", "haproxy", "webhook", "gunicorn"} {
		if _, err := exec.LookPath(name); err != nil {
			names = append(names, name)
		}
	}
	if _, err := os.Stat(njsModule); err != nil {
		names = append(names, njsModule)
	}
	if exec.Command("/usr/bin/python3", "-c", "import flask").Run() != nil {
		names = append(names, "python3-flask")
	}
	return names
}

// spread has the values of one figure, one value for each round.
type spread []float64

func (s spread) median() float64 {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// The method "minus" returns, for each round, the value in s minus the value in other.
func (s spread) minus(other spread) (differences spread) {
	for i := range s {
		differences = append(differences, s[i]-other[i])
	}
	return differences
}

func (s spread) String() string {
	return fmt.Sprintf("%.0f (%.0f to %.0f)", s.median(), slices.Min(s), slices.Max(s))
}

// print writes the tables of docs/performance.md. The parameter `rows` has pairs: a program
// without verification, and the same program with verification. The first pair is Caddy. The
// last column of a table names the figures in which another program is better than Caddy.
func print(rows []*row, rounds int, each time.Duration) {
	fmt.Printf("%s, %d processors, %s. Medians of %d rounds of %v, lowest and highest in brackets.\n",
		time.Now().Format(time.DateOnly), runtime.NumCPU(), versions(), rounds, each)
	ours := rows[1]

	fmt.Print("\n| | processor time of a request, µs | and verified, µs | verification, µs | of the whole | better than Caddy |\n|---|---|---|---|---|---|\n")
	for pair := range slices.Chunk(rows, 2) {
		without, with := pair[0], pair[1]
		added := with.cpu.minus(without.cpu)
		fmt.Printf("| %s | %v | %v | %v | %.0f %% | %s |\n", with.proxy, without.cpu, with.cpu, added, 100*added.median()/with.cpu.median(), better(
			figure{"not verified", without.cpu.median(), rows[0].cpu.median()},
			figure{"verified", with.cpu.median(), ours.cpu.median()},
			figure{"verification", added.median(), ours.cpu.minus(rows[0].cpu).median()},
		))
	}

	fmt.Printf("\n| at %d events/s | median, µs | and verified, µs | 99th percentile, µs | and verified, µs | better than Caddy, verified |\n|---|---|---|---|---|---|\n", rate)
	for pair := range slices.Chunk(rows, 2) {
		without, with := pair[0], pair[1]
		fmt.Printf("| %s | %v | %v | %v | %v | %s |\n", with.proxy, without.p50, with.p50, without.p99, with.p99, better(
			figure{"median", with.p50.median(), ours.p50.median()},
			figure{"99th percentile", with.p99.median(), ours.p99.median()},
		))
	}

	fmt.Printf("\n| resident memory, MiB | at rest | %d slow connections | a good event beside them | %d unsigned posts of %d MiB | the same, signed wrongly | better than Caddy, verifying |\n|---|---|---|---|---|---|---|\n",
		slowConnections, posts, postSize>>20)
	for _, r := range rows {
		beside := "no answer"
		if r.beside > 0 {
			beside = fmt.Sprintf("%.0f ms", float64(r.beside)/float64(time.Millisecond))
		}
		wrongly, where := "–", "–"
		if r.verifies {
			wrongly = mib(r.forged)
			where = better(
				figure{"at rest", float64(r.rest), float64(ours.rest)},
				figure{"slow", float64(r.slow), float64(ours.slow)},
				figure{"unsigned", float64(r.unsigned), float64(ours.unsigned)},
				figure{"signed wrongly", float64(r.forged), float64(ours.forged)},
			)
		}
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %s |\n", r.name(), mib(r.rest), mib(r.slow), beside, mib(r.unsigned), wrongly, where)
	}
}

// A figure has two values of one quantity: the value of another program, and the value of Caddy
// with this module. A lower value is better.
type figure struct {
	name         string
	theirs, ours float64
}

// better returns the names of the figures in which the other program is better.
func better(figures ...figure) string {
	var names []string
	for _, f := range figures {
		if f.theirs < f.ours {
			names = append(names, f.name)
		}
	}
	return cmp.Or(strings.Join(names, ", "), "–")
}

func mib(bytes int64) string { return fmt.Sprintf("%.0f", float64(bytes)/(1<<20)) }

func versions() string {
	first := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			return name
		}
		return strings.TrimSpace(cmp.Or(strings.SplitN(string(out), "\n", 2)[0], name))
	}
	caddy, _ := exec.Command("go", "list", "-C", "..", "-m", "-f", "Caddy {{.Version}}", "github.com/caddyserver/caddy/v2").Output()
	haproxy, _, _ := strings.Cut(first("haproxy", "-v"), " 20")
	njs, _ := exec.Command("dpkg-query", "-W", "-f", "njs ${Version}", "libnginx-mod-http-js").Output()
	return strings.Join([]string{
		runtime.Version(), strings.TrimSpace(string(caddy)), first("nginx", "-v"), string(njs), haproxy,
		first("webhook", "-version"), first("gunicorn", "--version"), first("/usr/bin/python3", "--version"),
	}, ", ")
}
