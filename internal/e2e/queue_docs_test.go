//go:build unix

package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// docBlock is a block of code in a Markdown file, with the heading above it.
type docBlock struct {
	heading, language, text string
}

// docBlocks returns the blocks of one language in a file, in their order.
func docBlocks(t *testing.T, path, language string) (blocks []docBlock) {
	t.Helper()
	heading := ""
	var block *docBlock
	for line := range strings.Lines(readFile(t, path)) {
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case isFence && block == nil:
			block = &docBlock{heading: heading, language: strings.TrimSpace(fence)}
		case isFence:
			if block.language == language {
				blocks = append(blocks, *block)
			}
			block = nil
		case block != nil:
			block.text += line
		case strings.HasPrefix(line, "#"):
			heading = strings.TrimSpace(strings.TrimLeft(line, "#"))
		}
	}
	require.Nil(t, block, "a block of %s has no end", path)
	require.NotEmpty(t, blocks, "%s has no block of %s", path, language)
	return blocks
}

// newStatus starts a backend that answers each attempt with a status that can be changed.
func newStatus(t *testing.T, code int32) (b *backend, status *atomic.Int32) {
	t.Helper()
	status = new(atomic.Int32)
	status.Store(code)
	return newTaker(t, func(string, int) int { return int(status.Load()) }), status
}

// operator is a shell that runs the commands of docs/queue.md. Scripts of the test replace the
// programs sudo, systemctl and journalctl.
type operator struct {
	t    *testing.T
	dir  string
	env  []string
	vars string
	hard atomic.Bool // whether "systemctl stop" kills Caddy, as after a timeout
}

func newOperator(t *testing.T, c *caddy) *operator {
	t.Helper()
	o := &operator{t: t, dir: t.TempDir()}
	control := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/log":
			fmt.Fprint(w, c.output.String())
		case "/stop":
			if o.hard.Load() {
				_ = c.cmd.Process.Kill()
			} else {
				_ = c.cmd.Process.Signal(os.Interrupt)
			}
			<-c.exited
		case "/start":
			c.start()
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(control.Close)
	o.vars = filepath.Join(o.dir, "vars")
	bin := t.TempDir()
	require.NoError(t, os.Symlink(caddyPath, bin+"/caddy"))
	for name, script := range map[string]string{
		"sudo":       `exec "$@"`,
		"systemctl":  `[ "$2" = caddy ] && curl -fsS -X POST "` + control.URL + `/$1"`,
		"journalctl": `[ "$*" = "-u caddy -o cat" ] && curl -fsS "` + control.URL + `/log"`,
	} {
		require.NoError(t, os.WriteFile(bin+"/"+name, []byte("#!/bin/sh\n"+script+"\n"), 0o700))
	}
	o.env = append(c.env, "PATH="+bin+":"+os.Getenv("PATH"))
	return o
}

// command returns an exec.Cmd that runs a script in bash. The variables $db and $damaged keep
// their values for the next script.
func (o *operator) command(script string) *exec.Cmd {
	cmd := exec.Command("bash", "-c", "[ ! -f vars ] || . ./vars\n"+script+"\nstatus=$?\ndeclare -p db damaged 2>/dev/null >vars\nexit $status")
	cmd.Dir, cmd.Env = o.dir, o.env
	return cmd
}

func (o *operator) run(script string) string {
	o.t.Helper()
	var out, errs bytes.Buffer
	cmd := o.command(script)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	require.NoError(o.t, err, "%s\n%s%s", script, out.String(), errs.String())
	return out.String()
}

