//go:build linux

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// pageHash is the hash of the password "demo". The cost of the hash is low, because Caddy
// checks the password at each request.
const pageHash = "$2a$10$vbwNOEOi0sqCSIBQf3hzguQ1ssw.iSoooBQc/pNHC28vw7GZsB4y2"

// pageSite returns the Caddyfile under a heading of docs/page.md, adapted to the test.
func pageSite(t *testing.T, heading string, replacements ...string) string {
	t.Helper()
	_, after, found := strings.Cut(readFile(t, "../../docs/page.md"), "\n### "+heading+"\n")
	require.True(t, found)
	_, block, _ := strings.Cut(after, "```caddyfile\n")
	block, _, _ = strings.Cut(block, "```\n")
	block = regexp.MustCompile(`\$2a\$14\$\S+`).ReplaceAllString(block, strings.ReplaceAll(pageHash, "$", "$$"))
	for i := 0; i < len(replacements); i += 2 {
		require.Contains(t, block, replacements[i])
		block = strings.ReplaceAll(block, replacements[i], replacements[i+1])
	}
	return block
}

// pageCaddy starts a Caddy with a queue that cannot deliver, and sites that show its page.
func pageCaddy(t *testing.T, pages string) (c *caddy, s *sender) {
	t.Helper()
	c = newCaddy(t, "", queueSite(freeAddr(t), "answer_after 0s")+"\n"+pages)
	c.start()
	return c, newSender(t, c)
}

type visitor struct {
	client *http.Client
	change func(*http.Request)
}

func (v visitor) do(t *testing.T, method, url string, form url.Values) (status int, body string, header http.Header) {
	t.Helper()
	var content io.Reader
	if form != nil {
		content = strings.NewReader(form.Encode())
	}
	r, err := http.NewRequestWithContext(t.Context(), method, url, content)
	require.NoError(t, err)
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if v.change != nil {
		v.change(r)
	}
	res, err := v.client.Do(r)
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(b), res.Header
}

func plainVisitor(change func(*http.Request)) visitor {
	return visitor{change: change, client: &http.Client{Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}}
}

func withPassword(r *http.Request) { r.SetBasicAuth("ops", "demo") }

// The method "uses" acts like an operator: it opens the page at the URL `at`, and retries an
// event. The URL ends in a slash.
func (v visitor) uses(t *testing.T, at, user string) {
	t.Helper()
	status, page, header := v.do(t, http.MethodGet, at, nil)
	require.Equal(t, 200, status, page)
	assert.Contains(t, page, "signed in as <bdi>"+user)
	assert.Contains(t, header.Get("Content-Security-Policy"), "frame-ancestors 'none'")
	status, page, _ = v.do(t, http.MethodGet, at+"events", nil)
	require.Equal(t, 200, status)
	link := regexp.MustCompile(`href="(event\?id=[^"]+)"`).FindStringSubmatch(page)
	require.NotNil(t, link, page)
	base, err := url.Parse(at + "events")
	require.NoError(t, err)
	follow := func(link string) string {
		to, err := base.Parse(link)
		require.NoError(t, err)
		return to.String()
	}
	status, page, _ = v.do(t, http.MethodGet, follow(link[1]), nil)
	require.Equal(t, 200, status)
	assert.Contains(t, page, "<h2>Request</h2>")
	waitFor(t, "the event becomes due between two attempts", nil, func() bool {
		status, _, header = v.do(t, http.MethodPost, follow("retry"), url.Values{"id": {strings.TrimPrefix(link[1], "event?id=")}, "from": {"event"}})
		require.Equal(t, http.StatusSeeOther, status)
		status, page, _ = v.do(t, http.MethodGet, follow(header.Get("Location")), nil)
		require.Equal(t, 200, status)
		return strings.Contains(page, "Due now: 1 event.")
	})
	status, _, _ = v.do(t, http.MethodGet, follow("page.css"), nil)
	assert.Equal(t, 200, status)
}

// refused asserts that a visitor sees nothing and changes nothing.
func (v visitor) refused(t *testing.T, at string, want int) {
	t.Helper()
	for _, path := range []string{"", "events", "event?id=x", "page.css", "nothing"} {
		status, body, _ := v.do(t, http.MethodGet, at+path, nil)
		assert.Equal(t, want, status, path)
		assert.Empty(t, body, path)
	}
	for _, path := range []string{"retry", "drop", "pause", "resume"} {
		status, _, _ := v.do(t, http.MethodPost, at+path, url.Values{"matching": {"yes"}, "sure": {"yes"}, "queue": {"default"}})
		assert.Equal(t, want, status, path)
	}
}

