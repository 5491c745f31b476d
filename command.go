package inkitwebhook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"
	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "inkit-webhook",
		Short: "Signs, verifies and sends Inkit webhooks",
		Long: `
Signs bodies as Inkit does, explains why a signature does not match, and sends
signed events to test a site.

The commands read the secret from the environment variable INKIT_WEBHOOK_SECRET
or from files. They do not accept it on the command line, where other users of
the machine could see it, and they never print it.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Args = cobra.NoArgs // otherwise an unknown command prints the help, with status 0
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			cmd.AddCommand(signCommand(), verifyCommand(), sendCommand())
			for _, sub := range cmd.Commands() {
				sub.SilenceUsage = true
			}
		},
	})
}

func signCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sign [--secret-file <file>] [<file>|-]",
		Short: "Prints the signature of a body",
		Long: `
Prints the signature that Inkit sends with a body: the HMAC-SHA256 of its bytes
in lower-case hexadecimal digits. It reads the body from a file or from standard
input. Every byte counts, including a final newline.
`,
		Example: `  printf %s '{"event_type":"DOCUMENT_DELETED"}' | INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook sign`,
		Args:    cobra.MaximumNArgs(1),
	}
	file := cmd.Flags().String("secret-file", "", "File with the secret; INKIT_WEBHOOK_SECRET if left out")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		secrets, err := commandSecrets(*file)
		if err != nil {
			return err
		}
		body, err := readInput(args...)
		if err != nil {
			return err
		}
		fmt.Println(Sign([]byte(secrets[0].Value), body))
		return nil
	}
	return cmd
}

func verifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify --signature <signature> [--secret-file <file>]... [<file>|-]",
		Short: "Verifies the signature of a body, or explains why it does not match",
		Long: `
Verifies the signature of a body from a file or from standard input. If one of
the secrets made the signature, prints the file or variable of that secret, and
exits with status 0. If not, prints the cause, and exits with status 1. It tries
the usual causes, such as a body that lost its final newline or was parsed and
written again. It never guesses: the signature matches without the named cause.
`,
		Example: `  printf %s '{"event_type":"DOCUMENT_DELETED"}' | INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook verify --signature d523ce83c5dc06cc5c0f5c752174ecd2d00ed5c8227324e36814ea230b75ad09`,
		Args:    cobra.MaximumNArgs(1),
	}
	signature := cmd.Flags().String("signature", "", "The value of Inkit-Signature; required")
	files := cmd.Flags().StringArray("secret-file", nil, "File with a secret, can be repeated; INKIT_WEBHOOK_SECRET if left out")
	_ = cmd.MarkFlagRequired("signature")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		secrets, err := commandSecrets(*files...)
		if err != nil {
			return err
		}
		verifier, err := NewVerifier(secrets...)
		if err != nil {
			return err
		}
		body, err := readInput(args...)
		if err != nil {
			return err
		}
		name, err := verifier.Verify(body, *signature)
		if err != nil {
			name = explain(secrets, body, *signature)
		}
		fmt.Println(name)
		return err
	}
	return cmd
}

func sendCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "send [--secret-file <file>] [--event-type <type>] [--resource-id <id>] [--body <file>] [--count <n>] [--rate <n>] <url>",
		Short: "Signs an event and sends it to a URL",
		Long: `
