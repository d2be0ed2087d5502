"""A server of files that knows ranges and tags, and misbehaves as a test tells it to."""

from __future__ import annotations

import hashlib
import http.server
import threading
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves bytes with ranges and an ETag; `server.behave` may do anything else first (returns
    whether it did).
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        self.close_connection = True
        if server.behave(self, len(server.requests)):
            return
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
        else:
            self.answer(body)

    def answer(self, body, sent=None, length=None, tag=None, cut_headers=False):
        tag = tag or '"' + hashlib.sha256(body).hexdigest()[:8] + '"'
        begin = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin and begin >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(length if length is not None else len(body) - begin))
        if not cut_headers:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body[begin:] if sent is None else body[begin : begin + sent])

    def log_message(self, *args):
        pass


@contextmanager
def serving(files, behave=lambda handler, number: False):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.behave, server.requests, server.daemon_threads = files, behave, [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
