"""A staged shard is lost, cut off, emptied or grown between two runs, before the finish or within it: never published.

Before the finish that is exit code 4; the next run makes the shard again, and ends with the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from crash.workshop import Job, at_call, emptied, is_clean, kill

import lowmem_aim.jobs.merge as merge_job
from lowmem_aim.output.folder import PRIVATE, STAGING
from lowmem_aim.output.journal import Journal

COMMITS = (2, 5, 8, 11)  # a kill comes at this commit of twelve
RENAMES = (1, 2, 4, 9)  # or at this rename of the finish; three shards come first


def suite(job: Job, short: bool) -> str:
    out, counts = job.work / "out", Counter[str]()
    for spoil in SPOILS[1:2] if short else SPOILS:
        for number in COMMITS[1:2] if short else COMMITS:
            job.killed(out, Journal, "keep_group", number)
            counts["between two runs"] += _spoil_and_finish(job, out, spoil)
        for number in RENAMES[1:2] if short else RENAMES:
            _killed_in_the_finish(job, out, number)
            counts["within the finish"] += _spoil_and_finish(job, out, spoil)
        for number in range(1 if short else 3):
            _before_the_finish(job, out, partial(spoil, number=number))
            counts["before the finish: exit code 4"] += 1
    assert all(counts.values()), counts
    told = ", ".join(f"{count} {when}" for when, count in counts.items())
    return f"{sum(counts.values())} spoilt shards ({told}), every output the same bytes"


def _killed_in_the_finish(job: Job, out: Path, number: int) -> None:
    def before() -> None:
        work, left = os.replace, [number]

        def renaming(source: Path, target: Path) -> None:
            left[0] -= target.parent == out  # others are of small files
            if not left[0]:
                kill()
            work(source, target)

        os.replace = renaming  # type: ignore[assignment]

    emptied(out)
    done = job.attempt(out, before)
    assert done.code == -9, done
    assert len(list(out.glob("*.safetensors"))) == min(number - 1, 3)


def _spoil_and_finish(job: Job, out: Path, spoil: Callable[..., None]) -> int:
    shard = _shard(out, 0)
    spoil(out, number=0)
    job.check_told(out)
    if shard.parent == out and shard.is_file():  # it had its name already; as it is, it may be the user's
        done = job.attempt(out)
        assert is_clean(done, 2), done
        assert f"not empty: `{shard.name}`" in done.text, done
        shard.unlink()
    job.finish(out)
    return 1


def _before_the_finish(job: Job, out: Path, spoil: Callable[[Path], None]) -> None:
    emptied(out)
    done = job.attempt(out, lambda: at_call(merge_job, "publish", 1, lambda: spoil(out)))
    job.check_no_half_model(out)
    assert is_clean(done, 4), done
    shutil.copytree(out, emptied(job.work / "again"))
    job.finish(out)
    job.finish(job.work / "again", "--fresh")


def _shard(out: Path, number: int) -> Path:
    """One of the shards: where it is staged, or where a run that was killed in its finish had published it."""
    found = sorted([*(out / PRIVATE / STAGING).glob("*.safetensors"), *out.glob("*.safetensors")], key=lambda f: f.name)
    return found[min(number, len(found) - 1)]


def _lost(out: Path, number: int) -> None:
    _shard(out, number).unlink()


def _cut_off(out: Path, number: int) -> None:
    shard = _shard(out, number)
    os.truncate(shard, shard.stat().st_size - 1)


def _emptied(out: Path, number: int) -> None:
    os.truncate(_shard(out, number), 0)


def _grown(out: Path, number: int) -> None:
    with _shard(out, number).open("ab") as stream:
        stream.write(b"junk")


SPOILS: tuple[Callable[..., None], ...] = (_lost, _cut_off, _emptied, _grown)
