"""The folders of a recipe's named stages once the output is complete: removed, or moved where the user keeps them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.models.config import CONFIG
from lowmem_aim.output.folder import (
    PRIVATE,
    STAGES,
    SUMS,
    check_disk,
    check_output,
    check_writable,
    existing_folder,
    is_finished,
    stage_folder,
    stages_in,
)
from lowmem_aim.system.files import disk_errors, is_file, real, sync_folder


def check_kept(keep: Path, names: Sequence[str], out: Path, inputs: Sequence[Path], nbytes: int) -> None:
    """Check that the stages can be moved into the folder `keep`. Raises UsageError, DiskError.

    `inputs` are the folders of models; `nbytes` the bytes of all stages, which another disk must have space for.
    """
    if real(out) in (real(keep), *real(keep).parents):
        text = f"`--keep-stages {printable(str(keep))}` lies in the output folder"
        raise UsageError(text, hint="name a folder elsewhere")
    for name in names:
        if _is_copy(keep / name, stage_folder(out, name)):
            continue
        check_output(keep / name, inputs)
        if os.path.lexists(keep / name):
            raise UsageError(
                f"`--keep-stages`: there is a `{printable(str(keep / name))}` already",
                hint="move it away, or name another folder to keep the stages in",
            )
    check_writable(existing_folder(keep))
    if _is_elsewhere(keep, out):
        check_disk(keep, nbytes, "keeping the stages")


def put_away(out: Path, keep: Path | None) -> None:
    """Move the finished stages in `out` into the folder `keep`, or remove them; after a kill, call it again.

    Raises DiskError, UsageError for what is in the place of a kept stage.
    """
    for folder in stages_in(out):
        if keep and is_finished(folder):
            _move(folder, keep / folder.name)
        _remove(folder)
    with contextlib.suppress(OSError):  # there is none, or something else is in it
        (out / PRIVATE / STAGES).rmdir()
        (out / PRIVATE).rmdir()  # with several omegas, nothing else is there


def remove_stages(out: Path) -> None:
    """Remove all stages in `out`. Raises DiskError."""
    put_away(out, None)


def _move(folder: Path, kept: Path) -> None:
    """Give a stage its place among the kept ones, whole or not at all."""
    with disk_errors(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        if _is_copy(kept, folder):
            return
        if os.path.lexists(kept):
            raise UsageError(f"`--keep-stages`: there is another `{printable(str(kept))}` already", "move it away")
        if not _is_elsewhere(kept.parent, folder):
            os.replace(folder, kept)
        else:
            partial = kept.with_name(f".{kept.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial)
            for root, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(root, name))
            os.replace(partial, kept)
        sync_folder(kept.parent)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _is_copy(kept: Path, folder: Path) -> bool:
    """Whether a run has copied the stage, and was killed before it removed it."""
    files = [place / PRIVATE / SUMS for place in (kept, folder)]
    with disk_errors(kept):
        return all(map(is_file, files)) and files[0].read_bytes() == files[1].read_bytes()


def _is_elsewhere(keep: Path, out: Path) -> bool:
    """Whether two folders, which may not be there yet, are on different filesystems."""
    with disk_errors(keep):
        return existing_folder(keep).stat().st_dev != existing_folder(out).stat().st_dev


def _remove(folder: Path) -> None:
    """Remove a stage, config.json first: what a kill leaves of it is no model."""
    with disk_errors(folder):
        (folder / CONFIG).unlink(missing_ok=True)
        if os.path.lexists(folder):
            shutil.rmtree(folder)
