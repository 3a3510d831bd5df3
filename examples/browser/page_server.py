"""The server of the page, on the loopback."""

from __future__ import annotations

import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


class Handler(SimpleHTTPRequestHandler):
    """Serves files with the types that modules and WebAssembly need, whatever the system has."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES
    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # the page may be built again
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def make_server(folder: str | os.PathLike, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a folder on the loopback; port 0 is any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=os.fspath(folder)))


def open_server(folder: str | os.PathLike, port: int) -> ThreadingHTTPServer:
    """Return the server of a page that is not built yet, which may take minutes.

    Raises:
        ValueError: if the port is not free; it names the flag.
    """
    try:
        return make_server(folder, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--serve {port}: {reason}; pass another port") from error
