// Command caddy is Caddy with its standard modules, inkit_webhook and inkit_queue, for the
// quick start and the tests. To build one for production, with the modules and
// the version of Caddy of your choice, use xcaddy.
package main

import (
	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue" // brings inkit_webhook along

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() {
	caddycmd.Main()
}
