"""A hub on this machine: the part of the protocol that huggingface_hub uses to fetch a snapshot."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CERTIFICATE = (
    Path(__file__).parent / "hub_certificate.pem"
)  # of 127.0.0.1, signed by itself, with its key: of no use elsewhere
COMMIT = "a" * 40


class Hub:
    """Serves `files[repo][name]`; `cut` names files whose first body breaks off; `status[repo]`
    refuses a repo.

    The only revision is main. With `tls` it speaks HTTPS, under a certificate that nobody trusts.
    """

    def __init__(self, files: dict[str, dict[str, bytes]], tls: bool = False) -> None:
        self.files, self.cut, self.status = files, set(), {}
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_address[1]}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        settings = {"poll_interval": 0.01}  # so long it takes to end
        threading.Thread(target=self.server.serve_forever, kwargs=settings, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        self.log.append((request.command, path, request.headers.get("Range")))
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo in self.status or repo not in self.files:
            code, error = self.status.get(repo, (404, "RepoNotFound"))
            return self.send(request, code, b"{}", {"X-Error-Code": error}, body)
        if "revision" in parts and parts[-1] != "main":
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if parts[0] == "api" and parts[4] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.files[repo].items()
            ]
            return self.send(request, 200, json.dumps(tree).encode(), {}, body)
        if parts[0] == "api":
            names = [{"rfilename": name} for name in self.files[repo]]
            info = {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": names,
                "private": False,
                "tags": [],
            }
            return self.send(request, 200, json.dumps(info).encode(), {}, body)
        name = "/".join(parts[4:])
        if name not in self.files[repo]:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = self.files[repo][name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = request.headers.get("Range")
        code = 200
        if start and body:
            first = int(start.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            code, data = 206, data[first:]
        if body and name in self.cut:
            self.cut.remove(name)
            self.send(request, code, data, headers, body, only=len(data) // 2)
            request.close_connection = True
            return None
        return self.send(request, code, data, headers, body)

    @staticmethod
    def send(request, code, data, headers, body, only=None) -> None:  # type: ignore[no-untyped-def]
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data[:only])
