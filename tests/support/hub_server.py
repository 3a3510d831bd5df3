"""A local server with the endpoints of the Hub that pushing and loading need."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

MAIN = "main"


def hub_environment(url: str, home: str) -> dict[str, str]:
    """Return the environment of a process with another Hub; huggingface_hub reads it at import.

    Args:
        url: the address.
        home: the folder of its cache.
    """
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": home,
        "HF_TOKEN": "hf_local",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def commit_of(branch: str) -> str:
    """Return the hash of the only commit of a branch."""
    return hashlib.sha1(branch.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Handles requests to repositories, which are dicts {path: content}:
    ``server.repos[name]`` for the main branch, ``server.branches[name, branch]`` for others."""

    protocol_version = "HTTP/1.1"
    commit = commit_of(MAIN)

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or commit; None if there is no such repository or branch."""
        for (name, branch), files in [*self.server.branches.items()]:
            if name == repo and revision in (branch, commit_of(branch)):
                self.commit = commit_of(branch)
                return files
        self.commit = commit_of(MAIN)
        return self.server.repos.get(repo) if revision in (MAIN, self.commit) else None

    def refuse(self, repo: str) -> None:
        missing = "Revision" if repo in self.server.repos else "Repo"
        self.reply({}, 404, X_Error_Code=f"{missing}NotFound")

    def log_message(self, *args):
        """Print nothing."""

    def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.commit)
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
        if self.server.refuses:
            return self.reply({"error": "You may not."}, 403)
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
        if "/branch/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self.server.branches.setdefault((repo, branch), dict(self.server.repos[repo]))
            return self.reply({})
        if "/commit/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            files = self.find(repo, branch)
            if files is None:
                return self.refuse(repo)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    del files[entry["value"]["path"]]
            url = f"{self.server.url}/{repo}/commit/{self.commit}"
            return self.reply({"commitUrl": url, "commitOid": self.commit, "pullRequestUrl": None})
        return self.reply({}, 200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        if path.startswith("/api/models/"):
            repo, revision = path.removeprefix("/api/models/"), MAIN
            for mark in ("/revision/", "/tree/"):
                if mark in repo:
                    repo, _, revision = repo.partition(mark)
            files = self.find(repo, revision.partition("/")[0])
            if files is None:
                return self.refuse(repo)
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": self.commit}
                    for name, data in files.items()
                ]
                return self.reply(tree)
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": repo, "sha": self.commit, "siblings": siblings, "tags": []})
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file_name = rest.partition("/")
        files = self.find(repo, revision)
        if files is None:
            return self.refuse(repo)
        data = files.get(file_name)
        if data is None:
            return self.reply({}, 404, X_Error_Code="EntryNotFound")
        return self.reply(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')


class HubServer(ThreadingHTTPServer):
    """Serves inside ``with HubServer() as hub:``, at the address ``hub.url``.

    Args:
        refuses: whether it rejects all writes.
    """

    daemon_threads = True

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()
