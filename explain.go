package inkitwebhook

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
)

// explain returns the cause of a mismatch. It tries the usual mistakes with the signature,
// the secret and the body, one at a time, and returns the first mistake that explains the
// signature. Only a person at a terminal may see the cause: in the response of a server,
// it would help an attacker.
func explain(secrets []Secret, body []byte, signature string) (cause string) {
	if signature == "" {
		return "Inkit-Signature is missing or empty: the request is not from Inkit, or a program on the way removed the header field"
	}
	// Only the first match sets the cause. The variants of the body are tried one at a time,
	// so that only one of them is in memory: a body may be large.
	try := func(secret, body, signature, why string) {
		if cause == "" && secret != "" && Sign([]byte(secret), []byte(body)) == signature {
			cause = why
		}
	}
	for _, secret := range secrets {
		trySignatures(signature, func(variant, why string) { try(secret.Value, string(body), variant, why) })
	}
	if _, err := parseSignature(signature); err != nil && cause == "" {
		return "Inkit sends 64 lower-case hexadecimal digits and nothing else: find the program on the way that changes the header field"
	}
	for _, secret := range secrets {
		trySecrets(secret.Value, func(variant, why string) { try(variant, string(body), signature, secret.Name+": "+why) })
	}
	tryBodies(string(body), func(variant, why string) {
		for _, secret := range secrets {
			try(secret.Value, variant, signature, why)
		}
	})
	if cause == "" {
		cause = "none of the usual causes. Compare the secret with the current one of this webhook in Inkit's web app: Regenerate Secret Key makes a new one. " +
			"Check that body and signature belong to the same request, and that the body was saved before any program parsed it"
	}
	return cause
}

// trySignatures calls `try` with other forms of the signature.
func trySignatures(signature string, try func(variant, why string)) {
	trimmed := strings.Trim(signature, " \t\r\n\"'")
	try(trimmed, "the signature has white space or quotes around it")
	try(strings.ToLower(trimmed), "the signature is in upper-case hexadecimal digits, and Inkit sends lower case")
	_, digits, _ := strings.Cut(trimmed, "=")
	try(digits, "the signature has a prefix such as sha256=, and Inkit sends none")
	for _, encoding := range base64Encodings {
		if sum, err := encoding.DecodeString(trimmed); err == nil {
			try(hex.EncodeToString(sum), "the signature is in base64, and Inkit sends hexadecimal digits")
		}
	}
}

var base64Encodings = []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding}

// trySecrets calls `try` with other secrets that the signer may have used.
func trySecrets(secret string, try func(variant, why string)) {
	try(strings.TrimSpace(secret), "the secret here has white space around it, which is not part of it")
	try(strings.Trim(secret, " \t\r\n\"'"), "the secret here has quotes around it, which are not part of it")
	try(secret+"\n", "the signature was made with a newline at the end of the secret")
	if decoded, err := hex.DecodeString(secret); err == nil {
		try(string(decoded), "the signature was made with the secret decoded from hexadecimal digits, and Inkit uses its text")
	}
	try(hex.EncodeToString([]byte(secret)), "the secret was decoded from hexadecimal digits here, and Inkit uses its text")
	for _, encoding := range base64Encodings {
		if decoded, err := encoding.DecodeString(secret); err == nil {
			try(string(decoded), "the signature was made with the secret decoded from base64, and Inkit uses its text")
		}
		try(encoding.EncodeToString([]byte(secret)), "the secret was decoded from base64 here, and Inkit uses its text")
	}
}

// tryBodies calls `try` with other bodies that the signer may have signed.
func tryBodies(body string, try func(variant, why string)) {
	try("", "the signature is of an empty body: the program that signed or saved the body had already read it")
	for _, newline := range []string{"\n", "\r\n"} {
		try(body+newline, "the newline at the end of the body was removed")
		try(strings.TrimSuffix(body, newline), "a newline was added at the end of the body")
	}
	unix := strings.ReplaceAll(body, "\r\n", "\n")
	try(unix, "the line ends of the body were changed from LF to CRLF")
	try(strings.ReplaceAll(unix, "\n", "\r\n"), "the line ends of the body were changed from CRLF to LF")
	try("\ufeff"+body, "the byte order mark at the start of the body was removed")
	try(strings.TrimPrefix(body, "\ufeff"), "a byte order mark was added at the start of the body")
	tryLayouts(body, func(variant, layout string) {
		why := "the JSON was parsed and written again: the signed body is " + layout
		try(variant, why)
		try(variant+"\n", why+", with a newline at its end")
	})
}

// tryLayouts calls `try` with the JSON of `body` in the layouts of the usual libraries: first
// with the members in their original order, then with the members sorted. tryLayouts skips large
// or deeply nested JSON, because the indented JSON could be many times as large.
func tryLayouts(body string, try func(variant, layout string)) {
	if len(body) > 64<<10 || depth(body) > 8 {
		return
	}
	var unsorted, sorted bytes.Buffer
	var value any
	decoder, encoder := json.NewDecoder(strings.NewReader(body)), json.NewEncoder(&sorted)
	decoder.UseNumber()
	encoder.SetEscapeHTML(false)
	if json.Compact(&unsorted, []byte(body)) != nil || decoder.Decode(&value) != nil || encoder.Encode(value) != nil {
		return
	}
	for i, compact := range []string{unsorted.String(), strings.TrimSuffix(sorted.String(), "\n")} {
		order := []string{"", ", with its members sorted"}[i]
		try(compact, "compact"+order)
		try(spaced(compact), "on one line with spaces after commas and colons"+order)
		for _, indent := range []string{"  ", "    ", "\t"} {
			var pretty bytes.Buffer
			if json.Indent(&pretty, []byte(compact), "", indent) == nil {
				try(pretty.String(), fmt.Sprintf("indented by %q%s", indent, order))
			}
		}
	}
}

// depth returns how deeply JSON is nested. Brackets in strings count, too.
func depth(body string) (deepest int) {
	level := 0
	for _, c := range body {
		level += strings.Count("{[", string(c)) - strings.Count("}]", string(c))
		deepest = max(deepest, level)
	}
	return deepest
}

var stringOrSeparator = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|[,:]`)

// spaced puts a space after each comma and colon of compact JSON, as Python does.
func spaced(compact string) string {
	return stringOrSeparator.ReplaceAllStringFunc(compact, func(match string) string {
		if match == "," || match == ":" {
			match += " "
		}
		return match
	})
}
