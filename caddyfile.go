package inkitwebhook

import (
	"errors"
	"math"

	"github.com/dustin/go-humanize"
	"github.com/inkit-webhooks/caddy-inkit-webhook/internal/placeholder"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("inkit_webhook", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		handler := new(Handler)
		return handler, handler.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("inkit_webhook", httpcaddyfile.Before, "basic_auth")
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	inkit_webhook [<matcher>] [<placeholder>] {
//		secret          <secret> [name <name>]
//		name            <name>
//		max_size        <size>
//		idempotency_key off
//	}
//
// At least one secret is required; the secret on the line of the directive comes first. A
// secret is one placeholder or a text in quotes: without quotes, an unset {$VARIABLE}
// would make the next word the secret. On the line of the directive, only a placeholder
// is allowed: even in quotes, a text that starts with a slash would be a matcher, and
// requests that do not match would not be verified.
//
// Errors repeat no word of the input, because a word in the wrong place may be a secret.
// Caddy's own errors do repeat words, for example for an unknown matcher.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume directive name
	if d.NextArg() {
		if _, ok := placeholder.Name(d.Val()); !ok {
			return d.Err("inkit_webhook: takes only a placeholder in braces: write any other secret into the block, in quotes")
		}
		h.Secrets = append(h.Secrets, Secret{Value: d.Val()})
	}
	if d.NextArg() {
		return d.Err("inkit_webhook: takes at most one placeholder: further secrets go into the block")
	}
	seen := make(map[string]bool)
	for d.NextBlock(0) {
		word := d.Val()
		if word != "secret" && seen[word] {
			return d.Err(word + ": must not be repeated")
		}
		if err := h.unmarshalOption(word, d.RemainingArgsAsTokens()); err != nil {
			return d.Err(err.Error())
		}
		seen[word] = true
		if d.NextBlock(1) {
			return d.Err(word + ": must not have a block")
		}
	}
	if len(h.Secrets) == 0 {
		return d.Err("secret: at least one is required")
	}
	return nil
}

// unmarshalOption sets one option of the block.
func (h *Handler) unmarshalOption(word string, tokens []caddyfile.Token) error {
	only := "" // the text of the only token
	if len(tokens) == 1 {
		only = tokens[0].Text
	}
	switch word {
	case "secret":
		named := len(tokens) == 3 && tokens[1].Text == "name"
		if !named && len(tokens) != 1 || !isSecret(tokens[0]) {
			return errors.New("secret: must be one placeholder or a text in quotes, and only name <name> may follow")
		}
		secret := Secret{Value: tokens[0].Text}
		if named {
			secret.Name = tokens[2].Text
		}
		h.Secrets = append(h.Secrets, secret)
	case "name":
		if h.Name = only; only == "" {
			return errors.New("name: takes one name")
		}
	case "max_size":
		bytes, err := humanize.ParseBytes(only)
		if err != nil || bytes == 0 || bytes > math.MaxInt64 {
			return errors.New("max_size: must be one size above 0, such as 64KiB")
		}
		h.MaxSize = int64(bytes)
	case "idempotency_key":
		if only != "off" {
			return errors.New("idempotency_key: must be off or left out")
		}
		h.IdempotencyKey = new(bool)
	default:
		return errors.New("inkit_webhook: only secret, name, max_size and idempotency_key are allowed")
	}
	return nil
}

// isSecret reports whether a token may be a secret: a placeholder or a text in quotes.
func isSecret(token caddyfile.Token) bool {
	_, ok := placeholder.Name(token.Text)
	return ok || token.Quoted()
}
