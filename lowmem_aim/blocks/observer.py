"""The mean |x| of each input channel of every weight that AIM scales, collected while the modules run.

The statistic of a weight is the mean over the tokens (and heads: all dimensions but the last) of one call, then over
calls, in float64. A module is called once a sequence, so this is the mean over sequences; an expert's mean is over the
sequences that sent the expert a token. Modules are observed through forward hooks, fused experts (one 3-D parameter, no
`.weight`; or the rows of one matrix, as DBRX has them) through the matrix products in which slices of that parameter
take part.
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
from lowmem_aim.models.meta_model import MetaModel

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

    def sums(self) -> Tensor:
        """The sums of means, float64 on the CPU, in `shape`."""
        return self.total.cpu().double().reshape(self.shape)

    def counts(self) -> Tensor:
        """The number of means in each sum, float64 in `shape`."""
        return torch.tensor(self.calls, dtype=torch.float64)[:, None].expand(self.total.shape).reshape(self.shape)


class Watch:
    """The tallies of a calibration. Inputs count only within `counting`, so that the canary's do not.

    Means are noted first and counted by `commit`, so that a forward that fails half-way can be run again.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}  # by parameter name
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


def scaled_weights(meta_model: MetaModel) -> set[str]:
    """Checkpoint names of the weights that AIM scales where their inputs are seen, wherever they are in the model.

    Among them are matrices that a causal language model has no place for, such as a reward model's score.
    """
    weights = meta_model.weights
    parts = list(meta_model.model.named_modules())
    parameters = [f"{path}.weight" for path, part in parts if _is_scaled(part)]
    parameters += [stack.name for path, part in parts for stack in _stacks(path, part) if stack.is_linear]
    found = {name for parameter in parameters for name in weights.sources(parameter)}
    strange = weights.unused - meta_model.buffers
    return found | {name for name in strange if len(weights.checkpoint.tensors[name].shape) == 2}


@dataclass(frozen=True)
class Stack:
    """A parameter that may hold the weights of several experts: (experts, a, b), or (experts * a, b)."""

    name: str
    owner: nn.Module
    key: str  # the parameter's name there

    @property
    def is_linear(self) -> bool:
        """Whether shape or name says that inputs are multiplied with the parameter: a Mamba's `A_log` is no linear."""
        named = "weight" in self.key or "proj" in self.key
        return min(self.value.shape[-2:]) > 1 and (self.value.dim() == 3 or named)

    @property
    def value(self) -> Tensor:
        """The parameter as it is now: weights come and go."""
        return self.owner.get_parameter(self.key)


def _stacks(path: str, part: nn.Module) -> Iterator[Stack]:
    """Yield a Stack for each parameter of a module that can hold experts, or one matrix under another name."""
    for key, value in part._parameters.items():
        is_stack = value is not None and value.dim() == 3 and not isinstance(part, nn.Conv1d)
        is_matrix = value is not None and value.dim() == 2 and key != "weight"
        if is_stack or is_matrix:
            yield Stack(f"{path}.{key}", part, key)


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
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or not x.numel():
            return
        stack = self._stack_of(weight) if weight.dim() in (2, 3) else None
        if stack is None:
            return
        value = stack.value
        # Which dimension of a matrix of the stack runs over the input channels: the one with the same stride.
        channel, other = (-1, -2) if linear else (-2, -1)
        channels, outputs = weight.shape[channel], weight.shape[other]
        last = weight.stride(channel) == value.stride(-1) and channels == value.shape[-1]
        rows = (outputs if last else channels) if value.dim() == 2 else value.shape[1]  # of one expert's matrix
        tally = self._tally(stack.name, value, rows, last=last)
        if weight.dim() == 3:
            self._note_all(tally, x)
        else:
            offset = (weight.data_ptr() - value.data_ptr()) // value.element_size()
            self.watch.note(tally, offset // (rows * value.shape[-1]), mean_abs(x))

    def _stack_of(self, weight: Tensor) -> Stack | None:
        """Find the stack that a weight is a slice of: a slice is a view and shares its stack's storage."""
        pointer = weight.untyped_storage().data_ptr()
        for stack in self.stacks:
            if not stack.value.is_meta and stack.value.untyped_storage().data_ptr() == pointer:
                return stack
        return None

    def _tally(self, name: str, value: Tensor, rows: int, *, last: bool) -> Tally:
        tally = self.watch.tallies.get(name)
        if tally is None:
            columns = value.shape[-1]
            experts, channels = value.numel() // (rows * columns), columns if last else rows
            total = torch.zeros(experts, channels, dtype=_wide(value.device), device=value.device)
            shape: tuple[int, ...] = (experts, 1, channels) if last else (experts, channels, 1)
            # A matrix that is used as a whole has a linear's statistic.
            shape = shape[1:] if value.dim() == 2 and experts == 1 else shape
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
