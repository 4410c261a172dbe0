"""The output folder while a run holds it: checked before work, locked during it, filled only once everything is whole.

Until `publish`, all that a run writes lies in OUT/.lowmem_aim: the shards in staging/, and the journal of what is
finished. Then files get their final names, in an order in which the folder is no loadable model until the last of them,
config.json, is there. A run that fails or is killed leaves what it had finished, for the same command to build on; a
run that had finished nothing leaves nothing. Files that a killed run had published (a list, written first, says which)
are taken back to staging by the next run. What stays beside a finished model: the journal and sha256.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_aim.errors import DiskError, LockedError, MemoryBudgetError, ModelError, printable
from lowmem_aim.output.folder import (
    ACTIVATIONS,
    ANSWERS,
    FACTS,
    LOG,
    PRIVATE,
    PUBLISHING,
    SEEN,
    SNAPSHOTS,
    STAGES,
    STAGING,
    STATES,
    SUMS,
    check_output,
    check_private,
    inode_and_size,
    is_finished,
    published_before,
    remove_snapshots,
    stages_in,
)
from lowmem_aim.output.journal import NAME as JOURNAL
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import PROGRESS, CalibrationSnapshot
from lowmem_aim.output.requests import REQUEST, only_new_requests
from lowmem_aim.output.verify import sums_text
from lowmem_aim.system.files import disk_errors, input_errors, read_file, sync_folder, write_file
from lowmem_aim.system.lock import OWNER, locked


@dataclass
class Workspace:
    """The output folder while a run holds it."""

    out: Path
    journal: Journal
    sums: dict[str, str] = field(default_factory=dict)  # of the published files: name -> sha256
    spent: bool = False  # nothing in it is needed any more: it is removed at the end of the block

    @property
    def private(self) -> Path:
        """The folder of all that is not the model."""
        return self.out / PRIVATE

    @property
    def staging(self) -> Path:
        """The folder of files that do not have their final names yet."""
        return self.private / STAGING

    def take_back(self) -> None:
        """Move what a killed run had published back to staging. Raises DiskError."""
        _take_back(self.out)

    def forget_calibration(self) -> None:
        """Remove the snapshots of calibration, which are of no more use. Raises DiskError."""
        if self.journal.holds(CalibrationSnapshot):
            self.journal.forget(CalibrationSnapshot)
        remove_snapshots(self.private)


@contextlib.contextmanager
def workspace(out: Path, *, fresh: bool = False, stages: Path | None = None) -> Iterator[Workspace]:
    """Make `out` if need be, and hold it against other runs during this block; a merge then calls `take_back`.

    `fresh` discards what an interrupted run has left. `stages`: the folder with the stages that the output is made of,
    if that is not `out`; while there are any, all is kept. On an exception, what this run made is removed again, unless
    something is finished that the same command can build on. Raises DiskError, LockedError, UsageError.
    """
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    private = out / PRIVATE
    keep = os.path.lexists(private)  # what was there before stays, until its journal says that nothing is finished
    check_private(out)
    try:
        with disk_errors(out):
            private.mkdir(parents=True, exist_ok=True)
            for folder in (private, *made):
                sync_folder(folder.parent)  # a durable file is lost if its folder is lost
        with locked(private / "lock"), only_new_requests(private), _cleared_unless(lambda: keep, private):
            check_output(out, [])  # again: another run may have been here in the meantime
            finished = is_finished(out)
            if fresh and not finished:
                _take_back(out)
                with disk_errors(private):
                    shutil.rmtree(private / STAGING)
                    shutil.rmtree(private / STAGES, ignore_errors=True)
                    Journal.remove(private)
                    for name in (ANSWERS, LOG, FACTS, SEEN):
                        (private / name).unlink(missing_ok=True)
                _remove_all_snapshots(private)
            with Journal(private, read_only=finished) as journal:
                space = Workspace(out, journal)
                try:
                    yield space
                finally:
                    keep = True  # also if the journal cannot be asked
                    keep = finished or journal.holds(*PROGRESS) or bool(stages_in(stages or out))
            if space.sums:  # after the journal is closed: the list has its digest
                _seal(out, space.sums)
            if space.spent:
                _clear(private)
        if space.spent:
            _remove_empty([private, out])
    except BaseException as error:
        if isinstance(error, DiskError | ModelError | MemoryBudgetError) and keep:
            error.add_to_hints("what is finished is kept: the same command resumes from there")
        if not keep and not isinstance(error, LockedError):  # then the folder is another run's
            _remove_empty([private, *made])
        raise


@contextlib.contextmanager
def _cleared_unless(kept: Callable[[], bool], private: Path) -> Iterator[None]:
    """Clear the private folder after an exception, unless something in it is worth keeping."""
    try:
        yield
    except BaseException:
        if not kept():
            _clear(private)
        raise


def _clear(private: Path) -> None:
    """Remove what runs put into the private folder, and nothing else; the lock last, which this run must hold.

    Whoever waits for the lock sees that its file is another one now, and asks again.
    """
    shutil.rmtree(private / STAGING, ignore_errors=True)
    _remove_half_written(private)
    with contextlib.suppress(OSError):
        Journal.remove(private)
        for name in (ACTIVATIONS, ANSWERS, PUBLISHING, LOG, FACTS, SEEN, REQUEST, OWNER, "lock"):
            (private / name).unlink(missing_ok=True)


def _remove_all_snapshots(private: Path) -> None:
    for kind in (SNAPSHOTS, STATES):
        remove_snapshots(private, kind=kind)


def _remove_half_written(private: Path) -> None:
    """Remove what a kill may have left of small files and snapshots."""
    _remove_all_snapshots(private)
    for file in private.glob(".*.partial"):
        with contextlib.suppress(OSError):
            file.unlink()


def _take_back(out: Path) -> None:
    """Move published files of a killed run back to staging, config.json first, so that half a model never loads."""
    staging = out / PRIVATE / STAGING
    with disk_errors(staging):
        staging.mkdir(exist_ok=True)
        for name in reversed(published_before(out)):
            with disk_errors(out / name):
                os.replace(out / name, staging / name)
        for folder in (staging, staging.parent, out):
            with disk_errors(folder):
                sync_folder(folder)  # before the list goes: a power loss must not lose a rename and keep that
        with disk_errors(out / PRIVATE / PUBLISHING):
            (out / PRIVATE / PUBLISHING).unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: not ours any more
            folder.rmdir()


def publish(space: Workspace, shards: Mapping[str, str], sizes: Mapping[str, int], files: Mapping[str, bytes]) -> None:
    """Give the staged shards and then `files` (in their order, config.json last) their final names, durably.

    `shards`: name -> sha256; `sizes`: name -> bytes, of the shards. After an interruption at any point, the same can be
    done again. Raises DiskError, also for a staged file that is lost or has another size: the next run makes it again.
    """
    out, staging = space.out, space.staging
    _stage(staging, files)
    # A folder of files takes its final name as one.
    names = list(dict.fromkeys(name.partition("/")[0] for name in (*shards, *files)))
    with input_errors(staging, DiskError):
        listed = {name: inode_and_size(staging / name) for name in names}
    expected = {**dict.fromkeys(names, 0), **sizes, **{name: len(content) for name, content in files.items()}}
    for name, found in listed.items():
        if found is None or found[1] != expected[name]:
            state = "is gone" if found is None else f"has {found[1]} bytes instead of {expected[name]}"
            raise DiskError(
                f"the staged file `{printable(str(staging / name))}` {state}: something else changed it",
                hint="the next run makes it again",
            )
    there = [name for name in names if os.path.lexists(out / name)]
    if there:  # it was not when the run began
        raise DiskError(
            f"`{printable(str(out / there[0]))}` appeared in the output folder while the merge ran",
            hint="move it away, and give the same command again",
        )
    # Before any rename: if this run is killed, the next one learns from the list which files are ours.
    write_file(space.private / PUBLISHING, json.dumps(listed).encode())
    with disk_errors(out):
        for name in names:
            if name == names[-1]:
                sync_folder(out)  # before config.json: a power loss must not keep that and lose another
            with disk_errors(out / name):
                os.replace(staging / name, out / name)
        sync_folder(out)
    space.sums.update(shards)
    space.sums.update({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def _stage(staging: Path, files: Mapping[str, bytes]) -> None:
    """Write the small files, those in folders into new ones."""
    folders = dict.fromkeys(staging / name.partition("/")[0] for name in files if "/" in name)
    with disk_errors(staging):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
    for name, content in files.items():
        write_file(staging / name, content)


def _seal(out: Path, sums: dict[str, str]) -> None:
    """Write the list of digests, the closed journal's among them; with it the run is finished."""
    private = out / PRIVATE
    with input_errors(private / JOURNAL, DiskError):
        own = {f"{PRIVATE}/{JOURNAL}": hashlib.sha256(read_file(private / JOURNAL, follow=False)).hexdigest()}
    with disk_errors(private):
        write_file(private / SUMS, sums_text(sums | own))
        # Only after the digests are durable: a run is finished once these are there and the list of names is not.
        (private / PUBLISHING).unlink(missing_ok=True)
        sync_folder(private)  # finished for good, before the run says so
        shutil.rmtree(private / STAGING, ignore_errors=True)
        _remove_half_written(private)
        (private / ACTIVATIONS).unlink(missing_ok=True)