func TestQueuePageWithAPassword(t *testing.T) {
	t.Parallel()
	own, bare, under := freeAddr(t), freeAddr(t), freeAddr(t)
	path := pageSite(t, "Under a path of another site", "example.com", "http://"+under)
	whole := freeAddr(t)
	unstripped := strings.NewReplacer("handle_path", "handle", under, whole).Replace(path)
	front := freeAddr(t)
	c, s := pageCaddy(t, pageSite(t, "With a password", "queue.example.com", "http://"+own)+path+unstripped+
		fmt.Sprintf("http://%s {\n\tinkit_queue_page\n}\nhttp://%s {\n\thandle_path /a/* {\n\t\treverse_proxy %s\n\t}\n}\n", bare, front, own))
	require.True(t, s.send(t.Context(), "doc_1", 0))

	plainVisitor(nil).refused(t, "http://"+own+"/", http.StatusUnauthorized)
	plainVisitor(withPassword).refused(t, "http://"+bare+"/", http.StatusForbidden)
	assert.Equal(t, 1, strings.Count(c.output.String(), "refused a request without a user"))
	plainVisitor(withPassword).uses(t, "http://"+own+"/", "ops")
	plainVisitor(withPassword).uses(t, "http://"+under+"/queue/", "ops")
	plainVisitor(withPassword).uses(t, "http://"+whole+"/queue/", "ops")
	plainVisitor(withPassword).uses(t, "http://"+front+"/a/", "ops")
	status, _, _ := plainVisitor(withPassword).do(t, http.MethodGet, "http://"+under+"/", nil)
	assert.Equal(t, 404, status)
	for range 2 { // after a reload, the page uses a queue that an earlier configuration has opened
		c.reload()
		plainVisitor(withPassword).uses(t, "http://"+own+"/", "ops")
	}

	// a request from another site
	status, _, _ = plainVisitor(func(r *http.Request) {
		withPassword(r)
		r.Header.Set("Sec-Fetch-Site", "cross-site")
	}).do(t, http.MethodPost, "http://"+own+"/drop", url.Values{"matching": {"yes"}, "sure": {"yes"}})
	assert.Equal(t, 403, status)
	assert.Contains(t, c.output.String(), `"action":"retry"`)
	assert.NotContains(t, c.output.String(), `"action":"drop"`)
}

func TestQueuePageWithAuthelia(t *testing.T) {
	t.Parallel()
	var asked sync.Map
	authelia := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.URL.Path, true)
		switch r.Header.Get("Cookie") {
		case "session=alice":
			w.Header().Set("Remote-User", "alice")
			w.Header().Set("Remote-Groups", "ops")
		case "session=nameless":
		default:
			w.Header().Set("Location", "https://auth.example.com/")
			w.WriteHeader(http.StatusFound)
		}
	}))
	t.Cleanup(authelia.Close)
	at := freeAddr(t)
	_, s := pageCaddy(t, pageSite(t, "With Authelia", "queue.example.com", "http://"+at, "authelia:9091", authelia.Listener.Addr().String()))
	require.True(t, s.send(t.Context(), "doc_1", 0))
	as := func(session string) visitor {
		return plainVisitor(func(r *http.Request) {
			r.Header.Set("Cookie", "session="+session)
			r.Header.Set("Remote-User", "mallory")
			r.Header.Add("Remote-User", "root")
		})
	}
	as("alice").uses(t, "http://"+at+"/", "alice<")
	as("none").refused(t, "http://"+at+"/", http.StatusFound)
	as("nameless").refused(t, "http://"+at+"/", http.StatusForbidden)
	_, found := asked.Load("/api/authz/forward-auth")
	assert.True(t, found)
}

