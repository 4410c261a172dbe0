"""Methods that solve, on a device with memory of its own, which is not there: matrices and rows meet on it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from fake_cuda import FakeCuda, cuda
from long_cases import others_long
from merge_cases import tensors_in
from text_merges import job, models

from lowmem_aim.jobs.merge import merge
from lowmem_aim.methods import moments, solved
from lowmem_aim.system.options import Options

__all__ = ["cuda"]
METHODS = {name: {} for name in ("covariance", "regmean", "regmean_plus", "ties")}
METHODS |= {"task_arithmetic": {"weight": ("solved",)}}
CASES = list(product(METHODS, ("llama", "gpt2", "qwen3_moe")))


@pytest.mark.parametrize(("method", "architecture"), others_long(CASES, [("regmean_plus", "llama")]))
def test_a_device_solves_what_the_cpu_solves(
    method: str, architecture: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (moments, solved):
        monkeypatch.setattr(module, "TILE", 64)  # few operations: each takes its time on a device that is not there
    recipe = job(models(architecture, tmp_path), method, **METHODS[method])
    expected = tensors_in(merge(recipe, tmp_path / "here", Options(device="cpu")))
    device: FakeCuda = request.getfixturevalue("cuda")
    found = tensors_in(merge(recipe, tmp_path / "there", Options(device="cuda")))
    assert device.peak > 0
    assert all(float((found[name] - value).abs().max()) < 1e-5 for name, value in expected.items())
