"""A run writes into its output folder and the tool's cache, and nowhere else; without a cache it works all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Place
from merge_cases import digests

from lowmem_aim.methods import compiled_code

COMMAND = [sys.executable, "-m", "lowmem_aim"]
WATCHING = """
import os, sys
made = open(os.environ["MADE"], "a")
def hook(event, arguments):
    flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
    # A folder can only be opened for a file without a name, which leaves nothing.
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not os.path.isdir(arguments[0])
    if writes or event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        what = arguments[1] if event == "os.rename" else arguments[0]
        if isinstance(what, (str, bytes, os.PathLike)):
            print(os.path.abspath(os.fsdecode(what)), file=made, flush=True)
sys.addaudithook(hook)
sys.dont_write_bytecode = True
from lowmem_aim.__main__ import main
main()
"""


@pytest.mark.long
def test_nothing_is_written_outside_the_output_and_the_cache(place: Place, texts: Path, tmp_path: Path) -> None:
    """By whatever library: torch's compiler and numba have folders of their own choice otherwise."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    given = {"XDG_CACHE_HOME": str(cache), "HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)}
    environment = {**os.environ, **given, "MADE": str(tmp_path / "made")}
    for name in ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
        environment.pop(name, None)
    flags = ["--base", place.folder / "base", "--with", "both", "--omega", "0.4", "--calibration", texts]
    command = [sys.executable, "-c", WATCHING, "relax", place.folder / "math", place.out, *flags]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = set(map(Path, (tmp_path / "made").read_text().split("\n")[:-1]))
    own = (cache, place.out, Path("/dev"), Path("/proc"))
    outside = {file for file in made if not any(folder in (file, *file.parents) for folder in own)}
    assert {file for file in outside if temporary not in file.parents} == set()
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "home").exists()
    assert list((cache / "lowmem_aim").glob("loops-*/*.nbc"))


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Compiles a loop, with a folder as the cache of caches."""
    monkeypatch.delenv("NUMBA_CACHE_DIR")

    def call(cache: Path) -> Any:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        loop = compiled_code.compiled(_double)
        values = np.ones(3, np.float32)
        loop(values)
        assert values.tolist() == [2.0, 2.0, 2.0]
        return loop

    return call


def _double(values: Any) -> None:
    for j in range(values.size):
        values[j] = values[j] * 2


class TestCompiledLoops:
    def test_they_are_found_again(self, tmp_path: Path, compiles: Callable[[Path], Any]) -> None:
        assert sum(compiles(tmp_path).stats.cache_misses.values()) == 1
        assert sum(compiles(tmp_path).stats.cache_hits.values()) == 1
        assert compiled_code.trouble() == ""

    def test_a_cache_that_cannot_be_made_is_done_without(
        self, tmp_path: Path, compiles: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        compiles(tmp_path / "file")
        assert compiled_code.trouble() == "Not a directory"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
        assert compiled_code.trouble() != ""

    @pytest.mark.parametrize("damage", [b"", b"\x80\x04junk"])
    def test_a_damaged_cache_is_made_anew(self, tmp_path: Path, compiles: Callable[[Path], Any], damage: bytes) -> None:
        compiles(tmp_path)
        kept = [*(tmp_path / "lowmem_aim").rglob("*.nb[ic]")]
        assert len(kept) == 2
        for file in kept:
            file.write_bytes(damage)
        assert sum(compiles(tmp_path).stats.cache_misses.values()) == 1
        assert sum(compiles(tmp_path).stats.cache_hits.values()) == 1

    def test_settings_in_the_working_directory_choose_no_other_folder(
        self, tmp_path: Path, compiles: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """numba reads `.numba_config.yaml` there, and what is in its cache is code."""
        monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "evil"))
        monkeypatch.setattr("numba.config.CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
        compiles(tmp_path / "cache")
        assert not (tmp_path / "evil").exists()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_where_nothing_can_be_cached_a_run_says_so_once_and_works(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.merge().code == 0
    want = digests(place.out)
    (place.folder / "file").touch()
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.folder / "file"))
    for command in ("plan", "merge"):
        models = ("--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code")
        done = place.run(command, place.folder / "again", "--method", "ties", *models, "--quiet")
        assert done.code == 0, done.err
        assert done.err.count("compiled loops cannot be saved") <= 1
    shown = place.run("merge", place.folder / "third", "--method", "ties", *models)
    assert "warning: compiled loops cannot be saved, so every run compiles them again" in shown.err
    assert digests(place.folder / "again") == digests(place.folder / "third") == want


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"NUMBA_DISABLE_JIT": "1"}], ids=["cold", "not compiled"])
def test_a_user_without_home_cache_or_temporary_folder(place: Place, settings: dict[str, str]) -> None:
    """As service users and containers are; a file stands where each folder would be."""
    assert place.merge().code == 0
    want = digests(place.out)
    file = place.folder / "file"
    file.touch()
    given = {"XDG_CACHE_HOME": str(file / "c"), "HOME": str(file / "h"), "TMPDIR": str(file / "t"), **settings}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | given
    models = ["--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code"]
    for words in (["merge", place.folder / "again", "--method", "ties", *models], ["doctor", place.folder]):
        done = subprocess.run([*COMMAND, *map(str, words)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert digests(place.folder / "again") == want


@pytest.mark.parametrize("command", ["merge", "plan", "verify"])
def test_little_address_space_is_told_before_the_libraries_abort(place: Place, command: str) -> None:
    resource = pytest.importorskip("resource")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))

    models = ["--method", "linear", "--expert", place.folder / "math"] * (command != "verify")
    words = [*COMMAND, command, place.out, *models]
    done = subprocess.run([*map(str, words)], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "error: the address space is limited to 400.0 MB (`ulimit -v`)" in done.stderr
    assert "hint: `ulimit -v 1500000`" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("descriptors", [10, 14, 20, 30])
def test_few_descriptors_end_in_the_same_bytes_or_with_the_cause(place: Place, descriptors: int) -> None:
    resource = pytest.importorskip("resource")
    assert place.merge().code == 0
    want = digests(place.out)
    models = ["--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code"]
    words = [*COMMAND, "merge", place.folder / "again", "--method", "ties", *models]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    done = subprocess.run([*map(str, words)], preexec_fn=limit, capture_output=True, text=True)
    if done.returncode == 0:
        assert digests(place.folder / "again") == want
    else:
        assert done.returncode in (3, 4), done.stderr
        assert "too many files are open" in done.stderr
        assert "`ulimit -n" in done.stderr
