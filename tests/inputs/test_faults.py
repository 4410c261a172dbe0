"""Whatever system call fails on whatever file: its full name, the cause, the right exit code; then the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Place, Ran
from faults import CALLS, counted, failing
from long_cases import others_long
from merge_cases import digests

if not Path("/proc/self/fd").exists():
    pytest.skip("open files have no names here", allow_module_level=True)

LIBRARY = "transformers"  # in its own messages
WORDS = {
    errno.EACCES: "no permission",
    errno.EIO: "the disk, or the connection to it, failed",
    errno.ENOTDIR: "a part of its path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "it is a link, or its links lead in a circle",
    errno.ENAMETOOLONG: "its name is too long for this system",
    errno.EMFILE: "too many files are open",
    errno.ENOSPC: "no space is left on the disk",
    errno.EFBIG: "larger than `ulimit -f` or the filesystem allows",
    errno.EROFS: "the filesystem is read-only",
    errno.ESTALE: "the network filesystem has lost it",
}


@pytest.fixture
def commands(
    place: Place, texts: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[[], Ran]]:
    """The commands by name; each makes, or looks at, `place.out`."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None, raising=False)
    recipe, given = place.folder / "recipe.yml", place.folder / "given.safetensors"
    given.write_bytes(measured.read_bytes())
    models = "".join(f"  - model: {place.folder}/{name}\n" for name in ("math", "code"))
    recipe.write_text(
        f"merge_method: ties\nbase_model: {place.folder}/base\nmodels:\n{models}parameters: {{weight: 0.5}}\n"
    )
    aim = ("--omega", "0.4", "--no-cache", "--calibration")
    words: dict[str, tuple[Any, ...]] = {
        "merge": ("merge", recipe, place.out, "--read", "pread", *aim, given),
        "measure": ("merge", recipe, place.out, "--block-size", "16", *aim, texts),
        "plan": ("plan", recipe, place.out, "--no-measure", *aim, given),
        "relax": ("relax", place.folder / "math", place.out, "--base", place.folder / "base", *aim, given),
        "verify": ("verify", place.out),
        "status": ("status", place.out),
    }
    return {name: lambda words=words: place.run(*words) for name, words in words.items()}


def assert_told(done: Ran, file: Path, code: int, exit_codes: tuple[int, ...]) -> None:
    """The error has one of the exit codes, the cause, and the full name of the file or of the folder that it is in."""
    assert done.code in exit_codes, (done.code, done.err)
    assert "Traceback" not in done.err
    if LIBRARY in done.err:  # what transformers cannot look at, it takes for absent
        return
    assert WORDS[code] in done.err
    names = (str(file), f"/{file.name}", str(file.parent))  # the second: a rename is told by the name that was to be
    assert any(name + end in done.err for name in names for end in ("`", ":", "/")), done.err


@pytest.mark.parametrize(
    ("command", "kind", "name", "code", "exit_code"),
    [
        ("plan", "look", "base", errno.EACCES, 3),
        ("plan", "list", "math", errno.EACCES, 3),
        ("plan", "open", "math/config.json", errno.ESTALE, 3),
        ("plan", "open", "base/tokenizer.json", errno.EACCES, 3),
        ("plan", "open", "given.safetensors", errno.EIO, 3),
        ("plan", "open", "recipe.yml", errno.EISDIR, 2),
        ("plan", "open", "code/model.safetensors", errno.EMFILE, 3),
        ("plan", "look", "out", errno.ENAMETOOLONG, 4),
        ("merge", "read", "math/model.safetensors", errno.EIO, 3),
        ("merge", "make", "out/.lowmem_aim", errno.EROFS, 4),
        ("merge", "write", "out/.lowmem_aim/staging/model.safetensors", errno.ENOSPC, 4),
        ("merge", "write", "out/.lowmem_aim/staging/model.safetensors", errno.EFBIG, 4),
        ("merge", "rename", "out/.lowmem_aim/staging/config.json", errno.EIO, 4),
        ("measure", "open", "texts.jsonl", errno.EACCES, 3),
    ],
)
def test_a_call_that_fails_is_told_by_file_and_cause(
    place: Place, commands: dict[str, Callable[[], Ran]], command: str, kind: str, name: str, code: int, exit_code: int
) -> None:
    with failing(kind, place.folder / name, code):
        done = commands[command]()
    assert_told(done, place.folder / name, code, (exit_code,))


