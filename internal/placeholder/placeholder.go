// Package placeholder reads secrets from files and variables. Its errors show no part of a
// secret.
package placeholder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

const maxFile = 1 << 20 // in bytes

// Name returns the text between the braces of value. It returns false unless value is exactly
// one placeholder.
func Name(value string) (name string, ok bool) {
	name = strings.TrimSuffix(strings.TrimPrefix(value, "{"), "}")
	return name, value == "{"+name+"}" && name != "" && !strings.ContainsAny(name, "{}")
}

// Value returns the value of a placeholder. It makes its own checks, because Caddy's replacer
// accepts an unset variable and a missing file, and cuts off a large file.
func Value(name string) (string, error) {
	if strings.HasPrefix(name, "http.") {
		return "", errors.New("placeholder belongs to a request, and secrets are resolved before any request")
	}
	if strings.HasPrefix(name, "time.") || strings.HasPrefix(name, "system.") {
		return "", errors.New("placeholder is not secret: anybody can guess its value")
	}
	if file, ok := strings.CutPrefix(name, "file."); ok {
		if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() { // reading a pipe would wait
			return "", errors.New("file cannot be read: not a regular file")
		}
		return ReadFile(file)
	}
	secret, known := caddy.NewReplacer().GetString(name)
	switch {
	case !known:
		return "", errors.New("placeholder is unknown")
	case strings.Trim(secret, "\r\n") != "":
		return secret, nil
	case strings.HasPrefix(name, "env."):
		return "", errors.New("environment variable is unset or empty")
	}
	return "", errors.New("placeholder is empty")
}

// ReadFile returns the content of a file without the newline at its end, as the
// placeholder {file.*} does. The errors do not show the file's name.
func ReadFile(name string) (string, error) {
	var content []byte
	file, err := os.Open(name)
	if err == nil {
		defer file.Close()
		content, err = io.ReadAll(io.LimitReader(file, maxFile+1))
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
	switch {
	case err != nil: // err is an fs.PathError: Unwrap removes the file's name
		return "", fmt.Errorf("file cannot be read: %w", errors.Unwrap(err))
	case len(content) > maxFile:
		return "", errors.New("file is larger than 1 MiB")
	case strings.Trim(secret, "\r\n") == "":
		return "", errors.New("file is empty")
	}
	return secret, nil
}
