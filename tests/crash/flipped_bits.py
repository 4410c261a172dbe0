"""A flipped bit anywhere in an output - weights, headers, index, journal, the list itself - is found by `verify`."""

from __future__ import annotations

import random
from pathlib import Path

from crash.workshop import Job, emptied, refusal

from lowmem_aim.errors import VerifyError
from lowmem_aim.output.folder import FACTS, LOG, PRIVATE, SUMS
from lowmem_aim.output.verify import verify

FLIPS = 200
SHORT_FLIPS = 60
HEADER_BYTES = 800  # of a shard


def suite(job: Job, short: bool) -> str:
    out, draw = emptied(job.work / "out"), random.Random(0)
    job.finish(out)
    beside = {"lock", LOG, FACTS}  # an empty file, and what is told of the run
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in beside]
    count, touched = SHORT_FLIPS if short else FLIPS, set()
    for number in range(count):
        file = files[number % len(files)]
        size = file.stat().st_size
        limit = min(size, HEADER_BYTES) if number % 2 else size
        place, bit = draw.randrange(limit), 1 << draw.randrange(8)
        _flip(file, place, bit)
        error = refusal(lambda: verify(out, f"{PRIVATE}/{SUMS}"))
        assert isinstance(error, VerifyError), f"bit {bit} of byte {place} of {file.name}: {error}"
        assert file.name in str(error), error
        _flip(file, place, bit)
        touched.add(file.name)
    verify(out, f"{PRIVATE}/{SUMS}")
    return f"{count} of {count} found, in {len(touched)} files"


def _flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        value = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([value ^ bit]))
