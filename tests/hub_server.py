"""A small server that plays the Hub, redirects large files to another host as there, and counts what it sends."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

OLD, NEW = "a" * 40, "b" * 40  # commits
PIECE = 64 << 10  # bytes, sent at a time


@dataclass
class Hub:
    """One repository, `tiny/model`, and what it does wrong."""

    commits: dict[str, Path] = field(default_factory=dict)
    main: str = OLD
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
        match path.split("/", 5)[1:]:
            case ["api", "models", "tiny", "model", rest] if rest.startswith("revision/"):
                self.info(rest.removeprefix("revision/"))
            case ["api", "models", "tiny", "model", rest] if rest.startswith("tree/"):
                self.tree(rest.removeprefix("tree/"))
            case ["tiny", "model", "resolve", commit, name]:
                self.resolve(commit, name)
            case _:
                self.refuse(404, "RepoNotFound")

    def info(self, revision: str) -> None:
        commit = self.hub.main if revision == "main" else revision
        if commit not in self.hub.commits:
            return self.refuse(404, "RevisionNotFound")
        if self.hub.pushes:
            self.hub.main = NEW
        return self.answer(json.dumps({"id": "tiny/model", "sha": commit, "siblings": [], "tags": []}).encode())

    def tree(self, commit: str) -> None:
        folder = self.hub.commits[commit]
        entries = [entry(f.relative_to(folder).as_posix(), f) for f in sorted(folder.rglob("*")) if f.is_file()]
        entries += [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.hub.listed.items()]
        self.answer(json.dumps(entries).encode())

    def resolve(self, commit: str, name: str) -> None:
        file = self.hub.commits[commit] / name
        if self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif not file.is_file():
            self.refuse(404, "EntryNotFound")
        elif name.endswith(".safetensors") and self.server.role == "hub":
            size, etag = file.stat().st_size, digest(file)
            more = {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": commit}
            self.answer(b"", 302, Location=f"{self.hub.cdn}/tiny/model/resolve/{commit}/{quote(name)}", **more)
        else:
            self.send_file(file, commit, name)

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

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"", status, **{"X-Error-Code": code})

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


def entry(path: str, file: Path) -> dict[str, Any]:
    """What the Hub's listing of a repository says of a file."""
    size, oid = file.stat().st_size, digest(file)
    found: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": oid}
    if path.endswith(".safetensors"):
        found["lfs"] = {"size": size, "oid": oid, "pointerSize": 130}
    return found


def weights(folder: Path) -> int:
    """Bytes of all files of weights, at any depth."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