@pytest.mark.parametrize(
    ("command", "kind", "name", "exit_code"),
    others_long(
        [
            ("verify", "open", "model.safetensors", 8),
            ("verify", "list", "", 8),
            ("verify", "open", ".lowmem_aim/sha256.txt", 8),
            ("status", "look", ".lowmem_aim", 4),
            ("status", "open", ".lowmem_aim/journal.sqlite", 4),
            ("merge", "open", ".lowmem_aim/journal.sqlite", 4),
            ("merge", "look", ".lowmem_aim/sha256.txt", 4),
        ],
        [("verify", "open", "model.safetensors", 8), ("merge", "open", ".lowmem_aim/journal.sqlite", 4)],
    ),
)
def test_a_finished_output_that_cannot_be_read(
    place: Place, commands: dict[str, Callable[[], Ran]], command: str, kind: str, name: str, exit_code: int
) -> None:
    assert commands["merge"]().code == 0
    want = digests(place.out)
    with failing(kind, place.out / name, errno.EACCES):
        done = commands[command]()
    assert_told(done, place.out / name, errno.EACCES, (exit_code,))
    assert digests(place.out) == want


def test_a_path_that_is_longer_than_the_system_takes(place: Place) -> None:
    long = place.folder / "/".join(["n" * 100] * 45)
    models = ("--method", "linear", "--expert", place.folder / "math")
    for command, exit_code, words in (("plan", 4, models), ("merge", 4, models), ("status", 4, ()), ("verify", 8, ())):
        done = place.run(command, long, *words)
        assert done.code == exit_code, (command, done.err)
        assert f"`{long}" in done.err
        assert "its name is too long for this system" in done.err


@pytest.mark.long
@pytest.mark.parametrize("command", ["merge", "measure", "plan", "relax", "verify", "status"])
@pytest.mark.parametrize("kind", CALLS)
def test_every_call_on_every_file_may_fail(
    place: Place, commands: dict[str, Callable[[], Ran]], command: str, kind: str
) -> None:
    """Its first call, its second and its last; errors by turns. Then the same command ends with the same bytes."""
    makes = command not in ("verify", "status", "plan")
    if command in ("verify", "status"):
        assert commands["merge"]().code == 0
    with counted(kind, place.folder) as counts:
        assert commands[command]().code == 0
    want = digests(place.out) if place.out.exists() else {}
    codes = itertools.cycle(set(WORDS) - ({errno.ENOTDIR} if kind == "look" else set()))  # there, it means: absent
    temporary = [file for file in counts if file.name.startswith(("tmp", ".")) and file.name != ".lowmem_aim"]
    for file in (file for file in counts if file not in temporary):
        for first in sorted({1, min(2, counts[file]), counts[file]}):
            if makes:
                _remove(place.out)
            code = next(codes)
            with failing(kind, file, code, first):
                done = commands[command]()
            where = (kind, file, first, errno.errorcode[code])
            if done.code:  # 0: what failed was not needed
                exit_codes = (8, 4) if command == "verify" else (2, 3, 4)
                try:
                    assert_told(done, file, code, exit_codes)
                except AssertionError as error:
                    raise AssertionError(where) from error
            if makes:
                assert commands[command]().code == 0, where
            assert (digests(place.out) if place.out.exists() else {}) == want, where


def _remove(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    if folder.exists():
        folder.rmdir()
