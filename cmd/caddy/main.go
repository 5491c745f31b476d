// Command caddy is Caddy for the quick start and the tests. It contains inkit_webhook,
// inkit_queue, and the standard modules of Caddy. To build a Caddy for production, with modules and a version of
// your choice, use xcaddy.
package main

import (
	_ "github.com/inkit-webhooks/caddy-inkit-webhook/queue" // includes inkit_webhook

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/modules/standard"
)

func main() {
	caddycmd.Main()
}
