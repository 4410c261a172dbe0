"""A skeleton made runnable, and cut open at its blocks and its output head.

What lies outside the blocks is loaded (embeddings stand for their rows in the checkpoint), each block's weights come
and go through accelerate's offload hook, and every forward meets a *driver* at each block and at the head, which
decides what happens there. All of it is undone when the set-up ends, also by an exception.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import set_module_tensor_to_device
from accelerate.utils.offload import PrefixedDataset
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_aim.checkpoint import Checkpoint, digest
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.memory import trim
from lowmem_aim.observe import Watch
from lowmem_aim.skeleton import Skeleton, embeddings_of


class Driver:
    """What a forward meets at the places where the model is cut open."""

    def block(self, index: int, call: Call) -> Any:
        raise NotImplementedError

    def head(self, x: Tensor) -> None:
        """`x`: what the output head is given, (1, tokens, hidden)."""


@dataclass(frozen=True)
class Call:
    """Arguments of a block. The hidden state is the first, by position or by keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        return next(iter(self.kwargs)) if "hidden_states" not in self.kwargs else "hidden_states"

    @property
    def hidden(self) -> Tensor:
        state: Tensor = self.args[0] if self.args else self.kwargs[self.key]
        return state

    def having(self, hidden: Tensor | None) -> Call:
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, self.key: hidden})


def hidden_of(output: Any) -> Tensor:
    """A block returns the hidden state, or a tuple that begins with it."""
    state: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return state


