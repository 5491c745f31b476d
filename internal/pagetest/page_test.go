package pagetest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	secret   = "test_inkit_webhook_secret"
	password = "demo"
	hash     = "$2a$10$vbwNOEOi0sqCSIBQf3hzguQ1ssw.iSoooBQc/pNHC28vw7GZsB4y2" // of password
	kept     = 10_000
)

// site is a Caddy with a queue and its page, and a backend that can fail.
type site struct {
	webhook, page string
	backend       atomic.Bool // whether the backend accepts events
}

func startSite(t *testing.T) *site {
	t.Helper()
	s := new(site)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch {
		case bytes.Contains(body, []byte("unknown_")):
			http.Error(w, "no such document", http.StatusNotFound)
		case !s.backend.Load():
			http.Error(w, "maintenance", http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(backend.Close)
	s.backend.Store(true)

	dir := t.TempDir()
	caddy := filepath.Join(dir, "caddy")
	out, err := exec.Command("go", "build", "-C", "../..", "-o", caddy, "./cmd/caddy").CombinedOutput()
	require.NoError(t, err, "%s", out)
	webhook, page, admin := freeAddr(t), freeAddr(t), freeAddr(t)
	s.webhook, s.page = "http://"+webhook+"/webhook", page
	config := filepath.Join(dir, "Caddyfile")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `{
	admin %s
	persist_config off
}
http://%s {
	handle /webhook {
		inkit_webhook {env.INKIT_WEBHOOK_SECRET}
		inkit_queue {
			name documents
			store sqlite %s/queue.db
			max_events 100000
			deliver {
				reverse_proxy %s
			}
		}
	}
	error 404
}
http://%s {
	basic_auth {
		demo %s
	}
	handle_path /queue/* {
		inkit_queue_page
	}
}
`, admin, webhook, dir, backend.Listener.Addr(), page, hash), 0o600))
	cmd := exec.Command(caddy, "run", "--config", config)
	cmd.Env = append(os.Environ(), "INKIT_WEBHOOK_SECRET="+secret)
	log := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.String()[max(0, log.Len()-3000):])
		}
	})
	for range 200 {
		if conn, err := net.Dial("tcp", page); err == nil {
			conn.Close()
			return s
		}
		time.Sleep(50 * time.Millisecond)
	}
	require.FailNow(t, "Caddy does not start")
	return nil
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

var types = []string{"DOCUMENT_CREATE_FINISHED", "DOCUMENT_UPDATE_FINISHED", "DOCUMENT_PDF_ACCESS", "DOCUMENT_DESTROY_FINISHED"}

// send sends n events as Inkit does.
func (s *site) send(t *testing.T, resource string, n int) {
	t.Helper()
	var wg sync.WaitGroup
	var next atomic.Int64
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	defer client.CloseIdleConnections()
	for range 16 {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				body := fmt.Appendf(nil, `{"event_type":"%s","resource_id":"%s%d","source_id":"tmpl_7","details":{"name":"Invoice %d","pages":2}}`, types[i%4], resource, 1000+i, i)
				mac := hmac.New(sha256.New, []byte(secret))
				mac.Write(body)
				r, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, s.webhook, bytes.NewReader(body))
				r.Header.Set("Inkit-Signature", hex.EncodeToString(mac.Sum(nil)))
				r.Header.Set("Content-Type", "application/json")
				r.Header.Set("User-Agent", "Inkit")
				res, err := client.Do(r)
				if assert.NoError(t, err) {
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
					assert.Equal(t, 200, res.StatusCode)
				}
			}
		})
	}
	wg.Wait()
}

func browser(t *testing.T) context.Context {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Skip("there is no Chromium")
	}
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU)...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	ctx, cancel = context.WithTimeout(ctx, 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// axe returns the source of axe-core, which finds accessibility problems.
func axe(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "npm pack --silent axe-core@4.14.1 && tar xzf axe-core-*.tgz package/axe.min.js")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("npm does not bring axe-core: %v %s", err, out)
	}
	source, err := os.ReadFile(filepath.Join(dir, "package", "axe.min.js"))
	require.NoError(t, err)
	return string(source)
}

