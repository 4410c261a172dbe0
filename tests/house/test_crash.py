"""The short form of `make test-crash`: each proof with a few of its attempts, in one process that forks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = Path(__file__).parents[1] / "crash" / "everything.py"
NAMES = re.findall(r'^    "(\w+)",', SUITES.read_text(), re.M)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, strace and /proc are Linux's")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each proof says of itself."""
    command = [sys.executable, str(SUITES), "--short", "--work", str(tmp_path_factory.mktemp("crash")), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": command[4]})
    found = re.split(r"^(?=(?:ok|FAILED) \w+: )", done.stdout, flags=re.M)
    return {part.split(":")[0].split()[-1]: part for part in found if part}


@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_of(name: str, lines: dict[str, str]) -> None:
    assert lines[name].startswith("ok "), lines[name]
    if ": skipped: " in lines[name]:
        pytest.skip(lines[name])
