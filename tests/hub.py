"""A model hub for tests: a small HTTP server that the real client of huggingface_hub talks to.

It speaks what `create_repo`, `create_branch`, `upload_folder`, `create_commit`, `model_info`,
`snapshot_download` and their like ask for, with the hub's own status codes and error headers. Large
files travel as Git LFS; Xet is switched off by `at`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import transformers.utils.hub
import yaml
from huggingface_hub import constants

WRITES, OTHER, READS = "hf_writes", "hf_other", "hf_reads"
"""Tokens: of `me`, of `you`, and of `me` without the right to write."""
_USERS = {WRITES: "me", OTHER: "you", READS: "me"}
_RELATIONS = {"adapter", "finetune", "merge", "quantized"}


class Refusal(Exception):
    """An answer that is an error, as the hub gives it."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit to path to content."""
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sums = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(repr((branch, sums, len(self.commits))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolved(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolved(revision)]


class Hub:
    """What the server keeps, in memory."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method and path of every request, in order."""
        self.url = ""
        self.lock = threading.Lock()
        self.closed = ""
        """Why nobody may commit; empty: who owns a repository may."""
        self.forbidden = ""
        """Why nobody may ask for anything."""

    # What each request gets. `user` is None without a token.

    def readable(self, name: str, user: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and name.split("/")[0] != user):
            # Without a token the hub does not say whether there is one.
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str, user: str | None, token: str) -> Repository:
        repository = self.readable(name, user)
        if self.closed or name.split("/")[0] != user or token == READS:
            raise Refusal(
                403,
                self.closed
                or "You don't have the rights to write to this repository: use a token with write",
            )
        return repository

    def create(self, body: dict[str, Any], user: str | None, token: str) -> dict[str, Any]:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = body.get("organization") or user
        name = f"{owner}/{body['name']}"
        if owner != user or token == READS:
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo", **self.page(name))
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repository = self.repositories[name] = Repository(private=private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial")
        return self.page(name)

    def page(self, name: str) -> dict[str, Any]:
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def info(self, name: str, repository: Repository, revision: str) -> dict[str, Any]:
        oid = repository.resolved(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        return {
            "_id": "0", "id": name, "modelId": name, "sha": oid, "private": repository.private,
            "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
        }  # fmt: skip

    def tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        entries = []
        for path, data in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
            if _is_large(path):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def preupload(self, repository: Repository, revision: str, body: dict[str, Any]) -> Any:
        there = repository.files(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _remote_oid(file["path"], there.get(file["path"])),
                }
                for file in body["files"]
            ]
        }

    def take(self, name: str, repository: Repository, branch: str, lines: list[Any]) -> Any:
        if branch not in repository.branches:
            repository.resolved(branch)  # a commit takes none, a name there is not
            raise Refusal(400, f"{branch} is no branch")
        files, message = dict(repository.files(branch)), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                raise Refusal(400, f"unknown operation {line['key']}")
        oid = repository.commit(branch, files, message)
        return {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    def batch(self, name: str, body: dict[str, Any]) -> Any:
        objects = []
        for wanted in body["objects"]:
            known = wanted["oid"] in self.large
            href = f"{self.url}/{name}.git/large/{wanted['oid']}"
            actions = {} if known else {"actions": {"upload": {"href": href}}}
            objects.append({**wanted, **actions})
        return {"transfer": "basic", "objects": objects}


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".pth"))


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _remote_oid(path: str, data: bytes | None) -> str | None:
    if data is None:
        return None
    return hashlib.sha256(data).hexdigest() if _is_large(path) else _git_oid(data)


