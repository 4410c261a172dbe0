"""The output folder: checked before work, locked during it, filled only once everything is whole.

Until `publish`, all that a run writes lies in OUT/.lowmem_aim: the shards in staging/, the journal of what is finished.
Then files get their final names, in an order in which the folder is no loadable model until the last of them,
config.json, is there. A run that fails or is killed leaves what it had finished for the same command to go on with; one
that had finished nothing leaves nothing. Files that a killed run had published (a list, written first, says which) are
taken back to staging by the next. What stays beside a finished model: the journal and sha256.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import filesize

from lowmem_aim.config import CONFIG
from lowmem_aim.durable import OWNER, disk_errors, locked, sync_folder, write_file
from lowmem_aim.errors import DiskError, LockedError, MemoryBudgetError, ModelError, UsageError, printable
from lowmem_aim.journal import NAME as JOURNAL
from lowmem_aim.journal import Journal
from lowmem_aim.record import LOG
from lowmem_aim.verify import sums_text

PRIVATE = ".lowmem_aim"
PUBLISHING = "publishing.json"
STAGING = "staging"
SUMS = "sha256.txt"
FACTS = "run.json"
ACTIVATIONS = "activations.safetensors"
SNAPSHOTS = "calibration-*.bin"
# Small files that come with the shards: config, tokenizer, card. A tokenizer may have 20 MB.
SMALL_FILES_BYTES = 50_000_000


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Raises UsageError if `out` is a file, holds anything, or overlaps an input folder; DiskError if unreadable."""
    shown = printable(str(out))
    with disk_errors(out):
        place = out.resolve()
        if out.exists() and not out.is_dir():
            raise UsageError(f"the output `{shown}` is a file", hint="name a new folder")
        if any(place == folder or folder in place.parents for folder in inputs):
            raise UsageError(f"the output `{shown}` lies inside an input model", hint="name a folder elsewhere")
        if is_finished(out):
            return  # by the same job? that is seen once the inputs are open
        if out.is_dir() and {entry.name for entry in out.iterdir()} - {PRIVATE} - set(_left_over(out)):
            raise UsageError(f"the output folder `{shown}` is not empty", hint="name a new folder, or empty this one")


