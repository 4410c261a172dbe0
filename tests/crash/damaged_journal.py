"""The journal of an interrupted run damaged in every way: work is done again, never a crash, never other bytes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from crash.workshop import Job, emptied

from lowmem_aim.output.folder import PRIVATE
from lowmem_aim.output.journal import NAME, Journal

TIMES = 140
SHORT_TIMES = 14
HEADER_BYTES = 100  # sqlite's own


def suite(job: Job, short: bool) -> str:
    begun, out, draw = job.work / "begun", job.work / "out", random.Random(0)
    job.killed(begun, Journal, "keep_group", 9)
    times, counts = SHORT_TIMES if short else TIMES, Counter[str]()
    for number in range(times):
        shutil.copytree(begun, emptied(out))
        damage = DAMAGES[number % len(DAMAGES)]
        damage(out / PRIVATE / NAME, draw)
        done = job.here(out)
        assert done.code == 0, f"{number}, {damage.__name__}: {done}"
        job.check_whole(out)
        counts[damage.__name__.strip("_").replace("_", " ")] += 1
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{times} damages ({told}), every output the same bytes"


def _random_bytes(file: Path, draw: random.Random) -> None:
    _overwrite(file, draw.randrange(file.stat().st_size), draw.randbytes(draw.choice((1, 8, 64, 600))))


def _header_bytes(file: Path, draw: random.Random) -> None:
    _overwrite(file, draw.randrange(HEADER_BYTES), draw.randbytes(1))


def _zeroed_page(file: Path, draw: random.Random) -> None:
    _overwrite(file, 4096 * draw.randrange(file.stat().st_size // 4096), bytes(4096))


def _cut(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _lost_rows(file: Path, draw: random.Random) -> None:
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        rows = [row[0] for row in connection.execute("SELECT rowid FROM entries")]
        for row in draw.sample(rows, draw.randint(1, len(rows))):
            connection.execute("DELETE FROM entries WHERE rowid = ?", (row,))


def _another_table(file: Path, draw: random.Random) -> None:
    name = draw.choice(("kind", "name", "value", "digest"))
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(f"ALTER TABLE entries RENAME COLUMN {name} TO other")


def _a_rollback_journal_of_noise(file: Path, draw: random.Random) -> None:
    magic = bytes.fromhex("d9d505f920a163d7") * draw.randrange(2)  # sqlite's own begins so
    file.with_name(f"{NAME}-journal").write_bytes(magic + draw.randbytes(5000))


def _overwrite(file: Path, place: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _random_bytes,
    _header_bytes,
    _zeroed_page,
    _cut,
    _lost_rows,
    _another_table,
    _a_rollback_journal_of_noise,
)
