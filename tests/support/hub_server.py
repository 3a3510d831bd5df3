"""A local server with the endpoints of the Hub that pushing and loading need.

Weights are uploaded and downloaded as on the real one: large files are LFS objects, which are sent
to another address (``hub_storage.py``), announced by the batch endpoint and confirmed afterwards.
The metadata of cards are validated (``hub_metadata.py``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from urllib.parse import unquote, urlparse

from huggingface_hub import ModelCard

from support.hub_metadata import metadata_problems
from support.hub_storage import LocalServer, QuietHandler, Storage

MAIN = "main"
USER = "me"  # owner of the token, and of repositories that are created without an owner
LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".png")


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
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def commit_of(branch: str) -> str:
    """Return the hash of the only commit of a branch."""
    return hashlib.sha1(branch.encode()).hexdigest()


class Handler(QuietHandler):
    """Handles requests to repositories, which are dicts {path: content}:
    ``server.repos[name]`` for the main branch, ``server.branches[name, branch]`` for others."""

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
        self.fail(404, f"{missing}NotFound", f"{missing} not found")

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def reply(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(content, status, self.with_commit(headers))

    def with_commit(self, headers: dict[str, str]) -> dict[str, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return {"X-Repo-Commit": self.commit, **named}

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self.body()
        if self.server.refuses:
            return self.reply({"error": "You may not."}, 403)
        self.server.requests.append(("POST", path))
        if path != "/api/validate-yaml" and "Authorization" not in self.headers:
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            self.server.validated.append(self.headers.get("Authorization"))
            errors, warnings = metadata_problems(json.loads(body)["content"])
            if errors and self.headers.get("Accept") == "text/plain":
                return self.reply("\n".join(errors).encode(), 400)
            answer = {"errors": errors, "warnings": warnings}
            answer = {kind: [{"message": text} for text in answer[kind]] for kind in answer}
            return self.reply(answer, 400 if errors else 200)
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values.get('organization') or USER}/{values['name']}"
            self.server.repos.setdefault(repo, {})
            return self.reply({"url": f"{self.server.url}/{repo}", "name": repo})
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply({"objects": [*map(self.upload_actions, json.loads(body)["objects"])]})
        if path == "/lfs/verify":
            stored = self.server.storage.objects.get(json.loads(body)["oid"])
            is_complete = stored is not None and len(stored) == json.loads(body)["size"]
            return self.reply({}, 200 if is_complete else 404)
        if "/preupload/" in path:
            files = [
                {"path": name, "shouldIgnore": False,
                 "uploadMode": "lfs" if name.endswith(LFS_SUFFIXES) else "regular"}
                for name in (file["path"] for file in json.loads(body)["files"])
            ]  # fmt: skip
            return self.reply({"files": files})
        if "/branch/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            branch = unquote(branch)
            if ".." in branch or branch.startswith("refs/"):  # as in git
                return self.reply({"error": f"Invalid rev id: {branch}"}, 400)
            if branch == MAIN or (repo, branch) in self.server.branches:
                return self.reply({"error": "Reference already exists"}, 409)
            self.server.branches[repo, branch] = dict(self.server.repos[repo])
            return self.reply({})
        if "/commit/" in path:
            return self.take_commit(*path.removeprefix("/api/models/").split("/commit/"), body)
        return self.reply({}, 404)

    def upload_actions(self, entry: dict) -> dict:
        """Return where to upload an LFS object, without actions if it is stored already."""
        if entry["oid"] in self.server.storage.objects:
            return entry
        upload = {"href": f"{self.server.storage.url}/{entry['oid']}"}
        return {
            **entry,
            "actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}},
        }

    def take_commit(self, repo: str, branch: str, body: bytes) -> None:
        files = self.find(repo, unquote(branch))
        if files is None:
            return self.refuse(repo)
        new, deleted = {}, []
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                if value["path"].endswith(LFS_SUFFIXES):
                    return self.reply({"error": f"{value['path']} must be an LFS object"}, 400)
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.storage.objects:
                    return self.reply({"error": f"{value['path']} was not uploaded"}, 400)
                new[value["path"]] = self.server.storage.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        if (card := new.get("README.md")) and (errors := metadata_problems(card.decode())[0]):
            return self.reply({"error": "; ".join(errors)}, 400)
        files.update(new)
        for path in deleted:
            del files[path]
        url = f"{self.server.url}/{repo}/commit/{self.commit}"
        return self.reply({"commitUrl": url, "commitOid": self.commit, "pullRequestUrl": None})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.server.requests.append((self.command, unquote(path)))
        if path == "/api/whoami-v2":
            if "Authorization" not in self.headers:
                return self.reply({"error": "Invalid username or password."}, 401)
            return self.reply({"type": "user", "name": USER})
        if path.startswith("/api/models/"):
            return self.describe_repository(path.removeprefix("/api/models/"))
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, name = map(unquote, rest.split("/", 1))  # a revision may have an escaped "/"
        files = self.find(repo, revision)
        if files is None:
            return self.refuse(repo)
        if repo in self.server.gated:
            message = (
                f"Access to model {repo} is restricted and you are not in the authorized list."
            )
            return self.fail(403, "GatedRepo", message)
        if (data := files.get(name)) is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        oid = hashlib.sha256(data).hexdigest()
        if not name.endswith(LFS_SUFFIXES):
            self.send_part(data, self.with_commit({"ETag": f'"{oid}"'}))
            return None
        self.server.storage.objects[oid] = data
        links = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data))}
        return self.reply(b"", 302, Location=f"{self.server.storage.url}/{oid}", **links)

    def describe_repository(self, repo: str) -> None:
        """Answer with the files of a repository or of a folder of it, or with its metadata."""
        revision, folder = MAIN, ""
        for mark in ("/revision/", "/tree/"):
            if mark in repo:
                repo, _, rest = repo.partition(mark)
                revision, _, folder = rest.partition("/")
                revision, folder = unquote(revision), unquote(folder)
                break
        else:
            mark = ""
        files = self.find(repo, revision)
        if files is None:
            return self.refuse(repo)
        if mark == "/tree/":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.commit}
                for name, data in files.items()
                if name.startswith(folder and f"{folder}/")
            ]
            return self.reply(tree) if tree or not folder else self.fail(404, "EntryNotFound", "")
        card = ModelCard(files["README.md"].decode()) if "README.md" in files else None
        info = {"id": repo, "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
        return self.reply({**info, "tags": [], "cardData": card and card.data.to_dict()})


class HubServer(LocalServer):
    """Serves inside ``with HubServer() as hub:``, at the address ``hub.url``.

    Args:
        refuses: whether it rejects all writes.

    Attributes:
        repos: the main branch of each repository.
        branches: the other branches.
        gated: repositories whose files nobody may download.
        requests: method and path of each request to the Hub itself.
        validated: the header with the token of each request to validate a card, or None.
        storage: holds the large files.
    """

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(Handler)
        self.refuses = refuses
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.validated: list[str | None] = []
        self.storage = Storage()

    def __enter__(self) -> HubServer:
        self.storage.__enter__()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.storage.__exit__(*exception)
