package page

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store/sqlite"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// caddyWith is the app "inkit_queue" with these queues.
type caddyWith []operator.Queue

func (c caddyWith) Queues() []operator.Queue { return c }

type fixture struct {
	*Handler
	t      *testing.T
	queues caddyWith
	stores map[string]store.Store
	logs   *observer.ObservedLogs
	woken  int
}

// newPage returns a page with queues, each given by its name and the name of its database.
func newPage(t *testing.T, queues ...[2]string) *fixture {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	p := &fixture{t: t, stores: make(map[string]store.Store), logs: logs, Handler: &Handler{
		User: defaultUser, logger: zap.New(core), protection: http.NewCrossOriginProtection(),
		shared: newShared(),
	}}
	for _, q := range queues {
		name, db := q[0], q[1]
		if p.stores[db] == nil {
			s, err := (&sqlite.SQLite{Path: filepath.Join(t.TempDir(), db)}).Open(t.Context(), store.Opening{Logger: zap.NewNop()})
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, s.Close()) })
			p.stores[db] = s
		}
		p.queues = append(p.queues, operator.Queue{
			Name: name, Database: db, History: time.Hour,
			Store: func() (store.Store, error) { return p.stores[db], nil },
			Down:  func() time.Time { return time.Time{} },
			Wake:  func() { p.woken++ },
		})
	}
	p.Handler.queues = p.queues
	return p
}

func newDefaultPage(t *testing.T) *fixture { return newPage(t, [2]string{"default", "queue.db"}) }

// The method "event" stores a pending event, and returns the id of the event.
func (p *fixture) event(db string, change func(*store.Record, *request.Request)) string {
	p.t.Helper()
	r := &store.Record{
		ID: uuid.Must(uuid.NewV7()).String(), Queue: "default", State: store.Pending, Received: time.Now(), Attempts: 1,
		EventType: "DOCUMENT_CREATE_FINISHED", ResourceID: "doc_1", LastError: "status 500",
	}
	stored := &request.Request{
		Method: "POST", Host: "example.com", Proto: "HTTP/2.0", RemoteAddr: "192.0.2.1:1234",
		Target: request.Target{URI: "/hook"}, Original: request.Target{URI: "/webhook"},
		Header: http.Header{"Content-Type": {"application/json"}}, Body: []byte(`{"event_type":"a","resource_id":"b"}`),
	}
	if change != nil {
		change(r, stored)
	}
	var err error
	r.Request, err = stored.Encode()
	require.NoError(p.t, err)
	r.Checksum = r.Sum()
	require.NoError(p.t, p.stores[db].Apply(p.t.Context(), &store.Batch{Owner: "test", Add: []*store.Record{r}, Finish: []store.Finish{{ID: r.ID, Outcome: store.Later, After: time.Minute}}}))
	return r.ID
}

// The method "named" stores a pending event of a resource, and returns its id.
func (p *fixture) named(resource string) string {
	p.t.Helper()
	return p.event("queue.db", func(r *store.Record, _ *request.Request) { r.ResourceID = resource })
}

func (p *fixture) ids(f store.Filter, due ...bool) (ids []string) {
	p.t.Helper()
	for _, s := range p.stores {
		page, err := s.Search(p.t.Context(), f, false)
		require.NoError(p.t, err)
		for _, r := range page.Records {
			if due == nil || r.Due.Before(time.Now()) {
				ids = append(ids, r.ID)
			}
		}
	}
	return ids
}

// ask sends a request as a user. The functions in change may change the request.
func (p *fixture) ask(method, target string, form url.Values, change ...func(*http.Request)) *http.Response {
	p.t.Helper()
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	r := httptest.NewRequestWithContext(p.t.Context(), method, target, body)
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	repl := caddy.NewReplacer()
	repl.Set("http.auth.user.id", "ops")
	r = r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, repl))
	for _, f := range change {
		f(r)
	}
	w := httptest.NewRecorder()
	err := p.ServeHTTP(w, r, caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
		p.t.Error("the next handler was called")
		return nil
	}))
	if err != nil { // write the response as Caddy does
		var handlerErr caddyhttp.HandlerError
		require.ErrorAs(p.t, err, &handlerErr)
		w.WriteHeader(handlerErr.StatusCode)
	}
	return w.Result()
}

func (p *fixture) get(target string) string {
	p.t.Helper()
	res := p.ask(http.MethodGet, target, nil)
	content, err := io.ReadAll(res.Body)
	require.NoError(p.t, err)
	require.Equal(p.t, http.StatusOK, res.StatusCode, "%s: %s", target, content)
	return string(content)
}

func (p *fixture) post(target string, form url.Values) *http.Response {
	p.t.Helper()
	if form == nil {
		form = url.Values{}
	}
	return p.ask(http.MethodPost, target, form)
}

func nobody(r *http.Request) {
	r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Delete("http.auth.user.id")
}

