<?php
// Caddy has verified the request. All that is left is to use it. Any status but 2xx has
// Caddy send the event again: PHP answers 500 by itself when an error ends it.
$event = json_decode(file_get_contents('php://input'), true, flags: JSON_THROW_ON_ERROR);
$key = $_SERVER['HTTP_IDEMPOTENCY_KEY']; // the same if Caddy sends an event again

file_put_contents('php://stderr', "{$event['event_type']} {$event['resource_id']} $key\n");
