package inkitwebhook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "inkit-webhook",
		Short: "Signs, verifies and sends Inkit webhooks",
		Long: `
Signs bodies as Inkit does, tells why a signature does not match, and sends
signed events to try a site out.

The secret is read from the environment variable INKIT_WEBHOOK_SECRET, or from
files. It never stands on the command line, where other users of the machine
could see it, and it is never printed.
`,
		CobraFunc: func(cmd *cobra.Command) {
			sign := &cobra.Command{
				Use:   "sign [--secret-file <file>] [<file>|-]",
				Short: "Prints the signature of a body",
				Long: `
Prints the signature that Inkit sends with a body: the HMAC-SHA256 of its bytes
in lower-case hexadecimal digits. The body is read from a file or from standard
input, and every byte of it counts, a final newline too.
`,
				Example: `  printf %s '{"event_type":"DOCUMENT_DELETED"}' | INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook sign`,
				Args:    cobra.MaximumNArgs(1),
				RunE:    caddycmd.WrapCommandFuncForCobra(cmdSign),
			}
			sign.Flags().String("secret-file", "", "File with the secret; INKIT_WEBHOOK_SECRET if left out")

			verify := &cobra.Command{
				Use:   "verify --signature <signature> [--secret-file <file>]... [<file>|-]",
				Short: "Verifies the signature of a body, or explains why it does not match",
				Long: `
Verifies a signature for a body that is read from a file or from standard input.
If one of the secrets made it, prints the name of that secret, which is its file
or variable, and exits with status 0.

If not, prints why and exits with status 1. The usual causes are tried, such as
a body that lost its final newline or was parsed and written again, a signature
in another form, and a secret with white space around it. One is named only if
with it the signature matches, so it is the cause and no guess.
`,
				Example: `  printf %s '{"event_type":"DOCUMENT_DELETED"}' | INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook verify --signature d523ce83c5dc06cc5c0f5c752174ecd2d00ed5c8227324e36814ea230b75ad09`,
				Args:    cobra.MaximumNArgs(1),
				RunE:    caddycmd.WrapCommandFuncForCobra(cmdVerify),
			}
			verify.Flags().String("signature", "", "The value of Inkit-Signature")
			verify.Flags().StringArray("secret-file", nil, "File with a secret, can be repeated; INKIT_WEBHOOK_SECRET if left out")

			send := &cobra.Command{
				Use:   "send [--secret-file <file>] [--event-type <type>] [--resource-id <id>] [--body <file>] [--count <n>] [--rate <n>] <url>",
				Short: "Signs an event and sends it to a URL",
				Long: `
Signs an event and posts it to a URL as Inkit does, then prints the status and
the body of the response. Exits with status 0 if every status is 2xx, and with 1
if not. Nothing is sent to any other URL: redirects are not followed, and no
proxy is used.
`,
				Example: `  INKIT_WEBHOOK_SECRET=demo caddy inkit-webhook send --event-type DOCUMENT_DELETED http://localhost:8080/webhook`,
				Args:    cobra.ExactArgs(1),
				RunE:    caddycmd.WrapCommandFuncForCobra(cmdSend),
			}
			send.Flags().String("secret-file", "", "File with the secret; INKIT_WEBHOOK_SECRET if left out")
			send.Flags().String("event-type", "DOCUMENT_CREATE_FINISHED", "The event_type of the event")
			send.Flags().String("resource-id", "doc_test", "The resource_id of the event")
			send.Flags().String("body", "", "File to send in the place of an event, - for standard input")
			send.Flags().Int("count", 1, "How many times to send it")
			send.Flags().Float64("rate", 0, "How many to send a second at most; without a limit if left out")

			cmd.AddCommand(sign, verify, send)
		},
	})
}

// secretVariable is where the commands look for the secret if no file is named.
const secretVariable = "INKIT_WEBHOOK_SECRET"