def _check_card(content: str) -> None:
    """The part of the hub's check of a card's metadata that concerns what layerrl writes."""
    data = yaml.safe_load(content.split("---")[1]) or {}
    if not isinstance(data, dict) or data.get("base_model_relation", "merge") not in _RELATIONS:
        raise Refusal(400, f"metadata of the card: {data}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(url.path)}")
            try:
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if self.hub.forbidden:
                    raise Refusal(403, self.hub.forbidden)
                if token and token not in _USERS:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                answer = self._answer(url.path, parse_qs(url.query), body, token)
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                data = {"error": str(refusal), **refusal.body}
                self._send(refusal.status, json.dumps(data).encode(), headers)
                return
        if isinstance(answer, tuple):
            data, headers = answer
            self._send(200, data, headers)
        else:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, path: str, query: dict[str, Any], body: bytes, token: str) -> Any:
        hub, user = self.hub, _USERS.get(token)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["api", "whoami-v2"]:
                if user is None:
                    raise Refusal(401, "Invalid username or password.")
                return {"type": "user", "name": user}
            case ["api", "repos", "create"]:
                return hub.create(json.loads(body), user, token)
            case ["api", "validate-yaml"]:
                _check_card(json.loads(body)["content"])
                return {"errors": [], "warnings": []}
            case ["api", "models", owner, name, *rest]:
                return self._model(f"{owner}/{name}", rest, body, user, token)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                name = f"{owner}/{name.removesuffix('.git')}"
                hub.writable(name, user, token)
                return hub.batch(name, json.loads(body))
            case [_, _, "large", oid]:  # a signed address: no token
                if hashlib.sha256(body).hexdigest() != oid:
                    raise Refusal(400, "another content")
                hub.large[oid] = body
                return {}
            case [owner, name, "resolve", revision, *file]:
                repository = hub.readable(f"{owner}/{name}", user)
                oid = repository.resolved(revision)
                data = repository.commits[oid].get("/".join(file))
                if data is None:
                    raise Refusal(404, "Entry not found", "EntryNotFound")
                etag = hashlib.sha256(data).hexdigest()
                return data, {"ETag": f'"{etag}"', "X-Repo-Commit": oid}
        raise Refusal(404, f"the hub of the tests does not know {self.command} {path} {query}")

    def _model(self, name: str, rest: list[str], body: bytes, user: str | None, token: str) -> Any:
        hub = self.hub
        match [self.command, *rest]:
            case ["GET"]:
                return hub.info(name, hub.readable(name, user), "main")
            case ["GET", "revision", revision]:
                return hub.info(name, hub.readable(name, user), revision)
            case ["GET", "tree", revision]:
                return hub.tree(hub.readable(name, user).files(revision))
            case ["GET", "refs"]:
                branches = hub.readable(name, user).branches.items()
                listed = [
                    {"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid}
                    for b, oid in branches
                ]
                return {"branches": listed, "converts": [], "tags": []}
            case ["POST", "branch", branch]:
                repository = hub.writable(name, user, token)
                if branch in repository.branches:
                    raise Refusal(409, "Reference already exists")
                repository.branches[branch] = repository.branches["main"]
                return {}
            case ["POST", "preupload", revision]:
                repository = hub.writable(name, user, token)
                return hub.preupload(repository, revision, json.loads(body))
            case ["POST", "commit", branch]:
                lines = [json.loads(line) for line in body.splitlines()]
                return hub.take(name, hub.writable(name, user, token), branch, lines)
        raise Refusal(404, f"the hub of the tests does not know {self.command} of a model: {rest}")


@contextmanager
def served() -> Iterator[Hub]:
    """A hub with nothing in it, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def at(url: str, cache: Path, *, token: str | None = None, offline: bool = False) -> Iterator[None]:
    """Inside, the client is as if it were imported with this hub, cache and token.

    It reads its environment once, when it is imported.
    """
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache.parent / "token"),
    }
    environment = {"HF_TOKEN": token or ""}
    with (
        mock.patch.multiple(constants, **values),
        mock.patch.dict("os.environ", environment),
        mock.patch.object(transformers.utils.hub, "_hf_api", None, create=True),
        mock.patch.object(huggingface_hub.hf_api.api, "endpoint", url),
    ):
        yield
