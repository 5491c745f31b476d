package inkitwebhook

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// explain tells why a signature does not match: it changes the signature, the
// secret and the body in the ways in which they usually get changed by mistake,
// one at a time, and names the first change with which they match. It is for a
// person at a terminal, and not for a server: to answer an attacker with it would
// be a great help to him.
func explain(secrets []Secret, body []byte, signature string) string {
	if signature == "" {
		return "the request has no Inkit-Signature, or it is empty: it is not from Inkit, or something on the way removed the header field"
	}
	for _, s := range otherSignatures(signature) {
		for _, secret := range secrets {
			if Sign([]byte(secret.Value), body) == s.value {
				return s.cause
			}
		}
	}
	if _, err := parseSignature(signature); err != nil {
		return "Inkit sends 64 lower-case hexadecimal digits and nothing else: see what on the way changes the header field"
	}
	for _, secret := range secrets {
		for _, k := range otherKeys(secret.Value) {
			if k.value != "" && Sign([]byte(k.value), body) == signature {
				return fmt.Sprintf("%s: %s", secret.Name, k.cause)
			}
		}
	}
	for _, b := range otherBodies(body) {
		for _, secret := range secrets {
			if Sign([]byte(secret.Value), []byte(b.value)) == signature {
				return b.cause
			}
		}
	}
	return "none of the usual causes. Check that the secret is the one of this webhook in Inkit's web app, as it is now, " +
		"since Regenerate Secret Key makes a new one; and that body and signature belong to the same request and were saved before anything parsed them"
}

// variant is a value as it may have been, and what then has happened to it.
type variant struct{ value, cause string }

// otherSignatures returns what a signature in another form means.
func otherSignatures(signature string) (variants []variant) {
	trimmed := strings.Trim(signature, " \t\r\n\"'")
	if trimmed != signature {
		variants = append(variants, variant{trimmed, "the signature has white space or quotes around it"})
	}
	if lower := strings.ToLower(trimmed); lower != trimmed {
		variants = append(variants, variant{lower, "the signature is in upper-case hexadecimal digits, and Inkit sends lower case"})
	}
	if _, digits, found := strings.Cut(trimmed, "="); found {
		variants = append(variants, variant{digits, "the signature has a prefix such as sha256=, and Inkit sends none"})
	}
	for _, encoding := range base64Encodings {
		if sum, err := encoding.DecodeString(trimmed); err == nil {
			variants = append(variants, variant{hex.EncodeToString(sum), "the signature is in base64, and Inkit sends hexadecimal digits"})
		}
	}
	return variants
}

var base64Encodings = []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding}

// otherKeys returns what may have been the key in the place of secret.
func otherKeys(secret string) (variants []variant) {
	variants = append(
		variants,
		variant{strings.TrimSpace(secret), "the secret has white space around it here that does not belong to it"},
		variant{strings.Trim(secret, " \t\r\n\"'"), "the secret has quotes around it here that do not belong to it"},
		variant{secret + "\n", "the signature was made with a newline at the end of the secret"},
	)
	if decoded, err := hex.DecodeString(secret); err == nil {
		variants = append(variants, variant{string(decoded), "the signature was made with the secret decoded from hexadecimal digits, and Inkit uses its text"})
	}
	for _, encoding := range base64Encodings {
		if decoded, err := encoding.DecodeString(secret); err == nil {
			variants = append(variants, variant{string(decoded), "the signature was made with the secret decoded from base64, and Inkit uses its text"})
		}
		variants = append(variants, variant{encoding.EncodeToString([]byte(secret)), "the secret was decoded from base64 here, and Inkit uses its text"})
	}
	variants = append(variants, variant{hex.EncodeToString([]byte(secret)), "the secret was decoded from hexadecimal digits here, and Inkit uses its text"})
	return variants
}

const byteOrderMark = "\ufeff"

