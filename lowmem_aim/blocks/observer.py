"""The inputs of every weight that is multiplied with them, seen while the modules run, and given to a statistic.

Modules are observed through forward hooks, fused experts (one 3-D parameter, no `.weight`; or the rows of one matrix,
as DBRX has them) through the matrix products in which slices of that parameter take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lowmem_aim.models.meta_model import MetaModel

# The products that experts use: linear computes x @ W.T, the others x @ W.
_LINEAR = frozenset({F.linear})
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm})


@dataclass(frozen=True)
class Operand:
    """A parameter that inputs are multiplied with: one vector or matrix, or one for each fused expert."""

    parameter: str  # its name
    matrices: int
    channels: int  # inputs of each
    shape: tuple[int, ...]  # of a value for each input channel, which broadcasts against the parameter

    @classmethod
    def of(cls, parameter: str, weight: Tensor, *, transposed: bool) -> Operand:
        """Describe the weight of a module, (out, in), or (in, out) if `transposed`; or a vector."""
        channels = weight.shape[0] if transposed else weight.shape[-1]
        shape = (channels,) if weight.dim() == 1 else (channels, 1) if transposed else (1, channels)
        return cls(parameter, 1, channels, shape)


class Statistic(Protocol):
    """A statistic of inputs, such as their mean.

    Inputs are noted first and counted by `commit`, so that a forward that fails half-way can be run again.
    """

    def meet(self, weight: Operand) -> None:
        """Take notice of a weight that is observed from now on, and may never be used."""
        ...

    def note(self, weight: Operand, number: int, x: Tensor, *, padded: bool = False) -> None:
        """Note `x`, (..., channels), the input of one product with matrix `number` of a weight.

        `padded`: rows of zeros stand for tokens that are routed elsewhere.
        """
        ...

    def commit(self) -> None:
        """Count all that is noted. Never fails for lack of memory."""
        ...

    def discard(self) -> None:
        """Drop all that is noted: the forward that gave it has failed."""
        ...

    def settle(self) -> None:
        """Do what counting has put off. If an allocation fails, the next call goes on there."""
        ...

    def check(self, prefix: str) -> None:
        """Settle, and raise ModelError naming a module under `prefix` whose inputs are not finite."""
        ...

    def leave_device(self) -> bool:
        """Move what is kept off the device, for good. Returns False if there was nothing to move."""
        ...


def routed(x: Tensor) -> Tensor:
    """The rows of `x`, (tokens, channels), that are not zero."""
    return x[x.ne(0).any(-1)]


class Watch:
    """Gives the inputs of weights to a statistic. They count only within `counting`, so that the canary's do not."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self._counts = False

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

    def commit(self) -> None:
        """Count all noted inputs."""
        self.statistic.commit()

    def discard(self) -> None:
        """Drop all noted inputs: the forward that gave them has failed."""
        self.statistic.discard()

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
        self._take(Operand.of(parameter, weight, transposed=transposed), x)

    def check(self, prefix: str) -> None:
        """Commit, then raise ModelError naming a module under `prefix` whose inputs are not finite."""
        self.commit()
        self.statistic.check(prefix)

    def _take(self, weight: Operand, x: Tensor) -> None:
        if self.counts and x.is_floating_point() and x.dim() and x.shape[-1] == weight.channels and x.numel():
            self.statistic.note(weight, 0, x)

    def _hook(self, parameter: str, module: nn.Module) -> Any:
        # By the weight's shape: weights come and go.
        weight = Operand.of(parameter, module.get_parameter("weight"), transposed=isinstance(module, Conv1D))

        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None:
                self._take(weight, x)

        self.statistic.meet(weight)
        return hook


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
        operand = _operand(stack, rows, last=last)
        if weight.dim() == 3:
            for expert, inputs in enumerate(x):  # one batched product over all experts, x (experts, tokens, channels)
                self.watch.statistic.note(operand, expert, inputs, padded=True)
        else:
            offset = (weight.data_ptr() - value.data_ptr()) // value.element_size()
            self.watch.statistic.note(operand, offset // (rows * value.shape[-1]), x)

    def _stack_of(self, weight: Tensor) -> Stack | None:
        """Find the stack that a weight is a slice of: a slice is a view and shares its stack's storage."""
        pointer = weight.untyped_storage().data_ptr()
        for stack in self.stacks:
            if not stack.value.is_meta and stack.value.untyped_storage().data_ptr() == pointer:
                return stack
        return None


def _operand(stack: Stack, rows: int, *, last: bool) -> Operand:
    """Describe a stack of matrices with so many rows each. `last`: their input channels are in the last dimension."""
    value = stack.value
    columns = value.shape[-1]
    experts, channels = value.numel() // (rows * columns), columns if last else rows
    shape: tuple[int, ...] = (experts, 1, channels) if last else (experts, channels, 1)
    # A matrix that is used as a whole has a linear's statistic.
    shape = shape[1:] if value.dim() == 2 and experts == 1 else shape
    return Operand(stack.name, experts, channels, shape)
