package inkitwebhook

import (
	"math"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("inkit_webhook", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("inkit_webhook", httpcaddyfile.Before, "basic_auth")
}

func parseCaddyfile(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	handler := new(Handler)
	return handler, handler.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	inkit_webhook [<matcher>] [<secret>] {
//		secret          <secret> [<name>]
//		max_size        <size>
//		idempotency_key off
//	}
//
// There can be any number of secrets, the one on the line of the directive being
// the first, and there must be one. Errors show no word of the input, since any
// that is in the wrong place may be a secret.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume directive name

	if d.NextArg() {
		h.Secrets = append(h.Secrets, Secret{Value: d.Val()})
	}
	if d.NextArg() {
		return d.Err("inkit_webhook: takes one secret at most, more go into the block")
	}

	for d.NextBlock(0) {
		word := d.Val()
		switch word {
		case "secret":
			args := d.RemainingArgs()
			switch len(args) {
			case 1:
				h.Secrets = append(h.Secrets, Secret{Value: args[0]})
			case 2:
				h.Secrets = append(h.Secrets, Secret{Value: args[0], Name: args[1]})
			default:
				return d.Err("secret: takes a secret and a name at most")
			}

		case "max_size":
			if h.MaxSize != 0 {
				return d.Err("max_size: must not be repeated")
			}
			var size string
			if !d.AllArgs(&size) {
				return d.Err("max_size: takes one size")
			}
			bytes, err := humanize.ParseBytes(size)
			if err != nil || bytes == 0 || bytes > math.MaxInt64 {
				return d.Err("max_size: must be a size above 0, such as 64KiB")
			}
			h.MaxSize = int64(bytes)

		case "idempotency_key":
			if h.IdempotencyKey != "" {
				return d.Err("idempotency_key: must not be repeated")
			}
			if !d.AllArgs(&h.IdempotencyKey) || h.IdempotencyKey != idempotencyKeyOff {
				return d.Err("idempotency_key: must be off or left out")
			}

		default:
			return d.Err("inkit_webhook: must hold secret, max_size and idempotency_key only")
		}
		if d.NextBlock(1) {
			return d.Errf("%s: must not have a block", word)
		}
	}

	if len(h.Secrets) == 0 {
		return d.Err("secret: at least one is required")
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