func content(t *testing.T, res *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return string(b)
}

func TestPathsAndMethods(t *testing.T) {
	for _, tt := range []struct {
		method, path string
		want         int
		allow        string
		readOnly     int // the status if the page is read-only; 0 means want
	}{
		{"GET", "/", 200, "", 0},
		{"HEAD", "/", 200, "", 0},
		{"POST", "/", 405, "GET, HEAD", 0},
		{"PUT", "/", 405, "GET, HEAD", 0},
		{"GET", "/events", 200, "", 0},
		{"HEAD", "/events", 200, "", 0},
		{"GET", "/events?state=all&since=2h&order=oldest", 200, "", 0},
		{"GET", "/events?state=lost", 400, "", 0},
		{"GET", "/events?since=yesterday", 400, "", 0},
		{"GET", "/events?until=-5h", 400, "", 0},
		{"DELETE", "/events", 405, "GET, HEAD", 0},
		{"GET", "/event?id=none", 404, "", 0},
		{"GET", "/event", 404, "", 0},
		{"GET", "/event?id=%00%ff", 404, "", 0},
		{"GET", "/page.css", 200, "", 0},
		{"GET", "/queue/", 200, "", 0},
		{"GET", "/queue/events", 200, "", 0},
		{"GET", "/queue/page.css", 200, "", 0},
		{"GET", "/queue", 404, "", 0},
		{"GET", "/frame.html", 404, "", 0},
		{"GET", "/templates/", 200, "", 0}, // the overview, as under each path that ends in a slash
		{"GET", "/../page.go", 404, "", 0},
		{"GET", "/Events", 404, "", 0},
		{"GET", "/drop", 405, "POST", 0},
		{"HEAD", "/retry", 405, "POST", 0},
		{"GET", "/pause?queue=default", 405, "POST", 0},
		{"GET", "/resume", 405, "POST", 0},
		{"OPTIONS", "/drop", 405, "POST", 0},
		{"PUT", "/drop", 405, "POST", 0},
		{"POST", "/nothing", 404, "", 0},
		{"POST", "/retry", 400, "", 403},
		{"POST", "/drop", 400, "", 403},
		{"POST", "/pause", 404, "", 403},
		{"POST", "/resume", 404, "", 403},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			p := newDefaultPage(t)
			res := p.ask(tt.method, tt.path, nil)
			assert.Equal(t, tt.want, res.StatusCode)
			assert.Equal(t, tt.allow, res.Header.Get("Allow"))
			for field, value := range headers {
				assert.Equal(t, value, res.Header.Get(field), field)
			}
			for field := range res.Header {
				assert.NotContains(t, field, "Access-Control")
			}

			p.ReadOnly = true
			want := tt.want
			if tt.readOnly != 0 {
				want = tt.readOnly
			}
			assert.Equal(t, want, p.ask(tt.method, tt.path, nil).StatusCode, "read-only")

			p.ReadOnly = false
			res = p.ask(tt.method, tt.path, nil, nobody)
			assert.Equal(t, http.StatusForbidden, res.StatusCode, "without a user")
			assert.Empty(t, content(t, res), "without a user")
			assert.Equal(t, "no-store", res.Header.Get("Cache-Control"))
		})
	}
}

func TestUser(t *testing.T) {
	remote := func(values ...string) func(*http.Request) {
		return func(r *http.Request) {
			nobody(r)
			repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			repl.Map(func(key string) (any, bool) {
				if key == "http.request.header.Remote-User" {
					return strings.Join(values, ","), true
				}
				return nil, false
			})
		}
	}
	const header = "{http.request.header.Remote-User}"
	for _, tt := range []struct {
		name, user string
		change     func(*http.Request)
		want       int
	}{
		{"a user", defaultUser, func(*http.Request) {}, 200},
		{"no user", defaultUser, nobody, 403},
		{"a user in a header field, but the placeholder is the default", defaultUser, remote("alice"), 403},
		{"a user in the header field of the placeholder", header, remote("alice"), 200},
		{"the header field is empty", header, remote(""), 403},
		{"the header field is missing", header, remote(), 403},
		{"the header field is blank", header, remote(" \t "), 403},
		{"an authenticated user, but the placeholder is a header field", header, func(*http.Request) {}, 403},
		{"an unknown placeholder", "{http.nothing}", func(*http.Request) {}, 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newDefaultPage(t)
			p.User = tt.user
			assert.Equal(t, tt.want, p.ask(http.MethodGet, "/", nil, tt.change).StatusCode)
		})
	}
}

