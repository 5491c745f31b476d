"""Takes each event, and prints its id and its Idempotency-Key."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Backend(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # The same event may come twice, so a real backend does its work once for
        # each key.
        print(event["resource_id"], self.headers["Idempotency-Key"], flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("localhost", int(sys.argv[1])), Backend).serve_forever()
