"""The output folder from outside: where a run keeps what, whether a run is finished, what is in the way of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, noted, printable, raise_all
from lowmem_aim.models.config import CONFIG
from lowmem_aim.system.faults import named
from lowmem_aim.system.files import (
    disk_errors,
    input_errors,
    is_file,
    is_folder,
    is_there,
    partial_folder,
    read_file,
    real,
)
from lowmem_aim.units import shown

PRIVATE = ".lowmem_aim"
PUBLISHING = "publishing.json"
STAGING = "staging"
STAGES = "stages"  # the folder of the recipe's named stages, until the output is finished
SUMS = "sha256.txt"
LOG = "run.log"
FACTS = "run.json"
SEEN = "inputs.json"  # the inputs of a finished output as they were when they were last read
ACTIVATIONS = "activations.safetensors"
ANSWERS = "answers.sqlite"  # of an evaluation that keeps nothing in the cache
SNAPSHOTS = "calibration-*.bin"
STATES = "solving-*.bin"  # hidden states of the experts' texts, while weights are solved
# Small files that come with the shards: config, tokenizer, card. A tokenizer may have 20 MB.
SMALL_FILES_BYTES = 50_000_000


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Raise UsageError if `out` is a file, holds anything, or lies in an input folder; DiskError if unreadable."""
    shown = printable(str(out))
    with disk_errors(out):
        place = real(out)
        if os.path.lexists(out) and not is_folder(out):
            raise UsageError(f"the output `{shown}` is a file", hint="name a new folder")
        if any(place == folder or folder in place.parents for folder in inputs):
            raise UsageError(f"the output `{shown}` lies inside an input model", hint="name a folder elsewhere")
        check_private(out)
        if is_finished(out):
            return  # whether by the same job is checked once the inputs are open
        strange = {entry.name for entry in out.iterdir()} - {PRIVATE, *published_before(out)} if out.is_dir() else set()
        if strange:
            first = f"`{printable(min(strange))}`" + f" and {len(strange) - 1} more" * (len(strange) > 1)
            raise UsageError(
                f"the output folder `{shown}` is not empty: {first}",
                hint="name a new folder, or move what is in this one elsewhere",
            )


def check_private(out: Path) -> None:
    """Raise DiskError for a link, a pipe, a device or a folder in the place of one of this tool's own files in `out`.

    They would be written through to another place, never end, or stop a run at its end. Only staging holds folders, and
    `stages`.
    """
    private = out / PRIVATE
    with input_errors(private, DiskError):
        if not is_there(private):
            return
        folders = [place for place in (private, private / STAGING, private / STAGES) if is_there(place)]
        odd = [place for place in folders if not stat.S_ISDIR(place.lstat().st_mode)]
        entries = [Path(entry.path) for place in folders if place not in odd for entry in os.scandir(place)]
        for entry in (e for e in entries if e not in folders):
            try:
                kind = stat.S_IFMT(entry.lstat().st_mode)
            except FileNotFoundError:  # a request that the run has taken meanwhile, or a file under a temporary name
                continue
            if kind != stat.S_IFREG and not (kind == stat.S_IFDIR and entry.parent.name in (STAGING, STAGES)):
                odd.append(entry)
    if odd:
        what = "is a link, a pipe or a device, or a folder where this tool has a file, or a file where it has a folder"
        raise DiskError([f"{named(place)} {what}" for place in odd], hint="remove it, or name another output folder")


def published_before(out: Path) -> list[str]:
    """Files and folders in `out` that a killed run had published, in that order; others of these names do not count.

    A file is recognised by its inode and size, which a rename keeps. Raises DiskError if the list cannot be read.
    """
    file = out / PRIVATE / PUBLISHING
    try:
        with input_errors(file, DiskError):
            listed = json.loads(read_file(file, follow=False)) if is_there(file) else None
    except ValueError:
        return []
    if not isinstance(listed, dict):  # not written by `publish`: then nothing in the folder is ours
        return []
    plain = {name: known for name, known in listed.items() if Path(name).name == name and known is not None}
    with input_errors(out, DiskError):
        return [name for name, known in plain.items() if inode_and_size(out / name) == known]


