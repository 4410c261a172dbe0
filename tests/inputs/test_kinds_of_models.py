"""Vision-language models merge, with AIM in their language part; encoders merge without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shrinking
import tiny
import torch
from conftest import Ran, Run
from long_cases import others_long
from merge_cases import tensors_in
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

PICTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "mistral3", "llava", "gemma3", "idefics3")
ENCODERS: dict[str, Any] = {
    "bert": AutoModel,
    "roberta": AutoModelForMaskedLM,
    "deberta-v2": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "t5gemma2": AutoModelForSeq2SeqLM,
    "siglip_vision_model": AutoModel,
}


def built(auto: Any, kind: str, folder: Path) -> Path:
    """A random model `base` in `folder`, and the experts `math` and `code` of it; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(shrinking.shrunk_config(kind))
        tiny.spread(model)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("math", "code"), 1):
        tiny.perturbed(folder / "base", folder / name, seed=seed)
    return folder


def arithmetic(run: Run, command: str, folder: Path, out: Path, *more: object) -> Ran:
    """Plan or merge the experts in `folder`, each with half of its delta."""
    experts = (part for name in ("math", "code") for part in ("--expert", folder / name))
    flags = ("--method", "task_arithmetic", "--base", folder / "base", "--weight", 0.5)
    return run(command, out, *flags, *experts, *more)


def merged(run: Run, folder: Path, out: Path, *more: object) -> dict[str, torch.Tensor]:
    done = arithmetic(run, "merge", folder, out, *more)
    assert done.code == 0, done.err
    return tensors_in(out)


def check_mean(found: dict[str, torch.Tensor], folder: Path) -> None:
    """Check a merge without AIM: two halves of the deltas give the experts' mean."""
    base, math, code = (tensors_in(folder / name) for name in ("base", "math", "code"))
    assert found.keys() == base.keys()
    for name, value in found.items():
        if value.is_floating_point():
            expected = (math[name].double() + code[name].double()) / 2
            assert (value.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), name


def loads(auto: Any, folder: Path) -> Any:
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("kind", others_long(PICTURES, ("qwen3_5", "llava")))
def test_vision_language_models_merge_whole_and_load(kind: str, tmp_path: Path, run: Run) -> None:
    folder = built(AutoModelForImageTextToText, kind, tmp_path)
    check_mean(merged(run, folder, tmp_path / "out"), folder)
    loads(AutoModelForImageTextToText, tmp_path / "out")


@pytest.mark.parametrize("kind", others_long(PICTURES, ("idefics3",)))
def test_aim_relaxes_their_language_part_and_tells_of_the_rest(
    kind: str, tmp_path: Path, texts: Path, run: Run
) -> None:
    folder, aim = built(AutoModelForImageTextToText, kind, tmp_path), ("--omega", 0.4, "--calibration", texts)
    planned = arithmetic(run, "plan", folder, tmp_path / "relaxed", *aim)
    assert "AIM leaves" in planned.out + planned.err
    plain, relaxed = merged(run, folder, tmp_path / "plain"), merged(run, folder, tmp_path / "relaxed", *aim)
    changed = {name for name in plain if not torch.equal(plain[name], relaxed[name])}
    seeing = {name for name in plain if "vision" in name or "visual" in name}
    inside = {name for name in plain if "layers" in name and name.endswith("weight") and "conv1d" not in name}
    assert inside - seeing <= changed
    assert not seeing & changed


@pytest.mark.parametrize("kind", others_long(ENCODERS, ("bert", "t5")))
def test_encoders_merge_without_aim_and_are_refused_with_it(kind: str, tmp_path: Path, texts: Path, run: Run) -> None:
    folder = built(ENCODERS[kind], kind, tmp_path)
    check_mean(merged(run, folder, tmp_path / "out"), folder)
    loads(ENCODERS[kind], tmp_path / "out")
    if kind == "roberta":
        return  # transformers has it as a causal model too, which AIM runs
    done = arithmetic(run, "merge", folder, tmp_path / "relaxed", "--omega", 0.4, "--calibration", texts)
    assert done.code == 3
    assert "it is an encoder, or has one" in done.err
