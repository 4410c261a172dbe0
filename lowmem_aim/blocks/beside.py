"""The parts of a model beside its blocks, made ready for forwards: weights loaded, embeddings read by row.

Embeddings stay in the checkpoint. What is outside the decoder (a vision tower) is loaded only if it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_aim.blocks.embeddings import EmbeddingRows
from lowmem_aim.blocks.observer import Watch
from lowmem_aim.blocks.offload import Weights
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.meta_model import MetaModel, embeddings_of


class Beside:
    """All of a model but its blocks and its output head."""

    def __init__(self, meta_model: MetaModel, weights: Weights, watch: Watch, device: torch.device) -> None:
        self.meta_model, self.weights, self.watch, self.device = meta_model, weights, watch, device
        self.model, self.blocks = meta_model.model, meta_model.blocks

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Keep everything ready, and observe its inputs, during this block. Raises ModelError, DiskError."""
        with contextlib.ExitStack() as undo:
            self._place_buffers(undo)
            self._place_embeddings(undo)
            self._place_rest(undo)
            yield

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

    def _rows(self, source: str, weight: Tensor) -> EmbeddingRows:
        def fetch(ids: Tensor) -> Tensor:
            used, places = torch.unique(ids, return_inverse=True)  # sorted: the file is read forward
            if used.numel() and int(used[-1]) >= weight.shape[0]:
                raise ModelError(
                    f"the token id {int(used[-1])} is beyond the {weight.shape[0]} rows of `{printable(source)}`",
                    hint="does the tokenizer belong to this model, and are the texts within its context?",
                )
            rows = [self.weights.base.rows(source, start, stop) for start, stop in _runs(used.tolist())]
            table = torch.cat(rows) if rows else torch.empty(0, weight.shape[1])
            return F.embedding(places, table.to(self.device, weight.dtype))

        return EmbeddingRows.like(weight, fetch, self.device)

    def _place_rest(self, undo: contextlib.ExitStack) -> None:
        """Load what lies beside the blocks; what is outside the decoder (a vision tower) is loaded only when called."""
        decoder = self.meta_model.decoder
        rest = list(self._beside_blocks())
        for path, module in rest:
            for name, value in module._parameters.items():
                undo.callback(module._parameters.__setitem__, name, value)
            if not decoder or f"{path}.".startswith(f"{decoder}.") or f"{decoder}.".startswith(f"{path}.") or not path:
                self._load_all(module, path)
            else:
                undo.callback(module.register_forward_pre_hook(self._lazily(path)).remove)
        undo.enter_context(self.watch.on(rest))

    def _beside_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (path, module) of modules with parameters that are in no block, no embedding and not the head."""
        taken = self._in_blocks() | {id(module) for _, module in embeddings_of(self.model)}
        for path, module in self.model.named_modules():
            if module._parameters and id(module) not in taken and path != self.meta_model.head:
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


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) for each run of consecutive numbers among sorted ones."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
