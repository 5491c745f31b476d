<?php
// Caddy has verified the request. All that is left is to use it.
$event = json_decode(file_get_contents('php://input'), true, flags: JSON_THROW_ON_ERROR);
$key = $_SERVER['HTTP_IDEMPOTENCY_KEY']; // the same if Caddy sends an event again

$line = "{$event['event_type']} {$event['resource_id']} $key\n";
if (file_put_contents(getenv('EVENTS') ?: 'php://stderr', $line, FILE_APPEND | LOCK_EX) === false) {
    http_response_code(500);
}
