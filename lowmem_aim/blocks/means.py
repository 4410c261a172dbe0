"""The mean |x| of each input channel of every weight that AIM scales.

The statistic of a weight is the mean over the tokens (and heads: all dimensions but the last) of one call, then over
calls, in float64. A module is called once a sequence, so this is the mean over sequences; an expert's mean is over the
sequences that sent the expert a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_aim.blocks.observer import Operand, routed
from lowmem_aim.errors import ModelError

# Numbers that are converted to float64 at a time (8 MiB), however long the sequence is.
CHUNK_NUMEL = 1 << 20


def mean_abs(x: Tensor) -> Tensor:
    """Mean of |x| over all dimensions but the last: (..., channels) -> (channels,).

    The result is float64, and float32 on Apple GPUs, which have no float64.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    step = max(1, CHUNK_NUMEL // rows.shape[-1])
    total = torch.zeros(rows.shape[-1], dtype=_wide(x.device), device=x.device)
    for start in range(0, rows.shape[0], step):
        total += rows[start : start + step].abs().to(total.dtype).sum(0)
    return total / rows.shape[0]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


@dataclass
class Tally:
    """Sums of means for one parameter: a row for each expert, or a single row."""

    total: Tensor  # (rows, channels)
    calls: list[int]  # the number of means in each row
    shape: tuple[int, ...]  # of the statistic, which broadcasts against the parameter

    def add(self, row: int, mean: Tensor) -> None:
        """Add the mean of one call, (channels,), to a row."""
        self.total[row] += mean
        self.calls[row] += 1

    def sums(self) -> Tensor:
        """The sums of means, float64 on the CPU, in `shape`."""
        return self.total.cpu().double().reshape(self.shape)

    def counts(self) -> Tensor:
        """The number of means in each sum, float64 in `shape`."""
        return torch.tensor(self.calls, dtype=torch.float64)[:, None].expand(self.total.shape).reshape(self.shape)


class Means:
    """The tallies of a calibration, a `Statistic` of the inputs that a `Watch` sees."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}  # by parameter name
        self._seen: list[tuple[Tally, int, Tensor]] = []  # (tally, its row, a mean), not yet counted

    def meet(self, weight: Operand) -> None:
        """Begin a tally of zeros: a module that is never called thus has a tally too, and counts as unreached."""
        self._tally(weight)

    def note(self, weight: Operand, number: int, x: Tensor, *, padded: bool = False) -> None:
        """Note the mean of |x| for one row of a tally; only `commit` counts the mean."""
        rows = routed(x) if padded else x
        if rows.numel():
            tally = self._tally(weight)
            if tally.total.device != x.device:
                tally.total = tally.total.to(x.device, _wide(x.device))
            self._seen.append((tally, number, mean_abs(rows)))

    def commit(self) -> None:
        """Count all noted means."""
        for tally, row, mean in self._seen:
            tally.add(row, mean)
        self._seen.clear()

    def discard(self) -> None:
        """Drop all noted means: the forward that gave them has failed."""
        self._seen.clear()

    def settle(self) -> None:
        """Do nothing: means are counted when they are committed."""

    def check(self, prefix: str) -> None:
        """Raise ModelError naming a module under `prefix` whose inputs are not finite."""
        for name, tally in self.tallies.items():
            if name.startswith(prefix) and not bool(tally.total.isfinite().all()):
                raise ModelError(
                    f"calibration: the inputs of `{name.removesuffix('.weight')}` overflow or are not numbers",
                    hint="is the base model sound? if it is, calibrate in a wider dtype (`aim: {dtype: float32}`)",
                )

    def leave_device(self) -> bool:
        """Do nothing: sums of means are small."""
        return False

    def _tally(self, weight: Operand) -> Tally:
        tally = self.tallies.get(weight.parameter)
        if tally is None:
            total = torch.zeros(weight.matrices, weight.channels, dtype=torch.float64)
            tally = self.tallies[weight.parameter] = Tally(total, [0] * weight.matrices, weight.shape)
        return tally