// otherBodies returns what may have been signed in the place of body.
func otherBodies(body []byte) (variants []variant) {
	s := string(body)
	if s != "" {
		variants = append(variants, variant{"", "the signature is that of an empty body: whoever signed it, or saved it, had read the body before"})
	}
	for _, newline := range []string{"\n", "\r\n"} {
		variants = append(variants, variant{s + newline, "the body has lost the newline at its end"})
		if trimmed, ok := strings.CutSuffix(s, newline); ok {
			variants = append(variants, variant{trimmed, "the body has got a newline at its end that was not signed"})
		}
	}
	unix := strings.ReplaceAll(s, "\r\n", "\n")
	variants = append(
		variants,
		variant{unix, "the line ends of the body were changed from LF to CRLF"},
		variant{strings.ReplaceAll(unix, "\n", "\r\n"), "the line ends of the body were changed from CRLF to LF"},
		variant{byteOrderMark + s, "the body has lost the byte order mark at its start"},
		variant{strings.TrimPrefix(s, byteOrderMark), "the body has got a byte order mark at its start that was not signed"},
	)
	for _, layout := range jsonLayouts(body) {
		for _, escaping := range jsonEscapings(layout.value) {
			cause := "the JSON was parsed and written again: what was signed is " + layout.cause + escaping.cause
			variants = append(variants, variant{escaping.value, cause}, variant{escaping.value + "\n", cause + ", with a newline at its end"})
		}
	}
	return variants
}

// jsonLayouts returns body as the usual libraries write JSON, with its members in
// the same order and sorted; nothing if it is not JSON.
func jsonLayouts(body []byte) (variants []variant) {
	var kept bytes.Buffer
	if json.Compact(&kept, body) != nil {
		return nil
	}
	orders := []variant{{kept.String(), ""}}

	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	var value any
	var sorted bytes.Buffer
	encoder := json.NewEncoder(&sorted)
	encoder.SetEscapeHTML(false)
	if decoder.Decode(&value) == nil && encoder.Encode(value) == nil {
		orders = append(orders, variant{strings.TrimSuffix(sorted.String(), "\n"), ", with its members sorted"})
	}

	for _, order := range orders {
		variants = append(
			variants,
			variant{order.value, "compact" + order.cause},
			variant{spaced(order.value), "on one line with spaces after commas and colons" + order.cause},
		)
		for _, indent := range []string{"  ", "    ", "\t"} {
			var pretty bytes.Buffer
			if json.Indent(&pretty, []byte(order.value), "", indent) == nil {
				variants = append(variants, variant{pretty.String(), fmt.Sprintf("indented by %q%s", indent, order.cause)})
			}
		}
	}
	return variants
}

// spaced puts a space after each comma and colon of compact JSON, as Python does.
func spaced(compact string) string {
	var b strings.Builder
	inString, escaped := false, false
	for _, c := range []byte(compact) {
		b.WriteByte(c)
		switch {
		case escaped:
			escaped = false
		case inString && c == '\\':
			escaped = true
		case c == '"':
			inString = !inString
		case !inString && (c == ',' || c == ':'):
			b.WriteByte(' ')
		}
	}
	return b.String()
}

// jsonEscapings returns JSON with the characters of its strings escaped in the
// ways in which the usual libraries differ.
func jsonEscapings(s string) []variant {
	plain := unescape(s)
	var html bytes.Buffer
	json.HTMLEscape(&html, []byte(plain))
	ascii := asciiEscape(plain)
	return []variant{
		{s, ""},
		{plain, ", with no character escaped that need not be"},
		{ascii, ", with characters beyond ASCII escaped"},
		{html.String(), ", with <, > and & escaped"},
		{strings.ReplaceAll(ascii, "/", `\/`), ", with slashes and characters beyond ASCII escaped"},
		{strings.ReplaceAll(plain, "/", `\/`), ", with slashes escaped"},
	}
}

// unescape writes out the escapes in the strings of JSON that JSON does not ask for.
func unescape(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if s[0] != '\\' || len(s) < 2 {
			b.WriteByte(s[0])
			s = s[1:]
			continue
		}
		length := 2
		if s[1] == 'u' && len(s) >= 6 {
			length = 6
			if len(s) >= 12 && s[6] == '\\' && s[7] == 'u' && utf16.IsSurrogate(hexRune(s[2:6])) {
				length = 12
			}
		}
		var text string
		_ = json.Unmarshal([]byte(`"`+s[:length]+`"`), &text)
		if r, _ := utf8.DecodeRuneInString(text); r < ' ' || r == '"' || r == '\\' || r == utf8.RuneError {
			text = s[:length]
		}
		b.WriteString(text)
		s = s[length:]
	}
	return b.String()
}

func hexRune(digits string) (r rune) {
	_, _ = fmt.Sscanf(digits, "%04x", &r)
	return r
}

// asciiEscape escapes all characters beyond ASCII.
func asciiEscape(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r < utf8.RuneSelf:
			b.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
