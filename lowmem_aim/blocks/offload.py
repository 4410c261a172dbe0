"""The base's weights as they come from its files and go: for as long as a block is at work, or while a module is."""

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
    """Where a model's weights come from: a checkpoint, or what is merged on the way."""

    def tensor(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def expect(self, names: Iterable[str]) -> None: ...

    def check_unchanged(self) -> None: ...


class Weights(Mapping[str, Tensor]):
    """Parameter name -> value, read from the checkpoint when asked for: accelerate's `weights_map`."""

    def __init__(self, base: Source, meta_model: MetaModel, device: torch.device, emit: Emit = silent) -> None:
        self.base, self.map, self._device, self._emit = base, meta_model.weights, device, emit
        self.names = [name for name, _ in meta_model.model.named_parameters()]
        self.digests: dict[str, str] = {}

    def __getitem__(self, parameter: str) -> Tensor:
        return self.map.load(parameter, self._read)

    def expect(self, parameters: Iterable[str]) -> None:
        """Have the disk fetch them while something else is at work."""
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

    # -- of one module

    def _hook(self, path: str, module: nn.Module) -> AlignDevicesHook:
        """Brings the module's own parameters in, and drops them."""
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
        hook = self._hook(path, module)
        try:
            hook.pre_forward(module)
            yield
        finally:
            hook.post_forward(module, None)

    @contextlib.contextmanager
    def coming(self, path: str, module: nn.Module) -> Iterator[None]:
        """The module has its weights only while it is called."""
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
    """A weight was used that is not there just now: its model reads it without calling its module."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module


class Absent(Tensor):
    """Stands for a weight that is not there. torch would not always say so: products with it may just be garbage."""

    _is_param = True  # for nn.Module.get_parameter
    module: str
    place: torch.device
    _FACTS = frozenset(
        getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "is_meta", "ndim", "requires_grad")
    ) | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.element_size, Tensor.is_floating_point}

    @classmethod
    def like(cls, value: Tensor, module: str, place: torch.device) -> Any:
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
        """Of the absent weights among a call's arguments, in whatever they are nested."""
        if isinstance(value, cls):
            yield value.module
        elif isinstance(value, (tuple, list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from cls._modules(part)
