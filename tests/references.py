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


def on_the_circle(a: Tensor, b: Tensor, t: float, dims: tuple[int, ...]) -> Tensor:
    """nuslerp of float64 vectors that lie along `dims`."""
    norms = (a.square().sum(dims, keepdim=True) * b.square().sum(dims, keepdim=True)).sqrt()
    cosine = ((a * b).sum(dims, keepdim=True) / norms.clamp(min=1e-300)).clamp(-1, 1)
    angle = torch.acos(torch.where(norms > 0, cosine, 0.0))
    sine = angle.sin()
    flat = sine < 1e-8
    sine = torch.where(flat, 1.0, sine)
    first = torch.where(flat, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / sine)
    second = torch.where(flat, torch.full_like(sine, t), (t * angle).sin() / sine)
    return first * a + second * b


def nuslerp(base: Tensor | None, experts: list[Tensor], weight: list[float], flatten: bool, row_wise: bool) -> Tensor:
    a, b = vectors(base, experts)
    total = weight[0] + weight[1]
    t = weight[1] / total if abs(total) > 1e-8 else 0.5
    dims = tuple(range(a.ndim)) if flatten or a.ndim < 2 else (0,) if row_wise else (a.ndim - 1,)
    merged = on_the_circle(a, b, t, dims)
    return merged if base is None else base.double() + merged


def vectors(base: Tensor | None, experts: list[Tensor]) -> list[Tensor]:
    return [e.double() for e in experts] if base is None else deltas(base, experts)


def multislerp(base: Tensor | None, experts: list[Tensor], weight: list[float], normalize: bool = True) -> Tensor:
    """As published, with its step in the tangent space."""
    x = vectors(base, experts)
    w = [value / sum(weight) if normalize else value for value in weight]
    units = [v / v.norm() for v in x]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    mean = mean / mean.norm()
    tau = sum(a * (u - (u * mean).sum() * mean) for a, u in zip(w, units, strict=True))
    size = float(tau.norm())
    moved = mean * torch.tensor(size).cos() + (tau * (torch.tensor(size).sin() / size) if size > 1e-8 else 0.0)
    merged = moved * sum(a * float(v.norm()) for a, v in zip(w, x, strict=True))
    return merged if base is None else base.double() + merged


def karcher(models: list[Tensor], iterations: int) -> Tensor:
    x = [m.double().flatten() for m in models]
    units = [v / v.norm() for v in x]
    mean = sum(units)
    mean = mean / mean.norm()
    for _ in range(iterations):
        step = torch.zeros_like(mean)
        for u in units:
            across = (u * mean).sum().clamp(-1, 1)
            angle = across.acos()
            step += torch.where(angle > 1e-7, angle / angle.sin().clamp(min=1e-300), 0.0) * (u - across * mean)
        step /= len(units)
        size = step.norm()
        if size > 1e-12:
            mean = size.cos() * mean + size.sin() / size * step
            mean = mean / mean.norm()
    return (mean * (sum(v.norm() for v in x) / len(x))).reshape(models[0].shape)


def widen(base: Tensor, experts: list[Tensor], ratio: float, calibrated: float, inputs_first: bool = False) -> Tensor:
    diffs = deltas(base, experts)
    if base.ndim < 2:
        changes = [torch.stack([d.abs().flatten() for d in diffs])]
    else:
        height = -1 if inputs_first else -2  # the dimension that a column runs along
        a, b = base.double(), [base.double() + d for d in diffs]
        norm, norms = a.norm(dim=height), [m.norm(dim=height) for m in b]
        cosines = [(m * a).sum(height) / (norm * n).clamp(min=1e-300) for m, n in zip(b, norms, strict=True)]
        turned = [torch.where(norm * n > 0, 1 - c, 0.0) for c, n in zip(cosines, norms, strict=True)]
        changes = [torch.stack([(n - norm).abs() for n in norms]), torch.stack(turned)]
        changes = [c.argsort(dim=-1, stable=True).argsort(dim=-1).double() / c.shape[-1] for c in changes]
    # The ranks' mean is known; summed up, it would decide by its rounding about the column in the middle.
    mean = [(c.shape[-1] - 1) / 2 / c.shape[-1] if base.ndim > 1 else c.mean(dim=-1, keepdim=True) for c in changes]
    scores = [torch.where(c > ratio * m, calibrated, c.softmax(dim=0)) for c, m in zip(changes, mean, strict=True)]
    share = sum(scores) / len(scores)
    share = share.reshape(-1, *base.shape) if base.ndim < 2 else share.unsqueeze(-1 if inputs_first else -2)
    return base.double() + sum(s * d for s, d in zip(share, diffs, strict=True))


def della_chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Of each element to stay."""
    rows = delta.abs().reshape(-1, delta.shape[-1] if delta.ndim else 1)
    ranks = rows.argsort(dim=-1, stable=True).argsort(dim=-1).double()
    if density >= 1 or rows.shape[-1] == 1:
        return torch.full(delta.shape, min(density, 1.0), dtype=torch.float64)
    return (density - epsilon + 2 * epsilon * ranks / (rows.shape[-1] - 1)).reshape(delta.shape)


def sce(base: Tensor, experts: list[Tensor], topk: float) -> Tensor:
    diffs = torch.stack(deltas(base, experts))
    if topk < 1:
        variance = diffs.var(dim=0, unbiased=False)
        k = int(topk * int((variance > 0).sum()))
        if k == 0:
            return base.double()
        diffs = diffs * largest_mask(variance, k / variance.numel() + 1e-9)
    w = diffs.square().reshape(len(experts), -1).mean(dim=1)
    w = w / w.sum() if w.sum() >= 1e-6 else torch.full_like(w, 1 / len(w))
    w = w.reshape(-1, *(1,) * base.ndim)
    sign = torch.where(diffs.sum(dim=0) >= 0, 1.0, -1.0)
    mask = diffs.sign() == sign
    return base.double() + (w * diffs * mask).sum(dim=0) / (w * mask).sum(dim=0).clamp(min=1e-6)


def arcee_fusion(base: Tensor, expert: Tensor) -> Tensor:
    delta = (expert - base).double()
    p, q = (t.double().reshape(-1, t.shape[-1] if t.ndim else 1).softmax(dim=-1) + 1e-8 for t in (expert, base))
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    importance = (delta.abs().reshape(p.shape) * divergence).reshape(delta.shape)
    ordered = importance.flatten().sort().values
    lower, median, upper = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (upper - lower), expert.double(), base.double())


def deltas(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    # Float32 first, as in the checkpoint's arithmetic: a threshold must see the same magnitudes.
    return [(expert - base).double() for expert in experts]


def largest_mask(delta: Tensor, density: float) -> Tensor:
    """The max(1, int(density n)) largest magnitudes (none at density 0), equal ones from the lowest flat index on."""
    k = max(1, int(density * delta.numel())) if density else 0
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


def control(
    means: Tensor,  # of one module, any shape
    omega: float,
    kind: str,
    order: list[int],  # of the channels, for `permuted`
) -> Tensor:  # the same shape, float64
    """The factors that a control puts in the place of AIM's."""
    flat = means.double().flatten()
    share = flat / flat.max() if flat.max() > 0 else torch.zeros_like(flat)
    factors = 1 - share * (1 - omega)
    if kind == "uniform":
        factors = torch.full_like(factors, float(factors.mean()))
    elif kind == "permuted":
        factors = factors[order]
    elif flat.max() > 0:
        rest = float((1 - share).mean())
        factors = 1 - (min(1.0, float((1 - factors).mean()) / rest) if rest else 1.0) * (1 - share)
    return factors.reshape(means.shape)