class Weights(Mapping[str, Tensor]):
    """Parameter name -> value, read from the checkpoint when asked for: accelerate's `weights_map`."""

    def __init__(self, base: Checkpoint, skeleton: Skeleton) -> None:
        self.base, self.map = base, skeleton.weights
        self.names = [name for name, _ in skeleton.model.named_parameters()]
        self.digests: dict[str, str] = {}

    def __getitem__(self, parameter: str) -> Tensor:
        return self.map.load(parameter, self._read)

    def _read(self, name: str) -> Tensor:
        value = self.base.tensor(name)
        if name not in self.digests:
            self.digests[name] = digest(value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Rows(Tensor):
    """Stands for an embedding's weight; looking tokens up in it reads just their rows from the checkpoint."""

    fetch: Callable[[Tensor], Tensor]
    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and len(args) >= 2 and isinstance(args[1], cls):
            return args[1].fetch(args[0])
        if func == Tensor.device.__get__ and isinstance(args[0], cls):
            return args[0].place  # models move their inputs to where the embedding is
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Stage:
    """The skeleton with what lies outside the blocks loaded, and blocks and head handed to the forward's driver."""

    def __init__(self, base: Checkpoint, skeleton: Skeleton, device: torch.device) -> None:
        self.skeleton, self.device = skeleton, device
        self.model, self.blocks = skeleton.model, skeleton.blocks
        self.weights = Weights(base, skeleton)
        self.watch = Watch()
        self._forwards: list[Callable[..., Any]] = []  # the blocks' own
        self._driver = threading.local()

    def forward(self, tokens: Tensor, driver: Driver) -> None:
        """One ordinary forward of the model, unpadded; blocks and head are the driver's."""
        self._driver.now = driver
        self.model(input_ids=tokens[None].to(self.device), use_cache=False)

    def run_block(self, index: int, call: Call) -> Any:
        """The block itself; its weights must be loaded."""
        return self._forwards[index](*call.args, **call.kwargs)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Block `index` with its weights, watched; after it they are dropped."""
        path, block = self.blocks[index]
        hook = AlignDevicesHook(
            execution_device=self.device,
            offload=True,
            offload_buffers=False,
            place_submodules=True,
            weights_map=PrefixedDataset(self.weights, f"{path}."),
        )
        hook.init_hook(block)
        try:
            hook.pre_forward(block)
            parts = list(block.named_modules(prefix=path))
            with self.watch.on(parts), self.watch.experts(parts):
                yield
            self.watch.check(f"{path}.")
        finally:
            hook.post_forward(block, None)
            trim()

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        """Make the model runnable; undo all of it at the end."""
        with contextlib.ExitStack() as undo:
            self._place_buffers(undo)
            self._place_embeddings(undo)
            self._place_rest(undo)
            for index, (_, block) in enumerate(self.blocks):
                self._forwards.append(block.forward)
                _override(undo, block, self._block_stub(index))
            if self.skeleton.head:
                _override(undo, self.model.get_submodule(self.skeleton.head), self._head_stub)
            yield

    def _block_stub(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._driver.now.block(index, Call(args, kwargs))

        return forward

    def _head_stub(self, x: Tensor) -> Tensor:
        self._driver.now.head(x)
        return x.new_zeros(*x.shape[:-1], 1)  # one logit, for what the model does to logits

    def see_head(self, x: Tensor) -> None:
        """Count the output head's input."""
        head = self.model.get_submodule(self.skeleton.head)
        self.watch.see(f"{self.skeleton.head}.weight", head.weight, x)

    def _place_buffers(self, undo: contextlib.ExitStack) -> None:
        persistent = self.model.state_dict().keys()
        for name, value in list(self.model.named_buffers()):
            owner, key = _owner(self.model, name)
            undo.callback(owner._buffers.__setitem__, key, value)
            here = self.weights[name] if name in persistent and self.weights.map.sources(name) else value
            # A copy: some rotary embeddings rewrite theirs for long sequences.
            owner._buffers[key] = here.to(self.device, value.dtype, copy=True)

    def _place_embeddings(self, undo: contextlib.ExitStack) -> None:
        inside = self._in_blocks()  # an embedding in a block comes and goes with it
        for path, module in embeddings_of(self.model):
            if id(module) in inside:
                continue
            weight: Any = module.weight
            source = self.weights.map.plain(f"{path}.weight")
            undo.callback(module._parameters.__setitem__, "weight", weight)
            if source is None:
                self._load(module, f"{path}.weight")
            else:
                module._parameters["weight"] = self._rows(source, weight)  # type: ignore[assignment]

    def _rows(self, source: str, weight: Tensor) -> Rows:
        table = torch.empty_like(weight, device="meta").as_subclass(Rows)
        table.place = self.device

        def fetch(ids: Tensor) -> Tensor:
            used, places = torch.unique(ids, return_inverse=True)  # sorted: the file is read forward
            if int(used[-1]) >= weight.shape[0]:
                raise ModelError(
                    f"calibration: id {int(used[-1])} is beyond the {weight.shape[0]} rows of `{printable(source)}`",
                    hint="does the tokenizer belong to this model, and is the block size within its context?",
                )
            rows = torch.cat([self.weights.base.rows(source, row, row + 1) for row in used.tolist()])
            return F.embedding(places, rows.to(self.device, weight.dtype))

        table.fetch = fetch
        return table

    def _place_rest(self, undo: contextlib.ExitStack) -> None:
        """Load what lies beside the blocks; modules outside the decoder (a vision tower) only if they are called."""
        decoder = self.blocks[0][0].rsplit(".", 2)[0]
        rest = list(self._beside_blocks())
        for path, module in rest:
            for name, value in module._parameters.items():
                undo.callback(module._parameters.__setitem__, name, value)
            if f"{path}.".startswith(f"{decoder}.") or f"{decoder}.".startswith(f"{path}.") or not path:
                self._load_all(module, path)
            else:
                undo.callback(module.register_forward_pre_hook(self._lazily(path)).remove)
        undo.enter_context(self.watch.on(rest))

    def _beside_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules with parameters that are in no block, no embedding and not the head."""
        taken = self._in_blocks() | {id(module) for _, module in embeddings_of(self.model)}
        for path, module in self.model.named_modules():
            if module._parameters and id(module) not in taken and path != self.skeleton.head:
                yield path, module

    def _in_blocks(self) -> set[int]:
        return {id(part) for _, block in self.blocks for part in block.modules()}

    def _lazily(self, path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if any(value is not None and value.is_meta for value in module._parameters.values()):
                self._load_all(module, path)

        return hook

    def _load_all(self, module: nn.Module, path: str) -> None:
        for name, value in list(module._parameters.items()):
            if value is not None:
                self._load(module, f"{path}.{name}" if path else name)

    def _load(self, module: nn.Module, parameter: str) -> None:
        name = parameter.rpartition(".")[2]
        set_module_tensor_to_device(module, name, self.device, value=self.weights[parameter])


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _override(undo: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module (not its class) another forward, until the stack unwinds."""
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(vars(module).pop, "forward")
    module.forward = forward