func TestWarningWithoutAUser(t *testing.T) {
	p := newDefaultPage(t)
	for range 5 {
		p.ask(http.MethodGet, "/page.css", nil, nobody)
	}
	require.Len(t, p.logs.All(), 1)
	entry := p.logs.All()[0]
	assert.Equal(t, zapcore.WarnLevel, entry.Level)
	assert.Equal(t, "refused a request without a user: inkit_queue_page needs a directive in front that authenticates, such as basic_auth", entry.Message)
	assert.Equal(t, map[string]any{"user": "{http.auth.user.id}"}, entry.ContextMap())
	p.shared.warning.Interval = time.Nanosecond
	p.ask(http.MethodGet, "/", nil, nobody)
	assert.Equal(t, 2, p.logs.Len(), "after the interval")
}

func TestValidate(t *testing.T) {
	const message = "user: must be one placeholder of the request, such as {http.auth.user.id}"
	for user, want := range map[string]string{
		"{http.auth.user.id}":                               "",
		"{http.request.header.Remote-User}":                 "",
		"{http.request.tls.client.subject}":                 "",
		"{http.vars.user}":                                  "",
		"alice":                                             message,
		"{env.HOME}":                                        message,
		"{file./etc/passwd}":                                message,
		"{system.hostname}":                                 message,
		"{http.auth.user.id} ":                              message,
		"x{http.auth.user.id}":                              message,
		"{http.auth.user.id}{http.auth.user.id}":            message,
		"{http.auth.user.id}{env.HOME}":                     message,
		"{http.request.header.{http.request.header.Other}}": message,
		`{http.auth.user.id\}`:                              message,
		"{http.}":                                           message,
		"{}":                                                message,
		"{http.request.header.Remote-User}\n{http.auth.user.id}": message,
	} {
		err := (&Handler{User: user}).Validate()
		if want == "" {
			require.NoError(t, err, user)
		} else {
			require.EqualError(t, err, want, user)
		}
	}
}

func TestCrossSite(t *testing.T) {
	for _, tt := range []struct {
		name   string
		header map[string]string
		want   int
	}{
		{"a button of the page", map[string]string{"Sec-Fetch-Site": "same-origin"}, 303},
		{"a client that is no browser", nil, 303},
		{"an old browser, from this site", map[string]string{"Origin": "https://example.com"}, 303},
		{"another site", map[string]string{"Sec-Fetch-Site": "cross-site"}, 403},
		{"another site of this domain", map[string]string{"Sec-Fetch-Site": "same-site"}, 403},
		{"an old browser, from another site", map[string]string{"Origin": "https://evil.example"}, 403},
		{"a sandboxed frame", map[string]string{"Origin": "null"}, 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newDefaultPage(t)
			id := p.event("queue.db", nil)
			with := func(r *http.Request) {
				r.Host = "example.com"
				for field, value := range tt.header {
					r.Header.Set(field, value)
				}
			}
			res := p.ask(http.MethodPost, "/drop", url.Values{"id": {id}, "sure": {"1 event"}}, with)
			assert.Equal(t, tt.want, res.StatusCode)
			assert.Len(t, p.ids(store.Filter{}), map[int]int{303: 0, 403: 1}[tt.want])
			assert.Equal(t, 200, p.ask(http.MethodGet, "/events", nil, with).StatusCode, "a link from elsewhere is fine")
		})
	}
}

func TestForms(t *testing.T) {
	p := newDefaultPage(t)
	id := p.event("queue.db", nil)
	assert.Equal(t, http.StatusRequestEntityTooLarge, p.post("/drop", url.Values{"id": {id}, "sure": {"yes"}, "x": {strings.Repeat("a", maxForm)}}).StatusCode)
	assert.Equal(t, http.StatusBadRequest, p.ask(http.MethodPost, "/drop", nil, func(r *http.Request) {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Body = io.NopCloser(strings.NewReader("id=%zz&sure=yes"))
	}).StatusCode)
	for _, tt := range []struct {
		name   string
		status int
		to     string // the redirect
		form   url.Values
	}{
		{"nothing is selected", 400, "", url.Values{"sure": {"0 events"}}},
		{"a filter without matching=yes", 400, "", url.Values{"sure": {"1 event"}, "state": {"dead"}}},
		{"only delivered events", 400, "", url.Values{"sure": {"0 events"}, "state": {"delivered"}, "matching": {"yes"}}},
		{"an unknown id", 303, "events?done=drop&n=0", url.Values{"sure": {"1 event"}, "id": {"none"}}},
		{"an id in the URL", 400, "", url.Values{"sure": {"1 event"}}},
		{"an unknown state", 400, "", url.Values{"sure": {"1 event"}, "matching": {"yes"}, "state": {"lost"}}},
		{"a malformed time", 400, "", url.Values{"sure": {"1 event"}, "matching": {"yes"}, "until": {"now"}}},
		{"the confirmation in the URL", 200, "", url.Values{"id": {id}}}, // the page asks the user
	} {
		t.Run(tt.name, func(t *testing.T) {
			res := p.post("/drop?sure=1+event&id="+id, tt.form)
			assert.Equal(t, tt.status, res.StatusCode)
			assert.Equal(t, tt.to, res.Header.Get("Location"))
			assert.Equal(t, []string{id}, p.ids(store.Filter{}))
		})
	}
}