// commandSecrets reads the secrets of a command, which are named after where they
// come from. White space around one is not an error here, since verify finds out
// whether it is the cause of a mismatch.
func commandSecrets(files ...string) (secrets []Secret, err error) {
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("secret-file: %w", err)
		}
		// as the placeholder {file.*} does
		value := strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
		if value == "" {
			return nil, fmt.Errorf("secret-file: %s: %w", file, ErrEmptySecret)
		}
		secrets = append(secrets, Secret{Value: value, Name: file})
	}
	if len(files) == 0 {
		value := os.Getenv(secretVariable)
		if value == "" {
			return nil, fmt.Errorf("%s is unset or empty, and no --secret-file is given", secretVariable)
		}
		secrets = append(secrets, Secret{Value: value, Name: secretVariable})
	}
	return secrets, nil
}

// oneSecret reads the one secret of a command whose --secret-file does not repeat.
func oneSecret(fl caddycmd.Flags) ([]byte, error) {
	var files []string
	if file := fl.String("secret-file"); file != "" {
		files = []string{file}
	}
	secrets, err := commandSecrets(files...)
	if err != nil {
		return nil, err
	}
	return []byte(secrets[0].Value), nil
}

// readInput reads a file, or standard input for - or no name.
func readInput(name string) ([]byte, error) {
	if name == "" || name == "-" {
		return io.ReadAll(os.Stdin)
	}
	return os.ReadFile(name)
}

func cmdSign(fl caddycmd.Flags) (int, error) {
	secret, err := oneSecret(fl)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	body, err := readInput(fl.Arg(0))
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	fmt.Println(Sign(secret, body))
	return caddy.ExitCodeSuccess, nil
}

func cmdVerify(fl caddycmd.Flags) (int, error) {
	files, err := fl.GetStringArray("secret-file")
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	secrets, err := commandSecrets(files...)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	body, err := readInput(fl.Arg(0))
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	verifier, err := NewVerifier(secrets...)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	signature := fl.String("signature")
	name, err := verifier.Verify(body, signature)
	if err != nil {
		fmt.Println(explain(secrets, body, signature))
		return caddy.ExitCodeFailedStartup, err
	}
	fmt.Println(name)
	return caddy.ExitCodeSuccess, nil
}

func cmdSend(fl caddycmd.Flags) (int, error) {
	count, rate := fl.Int("count"), fl.Float64("rate")
	file := fl.String("body")
	switch {
	case count < 1:
		return caddy.ExitCodeFailedStartup, errors.New("count: must be at least 1")
	case rate < 0:
		return caddy.ExitCodeFailedStartup, errors.New("rate: must not be negative")
	case file != "" && (fl.Changed("event-type") || fl.Changed("resource-id")):
		return caddy.ExitCodeFailedStartup, errors.New("body: cannot be combined with event-type and resource-id")
	}
	secret, err := oneSecret(fl)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	var body []byte
	if file != "" {
		body, err = readInput(file)
	} else {
		body, err = json.Marshal(struct {
			EventType  string `json:"event_type"`
			ResourceID string `json:"resource_id"`
		}{fl.String("event-type"), fl.String("resource-id")})
	}
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	signature := Sign(secret, body)

	client := &http.Client{
		Transport:     &http.Transport{}, // without the proxy of the environment
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       time.Minute,
	}
	var interval time.Duration
	if rate > 0 {
		interval = time.Duration(float64(time.Second) / rate)
	}
	refused := 0
	for i := range count {
		if i > 0 {
			time.Sleep(interval)
		}
		ok, err := sendOne(client, fl.Arg(0), body, signature)
		if err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		if !ok {
			refused++
		}
	}
	if refused > 0 {
		return caddy.ExitCodeFailedStartup, errors.New("not every response has status 2xx")
	}
	return caddy.ExitCodeSuccess, nil
}

// sendOne posts a signed body, prints the response, up to 64 KiB of it, and
// reports whether it has status 2xx.
func sendOne(client *http.Client, url string, body []byte, signature string) (ok bool, err error) {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(signatureField, signature)
	resp, err := client.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return false, err
	}
	fmt.Println(resp.Status)
	if len(text) > 0 {
		fmt.Println(strings.TrimSuffix(string(text), "\n"))
	}
	return resp.StatusCode/100 == 2, nil
}
