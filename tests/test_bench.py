"""The benchmark itself works: it builds, runs, counts and draws; on the tiniest models, ours alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent / "bench" / "bench.py"


def test_it_measures_and_draws(tmp_path: Path) -> None:
    results, page = tmp_path / "results" / "results.json", tmp_path / "page.md"
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    places = ["--work", str(tmp_path / "work"), "--output", str(results), "--page", str(page)]
    what = ["--scale", "tiny", "--only", "ours", "disk", "--methods", "task_arithmetic", "--repeats", "1"]
    subprocess.run([sys.executable, str(BENCH), *places, *what], check=True, capture_output=True, timeout=120)
    ways = json.loads(results.read_text())["scales"]["tiny"]["methods"]["task_arithmetic"]
    assert set(ways) == {"ours", "disk"}
    (run,) = ways["ours"]["runs"]
    assert run["exit_code"] == 0
    assert run["resident"] > run["anonymous"] > 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "| task_arithmetic |" in text
    assert "old" not in text
    assert "lowmem-aim" in (results.parent / "chart.svg").read_text()
