"""The output folder: checked before work, locked during it, filled only once everything is whole.

Until `publish`, all that a run writes lies in OUT/.lowmem_aim/staging. Then files get their final names in an order in
which the folder is no loadable model until the last of them, config.json, is there. A run that fails takes back what it
made; one that is killed leaves OUT/.lowmem_aim behind, which the next run at that place clears.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import filesize

from lowmem_aim.durable import disk_errors, locked, sync_folder, write_file
from lowmem_aim.errors import DiskError, LockedError, UsageError, printable

PRIVATE = ".lowmem_aim"
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
        if out.is_dir() and any(entry.name != PRIVATE for entry in out.iterdir()):
            raise UsageError(f"the output folder `{shown}` is not empty", hint="name a new folder, or empty this one")


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raises DiskError if the disk that `out` will be on has less than `needed_bytes` (and small files) free."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    with disk_errors(out):
        disk = shutil.disk_usage(existing)
    if disk.total and needed_bytes + SMALL_FILES_BYTES > disk.free:  # a total of 0: no real disk, nothing is known
        raise DiskError(
            f"the output needs {filesize.decimal(needed_bytes + SMALL_FILES_BYTES)}, "
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
            staging = private / "staging"
            with disk_errors(staging):
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
    try:
        with disk_errors(out):
            for name in shards:
                os.replace(staging / name, out / name)
            sync_folder(out)
        for name, content in files.items():
            write_file(out / name, content)
    except BaseException:
        for name in (*reversed(files), *shards):  # config.json first: half a model is never one that loads
            (out / name).unlink(missing_ok=True)
        raise
