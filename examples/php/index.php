<?php
// Caddy has verified the request, so only use the event here. After any status except
// 2xx, Caddy sends the event again. PHP answers 500 by itself after an error.
$event = json_decode(file_get_contents('php://input'), true, flags: JSON_THROW_ON_ERROR);
$key = $_SERVER['HTTP_IDEMPOTENCY_KEY']; // the same if Caddy sends an event again

file_put_contents('php://stderr', "{$event['event_type']} {$event['resource_id']} $key\n");
