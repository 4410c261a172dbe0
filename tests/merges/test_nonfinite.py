"""NaN and Inf in the inputs: they end the merge by name, or the base's value stands in for an expert's, and is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run
from long_cases import others_long
from merge_cases import digests, recipe, tensors_in
from safetensors.torch import load_file, save_file
from stopping import SHARDS, stop

from lowmem_aim.errors import ModelError, ResumeError, UsageError
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import shares as job_module
from lowmem_aim.merging.slices import TensorInputs
from lowmem_aim.methods import kernels
from lowmem_aim.system.options import Options

UP, EMBEDDING, NORM = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"
HOLES = {UP: (slice(3, 9), slice(2, 5)), EMBEDDING: (slice(0, 264), slice(7, 8)), NORM: (slice(30, 32),)}
COUNTS = {UP: 18, EMBEDDING: 264, NORM: 2}
TAKE_BASE = Options(nonfinite="base", shard_bytes=40_000)
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": ("0.3",)},
    "ties": {"weight": ("0.3",), "density": ("0.4",), "parameter": ("rescale=true",)},
    "dare_ties": {"weight": ("0.3",), "density": ("0.4",)},
    "slerp": {"experts": ("math",), "parameter": ("t=0.4",)},
    "ramplus_tl": {},
    "della": {"weight": ("0.3",), "density": ("0.4",)},
    "sce": {"parameter": ("select_topk=0.4",)},
    "model_stock": {},
    "multislerp": {"weight": ("0.3",)},
    "widen": {},
    "arcee_fusion": {"experts": ("math",)},
}


def with_holes(folder: Path, value: Any, holes: Any = HOLES) -> None:
    """Set the holes of a model to `value`, or to what `value` is in another model."""
    tensors = load_file(folder / "model.safetensors")
    for name, place in holes.items():
        tensors[name][place] = value[name][place].to(tensors[name].dtype) if isinstance(value, dict) else value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def models(llama: Path, tmp_path: Path) -> Path:
    """`holed` has base, math and code, math with NaN and Inf; `filled` is the same with the base's values there."""
    base = load_file(llama / "base" / "model.safetensors")
    for name in ("base", "math", "code"):
        tiny.perturbed(llama / name, tmp_path / "holed" / name, scale=0.0)
        tiny.perturbed(llama / name, tmp_path / "filled" / name, scale=0.0)
    with_holes(tmp_path / "holed" / "math", float("nan"))
    with_holes(tmp_path / "holed" / "math", float("-inf"), {UP: (slice(3, 4), slice(2, 5))})
    with_holes(tmp_path / "filled" / "math", base)
    return tmp_path


def job(folder: Path, method: str = "ties", **flags: Any) -> Any:
    return recipe(folder, method, **{"experts": ("math", "code"), **METHODS[method], **flags})


