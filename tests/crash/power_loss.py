"""Power loss: disks as they might be found, rebuilt from a recorded run, and the same command going on from each.

At any point of the run, what an fsync has covered is there. Of the rest any part may be: writes, whole, torn to
sectors or not at all; entries of folders (files made, renamed, removed), as far as some point of each folder's own
order. That is less than filesystems promise.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

from crash.recording import Named, Recording, Resize, Sync, Write, record
from crash.tracing import usable
from crash.workshop import Job, emptied, finished_tensors, is_clean

from lowmem_aim.output import workspace as output
from lowmem_aim.output.folder import PRIVATE, PUBLISHING, STAGING
from lowmem_aim.output.journal import Journal

STATES = 1000
SHORT_STATES = 24
REFUSALS = (4, 7)
KEEP = (0.0, 0.3, 0.7, 0.95, 1.0)  # shares of what is not durable
SECTORS = (0, 512, 4096)  # bytes; 0: a write is there or not
_Disk = tuple[dict[str, int], dict[int, bytearray]]  # path -> file, file -> content


def suite(job: Job, short: bool) -> str:
    if not usable():
        return "skipped: strace is missing or may not trace"
    out, draw, counts = job.work / "out", random.Random(0), Counter[str]()
    recordings = [record(job, emptied(out))]
    for owner, name, number in ((Journal, "keep_group", 7), (output.os, "replace", 14)):
        job.killed(out, owner, name, number)
        recordings.append(record(job, out))
    for number in range(SHORT_STATES if short else STATES):
        recording = recordings[number % 3]
        last = len(recording.operations)
        point = last if draw.random() < 0.05 else draw.randint(0, last)
        _build(recording, *_state(recording, point, draw, keep=1.0))
        finished = finished_tensors(out)
        _build(recording, *_state(recording, point, draw, draw.choice(KEEP)))
        try:
            job.check_no_half_model(out)
            # The last commit may have been on its way to the disk.
            assert finished_tensors(out) >= finished - 1, f"{finished_tensors(out)} of {finished} tensors"
            if point == last:
                job.check_whole(out)
            counts[_outcome(job, out)] += 1
        except AssertionError as error:
            raise AssertionError(f"state {number}, recording {number % 3}, operation {point}") from error
    lost = sum(counts.values()) - counts["the same bytes"]
    assert not lost, counts
    return ", ".join(f"{count} disks: {outcome}" for outcome, count in counts.items())


def _outcome(job: Job, out: Path) -> str:
    done = job.here(out)
    if done.code == 0:
        job.check_whole(out)
        return "the same bytes"
    assert any(is_clean(done, code) for code in REFUSALS), done
    return f"refused with {done.code}"


def _state(recording: Recording, point: int, draw: random.Random, keep: float) -> _Disk:
    """What is there after a power loss before operation number `point`; `keep` of what was not durable."""
    durable, names = _durable(recording, point), dict(recording.first)
    content = {file: bytearray(data) for file, data in recording.content.items()}
    ended: set[str] = set()  # folders whose later changes are lost
    for number, operation in enumerate(recording.operations[:point]):
        kept = number in durable or draw.random() < keep
        if isinstance(operation, Named):
            if number in durable or (kept and not operation.folders & ended):
                _rename(names, operation)
            else:
                ended |= operation.folders
        elif isinstance(operation, Write):
            data = content.setdefault(operation.file, bytearray())
            _write(data, operation, kept, 0 if number in durable or keep == 1 else draw.choice(SECTORS), draw)
        elif isinstance(operation, Resize) and kept:
            data = content.setdefault(operation.file, bytearray())
            del data[operation.size if operation.may_shrink else len(data) :]
            data.extend(bytes(max(0, operation.size - len(data))))
    return names, content


def _durable(recording: Recording, point: int) -> set[int]:
    """The operations before `point` that an fsync has covered."""
    found: set[int] = set()
    covered: dict[int | str, int] = {}  # file or folder -> its operations below this number are durable
    for number in range(point - 1, -1, -1):
        operation = recording.operations[number]
        if isinstance(operation, Sync):
            covered[operation.what] = max(covered.get(operation.what, 0), operation.covers)
            continue
        places = operation.folders if isinstance(operation, Named) else {operation.file}
        if any(number < covered.get(place, 0) for place in places):
            found.add(number)
            # A rename between folders is in both or in none; and each folder keeps its order.
            covered |= {place: max(covered.get(place, 0), number) for place in places}
    return found


def _rename(names: dict[str, int], operation: Named) -> None:
    for path, file in operation.entries.items():
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def _write(data: bytearray, write: Write, kept: bool, sector: int, draw: random.Random) -> None:
    """`sector`: 0 for all or nothing, else the size of the parts that may or may not be there."""
    first, end = write.offset, write.offset + len(write.data)
    if not sector:
        parts = [(first, end)] if kept else []
    else:
        cuts = [first, *range(first - first % sector + sector, end, sector), end]
        parts = [part for part in itertools.pairwise(cuts) if draw.random() < 0.5]
    for begin, stop in parts:
        data.extend(bytes(max(0, stop - len(data))))
        data[begin:stop] = write.data[begin - first : stop - first]


def _build(recording: Recording, names: dict[str, int], content: dict[int, bytearray]) -> None:
    emptied(recording.out)
    for path, file in sorted(names.items()):
        place = Path(path)
        if not place.parent.is_dir():
            continue  # its folder was lost
        if file < 0:
            place.mkdir()
        else:
            place.write_bytes(content.get(file, b""))
    _give_inodes(recording, names)


def _give_inodes(recording: Recording, names: dict[str, int]) -> None:
    """The list of what is being published tells files by their inodes: put those in that they have here."""
    out = recording.out
    listing = out / PRIVATE / PUBLISHING
    try:
        listed = json.loads(listing.read_text())
    except (OSError, ValueError):
        return  # not there, or torn
    for name, known in listed.items():
        meant = recording.inodes.get((name, known[0]), set())
        places = [path for path in (out / name, out / PRIVATE / STAGING / name) if names.get(str(path)) in meant]
        known[0] = places[0].stat().st_ino if places else -1
    listing.write_text(json.dumps(listed))
