"""A mock of the Hugging Face Hub: the part of its HTTP API that pushing and loading use."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

TOKEN = "hf_mock"


@dataclass
class Repository:
    """Branches, each with the files of its last commit."""

    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files, by their SHA-256."""
    served: list[str] = field(default_factory=list)
    """Names of the files that were fetched."""


def commit_of(repo: str, branch: str) -> str:
    """Return the commit that a branch is at."""
    return hashlib.sha1(f"{repo}@{branch}".encode()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty Hub for a block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def mock_hub(folder: Path) -> Iterator[Hub]:
    """Serve an empty Hub that the client takes for the real one; its user is logged in.

    The client's cache lies in `folder`.
    """
    from huggingface_hub import constants

    with hub_server() as server:
        values: dict[str, Any] = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(folder / "no token"),
        }
        environment = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with mock.patch.multiple(constants, **values), mock.patch.dict(os.environ, environment):
            yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._may_write():
            self._fail(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"objects": [self._target(one) for one in json.loads(body)["objects"]]})
        else:
            _, _, _, owner, name, action, revision = path.split("/", 6)
            repository = self.state.repositories[f"{owner}/{name}"]
            if action == "preupload":
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif action == "branch":
                repository.branches.setdefault(revision, dict(repository.branches["main"]))
                self._json({})
            else:
                self._commit(repository, revision, body)
                oid = commit_of(f"{owner}/{name}", revision)
                url = f"{self.state.url}/{owner}/{name}/commit/{oid}"
                self._json({"success": True, "commitUrl": url, "commitOid": oid})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self._path().rpartition("/")[2]
        self.state.objects[self._path().rpartition("/")[2]] = content
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._path()
        is_api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo = f"{owner}/{name}"
        repository = self.state.repositories.get(repo)
        if repository is None or (repository.private and not self._may_write()):
            self._fail(401, "RepoNotFound", "Repository not found")
            return
        if repository.gated:
            self._fail(403, "GatedRepo", f"Access to model {repo} is restricted.")
            return
        commits = {commit_of(repo, branch): branch for branch in repository.branches}
        asked = rest[1] if rest[1:] else "main"
        branch = commits.get(asked, asked)
        if branch not in repository.branches:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {asked}")
            return
        files = repository.branches[branch]
        if is_api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}
                for file, content in files.items()
            ]
            self._json(entries)
        elif is_api:
            sha = commit_of(repo, branch)
            self._json({"id": repo, "sha": sha, "private": repository.private, "siblings": []})
        else:
            content = files["/".join(rest[2:])]
            if self.command == "GET":
                self.state.served.append(rest[-1])
            headers = {"X-Repo-Commit": commit_of(repo, branch), "ETag": f'"{_oid(content)}"'}
            self._send(200, content, **headers)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.state.repositories:
            reply = {
                "error": "You already created this model repo",
                "url": f"{self.state.url}/{repo}",
            }
            self._send(409, json.dumps(reply).encode())
            return
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repositories[repo] = Repository(private=bool(is_private))
        self._json({"url": f"{self.state.url}/{repo}"})

    def _target(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.state.url}/objects/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload}}

    def _commit(self, repository: Repository, revision: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "lfsFile":
                repository.branches[revision][value["path"]] = self.state.objects[value["oid"]]
            else:
                content = base64.b64decode(value["content"])
                repository.branches[revision][value["path"]] = content

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), **headers)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
