"""Merge methods called on plain tensors, slice by slice as a merge calls them; parameters for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowmem_aim.methods.method import Rounds, Rows, Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.models.headers import matrix_shape

SHAPES = [(), (1,), (2,), (97,), (1, 13), (13, 1), (31, 37), (3, 5, 7), (2, 3, 1)]
CPU = torch.device("cpu")
WHOLE = 0  # a step
NAME = "model.layers.0.self_attn.q_proj.weight"

# For three experts, or as many as the method takes.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": (0.3, 0.4, 0.5)},
    "task_arithmetic": {"weight": (0.3, 0.4, 0.5), "lambda": 0.9},
    "ties": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 0.9), "rescale": True},
    "breadcrumbs": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 0.9), "gamma": (0.1, 0.1, 0.3), "rescale": True},
    "breadcrumbs_ties": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 0.9), "gamma": (0.1, 0.1, 0.0)},
    "dare_linear": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 0.9)},
    "dare_ties": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 0.9)},
    "slerp": {"t": 0.4},
    "model_stock": {"filter_wise": True},
    "karcher": {"max_iter": 20, "tol": 1e-9},
    "multislerp": {"weight": (0.3, 0.4, 0.5)},
    "nuslerp": {"weight": (0.3, 0.4), "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "widen": {"above_average_value_ratio": 1.1, "score_calibration_value": 0.9},
    "nearswap": {"t": 0.05},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.05, "alpha": 0.6},
    "passthrough": {"scale": (1.5,)},
    "della": {"weight": (0.3, 0.4, 0.5), "density": (0.2, 0.5, 1.0), "epsilon": (0.1, 0.4, 0.1)},
    "della_linear": {"weight": (0.3, 0.4, 0.5), "density": (0.3, 0.5, 0.7), "epsilon": (0.1, 0.4, 0.0)},
    "sce": {"select_topk": 0.3},
    "arcee_fusion": {},
    "covariance": {"weight": (0.3, 0.4, 0.5)},
    "regmean": {"weight": (0.3, 0.4, 0.5), "rest": "task_arithmetic", "lambda": 0.9},
    "regmean_plus": {"weight": (0.3, 0.4, 0.5)},
}


def tensors(shape: tuple[int, ...], experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Base and experts; float32 values, representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    others = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(experts)]
    return [t.to(dtype).float() for t in (base, *others)]


def slices(
    base: Tensor,
    experts: list[Tensor],  # each of the base's shape
    step: int,  # rows a slice, or WHOLE
) -> Iterator[Rows]:
    """The models' rows in their order, `step` at a time; a tensor of one dimension has one element a row."""
    rows, columns = matrix_shape(tuple(base.shape))
    step = rows or 1 if step == WHOLE else step
    flat = [t.reshape(rows, columns) for t in (base, *experts)]
    for start in range(0, rows, step):
        part = [t[start : start + step] for t in flat]
        yield Rows(part[0], tuple(part[1:]), start * columns)


def measured(script: Any, base: Tensor, experts: list[Tensor], step: int) -> Any:
    """What a script returns after all of its rounds."""
    rounds = Rounds(script)
    for fold in rounds:
        for rows in slices(base, experts, step):
            fold.add(fold.part(rows))
    return rounds.combine


def merge(
    method: str,
    base: Tensor,
    experts: list[Tensor],
    parameters: dict[str, Any],
    step: int = 1 << 30,
    seed: int = 0,
    **facts: Any,
) -> Tensor:
    """The merged tensor, float32, in slices of `step` rows; `facts` are more fields of the Subject."""
    subject = Subject(NAME, tuple(base.shape), base.numel(), len(experts), seed, **facts)
    step = WHOLE if METHODS[method].whole_rows and base.ndim < 2 else step
    combine = measured(METHODS[method].start(subject, parameters), base, experts, step)
    return torch.cat([combine(rows) for rows in slices(base, experts, step)]).reshape(base.shape)


def resolved(name: str, given: dict[str, Any], experts: list[Tensor]) -> dict[str, Any]:
    """The parameters of the method `name`: those that are given, and the defaults of the others."""
    table = METHODS[name].parameters
    return {key: given.get(key, (p.default,) * len(experts) if p.per_expert else p.default) for key, p in table.items()}


def assert_close(ours: Tensor, truth: Tensor) -> None:
    """Assert that a float32 result is within 1e-6 of the largest value of the float64 truth."""
    assert ours.dtype == torch.float32
    assert float((ours.double() - truth).abs().max()) <= 1e-6 * max(float(truth.abs().max()), 1e-30)