func screen(width int64, scheme string) chromedp.Action[chromedp.Void] {
	return chromedp.Steps(chromedp.EmulateViewport(width, 900), chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		_, err := cdp.Call(ctx, target, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
		})
		return err
	}))
}

func scripts(run bool) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		_, err := cdp.Call(ctx, target, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: !run})
		return err
	})
}

// ask runs an action and returns its value.
func ask[T any](t *testing.T, ctx context.Context, action chromedp.Action[T]) T {
	t.Helper()
	within, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	value, err := chromedp.Run(within, action)
	require.NoError(t, err)
	return value
}

func TestPageInABrowser(t *testing.T) {
	ctx := browser(t)
	s := startSite(t)
	s.send(t, "doc_", 60)
	s.send(t, "unknown_", 5)
	s.backend.Store(false)
	began := time.Now()
	s.send(t, "doc_", kept)
	t.Logf("%d events sent to a backend that is out of order in %v", kept, time.Since(began).Round(time.Millisecond))

	at := "http://" + s.page + "/queue/"
	run := func(actions ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		ask(t, ctx, chromedp.Steps(actions...))
	}
	text := func(wanted ...string) {
		t.Helper()
		got := ask(t, ctx, chromedp.Text(chromedp.CSS("body")))
		for _, want := range wanted {
			require.Contains(t, got, want)
		}
	}
	click := func(selector string) {
		t.Helper()
		within, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		_, err := chromedp.RunResponse(within, chromedp.Click(selector))
		require.NoError(t, err, selector)
	}

	t.Run("log in", func(t *testing.T) {
		res, err := http.Get(at)
		require.NoError(t, err)
		res.Body.Close()
		require.Equal(t, http.StatusUnauthorized, res.StatusCode)
		// the first action starts the browser. It uses `ctx`, so the browser outlives this subtest
		require.NoError(t, chromedp.Do(ctx, scripts(false), screen(1280, "light")))
		run(chromedp.Navigate("http://demo:" + password + "@" + s.page + "/queue/"))
		text("Queue documents", "signed in as demo")
	})
	t.Run("see an outage", func(t *testing.T) {
		require.Eventually(t, func() bool {
			run(chromedp.Navigate(at + "?still"))
			got := ask(t, ctx, chromedp.Text(chromedp.CSS("body")))
			return strings.Contains(got, "10,005") && strings.Contains(got, "status 503")
		}, 30*time.Second, time.Second)
		text("backend down", "status 404", "Reload this page")
		screenshot(t, ctx, "page.png")
	})
	t.Run("open an event and retry it", func(t *testing.T) {
		click(`//dt[text()="Pending"]/following-sibling::dd/a`)
		text("the newest first")
		run(screen(1280, "dark"))
		screenshot(t, ctx, "page-dark.png")
		run(screen(1280, "light"))
		run(chromedp.Navigate(at + "events?resource=unknown_1003&state=all"))
		click(`//a[contains(., "unknown_1003")]`)
		text("Event unknown_1003", "status 404", "REDACTED", `"event_type": "DOCUMENT_DESTROY_FINISHED"`)
		screenshot(t, ctx, "page-event.png")
		click(`//button[contains(., "Retry now")]`)
		text("Due now: 1 event.")
	})
	t.Run("drop five by a filter", func(t *testing.T) {
		click(`//a[text()="Events"]`)
		run(chromedp.SendKeys(chromedp.CSS("#error"), "404"))
		click(`//button[text()="Show"]`)
		text("unknown_1001", "unknown_1005")
		click(`//button[text()="Drop all…"]`)
		text("This deletes 5 events that match now")
		click(`//button[text()="Drop 5 events"]`)
		text("Dropped: 5 events.", "No event matches")
	})
	t.Run("pause and resume", func(t *testing.T) {
		click(`//a[contains(., "Inkit queue")]`)
		click(`//button[contains(., "Pause")]`)
		text("The queue is paused.", "paused since")
		click(`//button[contains(., "Resume")]`)
		text("The queue is no longer paused.")
	})
	t.Run("page through them all", func(t *testing.T) {
		run(chromedp.Navigate(at + "events"))
		seen := make(map[string]bool)
		began, pages := time.Now(), 1
		for ; ; pages++ {
			links := ask(t, ctx, chromedp.Evaluate[[]string](`[...document.querySelectorAll(".list tbody th a")].map(a => a.href)`))
			for _, link := range links {
				require.False(t, seen[link], link)
				seen[link] = true
			}
			if ask(t, ctx, chromedp.Evaluate[int](`document.querySelectorAll("a[rel=next]").length`)) == 0 {
				break
			}
			click(`a[rel=next]`)
		}
		assert.Len(t, seen, kept)
		t.Logf("%d events on %d pages in %v", len(seen), pages, time.Since(began).Round(time.Millisecond))
	})
	t.Run("each view, size and colour", func(t *testing.T) {
		source := axe(t)
		run(chromedp.Navigate(at + "events"))
		id := ask(t, ctx, chromedp.Evaluate[string](`document.querySelector(".list tbody th a").getAttribute("href")`))
		for _, width := range []int64{1280, 380} {
			for _, scheme := range []string{"light", "dark"} {
				for _, view := range []string{"?still", "events", "events?state=all&order=oldest", "events?resource=none", id, "event?id=none", "ask"} {
					name := fmt.Sprint(view, " ", width, " ", scheme)
					run(screen(width, scheme))
					if view == "ask" {
						run(chromedp.Navigate(at + "events?type=DOCUMENT_PDF_ACCESS"))
						click(`//button[text()="Drop all…"]`)
					} else {
						run(chromedp.Navigate(at + view))
					}
					wide := ask(t, ctx, chromedp.Evaluate[bool](`document.documentElement.scrollWidth > innerWidth`))
					assert.False(t, wide, "%s: scrolls sideways", name)
					assert.Empty(t, violations(t, ctx, source), name)
				}
			}
		}
	})
}

