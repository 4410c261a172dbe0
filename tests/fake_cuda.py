"""A CUDA device that is not there: its tensors lie in RAM, are told apart from those of the CPU, and are counted.

    with FakeCuda() as device: ...        or the fixture `cuda` of the tests that use it

Whatever Python asks torch for with a device of CUDA comes from here, in this thread and in those that begin meanwhile.
A tensor says that it is on `cuda:0`, and what is computed from it is there too. As on a real device, an operation on
tensors of both raises RuntimeError. Memory that torch takes within one operation is not seen.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
# These take tensors of both: copies, and an index that is on the CPU.
_MIXED = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.set_, torch.allclose, torch.equal}


class FakeCuda(TorchFunctionMode):
    """The device; `now` and `peak` are bytes of its tensors."""

    def __init__(self, total: int = 10**12) -> None:
        super().__init__()
        self.total, self.now, self.peak = total, 0, 0
        self.fraction = 1.0  # of `total`, that torch was told to keep to
        self._held: dict[int, int] = {}  # id of a storage -> bytes

    def holds(self, value: Any) -> bool:
        """Whether a tensor is on the device."""
        with torch._C.DisableTorchFunction():
            return isinstance(value, Tensor) and not value.is_meta and id(value.untyped_storage()) in self._held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func is torch.device:
            return func(*args, **kwargs)
        own = [kind for kind in types if isinstance(vars(kind).get("__torch_function__"), classmethod)]
        if own and torch._C._is_torch_function_enabled():
            with self:  # what a class of this project does at an operation asks for the device, too
                return own[0].__torch_function__(func, types, args, kwargs)
        if func == Tensor.device.__get__:
            return CUDA if self.holds(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.holds(args[0])
        parts = [*tree_iter((args, kwargs))]
        here = any(map(self.holds, parts))
        if func in _MOVES:
            return self._moved(func, args, kwargs)
        wanted = any(map(_is_cuda, parts))
        if here and func not in _MIXED:
            self._require_all(func, parts)
        result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        if wanted or here:
            for value in tree_iter(result):
                self._note(value)
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, where = args[0], (*args[1:], *kwargs.values())
        places = [torch.device(part) for part in where if isinstance(part, str | torch.device)]
        there = self.holds(value)
        to = CUDA if func is Tensor.cuda else CPU if func is Tensor.cpu else (places[0] if places else None)
        if to is None:
            to = CUDA if any(self.holds(part) for part in where if isinstance(part, Tensor)) or there else CPU
        if to.type == "meta":
            return func(*args, **kwargs)
        moves = there != (to.type == "cuda")
        result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        with torch._C.DisableTorchFunction():
            if moves and result.untyped_storage() is value.untyped_storage():
                result = result.clone()
        if to.type == "cuda":
            self._note(result)
        return result

    def _require_all(self, func: Any, parts: list[Any]) -> None:
        with torch._C.DisableTorchFunction():
            tensors = [part for part in parts if isinstance(part, Tensor) and part.dim() and not part.is_meta]
            if tensors and len({self.holds(value) for value in tensors}) > 1:
                shapes = [(tuple(value.shape), self.holds(value)) for value in tensors]
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")

    def _note(self, value: Any) -> None:
        with torch._C.DisableTorchFunction():
            if not isinstance(value, Tensor) or value.is_meta:
                return
            storage = value.untyped_storage()
            if id(storage) not in self._held:
                self._held[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, number: int) -> None:
        self.now -= self._held.pop(number)


class _Stream:
    """A stream in which everything is done at once."""

    def synchronize(self) -> None:
        """Do nothing."""


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _on_cpu(value: Any) -> Any:
    return CPU if _is_cuda(value) else value


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The device, as torch finds it."""
    device, run = FakeCuda(), threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with device:
            run(thread)

    def limit(fraction: float, where: Any = None) -> None:
        device.fraction = fraction

    answers: dict[str, Callable[..., Any]] = {
        "mem_get_info": lambda where=None: (device.total - device.now, device.total),
        "set_per_process_memory_fraction": limit,
        "memory_allocated": lambda where=None: device.now,
        "memory_reserved": lambda where=None: device.now,
        "max_memory_reserved": lambda where=None: device.peak,
        "synchronize": lambda where=None: None,
        "Stream": lambda where=None: _Stream(),
        "current_stream": lambda where=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "get_device_name": lambda where=None: "a device that is not there",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(threading.Thread, "run", within)
    with device:
        yield device
