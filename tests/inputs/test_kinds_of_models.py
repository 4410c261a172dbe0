"""Vision-language models merge, with AIM in their language part; encoders merge without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run
from long_cases import others_long
from merge_cases import tensors_in
from pictures import ENCODERS, PICTURES, TOWER, pictured, saved
from transformers import AutoConfig, AutoModelForImageTextToText


def merged(base: Path, run: Run, *more: object) -> dict[str, torch.Tensor]:
    """The merge of two experts of `base` by task arithmetic; checked against the formula where AIM is not asked for."""
    experts = [tiny.perturbed(base, base.parent / name, seed=seed) for seed, name in enumerate(("math", "code"), 1)]
    out = base.parent / "out"
    command = ("merge", out, "--method", "task_arithmetic", "--base", base, "--weight", 0.5, *more)
    done = run(*command, *(part for expert in experts for part in ("--expert", expert)))
    assert done.code == 0, done.err
    found, start, (math, code) = tensors_in(out), tensors_in(base), map(tensors_in, experts)
    assert found.keys() == start.keys()
    if not more:
        for name, value in found.items():
            if value.is_floating_point():
                expected = (math[name].double() + code[name].double()) / 2
                assert (value.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), name
    return found


def loads(kind: Any, folder: Path) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("kind", others_long(PICTURES, ("qwen2_5_vl", "llava")))
def test_vision_language_models_merge_whole_and_load(kind: str, tmp_path: Path, run: Run) -> None:
    merged(pictured(kind, tmp_path / "base"), run)
    loads(AutoModelForImageTextToText, tmp_path / "out")


@pytest.mark.parametrize("kind", others_long(PICTURES, ("qwen2_5_vl",)))
def test_aim_relaxes_their_language_part_and_tells_of_the_rest(
    kind: str, tmp_path: Path, texts: Path, run: Run
) -> None:
    base = pictured(kind, tmp_path / "base")
    plain = merged(base, run)
    (tmp_path / "out").rename(tmp_path / "plain")
    done = run(
        "plan",
        tmp_path / "out",
        "--method",
        "linear",
        "--base",
        base,
        "--expert",
        tmp_path / "math",
        "--omega",
        0.4,
        "--calibration",
        texts,
    )
    assert "AIM leaves" in done.out + done.err
    relaxed = merged(base, run, "--omega", 0.4, "--calibration", texts)
    changed = {name for name in plain if not torch.equal(plain[name], relaxed[name])}
    inside = {name for name in plain if "layers" in name and not ("vision" in name or "visual" in name)}
    assert {name for name in inside if name.endswith("weight")} <= changed
    assert not any("vision" in name or "visual" in name for name in changed)


@pytest.mark.parametrize("kind", others_long(ENCODERS, ("bert", "t5")))
def test_encoders_merge_without_aim_and_are_refused_with_it(kind: str, tmp_path: Path, texts: Path, run: Run) -> None:
    auto, changes = ENCODERS[kind]
    sizes = {key: value for key, value in tiny.COMMON.items() if kind != "t5" or key == "vocab_size"}
    sizes = {} if "vision" in kind else sizes
    base = saved(auto, AutoConfig.for_model(kind, **{**TOWER, **sizes, **changes}), tmp_path / "base")
    merged(base, run)
    loads(auto, tmp_path / "out")
    if kind == "roberta":
        return  # transformers has it as a causal model too, which AIM runs
    done = run(
        "merge",
        tmp_path / "relaxed",
        "--method",
        "linear",
        "--base",
        base,
        "--expert",
        tmp_path / "math",
        "--omega",
        0.4,
        "--calibration",
        texts,
    )
    assert done.code == 3
    assert "encoder" in done.err