@pytest.mark.parametrize("method", others_long(METHODS, ("ties", "dare_ties", "ramplus_tl", "della", "sce", "widen")))
def test_the_result_is_as_if_the_expert_had_the_bases_values(method: str, models: Path) -> None:
    merge(job(models / "filled", method), models / "expected", SHARDS)
    merge(job(models / "holed", method), models / "out", TAKE_BASE)
    expected, found = tensors_in(models / "expected"), tensors_in(models / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_expert_in_another_dtype_has_a_delta_of_zero_there(models: Path) -> None:
    narrow = models / "holed" / "math"
    tensors = {name: value.bfloat16() for name, value in load_file(narrow / "model.safetensors").items()}
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    alone = job(models / "holed", "task_arithmetic", experts=("math",))
    found = tensors_in(merge(alone, models / "out", TAKE_BASE))
    base = load_file(models / "holed" / "base" / "model.safetensors")
    for name, place in HOLES.items():
        assert torch.equal(found[name][place], base[name][place])
        assert not torch.equal(found[name], base[name])


def test_a_float64_beyond_float32_counts_as_well(models: Path) -> None:
    wide = models / "filled" / "math"
    tensors = {name: value.double() for name, value in load_file(wide / "model.safetensors").items()}
    tensors[NORM][3] = 1e300
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    out = merge(job(models / "filled", "task_arithmetic", experts=("math",)), models / "out", TAKE_BASE)
    base = load_file(models / "filled" / "base" / "model.safetensors")
    assert tensors_in(out)[NORM][3] == base[NORM][3]
    told = json.loads((out / "lowmem_aim.json").read_text())["nonfinite"]
    assert told == [{"model": "math", "tensor": NORM, "elements": 1}]


def test_rows_that_are_matched_by_token_take_the_bases_row(models: Path) -> None:
    """Two tokens of math's are swapped, its rows with them."""
    expected = tensors_in(merge(job(models / "holed", "task_arithmetic"), models / "expected", TAKE_BASE))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors = load_file(models / "holed" / "math" / "model.safetensors")
        tensors[name][[65, 66]] = tensors[name][[66, 65]]
        save_file(tensors, models / "holed" / "math" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = models / "holed" / "math" / "tokenizer.json"
    table = json.loads(tokenizer.read_text())
    a, b = (next(token for token, at in table["model"]["vocab"].items() if at == place) for place in (65, 66))
    table["model"]["vocab"] |= {a: 66, b: 65}
    tokenizer.write_text(json.dumps(table))
    out = merge(job(models / "holed", "task_arithmetic", tokenizer_source="base"), models / "out", TAKE_BASE)
    found = tensors_in(out)[EMBEDDING]
    assert torch.equal(found[:259], expected[EMBEDDING][:259])  # the rest has no token, and stays the base's


@pytest.mark.parametrize(("rows", "compiled"), [(7, True), (None, False), (5, False)])
def test_the_bytes_depend_on_neither_slices_threads_nor_loops(
    rows: int | None, compiled: bool, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(merge(job(models / "holed"), models / "expected", TAKE_BASE))
    if not compiled:
        monkeypatch.setattr(kernels, "_loops", lambda: None)
    other = Options(nonfinite="base", shard_bytes=40_000, slice_rows=rows, threads=1, read="pread")
    assert digests(merge(job(models / "holed"), models / "out", other)) == expected


def test_a_tensor_that_is_read_again_is_mended_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ties takes several passes; here nothing is kept between them."""
    expected = digests(merge(job(models / "holed"), models / "expected", TAKE_BASE))
    share_out = job_module.share_out
    monkeypatch.setattr(job_module, "share_out", lambda *a, **k: replace(share_out(*a, **k), kept_bytes=0))
    passes: list[bool] = []
    slices = TensorInputs.slices

    def noted(tensor: TensorInputs, first_pass: bool) -> Any:
        passes.append(first_pass)
        return slices(tensor, first_pass)

    monkeypatch.setattr(TensorInputs, "slices", noted)
    assert digests(merge(job(models / "holed"), models / "out", TAKE_BASE)) == expected
    assert False in passes


def test_the_card_and_a_warning_tell_what_was_replaced(models: Path) -> None:
    events: list[Event] = []
    out = merge(job(models / "holed"), models / "out", TAKE_BASE, events.append)
    told = json.loads((out / "lowmem_aim.json").read_text())["nonfinite"]
    assert {item["tensor"]: item["elements"] for item in told} == COUNTS
    assert {item["model"] for item in told} == {"math"}
    card = (out / "README.md").read_text()
    assert all(f"| `math` | `{name}` | {count} |" in card for name, count in COUNTS.items())
    warnings = [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]
    assert warnings == ["NaN or Inf in 284 elements of `math`: the base's value is used there"]


def test_the_counts_outlive_interruptions(models: Path, each_tensor: None) -> None:
    merge(job(models / "holed"), models / "whole", TAKE_BASE)
    for tensors in (3, 1, 9, 4):
        stop(job(models / "holed"), models / "out", tensors, TAKE_BASE)
    merge(job(models / "holed"), models / "out", TAKE_BASE)
    assert digests(models / "out") == digests(models / "whole")


def test_a_run_does_not_go_on_under_the_other_setting(models: Path, each_tensor: None) -> None:
    stop(job(models / "holed"), models / "out", 9, TAKE_BASE)
    with pytest.raises(ResumeError, match="nonfinite: base then, stop now"):
        merge(job(models / "holed"), models / "out", SHARDS)


def test_the_bases_own_end_the_merge_all_the_same(models: Path) -> None:
    with_holes(models / "holed" / "base", float("nan"), {UP: (slice(4, 5), slice(0, 2))})
    with pytest.raises(ModelError) as caught:
        merge(job(models / "holed"), models / "out", TAKE_BASE)
    assert caught.value.problems == (
        f"`{UP}` of `base` holds 2 values that cannot be merged (NaN, Inf, or beyond float32)",
    )
    assert "--nonfinite" not in caught.value.hint


def test_the_default_stops_and_names_the_flag(models: Path, run: Run) -> None:
    flags = ("--method", "ties", "--base", models / "holed/base", "--expert", models / "holed/math")
    done = run("merge", models / "out", *flags)
    assert done.code == 3
    assert "of `math` holds 264 values that cannot be merged" in done.err
    assert "`--nonfinite base`" in done.err
    assert run("merge", models / "out", *flags, "--nonfinite", "base").code == 0


def test_models_without_any_say_so_on_the_card(models: Path) -> None:
    out = merge(job(models / "filled"), models / "out", TAKE_BASE)
    assert "No element of a model was NaN or Inf" in (out / "README.md").read_text()


def test_a_method_that_builds_on_no_base_is_a_usage_error(models: Path) -> None:
    for method in ("linear", "passthrough"):
        with pytest.raises(UsageError, match=f"`--nonfinite base` needs a method that builds on a base.*`{method}`"):
            merge(recipe(models / "holed", method, experts=("math",)), models / "out", TAKE_BASE)
    assert not (models / "out").exists()
