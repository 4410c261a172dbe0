"""Programs that a model has written: each runs alone, without secrets or network, within limits, and says yes or no."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem_aim.evaluating import code_scoring
from lowmem_aim.evaluating.code_scoring import CodeEval, Tried, checked, require_processes, tried

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are run on POSIX systems alone")


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("import math\nx = [math.pi for _ in range(3)]\nassert len(x) == 3", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("input()", False),
        ("bytearray(5_000_000_000)", False),
        ("open('large', 'wb').write(bytes(200_000_000))", False),
        ("print('x' * 10)", True),
    ],
)
def test_a_program_passes_if_it_runs_to_its_end(program: str, passed: bool) -> None:
    assert tried(program).passed is passed


def test_a_program_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_scoring, "SECONDS", 1)
    monkeypatch.setattr(code_scoring, "START_SECONDS", 1)
    assert not tried("while True: pass").passed
    assert not tried("import signal, time\nsignal.alarm(0)\ntime.sleep(100)").passed


def test_a_program_sees_no_variables_of_the_user_and_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OTHER", "secret")
    seen = "import os\nassert 'secret' not in os.environ.values()\nassert os.listdir('.') == []\n"
    assert tried(seen + "assert os.path.realpath(os.path.expanduser('~')) == os.getcwd()").passed


def test_a_program_reaches_no_network_where_the_system_allows_that() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = tried(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)")
    assert found.network == require_processes()
    assert found.passed is bool(found.network)


def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = (
        f"import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nopen({str(file)!r}, 'w').write(str(child.pid))"
    )
    assert tried(program).passed
    assert has_ended(int(file.read_text()))


def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = f"import os, time\nopen({str(file)!r}, 'w').write(f'{{os.getpid()}}.')\ntime.sleep(600)"
    runs = f"from lowmem_aim.evaluating.code_scoring import tried\ntried({program!r})"
    with subprocess.Popen([sys.executable, "-c", runs]) as runner:
        while not (file.exists() and file.read_text().endswith(".")):
            time.sleep(0.05)
        runner.kill()
    assert has_ended(int(file.read_text().strip(".")))


def has_ended(process: int) -> bool:
    """Whether the process ends within some seconds; one that is dead, and not yet collected by anybody, has ended."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]\n", b"{}\n", b'{"network": 1}\n{"passed": true}\n', b"[" * 2000, b'{"network": ""}\nx'],
)
def test_what_is_not_of_the_form_has_not_passed(content: bytes) -> None:
    assert checked(content) == Tried()


@pytest.mark.parametrize("second", ['{"passed": 1}', '{"passed": "true"}', '{"passed": true, "more": 1}', "true"])
def test_only_the_very_words_count_as_passed(second: str) -> None:
    assert checked(b'{"network": ""}\n{"passed": true}\n').passed
    assert not checked(f'{{"network": ""}}\n{second}\n'.encode()).passed


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    programs = ["x = 1", "x = 2", "x = 1", "x = 3"]
    rates, told = CodeEval().compute(["assert x == 1", "assert x == 2"], [programs, programs], k=[1, 2, 5])
    for k in (1, 2):
        draws = [[program in draw for program in ("x = 1", "x = 2")] for draw in itertools.combinations(programs, k)]
        assert rates[f"pass@{k}"] == pytest.approx(sum(map(sum, draws)) / len(draws) / 2)
    assert "pass@5" not in rates
    assert [done["passed"] for _, done in told[1]] == [False, True, False, False]
