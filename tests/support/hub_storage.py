"""The storage of a local Hub: objects under the hash of their content, at a separate address.

As on the real Hub, it takes uploads by PUT, serves parts of an object (``Range``), and requests to
it carry no token.
"""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietHandler(BaseHTTPRequestHandler):
    """Handles requests over connections that stay open, without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Print nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, content: bytes, status: int, headers: dict[str, str], cut: int | None = None):
        """Send a response; ``cut`` closes the connection after so many bytes of the content."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def send_part(self, content: bytes, headers: dict[str, str], cut: int | None = None) -> int:
        """Send the part of a file that the request asks for; return the number of bytes."""
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is not None:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self.send(content, status, {**headers, "Accept-Ranges": "bytes"}, cut)
        return len(content[:cut])


class LocalServer(ThreadingHTTPServer):
    """Serves inside ``with``, at the address ``url`` of this machine."""

    daemon_threads = True

    def __init__(self, handler: type[QuietHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()


class _StorageHandler(QuietHandler):
    def do_PUT(self) -> None:
        oid, body = self.path.lstrip("/"), self.body()
        accepted = oid == hashlib.sha256(body).hexdigest() and self.is_without_token()
        if accepted:
            self.server.objects[oid] = body
        self.send(b"", 200 if accepted else 403, {})

    def do_GET(self) -> None:
        oid = self.path.lstrip("/")
        content = self.server.objects.get(oid)
        if is_refused := oid == self.server.refused:
            self.server.refused = None
        if content is None or is_refused or not self.is_without_token():
            return self.send(b"", 403, {})
        cut, self.server.cut = self.server.cut, None
        sent = self.send_part(content, {}, cut)
        self.server.sent.append((oid, self.headers.get("Range"), sent))
        return None

    def is_without_token(self) -> bool:
        return self.headers.get("Authorization") is None


class Storage(LocalServer):
    """The objects of a Hub.

    Attributes:
        objects: SHA-256 -> content.
        refused: an object whose next download is refused.
        cut: after this many bytes, the next download is interrupted; None for none.
        sent: object, range and number of bytes of each download.
    """

    def __init__(self) -> None:
        super().__init__(_StorageHandler)
        # Not the host of the Hub, since huggingface_hub 1.31 follows redirects to the same host.
        self.url = self.url.replace("127.0.0.1", "localhost")
        self.objects: dict[str, bytes] = {}
        self.refused: str | None = None
        self.cut: int | None = None
        self.sent: list[tuple[str, str | None, int]] = []
