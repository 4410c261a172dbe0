"""Tiny models of any architecture merged with ties and AIM, and compared with the plain computation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plain
import shrinking
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowmem_aim
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import Event, Notice
from lowmem_aim.system.options import Options

TEXTS = (
    "the first of three texts, forty bytes long",
    "one more, short",
    "one that is longer than all the others together",
)
LARGEST = 8_000_000  # parameters of a model that the plain computation takes seconds for
SCALES = (0.01, 0.02)  # of the experts' deltas


@dataclass(frozen=True)
class Outcome:
    """What became of a merge: right, with a notice, refused, unbuilt or wrong, and a text about it."""

    kind: str
    text: str
    notices: list[str] = field(default_factory=list)


def merged_and_compared(model_type: str, folder: Path) -> Outcome:
    """The outcome for one model type, and a text about it."""
    texts = [torch.tensor(tiny.tokenizer()(text)["input_ids"]) for text in TEXTS]
    try:
        seen, base = built(model_type, folder, texts)
    except Exception as error:  # whatever transformers raises at a config that fits no such small model
        return Outcome("unbuilt", short(error))
    notices: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            notices.append(event.text)

    try:
        merged = merge(folder, on_event)
    except LowmemAimError as error:
        return Outcome("refused", short(error))
    except Exception as error:
        return Outcome("wrong", f"crashed: {short(error)}")
    return compared(seen, base, [tensors_in(folder / f"expert-{i}") for i in range(len(SCALES))], merged, notices)


def built(model_type: str, folder: Path, texts: Sequence[Tensor]) -> tuple[plain.Seen, dict[str, Tensor]]:
    """Save the base and its experts in `folder`; return what plain forwards of the base saw, and the base's tensors."""
    torch.manual_seed(0)
    model = from_config(shrinking.shrunk_config(model_type))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > LARGEST:
        raise ValueError(f"the shrunk config still has {parameters / 1e6:.0f} million parameters")
    tiny.spread(model)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    for i, scale in enumerate(SCALES):
        tiny.perturbed(folder / "base", folder / f"expert-{i}", scale=scale, seed=i + 1)
    whole = loaded(folder / "base")
    return plain.statistics(whole, texts), tensors_in(folder / "base")


def from_config(config: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    except ValueError:  # no such experts
        return AutoModelForCausalLM.from_config(config)


def loaded(folder: Path) -> Any:
    """The model as transformers loads it, each parameter in memory of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model.eval()


def merge(folder: Path, on_event: Any) -> dict[str, Tensor]:
    """Merge the experts with ties and AIM."""
    recipe = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / f"expert-{i}"), "parameters": {"weight": plain.WEIGHT, "density": plain.DENSITY}}
            for i in range(len(SCALES))
        ],
        "aim": {"omega": plain.OMEGA, "calibration": texts_in(folder), "pack": False, "dtype": "float32"},
    }
    options = Options(use_cache=False)
    return tensors_in(lowmem_aim.merge(recipe, folder / "merged", options, on_event))


def texts_in(folder: Path) -> str:
    """The path of a file in `folder` with the texts."""
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def compared(
    seen: plain.Seen, base: plain.Tensors, experts: Sequence[plain.Tensors], merged: plain.Tensors, notices: list[str]
) -> Outcome:
    """Compare a merge with the plain one: each tensor relaxed as it should be, or left and told."""
    ties, factors = plain.ties(base, experts), plain.factors(seen, base)
    ties |= {name: base[name] for name in plain.buffers(seen.model, base)}
    wrong, left, relaxed = [], [], 0
    for name in base:
        expected = base[name] + (ties[name] - base[name]) * factors.get(name, 1.0)
        delta = float((ties[name] - base[name]).abs().max()) if base[name].numel() else 0.0
        if name in merged and near(merged[name], expected, delta):
            relaxed += name in factors
        elif name in merged and near(merged[name], ties[name], delta):
            left.append(name)
        else:
            wrong.append(name)
    text = f"{relaxed} of {len(base)} tensors relaxed"
    if wrong:
        return Outcome("wrong", f"{text}; {len(wrong)} wrong, such as `{wrong[0]}`", notices)
    if left and not any("as merged" in notice for notice in notices):
        return Outcome("wrong", f"{text}; {len(left)} left as merged and not told, such as `{left[0]}`", notices)
    return Outcome("notice" if notices else "right", "; ".join([text, *map(shortened, notices)]), notices)


def near(found: Tensor, expected: Tensor, delta: float) -> bool:
    """Whether two results differ by no more than float32 in another order does; `delta` is the largest change."""
    if found.shape != expected.shape:
        return False
    bound = 1e-4 * delta + 1e-6 * float(expected.double().abs().max()) if expected.numel() else 0.0
    return not found.numel() or float((found.double() - expected.double()).abs().max()) <= bound


def short(error: BaseException) -> str:
    """What was raised, in one short line."""
    said = str(error).strip().splitlines()
    return shortened(f"{type(error).__name__}: {said[-1].strip() if said else ''}")


def shortened(text: str, length: int = 160) -> str:
    """A text cut to `length` characters, in one line, without paths of this run."""
    text = re.sub(r"/tmp/[^\s`]*/", "", " ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 3]}..."
