"""Headers of safetensors files, checked in full before a byte of tensor data is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.config import LFS_POINTER, MAX_MARKS, refuse_lfs_pointer, too_many_values
from lowmem_aim.system.dtypes import DTYPES, PACKED_DTYPES, Dtype
from lowmem_aim.system.files import input_errors, open_to_read

# The safetensors library refuses headers above 100 MB; so do we, before reading them.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64

# Known to safetensors, refused here: quantised weights cannot be merged as if they were numbers.
QUANTISED_DTYPES = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}
)
OTHER_DTYPES = frozenset({"U16", "U32", "U64", "C64"})


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor; `begin` and `end` are byte offsets in `file`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    kept_as: Dtype | None = None  # where reading decodes: the dtype that an output has which keeps the model's own

    @property
    def output_dtype(self) -> Dtype:
        """The dtype of this tensor in an output for which the recipe names none."""
        return self.kept_as or self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor as everything here reads it; see `matrix_shape`."""
        return matrix_shape(self.shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor: its last dimension is the row.

    A 1-D tensor is a column, so that it can be cut anywhere.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def broadcasts(statistic: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a statistic of the first shape has a value for each element of a weight of the second.

    (experts, 1, in) and (experts, in, 1) also fit experts that stand one after another in a matrix, (experts * a, b).
    """
    if len(statistic) == 3 and len(shape) == 2 and statistic[0]:
        rows, rest = divmod(shape[0], statistic[0])
        return not rest and broadcasts(statistic, (statistic[0], rows, shape[1]))
    return len(statistic) == len(shape) and all(a in (1, b) for a, b in zip(statistic, shape, strict=True))


class _BadHeader(Exception):
    """The reason why a header is refused, without the file's name."""


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise _BadHeader("a key appears twice in its header")
    return table


def _natural(digits: str) -> int:
    # 20 digits hold 2^64; longer numbers would be slow to convert. Python accepts `-0`, the library does not.
    if digits.startswith("-") or len(digits) > 20:
        raise _BadHeader(f"its header holds the number {digits[:24]}")
    return int(digits)


def _no_number(text: str) -> float:
    raise _BadHeader(f"its header holds {text[:24]}, which is not a whole number")


def _decoded(text: bytes) -> Any:
    """The JSON of a header: whole numbers only, no key twice. Raises _BadHeader, and what `json` raises."""
    if too_many_values(text):
        raise _BadHeader(f"its header holds more than {MAX_MARKS} values")
    return json.loads(
        text.decode("utf-8"),
        object_pairs_hook=_no_doubles,
        parse_int=_natural,
        parse_float=_no_number,
        parse_constant=_no_number,
    )


def read_header(file: Path, *, packed: bool = False) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, fully checked against its size; if `packed`, of quantised weights too.

    Raises ModelError naming the file if the header is not one that the safetensors library would accept.
    """
    try:
        with input_errors(file), open_to_read(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            refuse_lfs_pointer(prefix + stream.read(len(LFS_POINTER) - 8), printable(str(file)))
            stream.seek(len(prefix))
            if len(prefix) < 8:
                raise _BadHeader("it is too short to be a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise _BadHeader(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if 8 + length > size:
                raise _BadHeader(f"its header claims {length} bytes but the file has {size}: truncated?")
            header = _decoded(stream.read(length))
        dtypes = {**DTYPES, **PACKED_DTYPES} if packed else DTYPES
        return _tensors_of(header, file, dtypes, data_start=8 + length, file_size=size)
    except _BadHeader as reason:
        raise ModelError(f"`{printable(str(file))}` is not a valid safetensors file: {reason}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers or nesting beyond reason
        cause = printable(str(error)) or type(error).__name__
        raise ModelError(
            f"`{printable(str(file))}` is not a valid safetensors file: its header is not valid JSON ({cause})"
        ) from error


def _tensors_of(
    header: Any, file: Path, dtypes: Mapping[str, Dtype], data_start: int, file_size: int
) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise _BadHeader("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _BadHeader("its __metadata__ is not a table of strings")
    for text in (*header, *metadata, *metadata.values()):
        if not _is_unicode(text):
            raise _BadHeader(f"`{printable(text)}` in its header is not Unicode")
    tensors = [_tensor_of(name, entry, file, dtypes, data_start) for name, entry in header.items()]
    end = data_start
    for info in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if info.begin != end:
            raise _BadHeader(f"tensor `{printable(info.name)}` overlaps its neighbour or leaves a gap")
        end = info.end
    if end != file_size:
        what = "truncated" if end > file_size else "followed by bytes that belong to no tensor"
        raise _BadHeader(f"its tensors end at byte {end} and the file at {file_size}: {what}")
    return {info.name: info for info in tensors}


def _is_unicode(text: str) -> bool:
    """Whether `text` has no half of a surrogate pair, which JSON can escape and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tensor_of(name: str, entry: Any, file: Path, dtypes: Mapping[str, Dtype], data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _BadHeader(f"the entry of tensor `{printable(name)}` is malformed")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise _BadHeader(f"tensor `{printable(name)}` has a malformed shape or offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise _unusable_dtype(printable(name), entry["dtype"])
    dtype = dtypes[entry["dtype"]]
    begin, end = offsets
    if math.prod(n or 1 for n in shape) >= 1 << 63:  # even if another dimension is 0: the library uses 64 bits
        raise _BadHeader(f"tensor `{printable(name)}` has a shape beyond 64 bits")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _BadHeader(f"tensor `{printable(name)}`: shape {shape} of {entry['dtype']} is not {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _unusable_dtype(shown: str, dtype: Any) -> _BadHeader:
    if isinstance(dtype, str) and dtype in QUANTISED_DTYPES:
        return _BadHeader(f"tensor `{shown}` is quantised ({dtype}): merge the unquantised model instead")
    if isinstance(dtype, str) and dtype in OTHER_DTYPES:
        return _BadHeader(f"tensor `{shown}` is {dtype}, which cannot be merged")
    return _BadHeader(f"tensor `{shown}` has the unknown dtype {printable(repr(dtype), 40)}")


def _naturals(numbers: Any) -> bool:
    # To Python a bool is an int, but JSON's `true` is no length.
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
