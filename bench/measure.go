package main

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	connections = 8   // under full load
	rate        = 200 // events a second, when the response time is measured

	slowConnections = 2000
	posts           = 8
	postSize        = 64 << 20
)

func sign(body []byte) string {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}

var (
	event    = []byte(`{"event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_2N0X2g4f3b1JJU75fqzDZs"}`)
	genuine  = sign(event)
	wrong    = sign([]byte("another body"))
	unsigned = ""
)

// send posts the event, and returns the status of the response.
func send(client *http.Client, addr, signature string) (int, error) {
	return sendTo(client, "http://"+addr+path, signature)
}

func sendTo(client *http.Client, url, signature string) (int, error) {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(event))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	if signature != unsigned {
		req.Header.Set("Inkit-Signature", signature)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

func newClient() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
}

// check returns an error if the program accepts a wrong event, or refuses a right one.
func (r *row) check(dir string) error {
	p, err := r.start(dir)
	if err != nil {
		return err
	}
	defer p.stop()
	client := newClient()
	defer client.CloseIdleConnections()
	for _, signature := range []string{genuine, wrong, unsigned} {
		status, err := send(client, p.addr, signature)
		if err != nil {
			return err
		}
		if accepted := status == http.StatusOK; accepted != (signature == genuine || !r.verifies) {
			return fmt.Errorf("status %d for the signature %q", status, signature)
		}
	}
	return nil
}

// measureLoad adds one round of figures: the processor time of a request under full load,
// and the response time at a fixed rate.
func (r *row) measureLoad(dir string, each time.Duration) error {
	p, err := r.start(dir)
	if err != nil {
		return err
	}
	defer p.stop()
	client := newClient()
	defer client.CloseIdleConnections()
	if _, err := load(client, p.addr, each/4); err != nil { // to warm up
		return err
	}

	before, err := p.cpu()
	if err != nil {
		return err
	}
	requests, err := load(client, p.addr, each)
	if err != nil {
		return err
	}
	after, err := p.cpu()
	if err != nil {
		return err
	}
	r.cpu = append(r.cpu, float64((after-before).Microseconds())/float64(requests))

	took, err := atRate(client, p.addr, each)
	if err != nil {
		return err
	}
	r.p50 = append(r.p50, float64(took[len(took)/2].Microseconds()))
	r.p99 = append(r.p99, float64(took[len(took)*99/100].Microseconds()))
	return nil
}

// load sends events on all connections: on each connection, one event after the other.
func load(client *http.Client, addr string, during time.Duration) (requests int64, err error) {
	var failed atomic.Value
	var count atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for range connections {
		wg.Go(func() {
			for time.Since(began) < during && failed.Load() == nil {
				if err := sendGenuine(client, addr); err != nil {
					failed.Store(err)
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	err, _ = failed.Load().(error)
	return count.Load(), err
}

// atRate sends events at a fixed rate, without waiting for the responses. It returns the
// response times, the shortest first.
func atRate(client *http.Client, addr string, during time.Duration) (took []time.Duration, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	ticker := time.NewTicker(time.Second / rate)
	defer ticker.Stop()
	for range int(during.Seconds() * rate) {
		<-ticker.C
		wg.Go(func() {
			began := time.Now()
			sendErr := sendGenuine(client, addr)
			mu.Lock()
			defer mu.Unlock()
			took = append(took, time.Since(began))
			if sendErr != nil {
				err = sendErr
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took, err
}

func sendGenuine(client *http.Client, addr string) error {
	status, err := send(client, addr, genuine)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d for a genuine event", status)
	}
	return err
}

// timing is a response time, or 0 if there was no response.
type timing time.Duration

// measureMemory measures the memory at rest and under each flood. It starts the program
// again for each measurement.
func (r *row) measureMemory(dir string) error {
	for _, flood := range []func(p *process) error{
		func(p *process) (err error) { r.rest, err = p.memory("VmRSS"); return err },
		func(p *process) (err error) { r.slow, r.beside, err = holdSlow(p); return err },
		func(p *process) (err error) { r.unsigned, err = upload(p, unsigned, r.verifies); return err },
		func(p *process) (err error) {
			if r.verifies {
				r.forged, err = upload(p, wrong, true)
			}
			return err
		},
	} {
		p, err := r.start(dir)
		if err != nil {
			return err
		}
		err = flood(p)
		p.stop()
		if err != nil {
			return err
		}
	}
	return nil
}

func head(addr string, length int, signature string) string {
	fields := ""
	if signature != unsigned {
		fields = "Inkit-Signature: " + signature + "\r\n"
	}
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n", path, addr, length, fields)
}

// holdSlow opens connections that announce 1 MiB but send only 64 bytes. While these
// connections are open, holdSlow sends a genuine event.
func holdSlow(p *process) (memory int64, beside timing, err error) {
	for range slowConnections {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			return 0, 0, err
		}
		defer conn.Close() // all connections stay open until holdSlow returns
		if _, err := io.WriteString(conn, head(p.addr, 1<<20, wrong)+strings.Repeat("a", 64)); err != nil {
			return 0, 0, err
		}
	}
	time.Sleep(time.Second)
	if memory, err = p.memory("VmRSS"); err != nil {
		return 0, 0, err
	}
	client := newClient()
	client.Timeout = 3 * time.Second
	defer client.CloseIdleConnections()
	began := time.Now()
	if sendGenuine(client, p.addr) == nil {
		beside = timing(time.Since(began))
	}
	return memory, beside, nil
}

// upload sends large posts in parallel, and does not stop when a response arrives. It
// returns the most memory that the program used.
func upload(p *process, signature string, refused bool) (int64, error) {
	var wg sync.WaitGroup
	var unexpected atomic.Int64
	block := make([]byte, 1<<20)
	for range posts {
		wg.Go(func() {
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			go func() {
				_, err := io.WriteString(conn, head(p.addr, postSize, signature))
				for range postSize / len(block) {
					if err == nil {
						_, err = conn.Write(block)
					}
				}
			}()
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				resp.Body.Close()
				if (resp.StatusCode != http.StatusOK) != refused {
					unexpected.Store(int64(resp.StatusCode))
				}
			}
		})
	}
	wg.Wait()
	if status := unexpected.Load(); status != 0 {
		return 0, fmt.Errorf("status %d for a large post", status)
	}
	return p.memory("VmHWM")
}