func TestQueuePageWithCertificates(t *testing.T) {
	t.Parallel()
	ca, caKey := issue(t, "Operators", nil, nil)
	certificate, key := issue(t, "alice", ca, caKey)
	other, otherKey := issue(t, "mallory", nil, nil)
	pool := t.TempDir() + "/operators.pem"
	require.NoError(t, os.WriteFile(pool, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), 0o600))
	at := freeAddr(t)
	c, s := pageCaddy(t, pageSite(t, "With certificates of your own network",
		"queue.example.com", "https://localhost:"+port(at), "tls {", "tls internal {", "/etc/caddy/operators.pem", pool))
	require.True(t, s.send(t.Context(), "doc_1", 0))
	with := func(certificate *x509.Certificate, key *ecdsa.PrivateKey) visitor {
		v := plainVisitor(nil)
		waitFor(t, "Caddy has made its authority", c.process, func() bool {
			_, err := os.Stat(c.path("caddy/pki/authorities/local/root.crt"))
			return err == nil
		})
		config := c.tlsConfig()
		if certificate != nil {
			config.Certificates = []tls.Certificate{{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}}
		}
		v.client.Transport = &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
		return v
	}
	url := "https://localhost:" + port(at) + "/"
	v := with(certificate, key)
	waitFor(t, "Caddy has its certificate", c.process, func() bool {
		res, err := v.client.Get(url)
		if err != nil {
			return false
		}
		res.Body.Close()
		return assert.Equal(t, 2, res.ProtoMajor, "HTTP/2")
	})
	v.uses(t, url, "CN=alice")
	third := with(certificate, key)
	transport := &http3.Transport{TLSClientConfig: third.client.Transport.(*http.Transport).TLSClientConfig.Clone()}
	t.Cleanup(func() { _ = transport.Close() })
	third.client.Transport = transport
	res, err := third.client.Get(url)
	require.NoError(t, err)
	res.Body.Close()
	assert.Equal(t, 3, res.ProtoMajor, "HTTP/3")
	third.uses(t, url, "CN=alice")
	for _, stranger := range []visitor{with(nil, nil), with(other, otherKey)} {
		_, err := stranger.client.Get(url) //nolint:bodyclose // there is no body
		require.Error(t, err)
	}
}

// issue creates a certificate, signed by `ca`. If `ca` is nil, the certificate is self-signed.
func issue(t *testing.T, name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ca == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		ca, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
	require.NoError(t, err)
	certificate, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return certificate, key
}

// Twenty visitors who constantly reload pages do not slow down events much.
func TestQueuePageUnderVisitors(t *testing.T) {
	backend := newTaker(t, all)
	at := freeAddr(t)
	c := newCaddy(t, "", queueSite(backend.addr, "")+fmt.Sprintf("\nhttp://%s {\n\tbasic_auth {\n\t\tops %s\n\t}\n\tinkit_queue_page\n}\n", at, pageHash))
	c.start()
	measure := func(name string, events int) (p50, p99 time.Duration) {
		s := newSender(t, c)
		s.workers = 2
		<-s.sendAll(t.Context(), name, events)
		require.Len(t, s.ids(), events)
		s.refusedNone(t)
		return s.quantile(0.5), s.quantile(0.99)
	}
	events := size(10_000, 1_000)
	measure("warm", 1000)
	alone50, alone99 := measure("alone", events)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	var times []time.Duration
	for i := range 20 {
		wg.Go(func() {
			v := plainVisitor(withPassword)
			defer v.client.CloseIdleConnections()
			for ctx.Err() == nil {
				began := time.Now()
				r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+[]string{"/", "/events?state=all"}[i%2], nil)
				withPassword(r)
				res, err := v.client.Do(r)
				if err != nil {
					continue
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
				mu.Lock()
				times = append(times, time.Since(began))
				mu.Unlock()
				select { // like a person who holds down the reload key
				case <-time.After(100 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	waitFor(t, "the visitors have logged in, which takes a processor", c.process, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(times) >= 40
	})
	mu.Lock()
	times = nil
	mu.Unlock()
	with50, with99 := measure("visited", events)
	stop()
	wg.Wait()
	t.Logf("an event takes %v (p99 %v) without visitors, and %v (p99 %v) with 20, who loaded %d pages in %v (p99 %v)",
		alone50, alone99, with50, with99, len(times), quantile(times, 0.5), quantile(times, 0.99))
	assert.NotEmpty(t, times)
	assert.Less(t, with99, alone99+50*time.Millisecond, "generous, for a machine that does other things; 10 ms is what it should be")
	assert.NotContains(t, c.output.String(), "cannot store events")
}
