"""Methods that solve, called on plain tensors, tile by tile as a merge calls them; and their formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from method_cases import CPU, NAME, resolved
from torch import Tensor

from lowmem_aim.methods import linears
from lowmem_aim.methods.method import Rounds, Rows, Subject
from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.system.tensor_store import TensorStore


class Space(MatrixSpace):
    """A space of so many bytes of RAM, the rest in a file; what it was told is kept."""

    def __init__(self, ram_bytes: int = 1 << 30, folder: Path | None = None, threads: int = 2) -> None:
        self.told: list[str] = []
        store = TensorStore(CPU, device_bytes=0, ram_bytes=ram_bytes, folder=folder)
        super().__init__(store, CPU, threads, self.told.append)


def solve(
    method: str,
    base: Tensor,
    experts: Sequence[Tensor],
    parameters: dict[str, Any],
    space: Space | None = None,
    moments: Any = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """The merged tensor, float32, of a linear or a stack of them."""
    subject = Subject(
        NAME,
        tuple(base.shape),
        base.numel(),
        len(experts),
        input_dim=-2 if transposed else -1,
        linear=True,
        space=space or Space(),
        moments=moments,
    )
    rounds = Rounds(METHODS[method].start(subject, resolved(method, parameters, list(experts))))
    rows = list(_tiles(base, experts))
    for fold in rounds:
        for part in rows:
            fold.add(fold.part(part))
    return torch.cat([rounds.combine(part) for part in rows]).reshape(base.shape)


def _tiles(base: Tensor, experts: Sequence[Tensor]) -> list[Rows]:
    height, columns = base.shape[-2:]
    flat = [t.reshape(-1, columns) for t in (base, *experts)]
    found = []
    for matrix in range(0, len(flat[0]), height):
        for start in range(matrix, matrix + height, linears.ROWS):
            stop = min(start + linears.ROWS, matrix + height)
            found.append(Rows(flat[0][start:stop], tuple(t[start:stop] for t in flat[1:]), start * columns))
    return found


def inputs(size: int, experts: int, rows: int = 50, seed: int = 5) -> list[Tensor]:
    """Each expert's inputs, (rows, size) float32: channels of very different sizes, that have to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, size)
    mixing = torch.randn(size, size, generator=generator)
    return [torch.randn(rows, size, generator=generator) @ mixing * scales for _ in range(experts)]


def moment_of(x: Tensor, space: MatrixSpace) -> Moment:
    """The moment of inputs, (rows, size) float32."""
    moment = Moment(x.shape[1], space)
    for rows in x.split(16):
        moment.add(rows)
    return moment


# --- float64 ----------------------------------------------------------------------------------------------------------


def covariance(deltas: Sequence[Tensor], weight: Sequence[float], ridge: float) -> Tensor:
    """The delta of METHODS' formula for one matrix (out, in), float64."""
    found = [delta.double() for delta in deltas]
    squares = [float((delta * delta).sum()) for delta in found]
    factors = [w / square for w, square in zip(weight, squares, strict=True)]
    parts = [factor * delta.T @ delta for factor, delta in zip(factors, found, strict=True)]
    total = sum(parts[1:], parts[0])
    right = sum((d @ part for d, part in zip(found, parts, strict=True)), torch.zeros_like(found[0]))
    return right @ torch.linalg.inv(total + ridge * total.diagonal().mean() * torch.eye(len(total)).double())


def regmean(
    deltas: Sequence[Tensor], x: Sequence[Tensor], weight: Sequence[float], ridge: float, shrink: float
) -> Tensor:
    """The delta of the formula for one matrix (out, in), float64, of each expert's inputs x, (rows, in)."""
    moments = [rows.double().T @ rows.double() for rows in x]
    return regmean_of_moments(deltas, moments, weight, ridge, shrink)


def regmean_of_moments(
    deltas: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    weight: Sequence[float],
    ridge: float = 1e-4,
    shrink: float = 0.9,
) -> Tensor:
    """The same, of each expert's moment, (in, in); None where no text has reached it."""
    below, above = torch.zeros(()).double(), torch.zeros(()).double()
    for delta, moment, w in zip(deltas, moments, weight, strict=True):
        hat = ridge * torch.eye(delta.shape[1]).double()
        if moment is not None:
            unit = moment / moment.diagonal().mean()
            hat = hat + shrink * unit + (1 - shrink) * torch.diag(unit.diagonal())
        below, above = below + w * hat, above + w * delta.double() @ hat
    return above @ torch.linalg.inv(below)
