"""The journal is another version's: exit code 7 with the way out, never a bug, never other bytes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from crash.workshop import Job, emptied, is_clean

from lowmem_aim.output import records
from lowmem_aim.output.folder import PRIVATE
from lowmem_aim.output.journal import NAME, Journal
from lowmem_aim.output.records import VERSION

KINDS = ("identity", "plan", "group")  # of records that a merge without a calibration has
VERSIONS = (0, VERSION + 1, VERSION + 7)


def suite(job: Job, short: bool) -> str:
    begun, out, counts = job.work / "begun", job.work / "out", Counter[str]()
    job.killed(begun, Journal, "keep_group", 9)
    for version in VERSIONS[1:2] if short else VERSIONS:
        for kind in KINDS[2:] if short else KINDS:
            for change in ("a field more", "a field less"):
                for source in (begun, job.work / "whole"):
                    shutil.copytree(source, emptied(out))
                    _rewrite(out / PRIVATE / NAME, kind, change, version)
                    counts[_try(job, out, finished=source is not begun)] += 1
    # The version's row is lost as well: then records that do not fit count as lost.
    for kind in KINDS[2:] if short else KINDS:
        for change in ("a field more", "a field less"):
            shutil.copytree(begun, emptied(out))
            _rewrite(out / PRIVATE / NAME, kind, change, None)
            job.finish(out)
            counts["without a version: done again"] += 1
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{sum(counts.values())} journals ({told}), every output the same bytes"


def _try(job: Job, out: Path, *, finished: bool) -> str:
    done = job.attempt(out)
    assert is_clean(done, 7), done
    assert "another version of lowmem-aim" in done.text, done
    assert ("--fresh" in done.text) == (not finished), done
    job.check_no_half_model(out)
    if finished:
        return "finished: exit code 7, left as they were"
    job.finish(out, "--fresh")
    return "interrupted: exit code 7, then `--fresh`"


def _rewrite(file: Path, kind: str, change: str, version: int | None) -> None:
    """Give the records of a kind a field more or less, and the journal a version, or none."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        for name, text in connection.execute("SELECT name, value FROM entries WHERE kind = ?", (kind,)).fetchall():
            value: dict[str, Any] = json.loads(text)
            if change == "a field more":
                value["more"] = 1
            else:
                value.popitem()
            _put(connection, kind, name, value)
        connection.execute("DELETE FROM entries WHERE kind = ?", (records.Schema.kind,))
        if version is not None:
            _put(connection, records.Schema.kind, "", {"version": version})


def _put(connection: sqlite3.Connection, kind: str, name: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, sort_keys=True)
    digest = xxhash.xxh3_128_hexdigest(f"{kind}\0{name}\0{text}".encode("utf-8", "surrogatepass"))
    connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (kind, name, text, digest))
