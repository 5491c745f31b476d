// Package docs tests the documents, but does not run their commands: internal/e2e and
// .ci/first-run do this.
package docs

import (
	"cmp"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

// files returns the files of the repository that match one of the patterns. The keys are
// paths in the repository.
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

// blocks returns the code blocks of a language in a document.
func blocks(document, language string) (blocks []string) {
	for _, match := range fence.FindAllStringSubmatch(document, -1) {
		if match[2] == language {
			blocks = append(blocks, strings.ReplaceAll(strings.TrimPrefix(match[3], match[1]), "\n"+match[1], "\n"))
		}
	}
	return blocks
}

// problems returns the faults of a Caddyfile of this repository.
func problems(t *testing.T, content string) (problems []string) {
	t.Helper()
	_, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(content), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return []string{err.Error()}
	}
	for _, warning := range warnings { // for example, the file is not formatted
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
		// a site that ends in inkit_queue_page needs no `error 404`: the page answers all paths
		if len(directives) == 0 || directives[len(directives)-1] != "error 404" && !endsInPage(directives) {
			problems = append(problems, keys[0]+": does not end in error 404")
		}
	}
	return problems
}

// endsInPage reports whether a site ends in the directive inkit_queue_page without a
// matcher. If the site is only a route, endsInPage looks into the route.
func endsInPage(directives []string) bool {
	words := strings.Fields(directives[len(directives)-1])
	if words[0] == "route" && len(directives) == 1 {
		words = words[max(0, slices.Index(words, "inkit_queue_page")):]
	}
	return words[0] == "inkit_queue_page" && (len(words) == 1 || words[1] == "{")
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

// TestProblems checks that TestEveryCaddyfile finds faults.
func TestProblems(t *testing.T) {
	for _, tt := range []struct {
		name, caddyfile string
		want            []string
	}{
		{"fine", ":80 {\n\thandle /a {\n\t\trespond b\n\t}\n\terror 404\n}\n", nil},
		{"fine, with global options, a snippet and error routes", "{\n\tadmin off\n}\n\n(a) {\n\trespond a\n}\n\n:80 {\n\thandle /a {\n\t\timport a\n\t}\n\terror 404\n\thandle_errors {\n\t\trespond b\n\t}\n}\n", nil},
		{"fine, with the page of the queue at its end", ":80 {\n\tinkit_queue_page\n}\n", nil},
		{"a page only for some paths", ":80 {\n\tinkit_queue_page /queue/*\n}\n", []string{":80: does not end in error 404"}},
		{"no error 404", ":80 {\n\trespond b\n}\n", []string{":80: does not end in error 404"}},
		{"error 404 only for some paths", ":80 {\n\terror /a 404\n}\n", []string{":80: does not end in error 404"}},
		{"error 404 in only one of two sites", ":80 {\n\terror 404\n}\n\n:81 {\n\trespond b\n}\n", []string{":81: does not end in error 404"}},
		{"indented by spaces", ":80 {\n    error 404\n}\n", []string{"Caddyfile input is not formatted; run 'caddy fmt --overwrite' to fix inconsistencies"}},
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

// anchors returns GitHub's anchors of a document's headings.
func anchors(document string) (anchors []string) {
	for _, match := range heading.FindAllStringSubmatch(fence.ReplaceAllString(document, ""), -1) {
		anchors = append(anchors, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(match[1]), ""), " ", "-"))
	}
	return anchors
}

// Links within the repository lead to an existing file and heading.
func TestLinks(t *testing.T) {
	documents, count := files(t, "*.md"), 0
	for name, document := range documents {
		for _, match := range link.FindAllStringSubmatch(fence.ReplaceAllString(document, ""), -1) {
			target, anchor, _ := strings.Cut(match[1], "#")
			if strings.Contains(target, ":") { // the URL of another site
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

// The documents show the Caddyfile syntax in the source, and name all outcomes, metrics,
// placeholders and commands of the source.
func TestDocsHaveTheWordsOfTheSource(t *testing.T) {
	readme := files(t, "README.md")["README.md"]
	reference := files(t, "reference.md")["docs/reference.md"] + files(t, "monitoring.md")["docs/monitoring.md"]
	source := files(t, "*.go")
	for _, file := range []string{"caddyfile.go", "queue/caddyfile.go", "queue/page/caddyfile.go"} {
		var grammar strings.Builder
		for line := range strings.Lines(source[file]) {
			if rest, ok := strings.CutPrefix(line, "//\t"); ok {
				grammar.WriteString(rest)
			}
		}
		require.Regexp(t, `^inkit_\w+ \[<matcher>\]`, grammar.String())
		document := readme
		if strings.HasPrefix(grammar.String(), "inkit_queue_page") {
			document = files(t, "page.md")["docs/page.md"]
		}
		assert.Contains(t, document, "```\n"+grammar.String()+"```\n", file)
	}
	for _, tt := range []struct {
		what, file, pattern string
		least               int
	}{
		{"outcomes", "module.go", `, http\.Status\w+, ("\w+"),`, 7},
		{"metrics of the guard", "metrics.go", `Name: ("caddy_\w+"),`, 3},
		{"metrics of the queue", "queue/metrics.go", `(?:Name: +|gauge\()("caddy_\w+"),`, 8},
		{"placeholders of the guard", "module.go", "`({http\\.inkit_webhook\\.\\w+})`", 4},
		{"placeholders of the queue", "queue/handler.go", "`({http\\.inkit_queue\\.\\w+})`", 3},
		{"commands of the guard", "command.go", `Use: +"(\w+) .*",`, 3},
		{"commands of the queue", "queue/command.go", `Use: +"(\w+) .*",`, 2},
		{"commands that show events", "queue/command_events.go", `Use: +"(\w+) .*",`, 2},
		{"commands that change events", "queue/command_change.go", `Use: +"(\w+) .*",`, 2},
		{"commands for queues", "queue/command_status.go", `Use: +"(\w+) .*",`, 3},
	} {
		names := regexp.MustCompile(tt.pattern).FindAllStringSubmatch(source[tt.file], -1)
		assert.GreaterOrEqual(t, len(names), tt.least, tt.what)
		for _, name := range names {
			word := strings.Trim(name[1], `"`)
			if strings.HasPrefix(tt.what, "commands") {
				assert.Regexp(t, `caddy inkit-(webhook|queue) `+word+`\b`, readme+reference, tt.what)
			} else {
				assert.Contains(t, reference, "`"+word+"`", tt.what)
			}
		}
	}
	assert.LessOrEqual(t, strings.Count(readme, "\n"), 200)
}

// CONTRIBUTING.md has a drawing of the packages of the queue. All imports follow its arrows.
func TestImportsRunAlongTheArrows(t *testing.T) {
	drawing := files(t, "CONTRIBUTING.md")["CONTRIBUTING.md"]
	packages := make(map[string]string) // by the name in the drawing
	for _, match := range regexp.MustCompile(`(?m)^\t(\w+)\["<b>([\w/]+)</b>`).FindAllStringSubmatch(drawing, -1) {
		packages[match[1]] = match[2]
	}
	below := make(map[string]map[string]bool) // the packages below each package
	for _, line := range regexp.MustCompile(`(?m)^\t\w+( & \w+)* --> .*$`).FindAllString(drawing, -1) {
		steps := strings.Split(strings.TrimSpace(line), " --> ")
		for i, step := range steps[1:] {
			for upper := range strings.SplitSeq(steps[i], " & ") {
				for lower := range strings.SplitSeq(step, " & ") {
					require.NotEmpty(t, packages[upper], upper)
					require.NotEmpty(t, packages[lower], lower)
					if below[packages[upper]] == nil {
						below[packages[upper]] = make(map[string]bool)
					}
					below[packages[upper]][packages[lower]] = true
				}
			}
		}
	}
	var reaches func(from, to string) bool
	reaches = func(from, to string) bool {
		for lower := range below[from] {
			if lower == to || reaches(lower, to) {
				return true
			}
		}
		return false
	}
	const module = "github.com/inkit-webhooks/caddy-inkit-webhook/"
	list := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./queue/...")
	list.Dir = ".."
	out, err := list.Output()
	require.NoError(t, err)
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		from := strings.TrimPrefix(words[0], module)
		if strings.HasSuffix(from, "storetest") {
			continue
		}
		assert.Contains(t, slices.Collect(maps.Values(packages)), from, "the drawing lacks a package")
		for _, imported := range words[1:] {
			if to, ours := strings.CutPrefix(imported, module+"queue"); ours {
				assert.True(t, reaches(from, "queue"+to), "%s imports queue%s", from, to)
			}
		}
	}
}

var verb = regexp.MustCompile(`%[a-z]`)

var update = flag.Bool("update", false, "write testdata/messages.txt")

// TestMessages compares all log lines and errors of the module with testdata/messages.txt,
// so that you can read all messages in one file.
func TestMessages(t *testing.T) {
	var messages []string
	parsed := make(map[string]*ast.File)
	constants := make(map[string]string) // by folder and name
	for name, source := range files(t, "*.go") {
		if !strings.HasSuffix(name, "_test.go") && !regexp.MustCompile(`^(bench|examples|internal/(e2e|pgtest|powercut))/|/storetest/`).MatchString(name) {
			file, err := parser.ParseFile(token.NewFileSet(), name, source, 0)
			require.NoError(t, err)
			parsed[name] = file
			ast.Inspect(file, func(node ast.Node) bool {
				if spec, ok := node.(*ast.ValueSpec); ok && len(spec.Values) == len(spec.Names) {
					for i, value := range spec.Values {
						if literal, ok := value.(*ast.BasicLit); ok {
							constants[path.Dir(name)+"."+spec.Names[i].Name] = text(literal, nil, "")
						}
					}
				}
				return true
			})
		}
	}
	for name, file := range parsed {
		ast.Inspect(file, func(node ast.Node) bool {
			if call, ok := node.(*ast.CallExpr); ok {
				if kind, argument := message(call); kind != "" {
					if found := text(argument, constants, path.Dir(name)); strings.ContainsAny(verb.ReplaceAllString(found, ""), "abcdefghijklmnopqrstuvwxyz") {
						messages = append(messages, fmt.Sprintf("%-24s %-5s %s", path.Dir(name), kind, found))
					}
				}
			}
			return true
		})
	}
	slices.Sort(messages)
	got := strings.Join(slices.Compact(messages), "\n") + "\n"
	if *update {
		require.NoError(t, os.WriteFile("testdata/messages.txt", []byte(got), 0o600))
	}
	want, err := os.ReadFile("testdata/messages.txt")
	require.NoError(t, err)
	assert.Equal(t, string(want), got, "go test ./docs -run TestMessages -update")
}

// message returns the text of an error or of a log line. kind is "error", or the level of the line.
func message(call *ast.CallExpr) (kind string, argument ast.Expr) {
	function := types.ExprString(call.Fun)
	receiver, method := function[:max(0, strings.LastIndex(function, "."))], function[strings.LastIndex(function, ".")+1:]
	log := strings.HasSuffix(strings.ToLower(strings.TrimSuffix(receiver, ".Load()")), "logger")
	switch {
	case len(call.Args) == 0:
	case slices.Contains([]string{"errors.New", "fmt.Errorf", "d.Err", "d.Errf"}, function):
		return "error", call.Args[0]
	case log && slices.Contains([]string{"Debug", "Info", "Warn", "Error"}, method):
		return strings.ToUpper(method), call.Args[0]
	case log && method == "Check":
		level, constant := strings.CutSuffix(strings.TrimPrefix(types.ExprString(call.Args[0]), "zapcore."), "Level")
		if !constant {
			level = "ANY"
		}
		return strings.ToUpper(level), call.Args[1]
	}
	return "", nil
}

// text returns the constant text of an expression, with "..." for its other parts.
func text(expr ast.Expr, constants map[string]string, folder string) string {
	switch e := expr.(type) {
	case *ast.BasicLit:
		unquoted, _ := strconv.Unquote(e.Value)
		return unquoted
	case *ast.BinaryExpr:
		return text(e.X, constants, folder) + text(e.Y, constants, folder)
	case *ast.Ident:
		return cmp.Or(constants[folder+"."+e.Name], "...")
	}
	return "..."
}
