package queue

import (
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("inkit_queue", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("inkit_queue", httpcaddyfile.Before, "reverse_proxy")
}

// parseCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	inkit_queue [<matcher>] {
//		name            <name>
//		store           sqlite [<path>] | postgres [<placeholder>] { ... }
//		answer_after    <duration>
//		attempt_timeout <duration>
//		max_age         <duration>
//		max_events      <number>
//		concurrency     <number>
//		history         <duration>
//		once            <type>...
//		remember        <duration>
//		deliver {
//			<directives...>
//		}
//	}
//
// Only the option `deliver` is required. The options can be in any order. No option can be
// repeated.
func parseCaddyfile(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h, d := new(Handler), helper.Dispenser
	d.Next() // consume directive name
	if d.NextArg() {
		return nil, d.Err("inkit_queue: takes only a block")
	}
	seen := make(map[string]bool)
	for d.NextBlock(0) {
		word := d.Val()
		if seen[word] {
			return nil, d.Errf("%s: must not be repeated", word)
		}
		seen[word] = true
		var err error
		switch word {
		case "name":
			if !d.AllArgs(&h.Name) || h.Name == "" {
				err = d.Err("name: takes one name")
			}
		case "store":
			err = h.parseStore(d)
		case "answer_after":
			h.AnswerAfter = new(caddy.Duration)
			*h.AnswerAfter, err = parseDuration(d, word, 0)
		case "attempt_timeout":
			h.AttemptTimeout, err = parseDuration(d, word, 1)
		case "max_age":
			h.MaxAge, err = parseDuration(d, word, 1)
		case "max_events":
			h.MaxEvents, err = parseNumber(d, word)
		case "concurrency":
			h.Concurrency, err = parseNumber(d, word)
		case "history":
			h.History = new(caddy.Duration)
			*h.History, err = parseDuration(d, word, 0)
		case "once":
			if h.Once = d.RemainingArgs(); len(h.Once) == 0 {
				err = d.Err("once: takes one or more event types")
			}
		case "remember":
			h.Remember, err = parseDuration(d, word, 1)
		case "deliver":
			var deliver caddyhttp.MiddlewareHandler
			if deliver, err = httpcaddyfile.ParseSegmentAsSubroute(helper.WithDispenser(d.NewFromNextSegment())); err == nil {
				h.Routes = deliver.(*caddyhttp.Subroute).Routes
			}
		default:
			err = d.Errf("inkit_queue: does not know the option %s", word)
		}
		if err != nil {
			return nil, err
		}
	}
	if len(h.Routes) == 0 {
		return nil, d.Err("deliver: is required, with at least one directive")
	}
	return h, nil
}

func (h *Handler) parseStore(d *caddyfile.Dispenser) error {
	if !d.NextArg() || !nameForm.MatchString(d.Val()) { // do not print this word: a connection string can contain a password
		return d.Err("store: needs the kind of the database first, such as sqlite or postgres")
	}
	kind := d.Val()
	module, err := caddyfile.UnmarshalModule(d, "inkit_queue.stores."+kind)
	if err != nil {
		return d.Errf("store: %v", err)
	}
	h.StoreRaw = caddyconfig.JSONModuleObject(module, "module", kind, nil)
	return nil
}

// parseDuration parses the duration of an option. The argument `word` is the name of the option.
// parseDuration refuses a duration below the argument `least`.
func parseDuration(d *caddyfile.Dispenser, word string, least time.Duration) (caddy.Duration, error) {
	var text string
	if d.AllArgs(&text) {
		if duration, err := caddy.ParseDuration(text); err == nil && duration >= least {
			return caddy.Duration(duration), nil
		}
	}
	return 0, d.Errf("%s: takes one duration, such as 30s", word)
}

func parseNumber(d *caddyfile.Dispenser, word string) (int, error) {
	var text string
	if d.AllArgs(&text) {
		if number, err := strconv.Atoi(text); err == nil && number > 0 {
			return number, nil
		}
	}
	return 0, d.Errf("%s: takes one number above 0", word)
}
