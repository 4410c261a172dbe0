"""Merges by `covariance`: linears inside the layers by the formula, all else averaged, and always the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import shrinking
import solving_cases as cases
import tiny
import torch
from merge_cases import digests, recipe, tensors_in
from stopping import SHARDS, stop
from transformers import AutoModelForCausalLM

from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import loop
from lowmem_aim.methods import moments, solved
from lowmem_aim.system.options import Options
from lowmem_aim.system.tensor_store import TensorStore

# As transformers' classes have them: matrices of attention, MLPs, routers and experts, and none of norms or biases.
LINEARS = {
    "llama": r"layers\.\d+\..*proj\.weight",
    "qwen3": r"layers\.\d+\..*proj\.weight",
    "gemma3_text": r"layers\.\d+\..*proj\.weight",
    "gpt2": r"\.h\.\d+\.(attn|mlp)\.c_\w+\.weight",
    "mixtral": r"layers\.\d+\..*(proj|gate|w[123])\.weight",
    "qwen2_moe": r"layers\.\d+\..*(proj|mlp\.gate|shared_expert_gate)\.weight",
    "qwen3_moe": r"layers\.\d+\..*(proj|mlp\.gate)\.weight",
    "gpt_oss": r"layers\.\d+\..*(proj\.weight|router\.weight|experts\.\w+_proj)$",
    "llama4_text": r"layers\.\d+\..*(proj\.weight|router\.weight|experts\.\w+_proj)$",
    "dbrx": r"blocks\.\d+\..*(Wqkv|out_proj|layer)\.weight$",
}
TURNED = {"gpt2": "", "gpt_oss": r"experts", "llama4_text": r"experts"}  # (in, out)


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moments, solved):
        monkeypatch.setattr(module, "TILE", 24)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama `base`, and three experts."""
    folder = tmp_path_factory.mktemp("llama")
    base = tiny.build("llama", folder / "base")
    for seed, name in enumerate(("math", "code", "chat")):
        tiny.perturbed(base, folder / name, seed=seed)
    return folder


def built(architecture: str, folder: Path) -> Path:
    """A tiny model, with the sizes that transformers' own configs need where `tiny` has none for them."""
    if architecture not in ("dbrx", "llama4_text"):
        return tiny.build(architecture, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shrinking.shrunk_config(architecture))
        tiny.spread(model)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", LINEARS)
def test_every_linear_is_solved_and_all_else_averaged(architecture: str, tmp_path: Path) -> None:
    base = built(architecture, tmp_path / "base")
    names = ("math", "code")
    for seed, name in enumerate(names):
        tiny.perturbed(base, tmp_path / name, seed=seed)
    flags = {"weight": ("0.5", "1"), "parameter": ("lambda=0.9",)}
    ours = tensors_in(merge(recipe(tmp_path, "covariance", names, **flags), tmp_path / "out"))
    own, *others = (tensors_in(tmp_path / name) for name in ("base", *names))
    found = 0
    for name, merged in ours.items():
        deltas = [other[name].double() - own[name].double() for other in others]
        truth = (0.5 * deltas[0] + deltas[1]) / 1.5
        if re.search(LINEARS[architecture], name):
            turned = architecture in TURNED and re.search(TURNED[architecture], name) is not None
            truth, found = 0.9 * solved_by_formula(deltas, turned=turned), found + 1
        error = merged.double() - own[name].double() - truth
        assert float(error.norm()) <= 1e-4 * float(truth.norm()), name
    assert found >= 3 * tiny.LAYERS


def solved_by_formula(deltas: list[torch.Tensor], *, turned: bool) -> torch.Tensor:
    matrices = [delta.mT if turned else delta for delta in deltas]
    if matrices[0].dim() == 2:
        whole = cases.covariance(matrices, (0.5, 1.0), 1e-2)
    else:
        each = zip(*matrices, strict=True)
        whole = torch.stack([cases.covariance(one, (0.5, 1.0), 1e-2) for one in each])
    return whole.mT if turned else whole


def test_budget_threads_and_read_mode_change_no_byte(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Less(TensorStore):
        def __init__(self, device: torch.device, *, ram_bytes: int, **rest: Any) -> None:
            given.append(ram_bytes)
            super().__init__(device, ram_bytes=ram_bytes * (2 - len(given) % 3) // 2, **rest)  # a half, none, all

    monkeypatch.setattr(loop, "TensorStore", Less)
    before = torch.get_num_threads()
    try:
        made = [
            digests(merge(recipe(experts, "covariance"), tmp_path / f"{threads}-{read}-{rows}", options))
            for threads, read, rows in ((1, "mmap", None), (2, "pread", None), (2, "mmap", 3))
            for options in [Options(threads=threads, read=read, slice_rows=rows)]  # type: ignore[arg-type]
        ]
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1] == made[2]
    assert min(given) > 10_000  # so that there was something to take away


@pytest.mark.parametrize("tensors", [2, 17])
def test_an_interrupted_merge_ends_with_the_same_bytes(experts: Path, tmp_path: Path, tensors: int) -> None:
    job = recipe(experts, "covariance")
    merge(job, tmp_path / "whole", SHARDS)
    stop(job, tmp_path / "out", tensors)
    merge(job, tmp_path / "out", SHARDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_it_is_relaxed_as_any_merge_is(experts: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("A merged model\n\nkeeps what its experts know.\n")
    flags = {"calibration": str(texts), "omega": "0,1", "samples": 2}
    merge(recipe(experts, "covariance", **flags), tmp_path / "out")
    plain = tensors_in(merge(recipe(experts, "covariance"), tmp_path / "plain"))
    base = tensors_in(experts / "base")
    kept, relaxed = (tensors_in(tmp_path / "out" / f"omega-{omega}") for omega in (1, 0))
    for name, value in plain.items():
        assert torch.equal(kept[name], value), name
        assert float((relaxed[name] - base[name]).norm()) <= float((value - base[name]).norm())
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(relaxed[name], plain[name])
