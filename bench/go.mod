module github.com/inkit-webhooks/caddy-inkit-webhook/bench

go 1.26.0
