"""A model's weights, read from its files when they are needed and dropped afterwards: block by block, or by module."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils.offload import PrefixedDataset
from torch import Tensor, nn

from lowmem_aim.events import Emit, Worked, silent
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.system.tensors import digest


class Source(Protocol):
    """The interface that weights are read through: of a checkpoint, or of weights merged on demand."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor seen as (rows, columns), see `headers.matrix_shape`. Raises ModelError."""
        ...

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that will be read soon, so that the system may fetch them meanwhile."""
        ...

    def check_unchanged(self) -> None:
        """Raise ModelError if a file has changed since it was opened."""
        ...


class Weights(Mapping[str, Tensor]):
    """Parameter name -> value, read from the checkpoint at each access: accelerate's `weights_map`."""

    def __init__(self, base: Source, meta_model: MetaModel, device: torch.device, emit: Emit = silent) -> None:
        self.base, self.map, self._device, self._emit = base, meta_model.weights, device, emit
        self.names = [name for name, _ in meta_model.model.named_parameters()]
        self.digests: dict[str, str] = {}  # tensor name -> xxh3-128 of its bytes, as first read

    def __getitem__(self, parameter: str) -> Tensor:
        return self.map.load(parameter, self._read)

    def expect(self, parameters: Iterable[str]) -> None:
        """Announce parameters that will be loaded soon, so that the disk can fetch them while something else runs."""
        self.base.expect({source for name in parameters for source in self.map.sources(name)})

    def _read(self, name: str) -> Tensor:
        begun = time.perf_counter()
        value = self.base.tensor(name)
        if name not in self.digests:
            self.digests[name] = digest(value)
        self._emit(Worked("read", value.nbytes, time.perf_counter() - begun))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    # -- one module

    def _hook(self, path: str, module: nn.Module) -> AlignDevicesHook:
        """The hook of accelerate that loads the module's own parameters, and drops them."""
        hook = AlignDevicesHook(
            execution_device=self._device,
            offload=True,
            offload_buffers=False,
            weights_map=PrefixedDataset(self, f"{path}."),
        )
        hook.tied_pointers_to_remove = set()  # post_forward asks for it also where nothing came in
        hook.init_hook(module)
        return hook

    @contextlib.contextmanager
    def there(self, path: str, module: nn.Module) -> Iterator[None]:
        """Keep the module's weights on the device during this block."""
        hook = self._hook(path, module)
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.post_forward(module, None)

    @contextlib.contextmanager
    def coming(self, path: str, module: nn.Module) -> Iterator[None]:
        """Give the module its weights only while it is called; between calls, `Absent` tensors take their place."""
        hook = self._hook(path, module)
        on_meta = {name: value for name, value in module._parameters.items() if value is not None}

        def before(called: nn.Module, args: Any) -> None:
            module._parameters.update(on_meta)
            hook.pre_forward(module)

        def after(called: nn.Module, args: Any, output: Any) -> None:
            for name, value in on_meta.items():
                module._parameters[name] = Absent.like(value, path, self._device)

        handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
        try:
            after(module, (), None)
            yield
        finally:
            for handle in handles:
                handle.remove()
            module._parameters.update(on_meta)


class ReadWhileAbsent(Exception):
    """A weight was used while it was not loaded: the model reads the weight without calling its module."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module


class Absent(Tensor):
    """Takes the place of a weight that is not loaded, and raises ReadWhileAbsent when it is used.

    A plain meta tensor would not always raise: a product with one may just be garbage.
    """

    _is_param = True  # for nn.Module.get_parameter
    module: str
    place: torch.device
    _FACTS = frozenset(
        getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "is_meta", "ndim", "requires_grad")
    ) | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.element_size, Tensor.is_floating_point}

    @classmethod
    def like(cls, value: Tensor, module: str, place: torch.device) -> Any:
        """Make a stand-in for a meta tensor of the module at path `module`, one that names `place` as its device."""
        absent = value.detach().as_subclass(cls)
        absent.module, absent.place = module, place
        return absent

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__ and isinstance(args[0], cls):
            return args[0].place  # models move their inputs to where a weight is
        if func not in cls._FACTS:
            raise ReadWhileAbsent(next(cls._modules((args, kwargs)), ""))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def _modules(cls, value: Any) -> Iterator[str]:
        """Yield the modules of the absent weights among a call's arguments, however they are nested."""
        if isinstance(value, cls):
            yield value.module
        elif isinstance(value, (tuple, list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from cls._modules(part)
