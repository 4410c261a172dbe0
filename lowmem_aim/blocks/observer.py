"""The mean |x| of each input channel of every weight that AIM scales, collected while the modules run.

The statistic of a weight is the mean over the tokens (and heads: all dimensions but the last) of one call, then over
calls, in float64. A module is called once a sequence, so this is the mean over sequences; an expert's mean is over the
sequences that sent the expert a token. Modules are observed through forward hooks, fused experts (one 3-D parameter, no
`.weight`) through the matrix products in which slices of that parameter take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lowmem_aim.errors import ModelError

# Numbers that are converted to float64 at a time (8 MiB), however long the sequence is.
CHUNK_NUMEL = 1 << 20

# The products that experts use: linear computes x @ W.T, the others x @ W.
_LINEAR = frozenset({F.linear})
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm})


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

    def statistic(self) -> Tensor:
        """Return the mean over calls, float32 on the CPU, in `shape`; zero for a row without a call."""
        # Divided in float64, and rounded once.
        calls = torch.tensor(self.calls, dtype=torch.float64).clamp(min=1)[:, None]
        return (self.total.cpu().double() / calls).float().reshape(self.shape)

    def unreached(self) -> Tensor:
        """Return a bool tensor of the statistic's shape: True where no token arrived."""
        seen = torch.tensor(self.calls)[:, None] > 0
        return (~seen).expand(self.total.shape).reshape(self.shape)


