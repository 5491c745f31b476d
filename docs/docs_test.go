// Package docs tests what the documents say, as far as it can be told without running
// it. The rest is for internal/e2e and .ci/first-run.
package docs

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// files returns the files of the repository that match one of the patterns, by their
// path in it.
func files(t *testing.T, patterns ...string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	require.NoError(t, filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			if entry != nil && slices.Contains([]string{".git", "node_modules", "testdata"}, entry.Name()) {
				return fs.SkipDir
			}
			return err
		}
		if slices.ContainsFunc(patterns, func(pattern string) bool {
			match, _ := filepath.Match(pattern, entry.Name())
			return match
		}) {
			content, err := os.ReadFile(path)
			found[filepath.ToSlash(strings.TrimPrefix(path, ".."+string(filepath.Separator)))] = string(content)
			return err
		}
		return nil
	}))
	require.NotEmpty(t, found)
	return found
}

var fence = regexp.MustCompile("(?ms)^( *)```(\\w*)\n(.*?)^ *```$")

// blocks returns what stands between fences of a language in a document.
func blocks(document, language string) (blocks []string) {
	for _, match := range fence.FindAllStringSubmatch(document, -1) {
		if match[2] == language {
			blocks = append(blocks, strings.ReplaceAll(strings.TrimPrefix(match[3], match[1]), "\n"+match[1], "\n"))
		}
	}
	return blocks
}

// problems says what is wrong with a Caddyfile that the project shows.
func problems(t *testing.T, content string) (problems []string) {
	t.Helper()
	_, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(content), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return []string{err.Error()}
	}
	for _, warning := range warnings { // also: caddy fmt has something to change
		problems = append(problems, warning.Message)
	}
	servers, err := caddyfile.Parse("Caddyfile", []byte(content))
	require.NoError(t, err)
	for _, block := range servers {
		keys := block.GetKeysText()
		if len(keys) == 0 || strings.HasPrefix(keys[0], "(") || strings.HasPrefix(keys[0], "&(") {
			continue // global options, snippets and named routes
		}
		var directives []string
		for _, segment := range block.Segments {
			var words []string
			for _, token := range segment {
				words = append(words, token.Text)
			}
			if segment.Directive() != "handle_errors" {
				directives = append(directives, strings.Join(words, " "))
			}
		}
		if len(directives) == 0 || directives[len(directives)-1] != "error 404" {
			problems = append(problems, keys[0]+": does not end in error 404")
		}
	}
	return problems
}

func TestEveryCaddyfile(t *testing.T) {
	shown := make(map[string]string)
	for path, content := range files(t, "*.md") {
		for i, block := range blocks(content, "caddyfile") {
			shown[fmt.Sprintf("%s, block %d", path, i+1)] = block
		}
	}
	inDocuments := len(shown)
	maps.Copy(shown, files(t, "Caddyfile", "*.Caddyfile", "Caddyfile.*"))
	assert.Greater(t, inDocuments, 5)
	assert.Greater(t, len(shown)-inDocuments, 4)
	for name, content := range shown {
		t.Run(name, func(t *testing.T) {
			assert.Empty(t, problems(t, content))
		})
	}
}

// What TestEveryCaddyfile asks for, it finds.
func TestProblems(t *testing.T) {
	for _, tt := range []struct {
		name, caddyfile string
		want            []string
	}{
		{"fine", ":80 {\n\thandle /a {\n\t\trespond b\n\t}\n\terror 404\n}\n", nil},
		{"fine, with global options, a snippet and error routes", "{\n\tadmin off\n}\n\n(a) {\n\trespond a\n}\n\n:80 {\n\thandle /a {\n\t\timport a\n\t}\n\terror 404\n\thandle_errors {\n\t\trespond b\n\t}\n}\n", nil},
		{"no end", ":80 {\n\trespond b\n}\n", []string{":80: does not end in error 404"}},
		{"an end for some paths alone", ":80 {\n\terror /a 404\n}\n", []string{":80: does not end in error 404"}},
		{"an end in one of two sites", ":80 {\n\terror 404\n}\n\n:81 {\n\trespond b\n}\n", []string{":81: does not end in error 404"}},
		{"spaces", ":80 {\n    error 404\n}\n", []string{"Caddyfile input is not formatted; run 'caddy fmt --overwrite' to fix inconsistencies"}},
		{"an unknown directive", ":80 {\n\tinkit_guard\n}\n", []string{"Caddyfile:2: unrecognized directive: inkit_guard"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			assert.Equal(t, tt.want, problems(t, tt.caddyfile))
		})
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	dropped = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors are what GitHub calls the headings of a document.
func anchors(document string) (anchors []string) {
	for _, match := range heading.FindAllStringSubmatch(fence.ReplaceAllString(document, ""), -1) {
		anchors = append(anchors, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(match[1]), ""), " ", "-"))
	}
	return anchors
}

