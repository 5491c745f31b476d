"""A listener as Inkit's documentation shows one, in Python's standard library.

It accepts POST alone, and answers 401 unless the header field Inkit-Signature is
the string that the HMAC-SHA256 of the raw body makes in hexadecimal digits. It
reads HTTP itself where http.server does not: chunks, and bodies cut short.
"""

import hashlib
import hmac
import http.server
import os
import socket
import sys

SECRET = os.environ["INKIT_WEBHOOK_SECRET"].encode()


class Listener(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        # a request with several values has no one signature to compare
        signatures = self.headers.get_all("Inkit-Signature", [])
        try:
            body = self.body()
        except ValueError:
            body = None
        signature = signatures[0].strip(" \t") if len(signatures) == 1 else ""
        if body is None and self.well_formed(signature):
            self.answer(400)
        elif body is not None and hmac.new(SECRET, body, hashlib.sha256).hexdigest() == signature:
            self.answer(200)
        else:
            self.answer(401)

    @staticmethod
    def well_formed(signature):
        """Whether the guard reads the body at all, and so can notice that it is broken."""
        return len(signature) == 64 and all(c in "0123456789abcdef" for c in signature)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.line().split(b";")[0], 16):
                body += self.exactly(size)
                if self.exactly(2) != b"\r\n":
                    raise ValueError("chunk is longer than its size")
            while self.line():
                pass  # trailers
            return body
        return self.exactly(int(self.headers.get("Content-Length", 0)))

    def line(self):
        line = self.rfile.readline()
        if not line.endswith(b"\r\n"):
            raise ValueError("line is cut short")
        return line[:-2]

    def exactly(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise ValueError("body is cut short")
        return data

    def other(self):
        self.answer(405)

    do_GET = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = other

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        # closed with something unread, the connection would be reset, answer and all
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read(65536):
            pass

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


Server(("127.0.0.1", int(sys.argv[1])), Listener).serve_forever()
