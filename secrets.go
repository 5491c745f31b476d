package inkitwebhook

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
)

// This file reads secrets from their sources, and decides which text may be a secret.

const loadWait = 10 * time.Second // time limit for reading one secret during a load

// resolveInTime calls resolve with a time limit, because a hanging file system must not block a
// load forever.
func resolveInTime(value string) (secret string, err error) {
	results := make(chan func() (string, error), 1)
	go func() {
		secret, err := resolve(value)
		results <- func() (string, error) { return secret, err }
	}()
	select {
	case result := <-results:
		return result()
	case <-time.After(loadWait):
		return "", errors.New("could not be read within 10 s")
	}
}

// resolve returns the secret for a configured value: the value of the placeholder, or the text
// itself. The errors show no part of the value or of the secret.
func resolve(value string) (secret string, err error) {
	applied := rules
	switch name, ok := placeholder.Name(value); {
	case ok:
		if secret, err = placeholder.Value(name); err != nil {
			return "", err
		}
	case value == "":
		return "", ErrEmptySecret
	default:
		secret, applied = value, slices.Concat(literalRules, rules)
	}
	for _, rule := range applied {
		if rule.form.MatchString(secret) {
			return "", rule.err
		}
	}
	if _, ok := os.LookupEnv(secret); ok {
		return "", errors.New("is the name of an environment variable, not its value: write {env.NAME}")
	}
	if isPath(secret) {
		return "", errors.New("is the path of a file, not its content: write {file./path}")
	}
	return secret, nil
}

// isPath reports whether text is the path of a file, or of a missing file in an existing
// folder. The slash alone is no proof: a secret in Base64 may start with a slash.
func isPath(text string) bool {
	if !strings.HasPrefix(text, "/") {
		return false
	}
	for _, path := range []string{text, filepath.Dir(text)} {
		if _, err := os.Stat(path); path != "/" && (err == nil || errors.Is(err, fs.ErrPermission)) {
			return true
		}
	}
	return false
}

var (
	errNotAlone         = errors.New("must be only the secret, not JSON or a template")
	errUnknownReference = errors.New("refers to a secret in a form that Caddy does not know: write {env.NAME} or {file./path}")
)

type rule struct {
	name string
	form *regexp.Regexp
	err  error
}

// rules match a text that cannot be a secret of Inkit: the content of a damaged file, a text with
// more than the secret in it, or a reference instead of the secret (anybody can guess a reference).
// The first matching rule sets the error. A test has examples for each rule, under the rule's name.
var rules = []rule{
	{"not UTF-8", regexp.MustCompile(`\x{FFFD}`), errors.New("must be UTF-8")}, // regexp reads invalid bytes as U+FFFD
	{"white space around it", regexp.MustCompile(`^[\s\pZ]|[\s\pZ]$`), errors.New("must not start or end with white space")},
	{"invisible character", regexp.MustCompile(`[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]`), errors.New("must not contain a line break, a control character or another invisible character")},
	{"quotes", regexp.MustCompile("^(\".*\"|'.*'|`.*`)$"), errors.New("must not be in quotes")},
	{"JSON or template", regexp.MustCompile(`^(\{.*\}|\[.*\]|<.*>)$`), errNotAlone},
	{"no value in a programming language", regexp.MustCompile(`^(?i:null|nil|none|undefined|true|false)$`), errNotAlone},
	{"variable of a shell", regexp.MustCompile(`^\$[A-Z_][A-Z0-9_]*$`), errUnknownReference},
	{"expression of a shell", regexp.MustCompile(`^\$[{(]`), errUnknownReference},
	{"variable of Windows", regexp.MustCompile(`^%\w+%$`), errUnknownReference},
	{"placeholder without braces", regexp.MustCompile(`^(?i:env|file|process\.env)[.:(]`), errUnknownReference},
	{"URL", regexp.MustCompile(`^\w+://`), errUnknownReference},
	{"name of a variable", regexp.MustCompile(`^[A-Z]+(_[A-Z]+)+$`), errUnknownReference},
	{"placeholder without its last brace", regexp.MustCompile(`^\{[\w.$]+$`), errUnknownReference},
	{"path from a known folder", regexp.MustCompile(`^(~|@|\.\.?)/`), errUnknownReference},
	{"placeholder inside a text", regexp.MustCompile(`\{(\$|env\.|file\.)`), errUnknownReference},
	{"dots that hide the secret", regexp.MustCompile(`^[*•●]+$`), errors.New("must be the secret itself, not the dots that hide it")},
	{"assignment", regexp.MustCompile(`^(export\s+)?[A-Za-z_]\w*=[^=]`), errors.New("must be only the secret, not NAME=value")},
}

// literalRules are checked before the table rules, but only for a secret in the configuration. The
// value of a placeholder, such as a secret in a file, may start with a dollar sign or have braces.
var literalRules = []rule{
	{"variable without braces", regexp.MustCompile(`^\$[\w:.]+$`), errUnknownReference},
	{"text around a placeholder", regexp.MustCompile(`\{(\w+\.|\$)`), errors.New("must be either one placeholder and nothing else, or a text without placeholders")},
}
