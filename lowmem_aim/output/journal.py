"""The journal of a run: what was asked for, on which inputs, and which bytes are finished. sqlite beside the output.

Guarantee: a row speaks only of bytes that were durable before it was written, and is durable itself when `put` returns
(journal_mode DELETE, synchronous EXTRA; WAL would fail on network filesystems). Every row carries a digest of itself.
A row that is damaged, and a journal that is, count as absent: that leads to work done again, never to wrong bytes.
Limit: durable is what the system's fsync makes so. A disk that lies about it may lose bytes whose row it kept; the
digests show that when the run is resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from lowmem_aim.errors import DiskError, printable

NAME = "journal.sqlite"
_TABLE = """
CREATE TABLE IF NOT EXISTS entries
    (kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (kind, name))
"""
_COLUMNS = "kind, name, value, digest"
# What sqlite says when something is in its way now. All else that it says of a file means damage.
_IN_ITS_WAY = {
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_MISUSE,
}


@dataclass(frozen=True)
class Group:
    """Finished tensors of one shard, from number `start` on: now its first `tensors`, the bytes up to `end`, are."""

    shard: str  # file name
    start: int
    tensors: int
    end: int
    sha256: str  # of the file's bytes up to `end`
    digests: Mapping[str, Mapping[str, str]]  # model folder -> tensor of this group -> xxh3-128 of its bytes as read
    replaced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # likewise -> elements that were not finite
    kept: Mapping[str, Sequence[float]] = field(default_factory=dict)  # tensor -> sums of |delta|, see `relaxation`


class Journal:
    """A context manager; its methods may be called from any thread."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """The journal in `folder`; a new one if there is none or it is damaged beyond reading. Raises DiskError.

        `read_only`: one that is not there, or damaged, is empty.
        """
        self._file = folder / NAME
        self._lock = threading.Lock()
        if read_only:
            with self._disk_errors():
                self._connection = sqlite3.connect(_only_read(self._file), uri=True)
            self._connection.text_factory = _text
            return
        with self._disk_errors():
            try:
                self._connection = _connected(self._file)
            except sqlite3.DatabaseError as error:
                if not _means_damage(error, self._file):
                    raise
                self.remove(folder)
                self._connection = _connected(self._file)

    @staticmethod
    def remove(folder: Path) -> None:
        """Forget all that a folder's journal says."""
        for name in (f"{NAME}-journal", NAME):  # the rollback journal first: it must never meet another database
            (folder / name).unlink(missing_ok=True)

    def put(self, kind: str, name: str, value: Any) -> None:
        """Keep a JSON value, durably. Raises DiskError."""
        text = json.dumps(value, sort_keys=True)
        row = (kind, name, text, _digest(kind, name, text))
        with self._lock, self._disk_errors():
            self._connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)

    def get(self, kind: str, name: str = "") -> Any:
        """None if it is not there, or damaged."""
        return self._rows(kind).get(name)

    def holds(self, kind: str) -> bool:
        """Whether there is anything of a kind. Raises DiskError."""
        with self._lock, self._disk_errors():
            return bool(self._connection.execute("SELECT 1 FROM entries WHERE kind = ? LIMIT 1", (kind,)).fetchall())

    def drop(self, kind: str) -> None:
        """Forget all of a kind. Raises DiskError."""
        with self._lock, self._disk_errors():
            self._connection.execute("DELETE FROM entries WHERE kind = ?", (kind,))

    def put_group(self, group: Group) -> None:
        self.put("group", f"{group.shard}\0{group.tensors:09}", asdict(group))

    def groups(self, shard: str) -> list[Group]:
        """Of one shard, in file order."""
        found = self._rows("group", f"{shard}\0", f"{shard}\1")
        return sorted((Group(**value) for value in found.values()), key=lambda group: group.tensors)

    def _rows(self, kind: str, first: str = "", last: str = "\U0010ffff") -> dict[str, Any]:
        """Those of a kind, from the name `first` to `last`. Raises DiskError where they cannot be read now."""
        query = f"SELECT {_COLUMNS} FROM entries WHERE kind = ? AND name >= ? AND name < ?"
        try:
            with self._lock:
                rows = self._connection.execute(query, (kind, first, last)).fetchall()
        except sqlite3.DatabaseError as error:
            if _means_damage(error, self._file):
                return {}  # as if nothing had been done
            raise DiskError(f"the journal `{printable(str(self._file))}` cannot be read now: {error}") from error
        return {row[1]: json.loads(row[2]) for row in rows if row[3] == _digest(*row[:3])}

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DiskError(
                f"the journal `{printable(str(self._file))}` cannot be written: {error}",
                hint="mend the disk, then give the same command again",
            ) from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _only_read(file: Path) -> str:
    # "rw": where a run was killed within a commit, the first reader takes that half commit back.
    return f"{file.absolute().as_uri()}?mode=rw" if file.is_file() else "file::memory:"


def _connected(file: Path) -> sqlite3.Connection:
    """Raises a sqlite3.DatabaseError of whatever would be in the way later."""
    connection = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    connection.text_factory = _text
    try:
        for statement in (
            "PRAGMA journal_mode=DELETE",
            "PRAGMA synchronous=EXTRA",
            _TABLE,
            f"SELECT {_COLUMNS} FROM entries LIMIT 1",
            "DELETE FROM entries WHERE FALSE",  # a damaged header may say that nothing can be written
        ):
            connection.execute(statement).fetchall()
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            damaged = sqlite3.DatabaseError("damaged")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged
    except BaseException:
        connection.close()
        raise
    return connection


def _means_damage(error: sqlite3.DatabaseError, file: Path) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE)
    if code == sqlite3.SQLITE_READONLY:  # the system's refusal, or what the file's own header says
        return os.access(file, os.W_OK)
    return code & 0xFF not in _IN_ITS_WAY


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "replace")  # a damaged row must come as far as its digest


def _digest(kind: str, name: str, text: str) -> str:
    return xxhash.xxh3_128_hexdigest(f"{kind}\0{name}\0{text}".encode("utf-8", "surrogatepass"))