func TestRetryAndDrop(t *testing.T) {
	p := newPage(t, [2]string{"default", "queue.db"}, [2]string{"other", "other.db"})
	var ids []string
	for i := range 7 {
		ids = append(ids, p.named(fmt.Sprint("doc_", i)))
	}
	other := p.event("other.db", func(r *store.Record, _ *request.Request) { r.Queue, r.LastError = "other", "no connection" })

	res := p.post("/retry", url.Values{"id": {ids[0], other}, "from": {"list"}, "type": {"A & B"}})
	assert.Equal(t, 303, res.StatusCode)
	assert.Equal(t, "events?done=retry&n=2&type=A+%26+B", res.Header.Get("Location"))
	assert.Equal(t, 2, p.woken)
	assert.ElementsMatch(t, []string{ids[0], other}, p.ids(store.Filter{}, true))
	res = p.post("/retry", url.Values{"id": {ids[1]}, "from": {"event"}})
	assert.Equal(t, "event?done=retry&id="+ids[1]+"&n=1", res.Header.Get("Location"))
	res = p.post("/retry", url.Values{"matching": {"yes"}, "error": {"500"}})
	assert.Equal(t, "events?done=retry&error=500&n=7", res.Header.Get("Location"))

	ask := p.post("/drop", url.Values{"id": {ids[0], ids[1]}, "error": {"500"}})
	assert.Equal(t, 200, ask.StatusCode)
	page := content(t, ask)
	assert.Contains(t, page, "<strong>2 events</strong>")
	assert.Len(t, p.ids(store.Filter{}), 8, "nothing is dropped yet")
	res = p.post("/drop", formOf(t, page))
	assert.Equal(t, "events?done=drop&error=500&n=2", res.Header.Get("Location"))
	assert.Len(t, p.ids(store.Filter{}), 6)

	page = content(t, p.post("/drop", url.Values{"matching": {"yes"}, "error": {"500"}, "order": {"oldest"}, "after": {ids[3]}}))
	assert.Contains(t, page, "<strong>5 events</strong>", "on all pages of the list")
	late := p.named("late")
	res = p.post("/drop", formOf(t, page))
	assert.Equal(t, "events?after="+ids[3]+"&done=drop&error=500&n=5&order=oldest", res.Header.Get("Location"))
	assert.ElementsMatch(t, []string{late, other}, p.ids(store.Filter{}), "the user did not confirm the events that arrived later")

	var lines []string
	for _, entry := range p.logs.All() {
		assert.Equal(t, zapcore.InfoLevel, entry.Level)
		fields := entry.ContextMap()
		lines = append(lines, fmt.Sprint(fields["user"], " ", fields["action"], " ", fields["queue"], " ", fields["events"]))
	}
	assert.Equal(t, []string{"ops retry default,other 2", "ops retry default 1", "ops retry default 7", "ops drop default 2", "ops drop default 5"}, lines)
}

// Before the page drops events, it asks the user, and shows how many events match. If more
// events match when the user confirms, the page drops no event, and asks again.
func TestDropAsksAgain(t *testing.T) {
	p := newDefaultPage(t)
	first := p.named("first")
	page := content(t, p.post("/drop", url.Values{"matching": {"yes"}, "error": {"500"}, "until": {"1h"}}))
	assert.Contains(t, page, "None of these events", "the filter itself ends before the event")
	page = content(t, p.post("/drop", url.Values{"matching": {"yes"}, "error": {"500"}}))
	assert.Contains(t, page, "<strong>1 event</strong>")
	old := p.event("queue.db", func(r *store.Record, _ *request.Request) {
		r.Received = time.Now().Add(-time.Minute)
		id := uuid.Must(uuid.NewV7())
		copy(id[:6], uuid.MustParse(first).NodeID()) // as if Caddy had received it before the page asked
		id[0], id[1] = 0, 0
		r.ID = id.String()
	})
	again := content(t, p.post("/drop", formOf(t, page)))
	assert.Contains(t, again, "The number of matching events has changed, so nothing was dropped yet.")
	assert.Contains(t, again, "<strong>2 events</strong>")
	assert.ElementsMatch(t, []string{first, old}, p.ids(store.Filter{}))
	res := p.post("/drop", formOf(t, again))
	assert.Equal(t, "events?done=drop&error=500&n=2", res.Header.Get("Location"))
	assert.Empty(t, p.ids(store.Filter{}))
}

var hidden = regexp.MustCompile(`<input type="hidden" name="([^"]+)" value="([^"]*)">`)