def inode_and_size(file: Path) -> list[int] | None:
    """[inode, bytes] of a regular file, [inode, 0] of a folder: a rename keeps them. None for anything else.

    Raises OSError if that cannot be found out.
    """
    if not is_there(file):
        return None
    found = file.lstat()
    if stat.S_ISREG(found.st_mode):
        return [found.st_ino, found.st_size]
    return [found.st_ino, 0] if stat.S_ISDIR(found.st_mode) else None


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end in the folder `out`. Raises DiskError if that cannot be found out."""
    with input_errors(out, DiskError):
        return is_file(out / PRIVATE / SUMS) and is_file(out / CONFIG) and not is_there(out / PRIVATE / PUBLISHING)


def outputs_in(out: Path, kind: type[LowmemAimError] = DiskError) -> list[Path]:
    """The outputs of a run: the folder itself or, with several omegas, the folders in it.

    Raises an error of a `kind` if the folder cannot be looked at.
    """
    with input_errors(out, kind):
        of_a_run = is_folder(out / PRIVATE) and not _holds_only_stages(out / PRIVATE)
        several = [] if of_a_run else sorted(out.glob(f"omega-*/{PRIVATE}"))
    return [private.parent for private in several] or [out]


def outputs_of(out: Path) -> list[Path]:
    """The same of what a user names: the folder of a merge, or the file into which `calibrate` measures.

    Raises DiskError, UsageError.
    """
    partial = partial_folder(out)
    return outputs_in(out if os.path.isdir(out) or not os.path.isdir(partial) else partial)


def _holds_only_stages(private: Path) -> bool:
    """Whether a folder holds the stages of a recipe with several omegas, whose outputs lie beside it."""
    return is_folder(private) and [entry.name for entry in private.iterdir()] == [STAGES]


def stage_folder(out: Path, name: str) -> Path:
    """The folder of a named stage of the recipe whose output is `out`."""
    return out / PRIVATE / STAGES / name


def stages_in(out: Path) -> list[Path]:
    """The folders of the stages that runs have left in `out`. Raises DiskError if the folder cannot be looked at."""
    stages = out / PRIVATE / STAGES
    with input_errors(stages, DiskError):
        return sorted(place for place in stages.iterdir() if is_folder(place)) if is_folder(stages) else []


def check_writable(folder: Path) -> None:
    """Raise DiskError if no file can be made in `folder`."""
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def existing_folder(out: Path) -> Path:
    """The nearest folder that exists: `out` itself, or the folder that it would lie in."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.exists(folder))


def check_disk(out: Path, needed_bytes: int, what: str = "the output") -> None:
    """Raise DiskError if the disk that `out` will be on has no space for `needed_bytes` and the small files.

    `what` names, in the message, what needs the space.
    """
    with disk_errors(out):
        disk = shutil.disk_usage(existing_folder(out))
    if disk.total and needed_bytes + SMALL_FILES_BYTES > disk.free:  # a total of 0: no real disk, nothing is known
        raise DiskError(
            f"{what} needs {shown(needed_bytes + SMALL_FILES_BYTES)}, "
            f"but the disk of `{printable(str(out))}` has {shown(disk.free)} free",
            hint="free some space, or choose an output folder on another disk",
        )


def staged_bytes(out: Path) -> int:
    """Bytes that an interrupted run's files take of the disk, in staging and where the run had published them."""
    with contextlib.suppress(OSError):
        files = [*(out / PRIVATE / STAGING).iterdir(), *(out / name for name in published_before(out))]
        return sum(file.stat().st_size for file in files)
    return 0


def remove_snapshots(private: Path, but: Container[str] = (), kind: str = SNAPSHOTS) -> None:
    """Remove the snapshots of calibration, or those of another kind, except the files named in `but`."""
    for file in private.glob(kind):
        if file.name not in but:
            with contextlib.suppress(OSError):
                file.unlink()


def snapshot_bytes(private: Path) -> int:
    """Bytes of the disk that the snapshots of calibration take. Raises DiskError."""
    with input_errors(private, DiskError):
        return sum(file.stat().st_size for file in private.glob(SNAPSHOTS))


def check_outputs(out: Path, folders: Iterable[Path], inputs: Sequence[Path]) -> None:
    """Raise UsageError or DiskError for what is in the way of the output, or of the outputs in it."""
    errors: list[LowmemAimError] = []
    for folder in folders:
        with noted(errors):
            check_output(folder, inputs)
    raise_all(errors)
    with input_errors(out, DiskError):
        taken = os.path.lexists(out / PRIVATE) and not _holds_only_stages(out / PRIVATE)
    if out not in folders and (taken or os.path.lexists(out / CONFIG)):
        raise UsageError(
            f"the output folder `{printable(str(out))}` holds a merge: each of several outputs needs a folder in it",
            hint="name a new folder",
        )
