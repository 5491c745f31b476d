"""Caddy has verified each request. All that is left is to use it.

Any status but 2xx has Caddy send the event again: Flask answers 500 by itself when an
exception ends a function.
"""

from flask import Flask, request

app = Flask(__name__)


@app.post("/webhook")
def webhook():
    event = request.get_json(force=True)
    key = request.headers["Idempotency-Key"]  # the same if Caddy sends an event again
    print(event["event_type"], event["resource_id"], key, flush=True)
    return "", 204
