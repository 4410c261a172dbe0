"""A stand-in for an embedding's weight that reads only the rows that a model asks for.

Models look tokens up (`F.embedding`), but also index the weight itself: Gemma 4 reads `weight[pad_id]`, Whisper a slice
of positions. Whatever else a model does with the weight gets the whole of it, for that one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class EmbeddingRows(Tensor):
    """Takes the place of an embedding's weight, (rows, columns); `fetch` reads the rows with given ids."""

    _is_param = True  # for nn.Module.get_parameter
    fetch: Callable[[Tensor], Tensor]  # ids (...) int64 -> (..., columns)
    place: torch.device

    @classmethod
    def like(cls, weight: Tensor, fetch: Callable[[Tensor], Tensor], place: torch.device) -> EmbeddingRows:
        """Make a stand-in for `weight`, a meta tensor; it names `place` as its device."""
        table = torch.empty_like(weight, device="meta").as_subclass(cls)
        table.fetch, table.place = fetch, place
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return args[0].place  # models move their inputs to where the embedding is
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding and (looked_up := cls._looked_up(*args, **kwargs)) is not None:
            return looked_up
        if func is Tensor.__getitem__:
            return args[0]._indexed(args[1])
        return func(*map(_whole, args), **{key: _whole(value) for key, value in kwargs.items()})

    @classmethod
    def _looked_up(
        cls, input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: float | None = None, *_: Any, **__: Any
    ) -> Tensor | None:
        """The rows of an ordinary look-up; None for one that does more."""
        return weight.fetch(input) if isinstance(weight, cls) and max_norm is None else None

    def _indexed(self, index: Any) -> Tensor:
        """The value of `weight[index]`, of which only the rows that the first index picks are read."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is None or first is Ellipsis or (isinstance(first, Tensor) and first.dtype == torch.bool):
            return _whole(self)[index]  # type: ignore[no-any-return]
        rows = self.fetch(torch.arange(self.shape[0])[first])
        dims = rows.dim() - 1  # those that the first index has left of the rows
        return rows[(*[slice(None)] * dims, *rest)] if rest else rows


# What is known without a row: attributes, and methods that ask for one.
_FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "is_meta", "ndim", "requires_grad", "grad", "is_leaf", "layout", "is_cuda")
) | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__}


def _whole(value: Any) -> Any:
    """The whole weight, for a stand-in; other values, and the items of a list or tuple, as they are."""
    if isinstance(value, EmbeddingRows):
        return value.fetch(torch.arange(value.shape[0]))
    return type(value)(map(_whole, value)) if type(value) in (list, tuple) else value
