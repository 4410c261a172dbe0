"""Merge and AIM computed plainly: the whole model in memory, hooks on its modules, then the formulas.

Nothing here comes from the package under test. Which parameter of the model a tensor of the file belongs to is found by
content: all weights are random, so that one row of numbers stands in one parameter only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

OMEGA, DENSITY, WEIGHT = 0.4, 0.5, 0.5
Tensors = Mapping[str, Tensor]
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)


class Seen:
    """The sum of means of |x|, and how many there were, for each matrix of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Storage -> (address, dimensions, axis of the input channels) of a matrix in it -> sum, count, shape.
        self.sums: dict[int, dict[tuple[int, int, int], list[Any]]] = {}
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() < 3 and not isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def add(self, weight: Tensor, x: Tensor, axis: int) -> None:
        """Count the mean of |x| over all dimensions but the last; `axis` of `weight` has the input channels."""
        if x.numel() and x.shape[-1] == weight.shape[axis]:
            home = self.sums.setdefault(_home(weight), {})
            entry = home.setdefault((weight.data_ptr(), weight.dim(), axis % weight.dim()), [0, 0, weight.shape])
            entry[0] = entry[0] + x.detach().abs().double().flatten(0, -2).mean(0)
            entry[1] += 1

    def _hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        weight = module.get_parameter("weight")
        if x is not None and x.is_floating_point() and x.dim():
            self.add(weight, x, 0 if isinstance(module, Conv1D) else -1)


def _home(weight: Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return weight.untyped_storage().data_ptr()


class Products(TorchFunctionMode):
    """Counts the inputs of matrices that no module holds as its weight: fused experts, one or all in a parameter."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.homes = {
            _home(value)
            for module in seen.model.modules()
            for name, value in module._parameters.items()
            if value is not None and value.dim() > 1 and not (name == "weight" and value.dim() == 2)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func is F.linear or func in _PRODUCTS) and len(args) > 1:
            x, weight = args[:2]
            if isinstance(weight, Tensor) and _home(weight) in self.homes:
                self._count(x, weight if func is not F.linear else weight.transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _count(self, x: Tensor, matrix: Tensor) -> None:
        """`matrix` is (..., in, out), a view of a parameter in whatever order."""
        if matrix.dim() == 3:
            for one, rows in zip(matrix, x, strict=True):
                self._count(rows[rows.ne(0).any(-1)], one)
        elif matrix.stride(-1) == 1 and matrix.stride(-2) != 1:
            self.seen.add(matrix, x, -2)  # the parameter's rows are input channels
        else:
            self.seen.add(matrix.transpose(-1, -2), x, -1)


def statistics(model: nn.Module, texts: Sequence[Tensor]) -> Seen:
    """Run an ordinary forward of every text."""
    seen = Seen(model)
    with torch.no_grad(), Products(seen):
        for tokens in texts:
            model(input_ids=tokens[None], use_cache=False)
    return seen


def factors(seen: Seen, base: Tensors) -> dict[str, Tensor]:
    """AIM's factor of each tensor of the file that the model was given an input for, in the tensor's shape."""
    places = _rows(seen.model)
    found = {}
    for name, value in base.items():
        if value.is_floating_point() and value.numel() and value.dim():
            factor = _factor(value, seen, places)
            if factor is None and value.dim() == 2 and (turned := _factor(value.T, seen, places)) is not None:
                factor = turned.T  # stored the other way round
            if factor is not None:
                found[name] = factor
    return found


Place = tuple[int, int]  # of a row: the memory that it is in, its address


def _factor(value: Tensor, seen: Seen, places: Mapping[bytes, Place]) -> Tensor | None:
    """A factor for each element of a tensor, of which each row lies at some address of the model."""
    rows = value.reshape(-1, value.shape[-1])
    out = torch.ones_like(rows, dtype=torch.float64)
    any_seen, known = False, (0, 0)
    for index, row in enumerate(rows):
        # A row that loading has changed (Youtu's padding token) goes with the row before it.
        home, address = known = places.get(_bytes(row), known)
        for (start, dims, axis), (total, count, shape) in seen.sums.get(home, {}).items():
            height, width = (1, shape[0]) if dims == 1 else shape
            inside = (address - start) // (4 * width)
            if start <= address and inside < height and width == value.shape[-1]:
                mean = total / count
                share = mean / mean.max() if mean.max() > 0 else mean
                out[index] = 1 - (share if axis == dims - 1 else share[inside]) * (1 - OMEGA)
                any_seen = True
    return out.reshape(value.shape) if any_seen else None


def _rows(model: nn.Module) -> dict[bytes, Place]:
    """The content of each row of the model's parameters -> where it is."""
    found: dict[bytes, Place] = {}
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and parameter.numel() and parameter.dim():
            for index, row in enumerate(parameter.detach().reshape(-1, parameter.shape[-1])):
                found.setdefault(_bytes(row), (_home(parameter), parameter.data_ptr() + index * 4 * row.numel()))
    return found


def buffers(model: nn.Module, base: Tensors) -> list[str]:
    """Tensors of the file that are state of the model, not weights: a merge keeps the base's."""
    contents = {_bytes(value) for value in model.buffers() if value.numel()}
    parameters = {_bytes(value.detach()) for value in model.parameters()}
    return [name for name, value in base.items() if value.numel() and _bytes(value) in contents - parameters]


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().float().numpy().tobytes()


def ties(base: Tensors, experts: Sequence[Tensors]) -> dict[str, Tensor]:
    """TIES of the experts, on float32 deltas, in float64: trim, elect signs, disjoint weighted mean."""
    merged = {}
    for name, value in base.items():
        if not value.is_floating_point() or not value.numel():
            merged[name] = value
            continue
        deltas = torch.stack([_trimmed((expert[name] - value).double()) for expert in experts]) * WEIGHT
        elected = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        agrees = deltas.sign() == elected
        divisor = (agrees * WEIGHT).sum(0)
        merged[name] = value.double() + (deltas * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    return merged


def _trimmed(delta: Tensor) -> Tensor:
    """The largest magnitudes; of equal ones those that come first."""
    order = delta.abs().flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[order[: max(1, int(DENSITY * delta.numel()))]] = True
    return delta * kept.reshape(delta.shape)
