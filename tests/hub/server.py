"""A small server that plays the Hub: models and data sets, each a folder on this machine.

Large files are redirected to another host, as there, and what is sent is counted. Tests start it by `hub.playing`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

OLD, NEW = "a" * 40, "b" * 40  # commits
MODEL = "tiny/model"
PIECE = 64 << 10  # bytes, sent at a time
LARGE = (".safetensors", ".parquet")  # files that the Hub keeps elsewhere, and redirects to


@dataclass
class Hub:
    """The model `tiny/model` with its commits, other models and data sets with one each, and what the Hub does wrong.

    `commits` of `tiny/model` are folders by their hashes. `models` and `datasets` are folders by `owner/name`.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    main: str = OLD
    models: dict[str, Path] = field(default_factory=dict)
    datasets: dict[str, Path] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # of other hosts: by their paths, which begin with /
    listed: dict[str, bytes] = field(default_factory=dict)  # more files: paths that no folder could hold
    gated: bool = False
    ranges: bool = True
    drops: bool = False  # the connection, halfway in a shard
    stingy: bool = False  # sends less than was asked for
    pushes: bool = False  # someone does, as soon as `main` was asked for
    sent: Counter[str] = field(default_factory=Counter)  # bytes, by path
    asked: list[str] = field(default_factory=list)
    tokens: dict[str, set[str | None]] = field(default_factory=lambda: {"hub": set(), "cdn": set()})
    cdn: str = ""

    @property
    def of_weights(self) -> dict[str, int]:
        """Bytes that were sent of each file of weights."""
        return {name: count for name, count in self.sent.items() if not name.endswith((".json", ".jinja"))}

    def commits_of(self, kind: str, name: str) -> dict[str, Path]:
        """The commits of a repository, by their hashes; {} if there is none. `kind`: `models` or `datasets`."""
        if (kind, name) == ("models", MODEL):
            return self.commits
        folders = self.datasets if kind == "datasets" else self.models
        return {OLD: folders[name]} if name in folders else {}


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does, for the part of it that is asked; `hub` is set by a subclass."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.tokens[self.server.role].add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        match path.split("/")[1:]:
            case _ if path in self.hub.files:
                self.answer(self.hub.files[path])
            case ["api", "models" | "datasets" as kind, owner, name]:
                self.about(kind, f"{owner}/{name}", "revision", "main", "")
            case ["api", "models" | "datasets" as kind, owner, name, what, revision, *rest]:
                self.about(kind, f"{owner}/{name}", what, revision, "/".join(rest))
            case ["datasets", owner, name, "resolve", revision, *rest]:
                self.resolve("datasets", f"{owner}/{name}", revision, "/".join(rest))
            case [owner, name, "resolve", revision, *rest]:
                self.resolve("models", f"{owner}/{name}", revision, "/".join(rest))
            case _:
                self.refuse(404, "RepoNotFound")

    def about(self, kind: str, name: str, what: str, revision: str, path: str) -> None:
        """Tell of a repository: which commit a revision is, or of all its files (`tree`), or those below `path`."""
        commits = self.hub.commits_of(kind, name)
        commit = self.hub.main if revision == "main" else revision
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound" if commits else "RepoNotFound")
        if what == "revision":
            if self.hub.pushes:
                self.hub.main = NEW
            told = {"id": name, "sha": commit, "siblings": [], "tags": []}
            return self.answer(json.dumps(told).encode())
        found = entries(commits[commit], self.hub.listed if name == MODEL else {})
        below = f"{path}/" if path else ""
        return self.answer(json.dumps([some for some in found if some["path"].startswith(below)]).encode())

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        """Send a file of a repository, or say where it is."""
        commits = self.hub.commits_of(kind, name)
        commit = self.hub.main if revision == "main" else revision
        if self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif commit not in commits:
            self.refuse(404, "RevisionNotFound" if commits else "RepoNotFound")
        elif not (file := commits[commit] / path).is_file():
            self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        elif path.endswith(LARGE) and self.server.role == "hub":
            size, etag = file.stat().st_size, digest(file)
            more = {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": commit}
            self.answer(b"", 302, Location=self.hub.cdn + quote(urlsplit(self.path).path), **more)
        else:
            self.send_file(file, commit, path)

    def send_file(self, file: Path, commit: str, name: str) -> None:
        size = stop = file.stat().st_size
        asked = self.headers.get("Range") if self.hub.ranges else None
        headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit}
        if asked:
            assert asked.startswith("bytes=0-")
            stop = min(size, int(asked.removeprefix("bytes=0-")) + 1)
            headers["Content-Range"] = f"bytes 0-{stop - 1}/{size}"
        stop -= stop // 2 if self.hub.stingy else 0
        self.head(206 if asked else 200, stop, headers)
        if self.command == "GET":
            self.send_content(file, stop // 2 if self.hub.drops else stop, name)

    def send_content(self, file: Path, stop: int, name: str) -> None:
        with file.open("rb") as stream:
            while stop and (piece := stream.read(min(PIECE, stop))):
                self.hub.sent[name] += len(piece)  # first: whoever has the last piece may look at once
                try:
                    self.wfile.write(piece)
                except ConnectionError:  # whoever asked has had enough
                    self.close_connection = True
                    return
                stop -= len(piece)
        self.close_connection = self.close_connection or self.hub.drops

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.answer(b"", status, **{"X-Error-Code": code, **headers})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    """A host of its own: `hub`, which redirects, or `cdn`, which sends."""

    def __init__(self, role: str, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.role = role
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


def digest(file: Path) -> str:
    """The sha256 that the Hub tells of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def entries(folder: Path, listed: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """What the Hub's listing of a repository says: of each file and folder in it, and of what is `listed`."""
    found = [entry(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*"))]
    return found + [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in listed.items()]


def entry(path: str, file: Path) -> dict[str, Any]:
    """What the Hub's listing of a repository says of a file, or of a folder."""
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40}
    size, oid = file.stat().st_size, digest(file)
    found: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": oid}
    if path.endswith(LARGE):
        found["lfs"] = {"size": size, "oid": oid, "pointerSize": 130}
    return found


def weights(folder: Path) -> int:
    """Bytes of all files of weights, at any depth."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