// TestQueueDocs runs every command of docs/queue.md, from the first line to the last.
func TestQueueDocs(t *testing.T) {
	t.Parallel()
	needs(t, "bash", "curl", "sqlite3")
	const (
		exampleID = "01a212b7-70f5-73ee-bba8-3136b2a65a14"
		became    = "With the log"
	)
	caddyfiles := make(map[string]string)
	for _, block := range docBlocks(t, "../../docs/queue.md", "caddyfile") {
		caddyfiles[block.heading] = block.text
	}
	backend, status := newStatus(t, http.StatusInternalServerError)
	options, site, found := strings.Cut(strings.TrimPrefix(caddyfiles[became], "{\n"), "\n}\n")
	require.True(t, found, "the Caddyfile has global options")
	site = replaceEach(t, site, "example.com {", "http://:{{port}} {", "localhost:9000", backend.addr)
	withOption := func(option string) string {
		return replaceEach(t, site, "inkit_queue {\n", "inkit_queue {\n"+option+"\n")
	}
	c := startCaddy(t, options, site)
	o := newOperator(t, c)
	db := c.path("caddy/inkit_queue.db")

	sendEvent := func(resource string, status int) {
		t.Helper()
		body := event(resource)
		require.Equal(t, status, post(t, webhookURL(c, "/webhook"), body, sign(secret, body)).status)
	}
	list := func(arguments string) string {
		t.Helper()
		return o.run("caddy inkit-queue list --db " + db + " " + arguments)
	}
	id := "" // the id of an event; id replaces exampleID in the scripts
	waiting := func(resource string) {
		t.Helper()
		before := backend.idOf(resource)
		sendEvent(resource, http.StatusOK)
		waitFor(t, "the backend has the id of its event", c.process, func() bool { id = backend.idOf(resource); return id != before })
		waitFor(t, "the attempt has failed", c.process, func() bool { return strings.Contains(list(""), id) })
	}
	var noisy []string
	lost := 0 // the number of events that the damage has destroyed

	steps := []struct {
		heading string
		before  func()
		check   func(script string) // runs the commands of the block, and checks the result
	}{
		{"Find one event", func() { waiting("doc_1") }, func(script string) {
			out := o.run(replaceEach(t, script, exampleID, id))
			assert.Regexp(t, id+` +pending .*DOCUMENT_CREATE_FINISHED +doc_1 .*status 500\n`, out)
			assert.Contains(t, out, `"last_error": "status 500"`)
			assert.Regexp(t, `pending +1, the oldest for`, out)
		}},
		{became, nil, func(script string) {
			var out string
			waitFor(t, "the access log", c.process, func() bool {
				out = o.run(script)
				return strings.Contains(out, "handled request")
			})
			assert.Contains(t, out, `"status":200`)
			assert.NotContains(t, c.output.String(), sign(secret, event("doc_1")))
		}},
		{became, func() {
			body := event("doc_forged")
			require.Equal(t, 401, post(t, webhookURL(c, "/webhook"), body, sign("wrong", body)).status)
		}, func(script string) {
			out := o.run(script)
			assert.Contains(t, out, `"outcome":"signature_mismatch"`)
			assert.Contains(t, out, `"client_ip":"127.0.0.1"`)
			assert.NotContains(t, c.output.String(), "doc_forged", "nobody knows the resource")
		}},
		{became, nil, func(script string) {
			assert.Regexp(t, id+` +pending .*DOCUMENT_CREATE_FINISHED +doc_1 .*status 500\n`, o.run(script))
		}},
		{became, nil, func(script string) {
			out := o.run(replaceEach(t, script, exampleID, id))
			assert.Contains(t, out, `"last_error": "status 500"`)
			assert.Contains(t, out, `"Content-Type": [`)
			assert.Contains(t, out, "\n\n"+string(event("doc_1")))
			assert.NotContains(t, out, sign(secret, event("doc_1")))
			assert.Regexp(t, `"msg":"attempt","id":"`+id+`","event_type":"DOCUMENT_CREATE_FINISHED","resource_id":"doc_1","attempt":1,"status":500,.*"error":"status 500"`, out)
		}},
		{became, func() {
			waiting("doc_dead")
			c.configure(options, withOption("max_age 1s"))
			c.reload()
			waitFor(t, "both are dead", c.process, func() bool { return strings.Count(list("--state dead"), " dead ") == 2 })
			assert.Contains(t, c.output.String(), "an event is dead")
			c.configure(options, site)
			c.reload()
		}, func(script string) {
			out := o.run(replaceEach(t, script, exampleID, id))
			assert.Equal(t, "events due: 1\nevents due: 1\n", out)
			status.Store(http.StatusOK)
			waitFor(t, "both are delivered", c.process, func() bool { return backend.of("doc_1").taken > 0 && backend.of("doc_dead").taken > 0 })
			waitFor(t, "no line is left", c.process, func() bool { return strings.Count(list(""), "\n") == 1 })
			assert.Equal(t, id, backend.idOf("doc_dead"), "under the same id")
		}},
		{became, func() {
			status.Store(http.StatusInternalServerError)
			waiting("doc_dropped")
		}, func(script string) {
			assert.Equal(t, "events dropped: 1\nevents dropped: 0\n", o.run(replaceEach(t, script, exampleID, id)))
			assert.NotContains(t, list(""), id)
		}},
		{became, func() { waiting("doc_1") }, func(script string) {
			waitFor(t, "the gauges are counted", c.process, func() bool {
				out := o.run(replaceEach(t, script, "localhost:2019", c.admin))
				lines := strings.SplitN(out, "\n", 3)
				assert.NotContains(t, lines[0], "doc_", "no event is dead")
				assert.Equal(t, "1", lines[1])
				return strings.Contains(lines[2], `caddy_inkit_queue_events{queue="default",state="dead"} 0`) &&
					strings.Contains(lines[2], `caddy_inkit_queue_events{queue="default",state="pending"} 1`)
			})
		}},
		{"Pause a queue", nil, func(script string) {
			assert.Equal(t, "default is paused\ndefault is no longer paused\n", o.run(script))
		}},
		{"Look into the database", nil, func(script string) {
			out := o.run(replaceEach(t, script, "/var/lib/caddy/.local/share/caddy/inkit_queue.db", db))
			assert.Regexp(t, `^default\|pending\|1\|20\d\d-.*\n1\|status 500\n`+id+`\|pending\|\d+\n$`, out)
			columns := o.run(`sqlite3 -readonly "$db" "SELECT name FROM pragma_table_info('inkit_queue_events')"`)
			for column := range strings.Lines(columns) {
				assert.Contains(t, readFile(t, "../../docs/queue.md"), "`"+strings.TrimSpace(column)+"`", "the column is explained")
			}
		}},
		{"Back up and restore", nil, func(script string) {
			o.run(script)
			backups, err := filepath.Glob(o.dir + "/inkit_queue-*.db")
			require.NoError(t, err)
			require.Len(t, backups, 1)
			info, err := os.Stat(backups[0])
			require.NoError(t, err)
			assert.Equal(t, os.FileMode(0o600), info.Mode())
			assert.Equal(t, "ok\n1\n", o.run("sqlite3 -readonly "+backups[0]+" 'PRAGMA integrity_check' 'SELECT count(*) FROM inkit_queue_events'"))
		}},
		{"Back up and restore", func() { waiting("doc_after") }, func(script string) {
			o.hard.Store(true) // so that the database to replace has a write-ahead log
			o.run(script)
			o.hard.Store(false)
			out := list("")
			assert.Contains(t, out, "doc_1")
			assert.NotContains(t, out, "doc_after", "it is the backup")
			info, err := os.Stat(db)
			require.NoError(t, err)
			assert.Equal(t, os.FileMode(0o600), info.Mode())
		}},
		{"Move it to another disk", nil, func(script string) {
			other := t.TempDir()
			o.run(replaceEach(t, script, "/srv/queue/", other+"/"))
			assert.NoFileExists(t, db)
			db = other + "/inkit_queue.db"
			c.configure(options, withOption("store sqlite "+db))
			c.start()
			assert.Contains(t, list(""), "doc_1")
			require.NoError(t, os.WriteFile(o.vars, []byte("db="+db+"\n"), 0o600))
		}},
		{"Move it to another disk", func() {
			waiting("doc_moved")
			c.configure(options, withOption("attempt_timeout 2s")) // short leases, because the command skips leased events
			c.reload()
		}, func(script string) {
			var out strings.Builder
			for again := true; again; again = strings.Contains(out.String(), "run this again") {
				out.Reset()
				out.WriteString(o.run(replaceEach(t, script, "/etc/caddy/Caddyfile", c.path("Caddyfile"))))
			}
			assert.Equal(t, 1, strings.Count(list(""), "\n"), "none is left")
			db = c.path("caddy/inkit_queue.db")
			require.NoError(t, os.WriteFile(o.vars, []byte("db="+db+"\n"), 0o600))
			assert.Contains(t, list(""), "doc_1")
			assert.Contains(t, list(""), "doc_moved")
			status.Store(http.StatusOK)
			// Make both events due now. The command `retry` fails if an attempt at one of
			// the events is running: the test ignores this error.
			_ = o.command("caddy inkit-queue retry " + backend.idOf("doc_1") + " " + id).Run()
			waitFor(t, "both are delivered from there", c.process, func() bool { return strings.Count(list(""), "\n") == 1 })
			assert.Positive(t, backend.of("doc_moved").taken)
		}},
		{"A damaged file", func() {
			status.Store(http.StatusServiceUnavailable)
			for i := range 400 {
				noisy = append(noisy, fmt.Sprint("noisy_", i))
				sendEvent(noisy[i], http.StatusOK)
			}
			o.run("systemctl stop caddy")
			damage(t, db, "noisy_200")
			status.Store(http.StatusOK)
			c.start()
			c.logged(`"moved_to":"` + db + ".damaged-")
			sendEvent("after_damage", http.StatusOK)
		}, func(script string) {
			out := o.run(script)
			recovered, missing := 0, 0
			for _, resource := range noisy {
				switch {
				case regexp.MustCompile(resource + `\s`).MatchString(out):
					recovered++
				case backend.of(resource).taken == 0:
					missing++
				}
			}
			t.Logf("%d events are in the recovered file, and %d are lost", recovered, missing)
			assert.Positive(t, recovered)
			assert.Less(t, missing, 8, "no more than there is room for in 4 KiB")
			lost = missing
		}},
		{"A damaged file", nil, func(script string) {
			waitFor(t, "the headings alone are left", c.process, func() bool {
				out := o.run(replaceEach(t, script, "/etc/caddy/Caddyfile", c.path("Caddyfile")))
				return strings.HasSuffix(out, "LAST ERROR\n")
			})
		}},
		{"A damaged file", nil, func(script string) {
			o.run(script)
			left, err := filepath.Glob(db + ".damaged-*")
			require.NoError(t, err)
			assert.Empty(t, left)
			waitFor(t, "what was recovered is delivered", c.process, func() bool { return strings.Count(list(""), "\n") == 1 })
			for _, resource := range noisy {
				if backend.of(resource).taken == 0 {
					lost--
				}
			}
			assert.Zero(t, lost)
			waitFor(t, "the metric is 0", c.process, func() bool {
				return strings.Contains(c.get("http://"+c.admin+"/metrics"), `caddy_inkit_queue_damaged_files{queue="default"} 0`)
			})
		}},
	}
	blocks := docBlocks(t, "../../docs/queue.md", "sh")
	require.Len(t, blocks, len(steps), "each block of commands has a step here")
	for i, step := range steps {
		require.Equal(t, step.heading, blocks[i].heading, blocks[i].text)
		if step.before != nil {
			step.before()
		}
		step.check(strings.TrimSuffix(blocks[i].text, "\n"))
		if t.Failed() {
			t.Fatalf("at %s", blocks[i].text)
		}
	}
}

// damage finds a text in a database, and overwrites the database page around it.
func damage(t *testing.T, db, text string) {
	t.Helper()
	const page = 4096
	content, err := os.ReadFile(db)
	require.NoError(t, err)
	i := bytes.Index(content, []byte(text))
	require.Positive(t, i)
	i -= i % page
	for j := range page {
		content[i+j] = byte(j*7 + 13)
	}
	require.NoError(t, os.WriteFile(db, content, 0o600))
}

// TestQueueDocsCaddyfiles loads each Caddyfile of docs/queue.md without changes.
func TestQueueDocsCaddyfiles(t *testing.T) {
	t.Parallel()
	for i, block := range docBlocks(t, "../../docs/queue.md", "caddyfile") {
		file := writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), block.text)
		for _, args := range [][]string{{"fmt", "--diff", file}, {"validate", "--config", file, "--adapter", "caddyfile"}} {
			cmd := exec.Command(caddyPath, args...)
			cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "INKIT_WEBHOOK_SECRET="+secret)
			cmd.Dir = t.TempDir()
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "block %d, %s: %s", i, args[0], out)
			assert.NotContains(t, string(out), "not formatted")
		}
		assert.Contains(t, block.text, "\n\terror 404\n}\n", "block %d", i)
	}
}
