package page

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html/template"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/operator"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// The page shows at most maxBody bytes of a text, and at most maxBytes bytes of other
	// data. It indents only JSON with few brackets, because the indentation of deeply nested
	// JSON would be a thousand times as large as the JSON.
	maxBody     = 256 << 10
	maxBytes    = 4 << 10
	maxBrackets = 64
)

// words are the functions of the templates.
var words = template.FuncMap{
	"text":   func(s any) string { return request.Printable(fmt.Sprint(s), '\n') },
	"short":  shorten,
	"number": number,
	"age":    operator.Age,
	"when":   when,
	"size":   func(bytes int64) string { return humanize.IBytesN(uint64(bytes), 3) },
	"states": func() []string { return []string{store.Pending, store.Dead, store.History, "all"} },
	"after":  func(d time.Duration) time.Time { return time.Now().Add(d) },
	"future": func(t time.Time) bool { return t.After(time.Now()) },
}

// shorten replaces control characters, and cuts a long text.
func shorten(most int, s string) string {
	if runes := []rune(s); len(runes) > most {
		s = string(runes[:most]) + "…"
	}
	return request.Printable(s)
}

// number returns a number with a comma between thousands.
func number(n int) string { return humanize.Comma(int64(n)) }

func events(n int) string {
	if n == 1 {
		return "1 event"
	}
	return number(n) + " events"
}

// The function "when" returns a time relative to now as text, such as "5 min ago".
func when(t time.Time) string {
	switch ago := time.Since(t); {
	case ago >= time.Second:
		return operator.Age(ago) + " ago"
	case ago > -time.Second:
		return "now"
	default:
		return "in " + operator.Age(-ago)
	}
}

// body is the body of an event as the page shows it.
type body struct {
	Kind, Text string
	Size       int
	Cut        bool
}

func newBody(b []byte) body {
	if !utf8.Valid(b) {
		return body{Kind: "bytes", Text: hex.Dump(b[:min(len(b), maxBytes)]), Size: len(b), Cut: len(b) > maxBytes}
	}
	shown := body{Kind: "text", Size: len(b), Cut: len(b) > maxBody}
	text := strings.ToValidUTF8(string(b[:min(len(b), maxBody)]), "") // the cut may be inside a character
	var indented bytes.Buffer
	if !shown.Cut && bytes.Count(b, []byte("{"))+bytes.Count(b, []byte("[")) <= maxBrackets && json.Indent(&indented, b, "", "  ") == nil {
		shown.Kind, text = "JSON", indented.String()
	}
	shown.Text = request.Printable(text, '\n', '\t')
	return shown
}

// results are the sentences about the result of each action.
var results = map[string]string{
	"retry":  "Due now: {events}. An attempt follows immediately, unless one is running, the queue is paused, or its backend is down.",
	"drop":   "Dropped: {events}.",
	"pause":  "The queue is paused. Events are stored without attempts.",
	"resume": "The queue is no longer paused.",
}

// done returns a sentence about the result of an action. A URL can choose only the sentence and the
// number in the sentence, so that a link from another site cannot show a text of that site.
func done(action, n string, more bool) string {
	count, _ := strconv.Atoi(n)
	sentence := strings.Replace(results[action], "{events}", events(max(0, count)), 1)
	if sentence != "" && more {
		sentence += " Other events were not changed, because it took too long: do it again."
	}
	return sentence
}

// picture shows the last 24 hours, with one bar for each hour.
type picture struct {
	Bars [24]bar
	Most int
}

// bar is one hour. The positions are for a picture of 24 by 100 units.
type bar struct {
	Hour  string
	Parts [3]part
}

type part struct {
	Class     string
	Count     int
	Y, Height float64
}

// newPicture returns the picture of a database, with the sums of all its queues.
func newPicture(s store.Status) (p picture) {
	now := time.Now().UTC()
	for i := range p.Bars {
		delivered, failed, pending := 0, 0, s.Kept[i]
		for _, q := range s.Queues {
			delivered += q.Delivered[i]
			failed += q.Failed[i]
		}
		p.Bars[i].Hour = now.Add(time.Duration(i-23) * time.Hour).Format("15:04")
		p.Bars[i].Parts = [3]part{{Class: "delivered", Count: delivered}, {Class: "failed", Count: failed}, {Class: "pending", Count: pending}}
		p.Most = max(p.Most, delivered+failed+pending)
	}
	for i := range p.Bars {
		y := 100.0
		for j := range p.Bars[i].Parts {
			if part := &p.Bars[i].Parts[j]; part.Count > 0 {
				part.Height = max(1.5, 100*float64(part.Count)/float64(p.Most))
				y -= part.Height
				part.Y = max(0, y)
			}
		}
	}
	return p
}
