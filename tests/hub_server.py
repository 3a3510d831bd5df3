"""A small server on the loopback that speaks the endpoints of the Hub for a push and a load."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Repositories are dicts from path to bytes, in ``server.repos``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing on the console."""

    def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self.body()
        self.server.requests.append(("POST", path))
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = "/".join(filter(None, (values.get("organization", "me"), values["name"])))
            self.server.repos.setdefault(repo, {})
            return self.reply({"url": f"{self.server.url}/{repo}", "name": repo})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            answer = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.reply({"files": answer})
        if "/commit/" in path:
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            return self.reply({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
        return self.reply({}, 200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/")
            for mark in ("/revision/", "/tree/"):
                repo, _, _ = repo.partition(mark)
            files = self.server.repos.get(repo)
            if files is None:
                return self.reply({}, 404, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in files.items()
                ]
                return self.reply(tree)
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        file_name = rest.partition("/")[2]
        if repo not in self.server.repos:
            return self.reply({}, 404, X_Error_Code="RepoNotFound")
        data = self.server.repos[repo].get(file_name)
        if data is None:
            return self.reply({}, 404, X_Error_Code="EntryNotFound")
        return self.reply(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')


class HubServer(ThreadingHTTPServer):
    """``with HubServer() as hub:`` serves until the block ends; ``hub.url`` is its address."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()
