"""A quantised model: a checkpoint whose packed weights are decoded as they are read, to float32.

The output of a merge keeps them as bfloat16, and its config says nothing of quantisation. Formats that are not listed
here are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Notice
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.checkpoint import Checkpoint, ModelFolder, model_in
from lowmem_aim.models.folder import in_file_order
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.in_steps import whole_tensor, whole_tensor_bytes
from lowmem_aim.models.packed import Finder, Packed
from lowmem_aim.models.packed_int import awq, empty_biases, gptq
from lowmem_aim.models.packed_mxfp4 import mxfp4
from lowmem_aim.models.packed_nf4 import four_bit
from lowmem_aim.models.packed_scaled import by_weight_scale, fp8, int8_of_bitsandbytes
from lowmem_aim.models.quantisation import (
    UNQUANTISED,
    method_of,
    packed_parts,
    quantisation_of,
    refuse_quantised,
    without_quantisation,
)
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.files import input_errors
from lowmem_aim.system.options import ReadMode
from lowmem_aim.units import counted

if TYPE_CHECKING:
    from torch import Tensor

IN_WORK = 2  # tensors that are decoded at the same time: one in its last pass over the rows, the next in its first

FORMATS: Mapping[str, tuple[Finder, ...]] = {  # by the name of a config's `quant_method`
    "fp8": (fp8,),
    "fbgemm_fp8": (by_weight_scale,),
    "compressed-tensors": (by_weight_scale,),
    "mxfp4": (mxfp4,),
    "bitsandbytes": (four_bit, int8_of_bitsandbytes),
    "gptq": (gptq,),
    "awq": (awq,),
}
# Scales of activations and caches, which a model with plain weights has no use for, and notes of a format's own.
_DROPPED = re.compile(r"\.((input|activation|output|q|k|v)_scale(_ub)?|qscale_act|weight_format|input_zero_point)$")


def open_model(folder: Path, label: str | None = None, read: ReadMode = "mmap") -> Checkpoint:
    """Check all headers of the model in `folder`, quantised or not. Raises ModelError with every problem found."""
    found = model_in(folder)
    settings = quantisation_of(found.config)
    if method_of(settings) in FORMATS:
        return QuantisedCheckpoint(found, settings, label, read)
    refuse_quantised(found.folder, found.config, found.tensors)
    return Checkpoint.of(found, label, read)


def _is_number(info: TensorInfo) -> bool:
    """Whether a tensor is named as a weight, and holds whole numbers: one whose scales are missing."""
    return info.name.endswith("weight") and not info.dtype.is_floating_point and info.numel > 0


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint of which some tensors are decoded from others."""

    def __init__(
        self, found: ModelFolder, settings: Mapping[str, Any], label: str | None = None, read: ReadMode = "mmap"
    ) -> None:
        """Find the packed weights. Raises ModelError for parts that do not fit together, or belong to no weight."""
        config = without_quantisation(found.config)
        super().__init__(found.folder, label or found.folder.name, config, found.tensors, read, found.oddities)
        self._settings, self._method = settings, method_of(settings)
        self._files = found.files
        with input_errors(found.folder):
            self.stored.note(self._files)
        try:
            self._packed = self._found(found.tensors)
            self.tensors = in_file_order(self._plain(found.tensors) | {n: p.info for n, p in self._packed.items()})
        except BaseException:
            self.stored.close()
            raise
        if self._packed:
            what = f"{counted(len(self._packed), 'quantised weight')} ({self._method}), decoded as read"
            self.oddities = (*self.oddities, Notice(f"`{printable(self.label)}` has {what}"))

    def _found(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
        weights = [packed for find in FORMATS[self._method] for packed in find(tensors, self._settings, self.stored)]
        return {packed.info.name: packed for packed in weights}

    def _plain(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors that are stored as they are. Half precision becomes bfloat16, as the other weights do."""
        used = {part.name for packed in self._packed.values() for part in packed.parts}
        used |= empty_biases(tensors, self._packed, self.stored)
        rest = {name: info for name, info in tensors.items() if name not in used and not _DROPPED.search(name)}
        numbers = [name for name, info in rest.items() if _is_number(info)]
        if strange := [*packed_parts(rest), *numbers, *(name for name in rest if name in self._packed)]:
            what = f"`{printable(strange[0])}` is of a quantised weight that is not read here ({self._method})"
            raise ModelError(f"`{printable(str(self.folder))}`: {what}", UNQUANTISED)
        half = DTYPES["F16"]
        return {n: replace(t, kept_as=DTYPES["BF16"]) if t.dtype == half else t for n, t in rest.items()}

    @property
    def files(self) -> list[Path]:
        """The shards, in reading order."""
        return self._files

    # -- reading

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop, as `Checkpoint.rows`: float32 where they are decoded."""
        packed = self._packed.get(name)
        return super().rows(name, start, stop) if packed is None else packed.rows(self.stored, start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape, decoded some rows at a time. Raises ModelError if its file has changed."""
        packed = self._packed.get(name)
        if packed is None:
            return super().tensor(name)
        return whole_tensor(packed.info, lambda start, stop: packed.rows(self.stored, start, stop))

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon, by the parts that they are decoded from."""
        wanted = [self._packed[name].parts if name in self._packed else (self.tensors[name],) for name in names]
        self.stored.expect(part for parts in wanted for part in parts)

    # -- memory

    @property
    def footprint(self) -> Footprint:
        """Bytes that decoding takes besides the rows that it gives."""
        element = max((packed.element_bytes for packed in self._packed.values()), default=0)
        held = max((packed.held_bytes for packed in self._packed.values()), default=0)
        return Footprint(element, tensor=IN_WORK * held)

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        packed = self._packed.get(name)
        if packed is None:
            return super().whole_bytes(name)
        return whole_tensor_bytes(packed.info, packed.element_bytes) + packed.held_bytes

    def warm_up(self) -> None:
        """Decode a row of each kind, so that torch has loaded what that needs."""
        for packed in {(type(p), p.parts[0].dtype): p for p in self._packed.values()}.values():
            packed.rows(self.stored, 0, min(1, packed.info.matrix[0]))

    # -- files

    def fingerprint(self) -> str:
        """A cheap identity of the files as they are on disk, as `Checkpoint.fingerprint`."""
        parts = [part for packed in self._packed.values() for part in packed.parts]
        facts = [(part.name, part.dtype.name, part.shape, part.file.name, part.begin) for part in parts]
        settings = json.dumps(self._settings, sort_keys=True)
        return xxhash.xxh3_128_hexdigest(
            repr((super().fingerprint(), settings, facts)).encode("utf-8", "surrogatepass")
        )
