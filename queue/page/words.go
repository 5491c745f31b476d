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

	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/internal/request"
	"github.com/inkit-webhooks/caddy-inkit-webhook/queue/store"
)

const (
	// The page shows at most maxBody bytes of a text, and at most maxBytes bytes of other
	// data. It indents JSON only up to maxDepth levels, because the indentation of deeply
	// nested JSON would be a thousand times as large as the JSON.
	maxBody  = 256 << 10
	maxBytes = 4 << 10
	maxDepth = 64
)

// words are the functions of the templates.
var words = template.FuncMap{
	"text":   func(s any) string { return request.Printable(fmt.Sprint(s)) },
	"short":  shorten,
	"number": number,
	"events": func(n int) string { return plural(n, "event") },
	"time":   newMoment,
	"age":    age,
	"size":   size,
	"states": func() []string { return []string{store.Pending, store.Dead, store.History, "all"} },
	"after":  func(d time.Duration) moment { return newMoment(time.Now().Add(d)) },
}

// shorten replaces control characters, and cuts a long text.
func shorten(most int, s string) string {
	if runes := []rune(s); len(runes) > most {
		s = string(runes[:most]) + "…"
	}
	return request.Printable(s)
}

// number returns a number with a comma between thousands.
func number(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return number(n) + " " + noun + "s"
}

func size(bytes int64) string {
	switch {
	case bytes >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", (bytes+1023)/1024)
}

// age returns a duration in one unit, such as 5 min.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return strconv.Itoa(int(d.Seconds())) + " s"
	case d < time.Hour:
		return strconv.Itoa(int(d.Minutes())) + " min"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + " h"
	}
	return plural(int(d.Hours()/24), "day")
}

// moment is a time: relative to now in words, and exact.
type moment struct{ Words, Exact, Title string }

func newMoment(t time.Time) moment {
	m := moment{Exact: t.UTC().Format(time.RFC3339), Title: t.UTC().Format("2006-01-02 15:04:05 UTC")}
	switch ago := time.Since(t); {
	case ago >= time.Second:
		m.Words = age(ago) + " ago"
	case ago > -time.Second:
		m.Words = "now"
	default:
		m.Words = "in " + age(-ago)
	}
	return m
}

// body is a body as the page shows it.
type body struct {
	Kind, Text string
	Size       int
	Cut        bool
}

func newBody(b []byte) body {
	shown := body{Kind: "text", Size: len(b), Cut: len(b) > maxBody}
	var indented bytes.Buffer
	switch {
	case !utf8.Valid(b):
		b = b[:min(len(b), maxBytes)]
		shown.Kind, shown.Cut, shown.Text = "bytes", len(b) < shown.Size, hex.Dump(b)
		return shown
	case !shown.Cut && depth(b) <= maxDepth && json.Indent(&indented, b, "", "  ") == nil:
		shown.Kind, b = "JSON", indented.Bytes()
	}
	shown.Text = request.Printable(strings.ToValidUTF8(string(b[:min(len(b), maxDepth*maxBody)]), ""), '\n', '\t')
	if shown.Cut {
		shown.Text = request.Printable(strings.ToValidUTF8(string(b[:maxBody]), ""), '\n', '\t')
	}
	return shown
}

// depth returns the nesting depth of JSON. Brackets in strings count, too.
func depth(b []byte) (most int) {
	now := 0
	for _, c := range b {
		switch c {
		case '{', '[':
			now++
			most = max(most, now)
		case '}', ']':
			now--
		}
	}
	return most
}

// done returns a sentence about the result of an action. A URL can only choose one of these
// sentences and its number, so a link from another site cannot show its own text.
func done(code, n string, more bool) string {
	count, err := strconv.Atoi(n)
	if err != nil || count < 0 {
		count = 0
	}
	were, are := " were", " are"
	if count == 1 {
		were, are = " was", " is"
	}
	sentence := ""
	switch code {
	case "retried":
		sentence = plural(count, "event") + are + " due now: an attempt follows immediately, unless the queue is paused or its backend is down."
		if count == 0 {
			sentence = "No event was changed. A retry does not change an event during an attempt."
		}
	case "dropped":
		sentence = plural(count, "event") + were + " dropped."
	case "paused":
		sentence = "The queue is paused. Events are stored without attempts."
	case "resumed":
		sentence = "The queue is no longer paused."
	case "none":
		return "No event was selected, so nothing has changed."
	case "same":
		return "The queue was already in this state, so nothing has changed."
	}
	if sentence != "" && more {
		sentence += " Other events were not changed, because it took too long: do it again."
	}
	return sentence
}

// picture shows the last 24 hours, with one bar for each hour.
type picture struct {
	Bars []bar
	Most int
}

// bar is one hour. The positions are for a picture of 24 by 100 units.
type bar struct {
	X                          int
	Hour                       string
	Delivered, Failed, Pending int
	Parts                      []part
}

type part struct {
	Class     string
	Y, Height float64
}

// newPicture returns the picture of a database, with the sums of all its queues.
func newPicture(s store.Status) (p picture) {
	p.Bars = make([]bar, 24)
	now := time.Now().UTC()
	for i := range p.Bars {
		b := &p.Bars[i]
		b.X, b.Hour, b.Pending = i, now.Add(time.Duration(i-23)*time.Hour).Format("15:04"), s.Kept[i]
		for _, q := range s.Queues {
			b.Delivered += q.Delivered[i]
			b.Failed += q.Failed[i]
		}
		p.Most = max(p.Most, b.Delivered+b.Failed+b.Pending)
	}
	for i := range p.Bars {
		b, y := &p.Bars[i], 100.0
		for _, row := range []struct {
			class string
			n     int
		}{{"delivered", b.Delivered}, {"failed", b.Failed}, {"pending", b.Pending}} {
			if row.n > 0 {
				height := max(1.5, 100*float64(row.n)/float64(p.Most))
				y -= height
				b.Parts = append(b.Parts, part{row.class, max(0, y), height})
			}
		}
	}
	return p
}
