"""The list of digests of a finished output, in the form that `sha256sum --check` takes, and the check of the output.

The list is sha256.txt. Its last line is a digest of the lines before, so that damage to the list itself shows too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lowmem_aim.errors import UsageError, VerifyError, printable
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, silent
from lowmem_aim.models.known_files import fits
from lowmem_aim.output.folder import PRIVATE, SUMS, outputs_in
from lowmem_aim.output.strays import strays_in
from lowmem_aim.system.files import input_errors, is_file, open_to_read, read_file

LONGEST_NAME = 200  # characters
PIECE_BYTES = 64 << 20  # read at a time
_HINT = "merge again into a new folder; if it happens again, check the disk"
_STRAY_HINT = "move these files elsewhere"
_EDITED_HINT = f"an edit of yours does no harm if loaders can read it; if you made none: {_HINT}"
_TEXTS = ("*.md", "*.yml", "*.json", "*.jinja", "*.txt")  # of an output, what people edit
_LAST = "# sha256 of the lines above: "


def sums_text(sums: Mapping[str, str]) -> bytes:
    """The text of the list, from file name (relative to the output folder) -> sha256."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    return lines + f"{_LAST}{hashlib.sha256(lines).hexdigest()}\n".encode()


def verify(out: Path, list_name: str, emit: Emit = silent) -> int:
    """Read every file of one output again, and return their number. Files of unknown use beside them are a notice.

    Raises VerifyError naming all files that differ, and all others that a loader would take for a part of the model;
    UsageError without a list.
    """
    file = out / list_name
    with input_errors(file, VerifyError):
        there = is_file(file)
    if not there:
        raise UsageError(
            f"`{printable(str(out))}` is not a finished output of this tool: there is no `{list_name}`",
            hint="`lowmem-aim status` shows what is there",
        )
    sums = _read(file)
    with input_errors(out, VerifyError):
        sizes = {name: (out / name).stat().st_size for name in sums if is_file(out / name)}
    emit(PhaseStarted("verify", sum(sizes.values()), "bytes"))
    found, done = dict[str, str](), 0  # problem -> hint
    for name, expected in sums.items():
        if name not in sizes:
            found[f"`{printable(name)}` is missing"] = _HINT
            continue
        try:
            if _sha256(out / name, emit, done) != expected:
                edited = _is_sound_text(out / name)
                what = "has been edited since the merge" if edited else "is not what was written"
                found[f"`{printable(name)}` {what}"] = _EDITED_HINT if edited else _HINT
        except VerifyError as error:  # it cannot be read; the others are read all the same
            found |= dict.fromkeys(error.problems, _HINT)
        done += sizes[name]
        emit(Advanced(done, name))
    emit(PhaseEnded("verify"))
    with input_errors(out, VerifyError):
        read, unknown = strays_in(out, sums)
    for name in read:
        found[f"`{printable(name)}` does not belong to this output, and a loader would read it"] = _STRAY_HINT
    for name in unknown:
        emit(Notice(f"`{printable(name)}` does not belong to this output", "warning"))
    if found:
        raise VerifyError([*found], [*found.values()])
    return len(sums)


def _is_sound_text(file: Path) -> bool:
    """Whether a file is one that people edit, and can be read as what it is: text, or JSON. Raises VerifyError."""
    if not fits(file.name, _TEXTS):
        return False
    with input_errors(file, VerifyError):
        data = read_file(file)
    try:
        text = data.decode()
        return bool(text) and (file.suffix != ".json" or json.loads(text) is not None)
    except (ValueError, RecursionError):
        return False


def missing_files(out: Path, list_name: str) -> list[str]:
    """The names of listed files that are not there. Nothing but the list is read. Raises VerifyError."""
    names = _read(out / list_name)
    with input_errors(out, VerifyError):
        return [name for name in names if not is_file(out / name)]


def verify_outputs(out: Path, emit: Emit = silent) -> Path:
    """Verify every output of the run in `out` (with several omegas, each has a folder), and return `out`.

    Raises VerifyError naming all files of an output that differ, UsageError for a folder without a finished output.
    """
    for folder in outputs_in(out, VerifyError):
        verify(folder, f"{PRIVATE}/{SUMS}", emit)
    return out


def _read(file: Path) -> dict[str, str]:
    with input_errors(file, VerifyError):
        data = read_file(file)
    lines, _, _ = data.rpartition(b"# ")
    if data != lines + f"{_LAST}{hashlib.sha256(lines).hexdigest()}\n".encode():
        raise VerifyError(f"`{printable(str(file))}`, the list of digests, is damaged itself", _HINT)
    sums = dict(_entries(lines.decode("utf-8", "replace")))
    if "config.json" not in sums or not all(map(_is_inside, sums)):
        raise VerifyError(f"`{printable(str(file))}` is not a list of digests that this tool wrote", _HINT)
    return sums


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for line in text.removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        yield name, digest


def is_listable(name: str) -> bool:
    """Whether a list can hold a file's name: it fits one line of UTF-8 text, and is taken for no path elsewhere."""
    return name.isprintable() and len(name.encode()) < LONGEST_NAME and _is_inside(name)


def _is_inside(name: str) -> bool:
    """Whether a name leads to a file of the output, and cannot lead elsewhere."""
    return (
        0 < len(name) < LONGEST_NAME
        and not set(name) & {"\0", "\\", ":"}
        and not ({"", ".", ".."} & set(name.split("/")))
    )


def _sha256(file: Path, emit: Emit, before: int) -> str:
    """sha256 of a file; `before` is the number of bytes of other files that have been read, for the progress."""
    digest, done = hashlib.sha256(), before
    with input_errors(file, VerifyError), open_to_read(file) as stream:
        while data := stream.read(PIECE_BYTES):
            digest.update(data)
            done += len(data)
            emit(Advanced(done, file.name))
    return digest.hexdigest()