// formOf returns the hidden fields of the forms in a page.
func formOf(t *testing.T, page string) url.Values {
	t.Helper()
	form := make(url.Values)
	for _, match := range hidden.FindAllStringSubmatch(page, -1) {
		form.Add(match[1], strings.NewReplacer("&#43;", "+", "&amp;", "&").Replace(match[2]))
	}
	require.NotEmpty(t, form)
	return form
}

func TestChangeOfMany(t *testing.T) {
	p := newDefaultPage(t)
	for i := range 3*operator.Step + 1 {
		p.named(fmt.Sprint("doc_", i))
	}
	assert.Equal(t, "events?done=retry&n=301", p.post("/retry", url.Values{"matching": {"yes"}}).Header.Get("Location"))
	form := formOf(t, content(t, p.post("/drop", url.Values{"matching": {"yes"}, "state": {"pending"}})))
	assert.Equal(t, "events?done=drop&n=301&state=pending", p.post("/drop", form).Header.Get("Location"))
	assert.Empty(t, p.ids(store.Filter{}))
}

func TestPauseAndResume(t *testing.T) {
	p := newDefaultPage(t)
	assert.Contains(t, p.get("/"), `action="pause"`)
	assert.Equal(t, "./?done=pause&n=0", p.post("/pause", url.Values{"queue": {"default"}}).Header.Get("Location"))
	assert.Contains(t, p.get("/?done=pause&n=0"), "The queue is paused. Events are stored without attempts.")
	assert.Contains(t, p.get("/"), `action="resume"`)
	assert.Equal(t, 404, p.post("/pause", url.Values{"queue": {"none"}}).StatusCode)
	assert.Equal(t, "./?done=resume&n=0", p.post("/resume", url.Values{"queue": {"default"}}).Header.Get("Location"))
	assert.Contains(t, p.get("/"), `action="pause"`)
	assert.Equal(t, 2, p.woken)
}

func TestDone(t *testing.T) {
	for _, tt := range []struct {
		code, n string
		more    bool
		want    string
	}{
		{"drop", "1", false, "Dropped: 1 event."},
		{"drop", "1234567", false, "Dropped: 1,234,567 events."},
		{"drop", "20000", true, "Dropped: 20,000 events. Other events were not changed, because it took too long: do it again."},
		{"retry", "2", false, "Due now: 2 events. An attempt follows immediately, unless one is running, the queue is paused, or its backend is down."},
		{"drop", "<b>", false, "Dropped: 0 events."},
		{"drop", "-5", false, "Dropped: 0 events."},
		{"", "5", true, ""},
		{"<script>", "5", true, ""},
		{"Call 555-1234", "5", false, ""},
	} {
		assert.Equal(t, tt.want, done(tt.code, tt.n, tt.more))
	}
}

// The page shows the data of an event as text: all elements, attributes and control
// characters of the page come from the templates.
func TestHostileEvents(t *testing.T) {
	for name, hostile := range map[string]string{
		"a script":                `<script>alert(1)</script>`,
		"the end of an attribute": `" onmouseover="alert(1)" x="`,
		"the end of an attribute in single quotes": `' autofocus onfocus='alert(1)`,
		"the end of elements":                      `</title></pre></td></code></bdi><img src=x onerror=alert(1)>`,
		"a javascript URL":                         `javascript:alert(1)`,
		"a template":                               `{{.User}}{{template "main" .}}`,
		"right to left":                            "abc\u202egnp.exe\u2066\u2067\u200f\u061c",
		"64 KiB without a space":                   strings.Repeat("W", 64<<10),
		"64 KiB of combining marks":                "a" + strings.Repeat("\u0301", 32<<10),
		"control characters":                       "a\x00\x01\x07\x08\x1b[31mred\x7f\u0085\r\nSet-Cookie: a=b",
		"not UTF-8":                                "a\xff\xfe\xc3(\xed\xa0\x80",
		"separators and a BOM":                     "a\u2028b\u2029c\ufeffd\u00ad",
		"placeholders":                             "{http.auth.user.id}{env.HOME}",
		"a comment":                                "<!--",
		"CDATA":                                    "<![CDATA[x]]>",
		"a character by its number":                "&#60;script&#62;&lt;b&gt;",
		"a query":                                  "a&state=all#x?y=%00%ff",
		"a base":                                   `<base href="https://evil.example/"><meta http-equiv="refresh" content="0">`,
		"an empty text":                            "",
		"only invisible characters":                "\u200b\u200b",
	} {
		t.Run(name, func(t *testing.T) {
			p := newPage(t, [2]string{"default", "queue.db"}, [2]string{"other", "queue.db"})
			id := p.event("queue.db", func(r *store.Record, q *request.Request) {
				r.ResourceID, r.EventType, r.LastError = hostile, hostile, hostile
				text := hostile
				q.Method, q.Host, q.Proto, q.RemoteAddr, q.SecretName, q.IdempotencyKey = hostile, hostile, hostile, hostile, hostile, hostile
				q.Target = request.Target{URI: text}
				q.Original = request.Target{URI: text + "x"}
				q.Header["X-"+hostile] = []string{hostile, hostile}
				for _, field := range []string{"Inkit-Signature", "Authorization", "Proxy-Authorization", "Cookie"} {
					q.Header[field] = []string{"CREDENTIAL" + hostile}
				}
				q.Vars = map[string]any{hostile: hostile, "number": 1000000, "bool": true}
				q.Body = []byte(hostile)
			})
			query := url.Values{"resource": {hostile}, "type": {hostile}, "error": {hostile}, "queue": {hostile}, "done": {hostile}, "n": {hostile}, "id": {id}}
			for _, view := range []string{
				"/", "/events", "/events?state=all", "/event?id=" + id, "/?" + query.Encode(), "/events?" + query.Encode(), "/event?" + query.Encode(),
			} {
				page := p.get(view)
				wellBehaved(t, view, page)
				assert.NotContains(t, page, "CREDENTIAL", view)
			}
			for name, form := range map[string]url.Values{
				"by id":      {"id": {id}, "resource": {hostile}, "queue": {hostile}},
				"by filter":  {"matching": {"yes"}, "type": {hostile}, "error": {hostile}},
				"by another": {"matching": {"yes"}, "resource": {hostile}, "after": {hostile}, "order": {hostile}},
				"by its id":  {"id": {hostile}},
			} {
				wellBehaved(t, "drop "+name, content(t, p.post("/drop", form)))
			}
			res := p.post("/retry", url.Values{"id": {hostile}, "resource": {hostile}, "from": {hostile}})
			if len(hostile) > maxForm/2 {
				assert.Equal(t, http.StatusRequestEntityTooLarge, res.StatusCode)
			} else {
				assert.Regexp(t, `^events\?[A-Za-z0-9._+%=&~-]*$`, res.Header.Get("Location"))
			}
		})
	}
}