class Watch:
    """The tallies of a calibration. Inputs count only within `counting`, so that the canary's do not.

    Means are noted first and counted by `commit`, so that a forward that fails half-way can be run again.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}  # by parameter name
        self.stacks: set[str] = set()  # names of all fused experts met, even if no product of theirs was noted
        self._counts = False
        self._seen: list[tuple[Tally, int, Tensor]] = []  # (tally, its row, a mean), not yet counted

    @contextlib.contextmanager
    def counting(self, on: bool) -> Iterator[None]:
        """Count inputs during this block if `on`, or else do not; restore the earlier state at its end."""
        before, self._counts = self._counts, on
        try:
            yield
        finally:
            self._counts = before

    def switch(self, on: bool) -> None:
        """Count, or stop counting, until the surrounding `counting` ends: for a forward whose parts differ."""
        self._counts = on

    @property
    def counts(self) -> bool:
        """Whether inputs are counted now."""
        return self._counts

    def note(self, tally: Tally, row: int, mean: Tensor) -> None:
        """Note a mean for one row of a tally; only `commit` counts the mean."""
        self._seen.append((tally, row, mean))

    def commit(self) -> None:
        """Count all noted means."""
        for tally, row, mean in self._seen:
            tally.add(row, mean)
        self._seen.clear()

    def discard(self) -> None:
        """Drop all noted means: the forward that gave them has failed."""
        self._seen.clear()

    @contextlib.contextmanager
    def on(self, parts: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Observe the scaled modules among `parts`, given as (path, module); all hooks are removed at the end."""
        handles = []
        try:
            for path, part in parts:
                if _is_scaled(part):
                    hook = self._hook(f"{path}.weight", part)
                    handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def experts(self, parts: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Observe the fused experts among `parts`, given as (path, module), in this thread only."""
        stacks = [stack for path, part in parts for stack in _stacks(path, part)]
        self.stacks |= {name for name, _, _ in stacks}
        with _ExpertProducts(self, stacks) if stacks else contextlib.nullcontext():
            yield

    def count(self, parameter: str, weight: Tensor, x: Tensor, *, transposed: bool = False) -> None:
        """Note the input `x` of one call of the module that holds `weight`, (out, in), or (in, out) if `transposed`.

        Does nothing unless inputs count now and the last dimension of `x` is that of the weight's input channels.
        """
        channels = weight.shape[0] if transposed else weight.shape[-1]
        if self.counts and x.is_floating_point() and x.dim() and x.shape[-1] == channels and x.numel():
            self.note(self._tally(parameter, weight, x.device, transposed=transposed), 0, mean_abs(x))

    def check(self, prefix: str) -> None:
        """Commit, then raise ModelError naming a module under `prefix` whose inputs are not finite."""
        self.commit()
        for name, tally in self.tallies.items():
            if name.startswith(prefix) and not bool(tally.total.isfinite().all()):
                raise ModelError(
                    f"calibration: the inputs of `{name.removesuffix('.weight')}` overflow or are not numbers",
                    hint="is the base model sound? if it is, calibrate in a wider dtype (`aim: {dtype: float32}`)",
                )

    def _hook(self, parameter: str, module: nn.Module) -> Any:
        transposed = isinstance(module, Conv1D)
        weight = module.get_parameter("weight")  # for its shape only

        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None:
                self.count(parameter, weight, x, transposed=transposed)

        self._tally(parameter, weight, None, transposed=transposed)
        return hook

    def _tally(self, name: str, weight: Tensor, device: torch.device | None, *, transposed: bool) -> Tally:
        """Return the tally of a module, made when the module is first met.

        A module that is never called thus has a tally too, and counts as unreached.
        """
        tally = self.tallies.get(name)
        if tally is None:
            channels = weight.shape[0] if transposed else weight.shape[-1]
            shape = (channels,) if weight.dim() == 1 else (channels, 1) if transposed else (1, channels)
            tally = self.tallies[name] = Tally(torch.zeros(1, channels, dtype=torch.float64), [0], shape)
        if device is not None and tally.total.device != device:
            tally.total = tally.total.to(device, _wide(device))
        return tally


def _is_scaled(part: nn.Module) -> bool:
    """Whether AIM scales the module's weight: 1-D and 2-D weights, but no embeddings or convolutions."""
    weight = part._parameters.get("weight")
    return weight is not None and weight.dim() in (1, 2) and not isinstance(part, nn.Embedding)


Stack = tuple[str, nn.Module, str]  # a parameter's name, its module, its name there


def _stacks(path: str, part: nn.Module) -> Iterator[Stack]:
    """Yield a Stack for each 3-D parameter (experts, a, b) of a module."""
    for name, value in part._parameters.items():
        if value is not None and value.dim() == 3 and not isinstance(part, nn.Conv1d):
            yield f"{path}.{name}", part, name


class _ExpertProducts(TorchFunctionMode):
    """Intercepts every matrix product, and notes those whose weight is a slice of a stack, or a whole stack."""

    def __init__(self, watch: Watch, stacks: list[Stack]) -> None:
        super().__init__()
        self.watch = watch
        self.stacks = stacks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watch.counts and (func in _LINEAR or func in _PRODUCTS) and len(args) >= 2:
            self._look(args[0], args[1], linear=func in _LINEAR)
        return func(*args, **(kwargs or {}))

    def _look(self, x: Any, weight: Any, *, linear: bool) -> None:
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor):
            return
        found = self._stack_of(weight) if weight.dim() in (2, 3) else None
        if found is None:
            return
        name, stack = found
        # Which of the stack's two inner dimensions runs over the input channels: the one with the same stride.
        channel = -1 if linear else -2
        axis = 2 if weight.stride(channel) == stack.stride(2) and weight.shape[channel] == stack.shape[2] else 1
        tally = self._tally(name, stack, axis)
        if weight.dim() == 3:
            self._note_all(tally, x)
        elif x.numel():
            offset = (weight.data_ptr() - stack.data_ptr()) // stack.element_size()
            self.watch.note(tally, offset // stack.stride(0), mean_abs(x))

    def _stack_of(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """Find the stack that a weight is a slice of: a slice is a view and shares its stack's storage.

        The storage is looked up anew each time, since weights come and go.
        """
        pointer = weight.untyped_storage().data_ptr()
        for name, owner, key in self.stacks:
            value = owner.get_parameter(key)
            if not value.is_meta and value.untyped_storage().data_ptr() == pointer:
                return name, value
        return None

    def _tally(self, name: str, stack: Tensor, axis: int) -> Tally:
        tally = self.watch.tallies.get(name)
        if tally is None:
            experts, channels = stack.shape[0], stack.shape[axis]
            total = torch.zeros(experts, channels, dtype=_wide(stack.device), device=stack.device)
            shape = (experts, 1, channels) if axis == 2 else (experts, channels, 1)
            tally = self.watch.tallies[name] = Tally(total, [0] * experts, shape)
        return tally

    def _note_all(self, tally: Tally, x: Tensor) -> None:
        """Note one batched product over all experts, x (experts, tokens, channels).

        Rows of zeros stand for tokens that are routed elsewhere.
        """
        for expert, rows in enumerate(x):
            routed = rows[rows.ne(0).any(-1)]
            if routed.shape[0]:
                self.watch.note(tally, expert, mean_abs(routed))