Signs an event and posts it to a URL as Inkit does, then prints the status and
the body of the response. With --count, the last line is a summary. Exits with
status 0 if every status is 2xx, and with 1 if not. It sends nothing to any other
URL: it follows no redirects, and uses no proxy.
`,
		Example: `  INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook send --event-type DOCUMENT_DELETED http://localhost:8080/webhook`,
		Args:    cobra.ExactArgs(1),
	}
	flags := cmd.Flags()
	secretFile := flags.String("secret-file", "", "File with the secret; INKIT_WEBHOOK_SECRET if left out")
	eventType := flags.String("event-type", "DOCUMENT_CREATE_FINISHED", "The event_type of the event")
	resourceID := flags.String("resource-id", "doc_test", "The resource_id of the event")
	file := flags.String("body", "", "File to send instead of an event, - for standard input")
	count := flags.Int("count", 1, "Number of times to send the event")
	rate := flags.Float64("rate", 0, "Maximum number of events a second, from 0.001 to 1000000; no limit if left out")
	cmd.MarkFlagsMutuallyExclusive("body", "event-type")
	cmd.MarkFlagsMutuallyExclusive("body", "resource-id")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		var interval time.Duration
		if flags.Changed("rate") {
			if !(*rate >= 0.001 && *rate <= 1e6) { // also refuses NaN
				return errors.New("rate: must be from 0.001 to 1000000")
			}
			interval = time.Duration(float64(time.Second) / *rate)
		}
		if *count < 1 {
			return errors.New("count: must be at least 1")
		}
		secrets, err := commandSecrets(*secretFile)
		if err != nil {
			return err
		}
		body, err := json.Marshal(map[string]string{"event_type": *eventType, "resource_id": *resourceID})
		if *file != "" {
			body, err = readInput(*file)
		}
		if err != nil {
			return err
		}
		signature := Sign([]byte(secrets[0].Value), body)
		accepted, refused, err := sendAll(args[0], body, signature, *count, interval)
		if flags.Changed("count") {
			fmt.Printf("%d sent: %d answered 2xx, %d answered otherwise, %d not answered\n", *count, accepted, refused, *count-accepted-refused)
		}
		if err == nil && refused > 0 {
			err = errors.New("not every response has status 2xx")
		}
		return err
	}
	return cmd
}

// sendAll sends an event `count` times, and prints the responses. Status 2xx counts as accepted.
func sendAll(url string, body []byte, signature string, count int, interval time.Duration) (accepted, refused int, err error) {
	for i := range count {
		if i > 0 {
			time.Sleep(interval)
		}
		status, text, sendErr := send(url, body, signature)
		fmt.Print(printable(text))
		switch {
		case sendErr != nil:
			err = sendErr
		case status/100 == 2:
			accepted++
		default:
			refused++
		}
	}
	return accepted, refused, err
}

// client uses no proxy from the environment, and follows no redirect.
var client = &http.Client{
	Transport:     &http.Transport{},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Timeout:       time.Minute,
}

// send posts a signed body. It returns the status of the response, and a text with the status
// line and up to 64 KiB of the response's body.
func send(url string, body []byte, signature string) (status int, text string, err error) {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(signatureField, signature)
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	text = resp.Status + "\n" + string(content)
	return resp.StatusCode, strings.TrimSuffix(text, "\n") + "\n", err
}

// printable replaces characters that could control a terminal. It keeps newlines.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// commandSecrets reads the secrets of a command, and names each after its file or variable. It
// does not refuse white space or quotes around a secret, because the command `verify` tests
// whether these characters cause a mismatch.
func commandSecrets(files ...string) (secrets []Secret, err error) {
	for _, file := range slices.DeleteFunc(files, func(file string) bool { return file == "" }) {
		value, err := placeholder.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("secret-file: %s: %w", file, err)
		}
		secrets = append(secrets, Secret{Value: value, Name: file})
	}
	if value := os.Getenv("INKIT_WEBHOOK_SECRET"); len(secrets) == 0 && value != "" {
		secrets = []Secret{{Value: value, Name: "INKIT_WEBHOOK_SECRET"}}
	}
	if len(secrets) == 0 {
		return nil, errors.New("no secret: set INKIT_WEBHOOK_SECRET, or use --secret-file")
	}
	return secrets, nil
}

// readInput reads the named file, or standard input if the name is "-" or missing.
func readInput(names ...string) ([]byte, error) {
	if len(names) == 0 || names[0] == "-" {
		return io.ReadAll(os.Stdin)
	}
	return os.ReadFile(names[0])
}