// markup has the elements of the templates, with their attributes.
var markup = map[string][]string{
	"html": {"lang"}, "head": nil, "meta": {"charset", "name", "content"}, "title": nil, "link": {"rel", "href"}, "body": nil,
	"a": {"class", "href", "rel"}, "header": nil, "nav": {"aria-label", "class"}, "b": nil, "span": {"class"}, "bdi": nil, "main": {"id", "tabindex"},
	"h1": nil, "h2": {"id"}, "p": {"class", "role"}, "section": {"aria-labelledby"}, "small": nil, "dl": {"class"}, "div": nil, "dt": nil, "dd": {"class"},
	"table": {"class"}, "caption": nil, "thead": nil, "tbody": nil, "tr": nil, "th": {"scope", "class"}, "td": {"class", "data-label"},
	"form": {"class", "method", "action", "aria-label"}, "input": {"type", "name", "value", "id", "placeholder", "aria-label"}, "button": {"class", "formaction"},
	"label": {"for"}, "select": {"id", "name"}, "option": {"value", "selected"}, "svg": {"viewBox", "preserveAspectRatio", "role", "aria-label"},
	"g": nil, "rect": {"class", "x", "y", "width", "height"}, "details": nil, "summary": nil, "code": {"class"}, "pre": {"tabindex", "role", "aria-labelledby", "dir"},
	"time": {"datetime", "title"}, "ol": {"class"}, "li": nil, "br": nil, "strong": nil,
}

// links matches each link that the page may have.
var links = regexp.MustCompile(`^(\./(\?still)?|#main|(events|event)(\?[A-Za-z0-9._+%=&~-]*)?|page\.css|retry|drop|pause|resume)$`)

func wellBehaved(t *testing.T, view, page string) {
	t.Helper()
	require.True(t, utf8.ValidString(page), view)
	for _, r := range page {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			// only the value of a form field may have an unprintable character, because the
			// page must not change this value
			require.Contains(t, valuesOf(page), string(r), "%s: has the character %U", view, r)
			require.NotContains(t, attributes.ReplaceAllString(page, ""), string(r), "%s: has the character %U", view, r)
		}
	}
	decoder := xml.NewDecoder(strings.NewReader(strings.TrimPrefix(attributes.ReplaceAllString(page, ` value=""`), "<!DOCTYPE html>")))
	decoder.Strict, decoder.AutoClose, decoder.Entity = false, xml.HTMLAutoClose, xml.HTMLEntity
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err, view)
		switch token := token.(type) {
		case xml.StartElement:
			known, ok := markup[token.Name.Local]
			require.True(t, ok, "%s: has the element %s", view, token.Name.Local)
			for _, attribute := range token.Attr {
				require.True(t, slices.Contains(known, attribute.Name.Local), "%s: %s has the attribute %s", view, token.Name.Local, attribute.Name.Local)
				if slices.Contains([]string{"href", "action", "formaction"}, attribute.Name.Local) {
					require.Regexp(t, links, attribute.Value, view)
				}
			}
		case xml.Comment, xml.ProcInst, xml.Directive:
			require.Fail(t, "a comment or a directive", "%s: %v", view, token)
		}
	}
}

