package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// binary is a Caddy to measure, with its figures.
type binary struct {
	name, path string
	dir        string
	process    *process
	figures    map[string]*figures // by path and number of senders
}

// figures has the measurements of one path with one number of senders. Each spread has one
// value for each round.
type figures struct {
	perSecond spread // events a second
	cpu       spread // processor time for each event, in µs
	median    spread // median response time, in µs
}

// places are the paths of the site: without a queue, with a queue and a backend that
// accepts each event, and with a queue and a backend that is down.
var places = []string{"without", "queue", "down"}

var senders = []int{1, 8, 64}

// measureQueue compares the throughput of each binary in caddys with and without a queue.
// The first binary is cmd/caddy. dsn is the connection string of a PostgreSQL for the
// queues. If dsn is empty, the queues are in SQLite.
func measureQueue(dir string, caddys []string, backend, dsn string, rounds int, each time.Duration) error {
	var binaries []*binary
	for i, path := range caddys {
		b := &binary{name: path, path: path, dir: filepath.Join(dir, fmt.Sprint("queue-", i)), figures: make(map[string]*figures)}
		if i == 0 {
			b.name = "this tree"
		}
		if err := b.start(backend, dsn); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		defer b.process.stop()
		binaries = append(binaries, b)
	}
	for round := range max(rounds, 1) {
		for _, n := range senders {
			for _, place := range places {
				for _, b := range binaries {
					fmt.Fprintf(os.Stderr, "round %d of %d: %s, %s, %d senders\n", round+1, rounds, b.name, place, n)
					if err := b.measure(place, n, each); err != nil {
						return fmt.Errorf("%s, %s: %w", b.name, place, err)
					}
				}
			}
		}
	}
	if rounds > 0 {
		printQueue(binaries, rounds, each)
	}
	return nil
}

func (b *binary) start(backend, dsn string) error {
	addr, err := freeAddr()
	if err != nil {
		return err
	}
	nobody, err := freeAddr()
	if err != nil {
		return err
	}
	var site strings.Builder
	site.WriteString("{\n\tadmin off\n\tauto_https off\n\tlog {\n\t\tlevel ERROR\n\t}\n}\nhttp://" + addr + " {\n")
	store := ""
	if dsn != "" {
		store = "store postgres {env.INKIT_QUEUE_DSN}\n"
	}
	for _, place := range places {
		proxy, queue := "reverse_proxy "+backend, ""
		if place == "down" {
			proxy = "reverse_proxy " + nobody
		}
		if place != "without" {
			queue = "inkit_queue {\nname " + place + "\n" + store + "deliver {\n"
			proxy += "\n}\n}"
		}
		fmt.Fprintf(&site, "handle /%s {\ninkit_webhook {env.INKIT_WEBHOOK_SECRET}\n%s%s\n}\n", place, queue, proxy)
	}
	site.WriteString("}\n")
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return err
	}
	file := filepath.Join(b.dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(site.String()), 0o600); err != nil {
		return err
	}
	cmd := exec.Command(b.path, "run", "--config", file) //nolint:gosec // the user chooses the binaries
	cmd.Env = append(os.Environ(), "HOME="+b.dir, "XDG_DATA_HOME="+b.dir, "XDG_CONFIG_HOME="+b.dir, "INKIT_WEBHOOK_SECRET="+secret, "INKIT_QUEUE_DSN="+dsn)
	b.process, err = startProcess(cmd, addr)
	return err
}

// measure adds one round of figures.
func (b *binary) measure(place string, senders int, each time.Duration) error {
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: senders}}
	defer client.CloseIdleConnections()
	before, err := b.process.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	var failed atomic.Value
	var mu sync.Mutex
	var took spread
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			var own spread
			for failed.Load() == nil {
				sent := time.Now()
				status, err := sendTo(client, "http://"+b.process.addr+"/"+place, genuine)
				if err == nil && status != http.StatusOK && place != "without" {
					err = fmt.Errorf("status %d for a genuine event", status)
				}
				if err != nil {
					failed.Store(err)
				}
				own = append(own, float64(time.Since(sent).Microseconds()))
				if time.Since(began) >= each {
					break
				}
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, own...)
		})
	}
	wg.Wait()
	if err, _ := failed.Load().(error); err != nil {
		return err
	}
	seconds := time.Since(began).Seconds()
	after, err := b.process.cpu()
	if err != nil {
		return err
	}
	key := fmt.Sprint(place, " ", senders)
	if b.figures[key] == nil {
		b.figures[key] = new(figures)
	}
	f, n := b.figures[key], float64(len(took))
	f.perSecond = append(f.perSecond, n/seconds)
	f.cpu = append(f.cpu, float64((after-before).Microseconds())/n)
	f.median = append(f.median, took.median())
	return nil
}

// The method "over" returns, for each round, the value in `s` divided by the value in `other`.
func (s spread) over(other spread) (shares spread) {
	for i := range s {
		shares = append(shares, s[i]/other[i])
	}
	return shares
}

func printQueue(binaries []*binary, rounds int, each time.Duration) {
	fmt.Printf("%s, medians of %d rounds of %v in turn.\n", time.Now().Format(time.DateOnly), rounds, each)
	fmt.Print("\n| | senders | without the queue, events/s | with it | share | processor time | later, µs | backend down, events/s |\n|---|---|---|---|---|---|---|---|\n")
	for _, b := range binaries {
		for _, n := range senders {
			without, with, down := b.figures[fmt.Sprint("without ", n)], b.figures[fmt.Sprint("queue ", n)], b.figures[fmt.Sprint("down ", n)]
			fmt.Printf("| %s | %d | %.0f | %.0f | %.2f | %.2f | %.0f | %.0f |\n", strings.TrimPrefix(b.name, "./"), n,
				without.perSecond.median(), with.perSecond.median(), with.perSecond.over(without.perSecond).median(),
				with.cpu.over(without.cpu).median(), with.median.minus(without.median).median(), down.perSecond.median())
		}
	}
}
