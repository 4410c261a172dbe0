"""Merged tensors of both tools, compared. Each comparison returns what is wrong, or an empty text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-6  # of a tensor's largest magnitude
STANDARD_ERRORS = 3.0

Tensors = dict[str, Tensor]


def tensors_in(folder: Path) -> Tensors:
    """The tensors of a model's files by name."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_tensors(ours: Tensors, theirs: Tensors, tolerance: float = TOLERANCE, may_differ: float = 0.0) -> str:
    """Names, shapes, and elements within the tolerance, but for a share of all elements that may differ."""
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    beyond, worst, where = 0, 0.0, ""
    elements = sum(value.numel() for value in ours.values())
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            return f"`{name}` has the shape {list(value.shape)}, there {list(theirs[name].shape)}"
        difference = (value.double() - theirs[name].double()).abs() / max(float(value.double().abs().max()), 1e-30)
        beyond += int((~(difference <= tolerance)).sum())  # NaN is beyond
        if float(difference.max()) > worst:
            worst, where = float(difference.max()), name
    return f"{beyond} elements differ, `{where}` by {worst:.1e}" if beyond > may_differ * elements else ""


def same_expectation(ours: Tensors, theirs: Tensors, base: Tensors, experts: Sequence[Tensors]) -> str:
    """The same kept share, and the same expected change along the experts' mean delta, to STANDARD_ERRORS."""
    kept: list[list[Tensor]] = [[], []]
    along: list[list[Tensor]] = [[], []]
    for name, origin in base.items():
        mean = sum((expert[name] - origin).double() for expert in experts) / len(experts)
        for tool, merged in enumerate((ours, theirs)):
            change = (merged[name].double() - origin.double()).flatten()
            kept[tool].append((change != 0.0).double())
            along[tool].append(change * mean.flatten())
    for what, (a, b) in (("kept share", kept), ("expected change", along)):
        if wrong := _apart(torch.cat(a), torch.cat(b)):
            return f"{what}: {wrong}"
    return ""


def _apart(a: Tensor, b: Tensor) -> str:
    error = math.sqrt(float(a.var() + b.var()) / a.numel())
    distance = abs(float(a.mean() - b.mean()))
    return f"{float(a.mean()):.4g} and {float(b.mean()):.4g}" if distance > STANDARD_ERRORS * error else ""


def error_not_above(ours: Tensors, theirs: Tensors, truth: Tensors) -> str:
    """Of all elements together, the root of the mean squared error and the largest."""
    squares, largest = [0.0, 0.0], [0.0, 0.0]
    for name, exact in truth.items():
        for tool, merged in enumerate((ours, theirs)):
            # Some of mergekit's methods store float32 whatever is asked for.
            stored = merged[name].to(ours[name].dtype)
            error = (stored.double() - exact.double()).abs()
            squares[tool] += float((error**2).sum())
            largest[tool] = max(largest[tool], float(error.max()))
    if squares[0] > squares[1] or largest[0] > largest[1]:
        return f"squared error {squares[0]:.3g} against {squares[1]:.3g}, largest {largest[0]:.3g}, {largest[1]:.3g}"
    return ""