// attributes finds the values of form fields, which contain text that the user typed.
var attributes = regexp.MustCompile(` value="[^"]*"`)

func valuesOf(page string) string { return strings.Join(attributes.FindAllString(page, -1), "") }

func TestBody(t *testing.T) {
	deep := strings.Repeat("[", 30_000) + strings.Repeat("]", 30_000)
	for _, tt := range []struct {
		name, body, kind, text string
		cut                    bool
	}{
		{"JSON", `{"a":[1,"b"]}`, "JSON", "{\n  \"a\": [\n    1,\n    \"b\"\n  ]\n}", false},
		{"escapes stay", `{"a":"\u202e\u003c"}`, "JSON", "{\n  \"a\": \"\\u202e\\u003c\"\n}", false},
		{"almost JSON", `{"a":`, "text", `{"a":`, false},
		{"text", "a\tb\nc\x1b\u202e", "text", "a\tb\nc��", false},
		{"nothing", "", "text", "", false},
		{"bytes", "\xff\x00ab", "bytes", "00000000  ff 00 61 62                                       |..ab|\n", false},
		{"deep JSON is not indented", deep, "text", deep, false},
		{"a long text", strings.Repeat("ä", maxBody), "text", strings.Repeat("ä", maxBody/2), true},
	} {
		got := newBody([]byte(tt.body))
		assert.Equal(t, body{Kind: tt.kind, Text: tt.text, Size: len(tt.body), Cut: tt.cut}, got, tt.name)
	}
	got := newBody(bytes.Repeat([]byte{0xff}, 1<<20))
	assert.True(t, got.Cut)
	assert.Less(t, len(got.Text), 6*maxBytes)
}

func TestEventThatIsDamagedOrGone(t *testing.T) {
	p := newDefaultPage(t)
	id := p.event("queue.db", nil)
	require.NoError(t, p.stores["queue.db"].Apply(t.Context(), &store.Batch{Owner: "test", Add: []*store.Record{{
		ID: uuid.Must(uuid.NewV7()).String(), Queue: "default", Received: time.Now(), ResourceID: "damaged", Request: []byte("\xff"), Checksum: []byte("x"),
	}}, History: []*store.Record{{
		ID: uuid.Must(uuid.NewV7()).String(), Queue: "default", Received: time.Now(), Finished: time.Now(), ResourceID: "done", Attempts: 3, Status: 204,
	}}}))
	ids := p.ids(store.Filter{States: operator.States["all"]})
	require.Len(t, ids, 3)
	assert.Contains(t, p.get("/event?id="+id), "<h2>Request</h2>")
	assert.Contains(t, p.get("/event?id="+ids[1]), "the request cannot be shown: the checksum does not match")
	delivered := p.get("/event?id=" + ids[2])
	assert.Contains(t, delivered, "the backend answered 204")
	assert.Contains(t, delivered, "The request of a delivered event is no longer stored.")
	assert.NotContains(t, delivered, "<button")
}

func TestPagesOfTheList(t *testing.T) {
	p := newPage(t, [2]string{"default", "queue.db"}, [2]string{"other", "other.db"})
	for i := range 120 {
		p.event([]string{"queue.db", "other.db"}[i%2], func(r *store.Record, _ *request.Request) { r.ResourceID = fmt.Sprint("doc_", i) })
	}
	next := regexp.MustCompile(`<a rel="next" href="([^"]+)">`)
	rows := regexp.MustCompile(`<bdi>(doc_\d+)</bdi></a>`)
	for order, first := range map[string]string{"": "doc_119", "oldest": "doc_0"} {
		var seen []string
		pages := 0
		for link := "/events?order=" + order; link != ""; pages++ {
			page := p.get(link)
			for _, match := range rows.FindAllStringSubmatch(page, -1) {
				seen = append(seen, match[1])
			}
			link = ""
			if match := next.FindStringSubmatch(page); match != nil {
				link = "/" + strings.ReplaceAll(match[1], "&amp;", "&")
			}
		}
		assert.Equal(t, 3, pages)
		assert.Len(t, seen, 120)
		assert.Equal(t, first, seen[0])
		slices.Sort(seen)
		assert.Len(t, slices.Compact(seen), 120)
	}
}

