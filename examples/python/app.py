"""Caddy has verified each request. All that is left is to use it."""

import os
import sys

from flask import Flask, request

app = Flask(__name__)
events = open(os.environ["EVENTS"], "a") if "EVENTS" in os.environ else sys.stdout


@app.post("/webhook")
def webhook():
    event = request.get_json(force=True)
    key = request.headers["Idempotency-Key"]  # the same if Caddy sends an event again
    print(event["event_type"], event["resource_id"], key, file=events, flush=True)
    return "", 204
