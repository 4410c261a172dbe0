"""Everything is drawn in ASCII if stdout and stderr have no UTF-8: nothing is escaped, cut off or fails."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Run
from long_cases import others_long

from lowmem_aim.cli.running import run
from lowmem_aim.jobs import doctor
from lowmem_aim.jobs.speed import disk_speed
from lowmem_aim.output.folder import LOG, PRIVATE
from lowmem_aim.system.characters import STAND_INS, has_unicode, use_what_streams_can_show

ROOT = Path(__file__).parents[2]
WITHOUT_UTF8 = [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out" / PRIVATE).mkdir(parents=True)
    (tmp_path / "out" / PRIVATE / LOG).write_bytes((ROOT / "tests" / "data" / LOG).read_bytes())
    return tmp_path / "out"


def told(environment: dict[str, str], *arguments: object) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_aim", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=own | environment,
        timeout=60,
    )
    return done.stdout.decode()


@pytest.mark.parametrize("environment", others_long(WITHOUT_UTF8, WITHOUT_UTF8[:1]))
def test_without_utf8_the_same_picture_is_drawn_in_ascii(environment: dict[str, str], out: Path) -> None:
    drawn = told(environment, "replay", out, "--at", 97, "--size", "120x40")
    full = told({"LC_ALL": "C.UTF-8"}, "replay", out, "--at", 97, "--size", "120x40")
    assert drawn.isascii()
    assert "\\" not in drawn, "an escaped code point"
    assert drawn == full.translate({ord(c): stand_in for c, stand_in in STAND_INS.items()})
    assert [len(line) for line in drawn.splitlines()] == [len(line) for line in full.splitlines()]
    assert not full.isascii()


@pytest.mark.parametrize("environment", others_long(WITHOUT_UTF8, WITHOUT_UTF8[1:2]))
def test_lines_that_are_printed_are_ascii_too(environment: dict[str, str]) -> None:
    program = "import sys, click; from lowmem_aim.system.characters import use_what_streams_can_show as use; use();"
    program += f"click.echo({'✓ █ ü'!a}); click.echo({'▁▂'!a}, err=True); print({'▶ …'!a})"
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, env=own | environment)
    assert done.stdout == b"+ # \\xfc\n> ~\n"
    assert done.stderr == b"_.\n"


def test_names_that_ascii_lacks_are_escaped_and_nothing_fails(tmp_path: Path) -> None:
    text = told({"PYTHONIOENCODING": "ascii"}, "replay", tmp_path / "über")
    assert "\\xfcber` holds no recorded run" in text
    assert "Traceback" not in text


def test_the_path_on_stdout_is_the_path_whatever_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    use_what_streams_can_show()
    run(lambda emit: Path("über"), "quiet")
    sys.stdout.flush()
    assert written.getvalue() == os.fsencode("über\n")


@pytest.mark.parametrize(
    ("encoding", "environment", "expected"),
    [
        ("utf-8", {}, True),
        ("utf-8", {"LANG": "de_DE.UTF-8"}, True),
        ("utf-8", {"LC_ALL": "C"}, False),
        ("utf-8", {"LC_ALL": "POSIX", "LANG": "de_DE.UTF-8"}, False),
        ("utf-8", {"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}, True),
        ("utf-8", {"LC_ALL": "C", "PYTHONUTF8": "1"}, True),
        ("cp437", {"LC_ALL": "en_US.UTF-8"}, False),
    ],
)
def test_what_a_stream_can_show(encoding: str, environment: dict[str, str], expected: bool) -> None:
    assert has_unicode(encoding, environment) == expected


def test_the_doctor_says_how_to_see_block_characters(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = doctor._terminal() | {"terminal": True, "columns": 80, "blocks": False}
    monkeypatch.setattr(doctor, "_terminal", lambda: terminal)
    monkeypatch.setattr(doctor, "disk_speed", partial(disk_speed, seconds=0.0))
    done = run("doctor")
    assert "ASCII only" in done.out
    assert "export LC_ALL=C.UTF-8" in done.out
    terminal["blocks"] = True
    assert "UTF-8" not in run("doctor").out
