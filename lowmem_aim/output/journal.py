"""The journal of a run: what was asked for, on which inputs, and which bytes are finished; in sqlite beside the output.

Guarantee: a record describes only bytes that were durable before it was written, and is durable itself when `keep`
returns (journal_mode DELETE, synchronous EXTRA; WAL would fail on network filesystems). Every row carries a digest of
itself. A damaged row counts as absent, and so does a damaged journal: that leads to work done again, never to wrong
bytes.

Limit: a record is as durable as the system's fsync makes it. A disk that lies about fsync may lose bytes whose record
it kept; the digests show that when the run is resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import xxhash

from lowmem_aim.errors import DiskError, ResumeError, printable
from lowmem_aim.output.records import VERSION, Group, Record, Schema
from lowmem_aim.system.faults import advice, cause, file_of, named
from lowmem_aim.system.files import is_there, open_regular

NAME = "journal.sqlite"
FINISHED_HINT = "a finished model is never overwritten: name a new folder, or remove this one"
_TABLE = """
CREATE TABLE IF NOT EXISTS entries
    (kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (kind, name))
"""
_HINT = "check the disk, then give the same command again"
_COLUMNS = "kind, name, value, digest"
# sqlite's errors when something is in its way now. Every other error about a file means damage.
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


R = TypeVar("R", bound=Record)


class Journal:
    """The journal of one run. A context manager; its methods may be called from any thread."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Open the journal in `folder`, or begin one if there is none or it is beyond reading.

        `read_only`: a journal that is absent or damaged reads as empty, and its version is not checked. Raises
        DiskError, and ResumeError for a journal of another version.
        """
        self._file = folder / NAME
        self._lock = threading.Lock()
        with self._disk_errors():
            _refuse_odd(self._file)
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
        try:
            self.check_version()
            if not self.holds(Schema):
                self.keep(Schema(VERSION))
        except BaseException:
            self.close()
            raise

    def check_version(self, *, finished: bool = False) -> None:
        """Raise ResumeError if another version of this tool wrote the journal, in records that this one cannot read.

        A journal without a version is taken for one of this version whose row was lost. `finished`: whether the output
        is, which `--fresh` then leaves as it is.
        """
        schema = self.kept(Schema)
        if schema is not None and schema.version != VERSION:
            did = "made this output" if finished else "began this run"
            raise ResumeError(
                f"the journal `{printable(str(self._file))}` has records of version {schema.version}, and this is "
                f"version {VERSION}: another version of lowmem-aim {did}",
                hint=FINISHED_HINT if finished else "resume it with that version, or start over with `--fresh`",
            )

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the journal of a folder, and all records with it."""
        for name in (f"{NAME}-journal", NAME):  # the rollback journal first: it must never meet another database
            (folder / name).unlink(missing_ok=True)

    def keep(self, record: Record, name: str = "") -> None:
        """Keep a record, durably, in place of an earlier one of its kind and `name`. Raises DiskError."""
        text = json.dumps(record.as_json(), sort_keys=True)
        row = (record.kind, name, text, _digest(record.kind, name, text))
        with self._lock, self._disk_errors():
            self._connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)

    def kept(self, kind: type[R]) -> R | None:
        """The record of a kind that has only one; None if it is absent or damaged. Raises DiskError."""
        return next(iter(self._records(kind)), None)

    def all_kept(self, kind: type[R]) -> list[R]:
        """All records of a kind that are not damaged. Raises DiskError."""
        return self._records(kind)

    def holds(self, *kinds: type[Record]) -> bool:
        """Whether there is a record of any of these kinds. Raises DiskError."""
        query = "SELECT 1 FROM entries WHERE kind = ? LIMIT 1"
        with self._lock, self._disk_errors():
            return any(self._connection.execute(query, (kind.kind,)).fetchall() for kind in kinds)

    def forget(self, *kinds: type[Record]) -> None:
        """Remove all records of these kinds. Raises DiskError."""
        with self._lock, self._disk_errors():
            for kind in kinds:
                self._connection.execute("DELETE FROM entries WHERE kind = ?", (kind.kind,))

    def keep_group(self, group: Group) -> None:
        """Keep a group of finished tensors, durably. Raises DiskError."""
        self.keep(group, f"{group.shard}\0{group.tensors:09}")

    def groups(self, shard: str) -> list[Group]:
        """The groups of one shard, in file order. Raises DiskError."""
        return sorted(self._records(Group, f"{shard}\0", f"{shard}\1"), key=lambda group: group.tensors)

    def _records(self, kind: type[R], first: str = "", last: str = "\U0010ffff") -> list[R]:
        found = []
        for row in self._rows(kind.kind, first, last):
            with contextlib.suppress(TypeError):  # another version's: other fields
                found.append(kind(**row))
        return found

    def _rows(self, kind: str, first: str, last: str) -> list[dict[str, Any]]:
        """The rows of a kind, from the name `first` to `last`. Raises DiskError if they cannot be read now."""
        query = f"SELECT {_COLUMNS} FROM entries WHERE kind = ? AND name >= ? AND name < ?"
        try:
            with self._lock:
                rows = self._connection.execute(query, (kind, first, last)).fetchall()
        except sqlite3.DatabaseError as error:
            if _means_damage(error, self._file):
                return []  # as if nothing had been done
            raise DiskError(f"the journal {named(self._file)} cannot be read now: {error}", _HINT) from error
        return [json.loads(row[2]) for row in rows if row[3] == _digest(*row[:3])]

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DiskError(f"the journal {named(self._file)} cannot be written: {error}", _HINT) from error
        except OSError as error:
            what = f"the journal {named(file_of(error, self._file))} cannot be opened: {cause(error)}"
            raise DiskError(what, advice(error) or _HINT) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse_odd(file: Path) -> None:
    """Raise OSError for what is no plain file among those that sqlite opens, and for what this user may not read.

    sqlite would follow a link to another place, wait at a pipe, and say of every trouble that it cannot open the file.
    """
    for name in (file.name, f"{file.name}-journal", f"{file.name}-wal", f"{file.name}-shm"):
        if is_there(file.with_name(name)):
            os.close(open_regular(file.with_name(name), follow=False))


def _only_read(file: Path) -> str:
    # "rw": where a run was killed within a commit, the first reader takes that half commit back.
    return f"{file.absolute().as_uri()}?mode=rw" if os.path.isfile(file) else "file::memory:"


def _connected(file: Path) -> sqlite3.Connection:
    """Open the database. Raises sqlite3.DatabaseError now for whatever would be in the way later."""
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
