"""The output folder: checked before work, locked during it, filled only once everything is whole.

Until `publish`, all that a run writes lies in OUT/.lowmem_aim/staging. Then its files get their final names, in an
order in which the folder is no loadable model until the last of them, config.json, is there. A run that fails takes
back what it made. One that is killed leaves OUT/.lowmem_aim behind, and what it had published: a list in there, written
first, says what that is, and the next run at that place clears both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import filesize

from lowmem_aim.checkpoint import CONFIG
from lowmem_aim.durable import disk_errors, locked, sync_folder, write_file
from lowmem_aim.errors import DiskError, LockedError, UsageError, printable

PRIVATE = ".lowmem_aim"
PUBLISHING = "publishing.json"
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
        if out.is_dir() and {entry.name for entry in out.iterdir()} - {PRIVATE} - _left_over(out):
            raise UsageError(f"the output folder `{shown}` is not empty", hint="name a new folder, or empty this one")


def _left_over(out: Path) -> set[str]:
    """The files in `out` that a killed run had published; none if it had come to config.json: then that is a model."""
    if (out / CONFIG).exists():
        return set()
    try:
        names = json.loads((out / PRIVATE / PUBLISHING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(names, list):  # not written by `publish`: then nothing in the folder is ours
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def check_writable(folder: Path) -> None:
    """Raises DiskError if no file can be made in `folder`."""
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def check_disk(out: Path, needed_bytes: int, what: str = "the output") -> None:
    """Raises DiskError if the disk that `out` will be on has less than `needed_bytes` (and small files) free."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    with disk_errors(out):
        disk = shutil.disk_usage(existing)
    if disk.total and needed_bytes + SMALL_FILES_BYTES > disk.free:  # a total of 0: no real disk, nothing is known
        raise DiskError(
            f"{what} needs {filesize.decimal(needed_bytes + SMALL_FILES_BYTES)}, "
            f"but the disk of `{printable(str(out))}` has {filesize.decimal(disk.free)} free",
            hint="free some space, or choose an output folder on another disk",
        )


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Make `out` and give an empty staging folder in it, locked against other runs.

    On an exception everything this run made is removed again. Raises DiskError, LockedError.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    private = out / PRIVATE
    try:
        with disk_errors(out):
            private.mkdir(parents=True, exist_ok=True)
        with locked(private / "lock"):
            check_output(out, [])  # again: another run may have finished here in the meantime
            staging = private / "staging"
            with disk_errors(staging):
                for name in _left_over(out):
                    (out / name).unlink(missing_ok=True)
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except BaseException as error:
        if not isinstance(error, LockedError):  # then the folder is another run's
            shutil.rmtree(private, ignore_errors=True)
            _remove_empty(made)
        raise
    # The lock file and its folder have done their work; what a finished model is made of stands beside them.
    shutil.rmtree(private, ignore_errors=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: not ours any more
            folder.rmdir()


def publish(out: Path, staging: Path, shards: Sequence[str], files: dict[str, bytes]) -> None:
    """Give the staged shards and then `files` (in their order, config.json last) their final names, durably.

    `out` held nothing before; after an exception it holds nothing again.
    """
    for name, content in files.items():
        write_file(staging / name, content)
    names = [*shards, *files]
    write_file(out / PRIVATE / PUBLISHING, json.dumps(names).encode())
    try:
        with disk_errors(out):
            for name in names[:-1]:
                os.replace(staging / name, out / name)
            sync_folder(out)  # before config.json: a power loss must not keep that and lose another
            os.replace(staging / names[-1], out / names[-1])
            sync_folder(out)
    except BaseException:
        for name in reversed(names):  # config.json first: half a model is never one that loads
            (out / name).unlink(missing_ok=True)
        raise