def _left_over(out: Path) -> list[str]:
    """The files in `out` that a killed run had published, in that order; others of the same names do not count.

    They are known by inode and size, which a rename keeps.
    """
    try:
        listed = json.loads((out / PRIVATE / PUBLISHING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(listed, dict):  # not written by `publish`: then nothing in the folder is ours
        return []
    return [name for name, known in listed.items() if Path(name).name == name and _known(out / name) == known]


def _known(file: Path) -> list[int] | None:
    with contextlib.suppress(OSError, ValueError):
        found = file.lstat()
        return [found.st_ino, found.st_size] if stat.S_ISREG(found.st_mode) else None
    return None


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end there."""
    return (out / PRIVATE / SUMS).is_file() and (out / CONFIG).is_file() and not (out / PRIVATE / PUBLISHING).exists()


def outputs_in(out: Path) -> list[Path]:
    """The outputs of a run: the folder itself, or, of several omegas, those in it."""
    several = [] if (out / PRIVATE).exists() else sorted(out.glob(f"omega-*/{PRIVATE}"))
    return [private.parent for private in several] or [out]


def check_writable(folder: Path) -> None:
    """Raises DiskError if no file can be made in `folder`."""
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def existing_folder(out: Path) -> Path:
    """The folder that is there of `out` and those that it lies in."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())


def check_disk(out: Path, needed_bytes: int, what: str = "the output") -> None:
    """Raises DiskError if the disk that `out` will be on has less than `needed_bytes` (and small files) free."""
    with disk_errors(out):
        disk = shutil.disk_usage(existing_folder(out))
    if disk.total and needed_bytes + SMALL_FILES_BYTES > disk.free:  # a total of 0: no real disk, nothing is known
        raise DiskError(
            f"{what} needs {filesize.decimal(needed_bytes + SMALL_FILES_BYTES)}, "
            f"but the disk of `{printable(str(out))}` has {filesize.decimal(disk.free)} free",
            hint="free some space, or choose an output folder on another disk",
        )


@dataclass(frozen=True)
class Workspace:
    """The output folder while a run holds it."""

    out: Path
    journal: Journal
    sums: dict[str, str] = field(default_factory=dict)  # of the published files: name -> sha256

    @property
    def private(self) -> Path:
        return self.out / PRIVATE

    @property
    def staging(self) -> Path:
        return self.private / STAGING

    def take_back(self) -> None:
        """What a killed run had published goes back to staging. Raises DiskError."""
        _take_back(self.out)

    def forget_calibration(self) -> None:
        """Its snapshots are of no more use. Raises DiskError."""
        if self.journal.holds("calibration"):
            self.journal.drop("calibration")
        remove_snapshots(self.private)

    def staged_bytes(self) -> int:
        """What earlier runs have already taken of the disk."""
        with contextlib.suppress(OSError):
            return sum(file.stat().st_size for file in self.staging.iterdir())
        return 0


@contextlib.contextmanager
def workspace(out: Path, *, fresh: bool = False) -> Iterator[Workspace]:
    """Make `out` if need be and lock it against other runs; `take_back` then puts what is finished into staging.

    `fresh` discards what an interrupted run has left. On an exception what this run made is removed again, unless there
    is something finished for the same command to go on with. Raises DiskError, LockedError, UsageError.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    private = out / PRIVATE
    keep = private.exists()  # what is there is another's until its journal, once read, says that nothing is finished
    try:
        with disk_errors(out):
            private.mkdir(parents=True, exist_ok=True)
            for folder in (private, *made):
                sync_folder(folder.parent)  # what becomes durable in a folder is worth as much as the folder
        with locked(private / "lock"):
            check_output(out, [])  # again: another run may have been here in the meantime
            finished = is_finished(out)
            if fresh and not finished:
                _take_back(out)
                with disk_errors(private):
                    shutil.rmtree(private / STAGING)
                    Journal.remove(private)
                    for name in (LOG, FACTS):
                        (private / name).unlink(missing_ok=True)
                remove_snapshots(private)
            with Journal(private, read_only=finished) as journal:
                space = Workspace(out, journal)
                try:
                    yield space
                finally:
                    keep = True
                    keep = finished or any(map(journal.holds, ("group", "activations", "calibration", "acm")))
            if space.sums:
                _seal(out, space.sums)
    except BaseException as error:
        if isinstance(error, DiskError | ModelError | MemoryBudgetError) and keep:
            error.hint += f"{'; ' * bool(error.hint)}what is finished stays: the same command goes on from there"
        if not keep and not isinstance(error, LockedError):  # then the folder is another run's
            _clear(private)
            _remove_empty([private, *made])
        raise


def discard(out: Path) -> None:
    """Remove what runs have left in `out`, and the folder if that was all. Not while a run holds it."""
    _clear(out / PRIVATE)
    _remove_empty([out / PRIVATE, out])


def _clear(private: Path) -> None:
    """Remove what runs put there, and nothing else."""
    shutil.rmtree(private / STAGING, ignore_errors=True)
    _remove_half_written(private)
    with contextlib.suppress(OSError):
        Journal.remove(private)
        for name in (ACTIVATIONS, PUBLISHING, LOG, FACTS, OWNER, "lock"):
            (private / name).unlink(missing_ok=True)


def remove_snapshots(private: Path, but: str = "") -> None:
    """Remove those of calibration, except the file of one name."""
    for file in private.glob(SNAPSHOTS):
        if file.name != but:
            with contextlib.suppress(OSError):
                file.unlink()


def _remove_half_written(private: Path) -> None:
    """What a kill may have left of small files and snapshots."""
    remove_snapshots(private)
    for file in private.glob(".*.partial"):
        with contextlib.suppress(OSError):
            file.unlink()


def snapshot_bytes(private: Path) -> int:
    """What those of calibration take of the disk."""
    return sum(file.stat().st_size for file in private.glob(SNAPSHOTS))


def _take_back(out: Path) -> None:
    """Published files of a killed run go back to staging, config.json first: half a model is never one that loads."""
    staging = out / PRIVATE / STAGING
    with disk_errors(staging):
        staging.mkdir(exist_ok=True)
        for name in reversed(_left_over(out)):
            os.replace(out / name, staging / name)
        for folder in (staging, staging.parent, out):
            sync_folder(folder)  # a power loss must not keep the list's end and lose a renaming: whose were the files?
        (out / PRIVATE / PUBLISHING).unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: not ours any more
            folder.rmdir()


def publish(space: Workspace, shards: dict[str, str], files: dict[str, bytes]) -> None:
    """Give the staged shards and then `files` (in their order, config.json last) their final names, durably.

    `shards`: name -> sha256. Can be done again after it was interrupted at any point. Raises DiskError.
    """
    out, staging = space.out, space.staging
    for name, content in files.items():
        write_file(staging / name, content)
    names = [*shards, *files]
    there = [name for name in names if os.path.lexists(out / name)]
    if there:  # it was not when the run began
        raise DiskError(
            f"`{printable(str(out / there[0]))}` has been put into the output folder meanwhile",
            hint="move it away, and give the same command again",
        )
    write_file(space.private / PUBLISHING, json.dumps({name: _known(staging / name) for name in names}).encode())
    with disk_errors(out):
        for name in names[:-1]:
            os.replace(staging / name, out / name)
        sync_folder(out)  # before config.json: a power loss must not keep that and lose another
        os.replace(staging / names[-1], out / names[-1])
        sync_folder(out)
    space.sums.update(shards)
    space.sums.update({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def _seal(out: Path, sums: dict[str, str]) -> None:
    """The list of digests, the closed journal's with them; with it the run is finished."""
    private = out / PRIVATE
    with disk_errors(private):
        own = {f"{PRIVATE}/{JOURNAL}": hashlib.sha256((private / JOURNAL).read_bytes()).hexdigest()}
        write_file(private / SUMS, sums_text(sums | own))
        (private / PUBLISHING).unlink(missing_ok=True)
        sync_folder(private)  # finished, whatever happens after the run has said so
        shutil.rmtree(private / STAGING, ignore_errors=True)
        _remove_half_written(private)
        (private / ACTIVATIONS).unlink(missing_ok=True)
