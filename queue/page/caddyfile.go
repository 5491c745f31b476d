package page

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// The page comes after all directives that may reject a request, such as abort and error.
func init() {
	httpcaddyfile.RegisterHandlerDirective("inkit_queue_page", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("inkit_queue_page", httpcaddyfile.Before, "reverse_proxy")
}

// parseCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	inkit_queue_page [<matcher>] {
//		user      <placeholder>
//		read_only
//	}
func parseCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h, d := new(Handler), helper.Dispenser
	d.Next() // consume directive name
	if d.NextArg() {
		return nil, d.Err("inkit_queue_page: takes only a block")
	}
	for d.NextBlock(0) {
		switch word := d.Val(); word {
		case "user":
			if h.User != "" {
				return nil, d.Err("user: must not be repeated")
			}
			if !d.AllArgs(&h.User) || !userForm.MatchString(h.User) {
				return nil, d.Err("user: takes one placeholder of the request, such as {http.auth.user.id}")
			}
		case "read_only":
			if h.ReadOnly {
				return nil, d.Err("read_only: must not be repeated")
			}
			if h.ReadOnly = true; d.NextArg() {
				return nil, d.Err("read_only: takes no argument")
			}
		default:
			return nil, d.Errf("inkit_queue_page: does not know the option %s", word)
		}
	}
	return h, nil
}
