"""GPTQ and AWQ: integers of a few bits, several in an int32, with scales and zero points for groups of inputs.

A weight (out, in) is stored transposed: a slice of its rows is some columns of what is stored. An element is
scale * (number - zero point) of its group and its output.

GPTQ: `qweight` (in / n, out), n inputs in an int32, the first in its lowest bits; `qzeros` (groups, out / n);
`g_idx` (in,), the group of each input. Zero points are stored less one, but for `gptq_v2`.
AWQ: `qweight` (in, out / 8) and `qzeros` (groups, out / 8), eight outputs in an int32, in an order of their own.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.packed import CHUNK_BYTES, FLOAT, Packed, Settings, ceiling, columns_of, decoded, require
from lowmem_aim.models.quantisation import UNQUANTISED
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32  # bits
# Which output the first, second, ... four bits of an int32 of AWQ belong to.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, eq=False)
class Grouped(Packed):
    """A weight of GPTQ or AWQ."""

    numbers: TensorInfo  # int32
    zeros: TensorInfo  # int32
    scales: TensorInfo  # (groups, out)
    groups: TensorInfo | None  # (in,): the group of each input; None: `group` inputs in a row make one
    group: int
    bits: int
    zero_less: int = 0  # by how much zero points are stored too low

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Numbers, zero points, scales and groups."""
        return self.numbers, self.zeros, self.scales, *((self.groups,) if self.groups else ())

    @property
    def element_bytes(self) -> int:
        """Numbers as int32 and float32, their scales and zero points."""
        return 4 * FLOAT

    @property
    def held_bytes(self) -> int:
        """A piece of the file where it is not mapped; numbers, scales and zero points of a word's outputs."""
        inputs, per_word = self.info.shape[1], WORD // self.bits
        return CHUNK_BYTES + 2 * per_word * inputs * self.element_bytes + 8 * inputs

    @property
    def mask(self) -> int:
        """The bits of a number."""
        return (1 << self.bits) - 1

    def rows(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        """Outputs start:stop."""
        groups = self._groups(stored)
        zeros = ((self._zeros(stored, start, stop) + self.zero_less) & self.mask)[groups]
        scales = columns_of(stored, self.scales, (0, self.scales.shape[0]), (start, stop)).to(torch.float32)[groups]
        values = self._numbers(stored, start, stop).sub_(zeros).to(torch.float32).mul_(scales)  # (in, outputs)
        return values.t().contiguous()

    def _groups(self, stored: TensorFiles) -> Tensor:  # (in,) int64
        inputs = self.info.shape[1]
        if self.groups is None:
            return torch.arange(inputs) // self.group
        found = stored.elements(self.groups, 0, inputs).to(torch.int64)
        if int(found.min()) < 0 or int(found.max()) >= self.scales.shape[0]:
            raise ModelError(f"`{printable(self.groups.name)}` names groups that have no scales")
        return found

    @abstractmethod
    def _numbers(self, stored: TensorFiles, start: int, stop: int) -> Tensor:  # (in, stop - start) int32
        """The packed numbers of some outputs."""

    @abstractmethod
    def _zeros(self, stored: TensorFiles, start: int, stop: int) -> Tensor:  # (groups, stop - start) int32
        """The zero points of some outputs, as they are stored."""

    def _along_outputs(
        self, stored: TensorFiles, info: TensorInfo, start: int, stop: int, order: tuple[int, ...]
    ) -> Tensor:  # (rows, stop - start) int32
        """Numbers that are packed along the outputs, in that order."""
        per_word = len(order)
        first, last = start // per_word, ceiling(stop, per_word)
        words = columns_of(stored, info, (0, info.shape[0]), (first, last))
        found = torch.empty(len(words), last - first, per_word, dtype=torch.int32)
        for place, output in enumerate(order):
            found[:, :, output] = (words >> (self.bits * place)) & self.mask
        return found.flatten(1)[:, start - first * per_word : stop - first * per_word]


class Gptq(Grouped):
    """A weight of GPTQ: numbers are packed along the inputs."""

    def _numbers(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        words = columns_of(stored, self.numbers, (0, self.numbers.shape[0]), (start, stop))
        shifts = torch.arange(0, WORD, self.bits, dtype=torch.int32)
        return ((words.unsqueeze(1) >> shifts[:, None]) & self.mask).flatten(0, 1)

    def _zeros(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        return self._along_outputs(stored, self.zeros, start, stop, tuple(range(WORD // self.bits)))


class Awq(Grouped):
    """A weight of AWQ: numbers are packed along the outputs."""

    def _numbers(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        return self._along_outputs(stored, self.numbers, start, stop, _AWQ_ORDER).contiguous()

    def _zeros(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        return self._along_outputs(stored, self.zeros, start, stop, _AWQ_ORDER)


def gptq(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The weights of a GPTQ model of 2, 4 or 8 bits. Raises ModelError for others."""
    bits = _bits(settings, (2, 4, 8))
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for stem, numbers, zeros, scales in _found(tensors):
        inputs, outputs = numbers.shape[0] * (WORD // bits), numbers.shape[1]
        groups = tensors.get(f"{stem}.g_idx")
        good = scales.shape[1:] == (outputs,) and zeros.shape == (scales.shape[0], ceiling(outputs * bits, WORD))
        size = _group(settings, inputs, scales.shape[0])
        good = good and (groups.shape == (inputs,) if groups else size > 0)
        require(good, numbers, zeros, scales, *((groups,) if groups else ()))
        info = decoded(f"{stem}.weight", (outputs, inputs), numbers)
        yield Gptq(info, numbers, zeros, scales, groups, size, bits, less)


def awq(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The weights of an AWQ model of the version `gemm`. Raises ModelError for others."""
    bits = _bits(settings, (4,))
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise ModelError(f"AWQ of the version `{printable(version, 40)}` is not read, only `gemm`", UNQUANTISED)
    for stem, numbers, zeros, scales in _found(tensors):
        inputs, outputs = numbers.shape[0], numbers.shape[1] * (WORD // bits)
        good = scales.shape[1:] == (outputs,) and zeros.shape == (scales.shape[0], numbers.shape[1])
        size = _group(settings, inputs, scales.shape[0])
        require(good and size > 0, numbers, zeros, scales)
        info = decoded(f"{stem}.weight", (outputs, inputs), numbers)
        yield Awq(info, numbers, zeros, scales, None, size, bits)


def empty_biases(tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed], stored: TensorFiles) -> set[str]:
    """The names of biases that older versions of AutoGPTQ wrote for every module, and that the model does not have.

    They are 0, in all layers. Where a module's scales are 0 as well, the file's holes stand for numbers that are not
    here (see `stand_in`), and nothing is known. Raises ModelError.
    """
    kinds: dict[str, list[Gptq]] = {}
    for name, weight in packed.items():
        if isinstance(weight, Gptq) and _bias(weight) in tensors:
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(weight)
    found = [weights for weights in kinds.values() if all(_is_empty(w, tensors[_bias(w)], stored) for w in weights)]
    return {_bias(weight) for weights in found for weight in weights}


def _bias(weight: Gptq) -> str:
    return f"{weight.info.name.removesuffix('weight')}bias"


def _is_empty(weight: Gptq, bias: TensorInfo, stored: TensorFiles) -> bool:
    scales = stored.rows(weight.scales, 0, 1)
    return bool(scales.any()) and not stored.elements(bias, 0, bias.numel).any()


def _bits(settings: Settings, known: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in known or type(bits) is not int:
        what = f"weights of {printable(repr(bits), 20)} bits are not read, only of {', '.join(map(str, known))}"
        raise ModelError(f"GPTQ and AWQ: {what}", UNQUANTISED)
    return bits


def _group(settings: Settings, inputs: int, groups: int) -> int:
    """Inputs that share a scale, in a weight that has so many groups of them; 0 if that cannot be."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is int and size > 0 and ceiling(inputs, size) == groups:
        return size
    return inputs // groups if groups and inputs % groups == 0 else 0


def _found(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo, TensorInfo, TensorInfo]]:
    """Yield (module's name, qweight, qzeros, scales). Raises ModelError for one that lacks the others."""
    for name, numbers in tensors.items():
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        zeros, scales = tensors.get(f"{stem}.qzeros"), tensors.get(f"{stem}.scales")
        if zeros is None or scales is None:
            raise ModelError(f"`{printable(str(numbers.file))}`: `{printable(name)}` has no `qzeros` or no `scales`")
        flat = len(numbers.shape) == len(zeros.shape) == len(scales.shape) == 2
        whole = numbers.dtype.name == zeros.dtype.name == "int32" and scales.dtype.is_floating_point
        require(flat and whole, numbers, zeros, scales)
        yield stem, numbers, zeros, scales
