"""The file of defaults: a flag counts more; what is wrong in it is told by file and line, before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Place, Run

from lowmem_aim.errors import UsageError
from lowmem_aim.events import Planned
from lowmem_aim.jobs import api
from lowmem_aim.system.defaults_file import KEYS, MOST_BYTES, defaults_file, read_defaults

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(own_defaults: Path) -> Path:
    own_defaults.parent.mkdir(parents=True)
    return own_defaults


def planned(out: str) -> dict[str, object]:
    """The `planned` line among lines of JSON."""
    return next(event for event in map(json.loads, out.splitlines()) if event["event"] == "planned")


def test_no_file_is_nothing(own_defaults: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert defaults_file() == own_defaults
    assert read_defaults() == {}
    own_defaults.parent.parent.mkdir(exist_ok=True)
    own_defaults.parent.write_text("not a folder")
    assert read_defaults() == {}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert defaults_file() == Path("/home/somebody/.config/lowmem-aim/config.toml")


def test_all_keys_are_read(config: Path) -> None:
    config.write_text('device = "cuda:1"\nram = "4GB"\nvram = 5000\ncache = false\nformat = "plain"\n')
    assert read_defaults() == {
        "device": "cuda:1",
        "ram": 4_000_000_000,
        "vram": 5000,
        "cache": False,
        "format": "plain",
    }
    assert set(read_defaults()) == set(KEYS)


def test_a_flag_counts_more_than_the_file(place: Place, config: Path) -> None:
    config.write_text('device = "cpu"\nram = "3GB"\nformat = "json"\n')
    found = planned(place.merge().out)
    assert (found["device"], found["ram_budget"]) == ("cpu", 3_000_000_000)
    done = place.merge("--ram", "2GB", "--fresh", "--format", "quiet")
    assert (done.code, done.out, done.err) == (0, f"{place.out}\n", "")
    other = place.run("relax", place.out, place.folder / "relaxed", "--base", place.folder / "base", "--ram", "2GB")
    assert json.loads(other.out.splitlines()[0])["event"] == "run_started"
    assert place.run("verify", place.out, "--quiet").out == f"{place.out}\n"


def test_commands_that_give_data_take_no_format_of_it(run: Run, config: Path) -> None:
    config.write_text('format = "json"\n')
    assert run("methods", "ties").out.startswith("ties: ")


def test_no_cache(place: Place, texts: Path, own_cache: Path, config: Path) -> None:
    config.write_text("cache = false\n")
    aim = ("--omega", "0.4", "--calibration", texts)
    assert place.merge(*aim).code == 0
    assert not list((own_cache / "lowmem_aim").glob("activations*"))
    assert place.run("merge", place.folder / "b", "--method", "ties", "--base", place.folder / "base").code == 2


def test_vram_is_for_the_machine_and_not_for_a_run_on_the_cpu(place: Place, config: Path) -> None:
    config.write_text('device = "cuda"\nvram = "6GB"\n')
    assert place.merge("--device", "cpu").code == 0
    shutil.rmtree(place.out)
    place.refused(place.merge("--device", "cpu", "--vram", "6GB"), 2, "--vram has no meaning on the device `cpu`")


WRONG = {
    "unknown": ('\nramm = "4GB"\n', ":2: unknown key `ramm`; did you mean `ram`?"),
    "a table": ("\n\n[merge]\nram = 1\n", ":3: unknown key `merge`"),
    "bytes change": ("# first\nseed = 1\n", ":2: unknown key `seed`"),
    "type": ("cache = 1\n", ":1: `cache`: `1` is neither true nor false"),
    "a switch as a size": ("ram = true\n", ":1: `ram`: `True` is not a size"),
    "size": ('ram = "much"\n', ":1: `ram`: `much` is not a size; write 5GB"),
    "negative": ("vram = -1\n", ":1: `vram`: `-1` is not a size"),
    "word": ('device = "gpu"\n', ":1: `device`: `gpu` is not one of auto, cpu, cuda, mps; did you mean `cpu`?"),
    "format": ('format = "jsn"\n', ":1: `format`: `jsn` is not one of human, plain, json, quiet; did you mean `json`?"),
    "no TOML": ('ram = "4GB"\ndevice = cuda\n', ":2: this is not TOML: "),
    "twice": ("cache = true\ncache = true\n", "this is not TOML: "),
    "deep": ("ram = " + "[" * 20_000, "this is not TOML: "),
    "escapes": ('"ra\\u001bm" = 1\n', "unknown key `ra\\x1bm`; did you mean `ram`?"),
    "no text": (b"ram = '\xff'\n", "is not UTF-8 text"),
    "long": ("#" * (MOST_BYTES + 1), "has more than 64 kB"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_by_file_and_line(place: Place, config: Path, kind: str) -> None:
    text, message = WRONG[kind]
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = place.merge()
    place.refused(done, 2, str(config), message)
    assert "\x1b" not in done.err
    assert "docs/command-line.md" in done.err


def test_all_that_is_wrong_is_told_at_once(config: Path) -> None:
    config.write_text("ram = true\nthreads = 2\ncache = 'no'\n")
    with pytest.raises(UsageError) as error:
        read_defaults()
    assert [problem.partition(" ")[0] for problem in error.value.problems] == [f"{config}:{n}:" for n in (1, 2, 3)]


@pytest.mark.skipif(os.name == "nt", reason="no pipes")
def test_only_a_regular_file_is_read(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.toml").write_text("cache = false\n")
    config.symlink_to(tmp_path / "kept.toml")  # as people keep such files
    assert read_defaults() == {"cache": False}
    for spoil in (lambda: os.mkfifo(config), lambda: config.mkdir(), lambda: config.symlink_to("/dev/zero")):
        config.unlink() if config.is_symlink() or config.is_fifo() else config.rmdir()
        spoil()
        done = run("verify", tmp_path)
        assert done.code == 2
        assert f"`{config}` cannot be read: it is no" in done.err.replace("it is a folder", "it is no file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_must_not_be_read(run: Run, config: Path, tmp_path: Path) -> None:
    config.touch(mode=0)
    assert "no permission" in run("verify", tmp_path).err


def test_help_doctor_and_data_work_beside_a_wrong_file(run: Run, config: Path, tmp_path: Path) -> None:
    config.write_text("thread = 1\n")
    for words in (("merge", "--help"), ("methods", "ties"), ("completion", "bash")):
        assert run(*words).code == 0
    told = run("doctor", tmp_path)
    assert told.code == 0
    assert f"warning: the file of defaults is wrong: {config}:1: unknown key `thread`" in told.out
    config.write_text('device = "cuda"\nram = "8GB"\ncache = true\n')
    assert f"{'defaults':12}{config}: device = cuda, ram = 8.0 GB, cache = True\n" in run("doctor", tmp_path).out
    assert json.loads(run("doctor", tmp_path, "--json").out)["defaults"]["values"]["ram"] == 8_000_000_000


def test_python_does_not_read_it(place: Place, config: Path) -> None:
    config.write_text("nothing of sense")
    told: list[object] = []
    recipe = {"merge_method": "linear", "models": [{"model": str(place.folder / "math"), "parameters": {"weight": 1}}]}
    api.merge(recipe, place.out, on_event=told.append)
    assert any(isinstance(event, Planned) for event in told)


def test_every_key_is_a_flag_and_is_documented() -> None:
    from lowmem_aim.cli.commands import cli

    flags = {flag for parameter in cli.commands["merge"].params for flag in parameter.opts}
    section = (ROOT / "docs/command-line.md").read_text().partition("## The file of defaults")[2].partition("\n## ")[0]
    for key in KEYS:
        assert f"| `{key}` |" in section
        assert f"--{key}" in flags


def test_no_library_is_imported_for_a_file_that_is_not_there() -> None:
    code = "import sys; from lowmem_aim.system.defaults_file import read_defaults; read_defaults()\n"
    code += "print('tomllib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