// Links within the repository lead to a file that is there, and to a heading in it.
func TestLinks(t *testing.T) {
	documents, count := files(t, "*.md"), 0
	for name, document := range documents {
		for _, match := range link.FindAllStringSubmatch(fence.ReplaceAllString(document, ""), -1) {
			target, anchor, _ := strings.Cut(match[1], "#")
			if strings.Contains(target, ":") { // of another place
				continue
			}
			count++
			path := name
			if target != "" {
				path = filepath.ToSlash(filepath.Join(filepath.Dir(name), target))
				if _, err := os.Stat(filepath.Join("..", path)); err != nil {
					assert.Fail(t, err.Error(), "%s: %s", name, match[1])
				}
			}
			if anchor != "" {
				assert.Contains(t, anchors(documents[path]), anchor, "%s: %s", name, match[1])
			}
		}
	}
	assert.Greater(t, count, 20)
}

// What the source calls things is in the README, to the letter: the grammar, the
// outcomes, the metrics and the placeholders.
func TestREADMEHasWhatTheSourceHas(t *testing.T) {
	readme := files(t, "README.md")["README.md"]
	source := files(t, "*.go")
	for _, file := range []string{"caddyfile.go", "queue/caddyfile.go"} {
		var grammar strings.Builder
		for line := range strings.Lines(source[file]) {
			if rest, ok := strings.CutPrefix(line, "//\t"); ok {
				grammar.WriteString(rest)
			}
		}
		require.Regexp(t, `^inkit_\w+ \[<matcher>\]`, grammar.String())
		assert.Contains(t, readme, "```\n"+grammar.String()+"```\n", file)
	}
	for _, tt := range []struct {
		what, file, pattern string
		least               int
	}{
		{"outcomes", "module.go", `, http\.Status\w+, ("\w+"),`, 7},
		{"metrics of the guard", "metrics.go", `Name: ("caddy_\w+"),`, 3},
		{"metrics of the queue", "queue/metrics.go", `Name: +("caddy_\w+"),`, 7},
		{"placeholders of the guard", "module.go", "`({http\\.inkit_webhook\\.\\w+})`", 4},
		{"placeholders of the queue", "queue/handler.go", "`({http\\.inkit_queue\\.\\w+})`", 3},
		{"commands of the guard", "command.go", `Use: +"(\w+) .*",`, 3},
		{"commands of the queue", "queue/command.go", `Use: +"(\w+) .*",`, 2},
		{"commands for events", "queue/command_events.go", `Use: +"(\w+) .*",`, 4},
		{"commands for queues", "queue/command_status.go", `Use: +"(\w+) .*",`, 3},
	} {
		names := regexp.MustCompile(tt.pattern).FindAllStringSubmatch(source[tt.file], -1)
		assert.GreaterOrEqual(t, len(names), tt.least, tt.what)
		for _, name := range names {
			word := strings.Trim(name[1], `"`)
			if strings.HasPrefix(tt.what, "commands") {
				assert.Regexp(t, `caddy inkit-(webhook|queue) `+word+`\b`, readme, tt.what)
			} else {
				assert.Contains(t, readme, "`"+word+"`", tt.what)
			}
		}
	}
	assert.Less(t, strings.Count(readme, "\n"), 250)
}
