"""Plain float64 implementations of the formulas, whole tensors at a time, written from the documentation alone."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(models: list[Tensor], weight: list[float], normalize: bool = True) -> Tensor:
    total = sum(w * m.double() for w, m in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def slerp(base: Tensor, expert: Tensor, t: float) -> Tensor:
    a, b = base.double(), expert.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if norms > 0 else 0.0
    if norms == 0 or abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    return torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b


def nearswap(base: Tensor, expert: Tensor, t: float) -> Tensor:
    a, b = base.double(), expert.double()
    share = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * b + (1 - share) * a


def ram(base: Tensor, diffs: list[Tensor], epsilon: float, plus: tuple[float, float] | None = None) -> Tensor:
    """`plus` are r and alpha of ramplus_tl."""
    changed = [diff.abs() > float(torch.tensor(epsilon)) for diff in diffs]
    count = sum(mask.double() for mask in changed)
    total = torch.zeros_like(diffs[0])
    for diff, mask in zip(diffs, changed, strict=True):
        lone = mask & (count == 1)
        factor = 1.0
        if plus and lone.any():
            factor += plus[0] * min(float((mask & ~lone).sum() / lone.sum()), plus[1])
        total += torch.where(lone, diff * factor, torch.where(mask, diff / count.clamp(min=1), 0.0))
    return base.double() + total


def model_stock(base: Tensor, experts: list[Tensor], filter_wise: bool) -> Tensor:
    diffs = torch.stack([diff.flatten() for diff in deltas(base, experts)])
    rows = base.shape[-1] if filter_wise and base.ndim > 1 else max(base.numel(), 1)
    diffs = diffs.reshape(len(experts), -1, rows)
    norms = diffs.norm(dim=-1)
    cosines = [
        torch.where(
            norms[i] * norms[j] > 0, (diffs[i] * diffs[j]).sum(-1) / (norms[i] * norms[j]).clamp(min=1e-300), 0.0
        )
        for i in range(len(experts))
        for j in range(i)
    ]
    c = sum(cosines) / len(cosines)
    below = 1 + (len(experts) - 1) * c
    t = torch.where(below > 1e-6, len(experts) * c / below, 0.0)
    return base.double() + (t[:, None] * diffs.mean(0)).reshape(base.shape)


def deltas(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    # Float32 first, as in the checkpoint's arithmetic: a threshold must see the same magnitudes.
    return [(expert - base).double() for expert in experts]


def largest_mask(delta: Tensor, density: float) -> Tensor:
    """The int(density n) largest magnitudes, equal ones from the lowest flat index on."""
    k = int(density * delta.numel())
    order = sorted(range(delta.numel()), key=lambda i: (-abs(float(delta.flatten()[i])), i))
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.reshape(delta.shape)


def middle_mask(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Of the magnitudes the int(density n) largest after the int(gamma n) largest, or as few of those as fit."""
    k = int(density * delta.numel())
    dropped = min(int(gamma * delta.numel()), delta.numel() - k)
    order = sorted(range(delta.numel()), key=lambda i: (-abs(float(delta.flatten()[i])), i))
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[dropped : dropped + k]] = True
    return mask.reshape(delta.shape)


def rescale_factor(delta: Tensor, mask: Tensor, rule: bool | str, density: float) -> float:
    if rule is False:
        return 1.0
    if rule == "density":
        return 1.0 / density if density > 0 else 1.0
    kept = float((delta * mask).abs().sum())
    return float(delta.abs().sum()) / kept if kept > 0 else 1.0


def task_arithmetic_tail(
    base: Tensor,
    sparse: list[Tensor],
    weight: list[float],
    *,
    elect: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    parts = [w * d for w, d in zip(weight, sparse, strict=True)]
    if elect:
        positive = sum(parts) >= 0
        keep = [torch.where(positive, part > 0, part < 0) for part in parts]
        merged = sum(part * k for part, k in zip(parts, keep, strict=True))
        divisor = sum(w * k.double() for w, k in zip(weight, keep, strict=True))
    else:
        merged = sum(parts)
        divisor = torch.full_like(merged, sum(weight))
    if normalize:
        merged = merged / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
    return base.double() + scale * merged


def aim(base: Tensor, merged: Tensor, means: Tensor, omega: float) -> Tensor:
    """means broadcastable against the weight."""
    share = means.double() / means.double().max() if means.max() > 0 else torch.zeros_like(means.double())
    return base.double() + (merged.double() - base.double()) * (1 - share * (1 - omega))