// violations returns all problems that axe finds on the page, also minor ones.
func violations(t *testing.T, ctx context.Context, source string) (found []string) {
	t.Helper()
	ask(t, ctx, scripts(true))
	defer func() { ask(t, ctx, scripts(false)) }()
	ask(t, ctx, chromedp.Evaluate[chromedp.Void](source+"; undefined"))
	result := ask(t, ctx, chromedp.Evaluate[string](`axe.run().then(r => JSON.stringify({v: r.violations, n: r.passes.length}))`, chromedp.EvalAwaitPromise))
	var report struct {
		V []struct {
			ID, Impact, Help string
			Nodes            []struct {
				HTML           string
				FailureSummary string
			}
		}
		N int
	}
	require.NoError(t, json.Unmarshal([]byte(result), &report))
	assert.Greater(t, report.N, 10, "the number of rules that passed")
	for _, v := range report.V {
		found = append(found, fmt.Sprintf("%s (%s): %s: %s %s", v.ID, v.Impact, v.Help, v.Nodes[0].HTML, v.Nodes[0].FailureSummary))
	}
	return found
}

// screenshot takes a picture of the page, and asserts that the picture is small. If the
// variable SCREENSHOTS is set, screenshot writes the picture into the folder docs.
func screenshot(t *testing.T, ctx context.Context, name string) {
	t.Helper()
	png := ask(t, ctx, chromedp.CaptureScreenshot())
	t.Logf("%s: %d bytes", name, len(png))
	assert.Less(t, len(png), 150_000)
	dir := t.TempDir()
	if os.Getenv("SCREENSHOTS") != "" {
		dir = "../../docs"
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, name), png, 0o644))
}
