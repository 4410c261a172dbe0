"""Answers that a model has given, kept for the next run: a file in sqlite for each model, with JSON values.

A model is known by all that its answers follow from: tensors, config, tokenizer, dtype, length, and versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lowmem_aim.errors import DiskError, printable

FOLDER = "answers"  # of the cache folder
_AT_ONCE = 500  # keys of one look-up


class Answers(contextlib.AbstractContextManager["Answers"]):
    """The kept answers of one model, JSON values by the keys of questions. Use as a context manager."""

    def __init__(self, file: Path) -> None:
        """Open the file, or make it; one that is no such file is replaced. Raises DiskError."""
        self._file = file
        with _as_disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._db = _opened(file)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # locked, or cannot be opened: not a damaged one
                    raise
                file.unlink()
                self._db = _opened(file)

    def kept(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are kept, of the questions with these keys. Raises DiskError."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Any]()
        with _as_disk_errors(self._file):
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                rows = self._db.execute(
                    f"SELECT question, answer FROM answers WHERE question IN ({','.join('?' * len(some))})", some
                )
                found.update((key, json.loads(value)) for key, value in rows)
        return found

    def keep(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers durably: all of them, or none. Raises DiskError."""
        rows = [(key, json.dumps(value)) for key, value in answers]
        with _as_disk_errors(self._file), self._db:
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()


def _opened(file: Path) -> sqlite3.Connection:
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # answers may quote a task that is nobody else's
    db = sqlite3.connect(file, timeout=60)  # another run may be writing
    try:
        db.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
        db.commit()
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _as_disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise DiskError(
            f"the answers in `{printable(str(file))}` cannot be read or written: {printable(str(error))}",
            hint="remove the file, or leave it alone with `--no-cache`",
        ) from error
