"""The benchmark and the GPU check work: they build, run, count and draw; on the tiniest models, ours alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench" / "bench.py"


def test_it_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "results" / "results.json", tmp_path / "page.md"
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    places = ["--work", str(tmp_path / "work"), "--output", str(results), "--page", str(page)]
    what = [
        "--scale",
        "tiny",
        "--only",
        "ours",
        "disk",
        "--methods",
        "task_arithmetic",
        "--repeats",
        "1",
        "--patience",
        "0",
    ]
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import bench
    import measure

    monkeypatch.setattr(measure, "PATIENCE_SECONDS", measure.PATIENCE_SECONDS)  # it is set by a flag
    monkeypatch.setattr(sys, "argv", ["bench.py", *places, *what])
    bench.main()
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


@pytest.mark.long
def test_the_gpu_check_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    what = ["--device", "cpu", "--scale", "tiny", "--methods", "ties", "--blocks", "3", "--block-size", "32"]
    limits = ["--work", str(tmp_path), "--ram", "2GB"]
    command = [sys.executable, str(BENCH.with_name("gpu_check.py")), *what, *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("\n\n")[2]
    assert "| ties: device against CPU | 0.0e+00 of the elements off by more than 1 ulp | ok |" in table
    assert "| ties, killed half-way, then the same command | the same bytes | ok |" in table
    assert "| calibrate: peak anonymous memory |" in table
    for method in ("covariance", "regmean", "regmean_plus"):
        assert f"| {method}: deltas, device against CPU | relative 0.0e+00 | ok |" in table
    assert re.search(r"\| calibrate, --ram \d+MB \| .* the same bytes \| ok \|", table)
    assert "failed" not in table


@pytest.mark.long
@pytest.mark.parametrize("method", ["covariance", "regmean"])
def test_merges_that_solve_are_measured(method: str, tmp_path: Path) -> None:
    what = ["--scale", "tiny", "--methods", method, "--work", str(tmp_path), "--patience", "0"]
    command = [sys.executable, str(BENCH.with_name("solving.py")), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith(f"| {method}, 2GB | 2 |"))
    shares = re.findall(r"(\d+)%", row)
    assert len(shares) == 4
    assert sum(map(int, shares)) <= 100


def test_distances_are_counted_in_units_in_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import gpu_check

    steps = torch.tensor([-2, -1, 0, 1, 2], dtype=torch.int16)
    near_one = (torch.tensor(0x3F80, dtype=torch.int16) + steps).view(torch.bfloat16)
    assert gpu_check._order(near_one).diff().tolist() == [1] * 4
    assert gpu_check._order(-near_one).diff().tolist() == [-1] * 4
    around_zero = torch.tensor([-0x7FFF, -0x8000, 0, 1], dtype=torch.int16).view(torch.bfloat16)
    assert gpu_check._order(around_zero).tolist() == [-1, 0, 0, 1]