func TestStates(t *testing.T) {
	t.Run("no queue", func(t *testing.T) {
		p := newPage(t)
		assert.Contains(t, p.get("/"), "This Caddy has no queue")
		p.get("/events")
		assert.Equal(t, 404, p.ask(http.MethodGet, "/event?id=x", nil).StatusCode)
		assert.Equal(t, 303, p.post("/retry", url.Values{"matching": {"yes"}}).StatusCode)
	})
	t.Run("one of two databases is not open", func(t *testing.T) {
		p := newPage(t, [2]string{"default", "queue.db"}, [2]string{"broken", "broken.db"})
		p.queues[1].Store = func() (store.Store, error) { return nil, errors.New("connection refused <b>") }
		id := p.event("queue.db", nil)
		page := p.get("/")
		assert.Contains(t, page, "the database broken.db is not open: connection refused &lt;b&gt;")
		assert.Contains(t, page, "events?queue=default")
		wellBehaved(t, "overview", page)
		list := p.get("/events")
		assert.Contains(t, list, "the database broken.db is not open")
		assert.Contains(t, list, "doc_1")
		p.get("/event?id=" + id)
		assert.Equal(t, 503, p.ask(http.MethodGet, "/event?id=other", nil).StatusCode)
		assert.Equal(t, 503, p.post("/pause", url.Values{"queue": {"broken"}}).StatusCode)
		assert.Equal(t, 303, p.post("/pause", url.Values{"queue": {"default"}}).StatusCode)
		res := p.post("/retry", url.Values{"matching": {"yes"}})
		assert.Equal(t, 503, res.StatusCode)
		assert.Contains(t, content(t, res), "Due now: 1 event.")
		assert.NotContains(t, p.get("/events?queue=default"), "broken.db", "the other database is not affected")
		assert.Equal(t, 303, p.post("/retry", url.Values{"id": {id}}).StatusCode)
		assert.Equal(t, 303, p.post("/drop", url.Values{"id": {id}, "sure": {"1 event"}}).StatusCode)
	})
	t.Run("a database that is being opened", func(t *testing.T) {
		p := newDefaultPage(t)
		p.queues[0].Store = func() (store.Store, error) { return nil, nil }
		assert.Contains(t, p.get("/"), "the database queue.db is not open: it is being opened")
		assert.Equal(t, 503, p.ask(http.MethodGet, "/events", nil).StatusCode)
	})
	t.Run("a backend that is down, and a queue that is not configured", func(t *testing.T) {
		p := newDefaultPage(t)
		p.queues[0].Down = func() time.Time { return time.Now().Add(-5 * time.Minute) }
		p.event("queue.db", func(r *store.Record, _ *request.Request) { r.Queue = "old" })
		page := p.get("/")
		assert.Regexp(t, `backend down</span> since <time [^>]+>5 min ago`, page)
		assert.Contains(t, page, "This Caddy has no queue with this name")
	})
	t.Run("read-only", func(t *testing.T) {
		p := newDefaultPage(t)
		p.ReadOnly = true
		id := p.event("queue.db", nil)
		for _, view := range []string{"/", "/events", "/event?id=" + id} {
			page := p.get(view)
			assert.NotContains(t, page, `method="post"`, view)
			assert.NotContains(t, page, "checkbox", view)
			assert.Contains(t, page, "read-only", view)
		}
	})
	t.Run("too many visitors", func(t *testing.T) {
		p := newDefaultPage(t)
		p.shared.turn <- struct{}{}
		res := p.ask(http.MethodGet, "/events", nil, func(r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), 10*time.Millisecond)
			t.Cleanup(cancel)
			*r = *r.WithContext(ctx)
		})
		assert.Equal(t, 503, res.StatusCode)
	})
}

// A look reads the status of a database. All visitors see the result of one look.
func TestLooks(t *testing.T) {
	p := newDefaultPage(t)
	looks, slow, first := 0, make(chan struct{}), make(chan struct{})
	p.queues[0].Store = func() (store.Store, error) {
		switch looks++; looks {
		case 1:
			<-first
		case 2:
			<-slow
		}
		return p.stores["queue.db"], nil
	}
	res := p.ask(http.MethodGet, "/", nil)
	assert.Equal(t, "1; url=./", res.Header.Get("Refresh"))
	assert.Contains(t, content(t, res), "The events are being counted")
	close(first)
	for range 20 {
		p.get("/")
	}
	assert.Equal(t, 1, looks)
	assert.Contains(t, p.get("/"), "Pending")
	for _, l := range p.shared.looks {
		l.next = time.Time{}
	}
	began := time.Now()
	assert.Contains(t, p.get("/"), "backend up", "from the last look")
	assert.Less(t, time.Since(began), 2*time.Second)
	close(slow)
	for _, l := range p.shared.looks {
		<-l.done
	}
}

func TestWords(t *testing.T) {
	assert.Equal(t, []string{"0 events", "1 event", "999 events", "1,234,567 events"}, []string{events(0), events(1), events(999), events(1234567)})
	now := time.Now()
	assert.Equal(t, []string{"3 min ago", "in 2 min", "now"}, []string{when(now.Add(-3 * time.Minute)), when(now.Add(3 * time.Minute)), when(now)})
	assert.Equal(t, "ab…", shorten(2, "abc"))
}
