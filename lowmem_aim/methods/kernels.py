"""The compiled CPU loops (`loops`, numba) as functions of tensors.

Each function does in one pass what the torch code beside its call does in several, and gives the same bytes. Callers
ask `usable` first; on another device, or where numba cannot be loaded, they go on in torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowmem_aim.errors import printable
from lowmem_aim.system.on_demand import numpy as np
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

SWITCH = "LOWMEM_AIM_KERNELS"  # in the environment: 0 leaves the loops out

# The kind of a selection, and its numbers: see `methods.selection`.
Selected = tuple[Literal["all", "random", "largest", "between"], tuple[int, int, int, int]]

UPPER_BITS = 16  # of the 31 bits of a float32 magnitude, counted by `count_upper`
_BINS_OF_UPPER = 1 << UPPER_BITS
BINS_BYTES = 720 * 8  # of an exact sum's bins: `loops.BINS` of them
BLOCK_BYTES = 1024 * 8  # of the sums of `loops.BLOCK` elements


@functools.cache
def _found() -> tuple[Any, str]:
    """(the compiled loops, ""), or (None, the reason why they are not used)."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH} is 0"
    if importlib.util.find_spec("numba") is None:
        return None, "numba is not installed"
    try:
        import numba  # here and not above: numba takes half a second to import

        if numba.config.DISABLE_JIT:
            return None, "NUMBA_DISABLE_JIT is set"
        from lowmem_aim.methods import loops
    except Exception as error:  # another numpy than it was built for, no memory for LLVM, ...
        return None, f"they cannot be loaded: {printable(str(error))}"
    return loops, ""


def _loops() -> Any:
    return _found()[0]


def available() -> bool:
    """Whether the compiled loops are used."""
    return _loops() is not None


def unavailable() -> str:
    """Why the compiled loops are not used; empty if they are."""
    return _found()[1]


def cache_trouble() -> str:
    """Why compiled loops cannot be kept for the next run, with the folder's name; empty if they can, or are not used.

    The folder is made if need be.
    """
    if not available():
        return ""
    from lowmem_aim.methods import compiled_code

    why = compiled_code.trouble()
    return why and f"`{printable(str(compiled_code.folder()))}`: {why}"


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether the loops can take these tensors: they are on the CPU, and the loops are available."""
    return tensors[0].device.type == "cpu" and available()


def _arrays(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Flat arrays of one type: uint16 if all are bfloat16, else float32."""
    if all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return tuple(tensor.reshape(-1).view(torch.uint16).numpy() for tensor in tensors)
    return tuple(tensor.reshape(-1).to(torch.float32).numpy() for tensor in tensors)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum wi Ti, added in model order; float32, of the tensors' shape."""
    out = torch.empty(tensors[0].shape)
    _loops().weighted_sum(_arrays(tensors), np.array(weights, np.float32), out.view(-1).numpy())
    return out


def combine_deltas(
    base: Tensor,
    experts: Sequence[Tensor],
    kept: Sequence[Selected],
    scales: Sequence[float],
    weights: Sequence[float],
    *,
    elect: bool,
    per_element: bool,
    factor: float,
    lambda_: float,
    zero_weight: float,
) -> Tensor:
    """One slice of `methods.task_vectors.combine_deltas`; float32, of the base's shape."""
    loops = _loops()
    base_array, *expert_arrays = _arrays([base, *experts])
    kinds, numbers = _codes(kept)
    out = torch.empty(base.shape)
    loops.combine_deltas(
        base_array,
        tuple(expert_arrays),
        kinds,
        numbers,
        np.array(scales, np.float32),
        np.array(weights, np.float32),
        elect,
        per_element,
        np.float32(factor),
        np.float32(lambda_),
        np.float32(zero_weight),
        out.view(-1).numpy(),
    )
    return out


def _codes(kept: Sequence[Selected]) -> tuple[Any, Any]:
    """(K,) kinds and (K, 4) numbers, int64."""
    loops = _loops()
    kinds = {"all": loops.ALL, "random": loops.RANDOM, "largest": loops.LARGEST, "between": loops.BETWEEN}
    return np.array([kinds[kind] for kind, _ in kept], np.int64), np.array([n for _, n in kept], np.int64)


def relax(merged: Tensor, base: Tensor, shrink: Tensor) -> Tensor:
    """Apply `relaxing.aim.relax` to `merged` in place; `shrink` is (1, columns), or as large as `merged`."""
    (base_array,) = _arrays([base])
    _loops().relax(merged.view(-1).numpy(), base_array, shrink.reshape(-1).numpy())
    return merged


def to_bfloat16(merged: Tensor) -> tuple[Tensor, bool]:
    """`merged` rounded to bfloat16, and whether all of the result is finite."""
    out = torch.empty(merged.shape, dtype=torch.bfloat16)
    largest = _loops().round_to_bfloat16(merged.view(-1).numpy(), out.view(-1).view(torch.uint16).numpy())
    return out, bool(largest < 0x7F80)  # the bits of infinity


def finite(stored: Tensor) -> bool:
    """Whether all of a bfloat16, float16 or float32 tensor is finite, by its bits."""
    bits = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}[stored.dtype]
    unsigned = torch.uint16 if stored.dtype.itemsize == 2 else torch.uint32
    return bool(_loops().largest_magnitude(stored.reshape(-1).view(unsigned).numpy()) < bits)


def count_upper(base: Tensor, expert: Tensor) -> Tensor:  # (2^UPPER_BITS,) int64
    """Count |expert - base| by the upper UPPER_BITS of its 31 bits."""
    counts = torch.zeros(_BINS_OF_UPPER, dtype=torch.int64)
    _loops().count_upper(*_arrays([base, expert]), 31 - UPPER_BITS, counts.numpy())
    return counts


def collect(base: Tensor, expert: Tensor, upper: int, most: int) -> tuple[Tensor, Tensor]:  # (n,) int64, (n,) int32
    """Indices in the slice and bits of those |expert - base| whose upper bits are `upper`, in order; `most` at most."""
    places = np.empty(min(base.numel(), most), np.int32)
    bits = np.empty(len(places), np.int32)
    found = _loops().collect(*_arrays([base, expert]), 31 - UPPER_BITS, upper, places, bits)
    # Copies: the buffers are as large as the whole bin, of which this slice may hold little.
    return torch.from_numpy(places[:found].astype(np.int64)), torch.from_numpy(bits[:found].copy())


def row_ranks(magnitudes: Tensor) -> Tensor:  # (rows, columns) int32
    """The rank of each non-negative int32 of (rows, columns) in its row, from 0; equal ones in their order."""
    ranks = torch.empty_like(magnitudes)
    _loops().row_ranks(magnitudes.view(-1).numpy(), magnitudes.shape[1], ranks.view(-1).numpy())
    return ranks


def absolute_sums(base: Tensor, expert: Tensor, kept: Selected) -> tuple[int, int]:
    """Exact sums of |expert - base|, of all elements and of those kept, in the units of `methods.exact`."""
    loops = _loops()
    kinds, numbers = _codes([kept])
    bins = np.zeros((2, loops.BINS), np.int64)
    loops.absolute_sums(*_arrays([base, expert]), kinds[0], numbers[0], bins[0], bins[1])
    return _units(bins[0]), _units(bins[1])


def gram_sums(models: Sequence[Tensor], origin: Tensor | None) -> list[int]:
    """Exact dot products of each pair of the models, or of their deltas against `origin`, i <= j, by rows."""
    loops = _loops()
    first, *arrays = _arrays([models[0] if origin is None else origin, *models])
    bins = np.zeros((len(arrays) * (len(arrays) + 1) // 2, loops.BINS), np.int64)
    loops.gram_sums(tuple(arrays), first[:0] if origin is None else first, bins)
    return [_units(row) for row in bins]


def row_dots(left: Tensor, right: Tensor) -> Tensor:  # (rows,) float64
    """The dot product of each row of two (rows, columns) float32 tensors, as `methods.gram.row_dots`."""
    out = torch.empty(left.shape[0], dtype=torch.float64)
    _loops().row_dots(left.reshape(-1).numpy(), right.reshape(-1).numpy(), out.numpy())
    return out


def column_tops(origin: Tensor, others: Sequence[Tensor], deltas: bool) -> Tensor:  # (1 + K, columns) float32
    """The largest magnitude in each column of the origin and of the others, or of their deltas against it."""
    tops = torch.zeros(1 + len(others), origin.shape[1])
    first, *arrays = _arrays([origin, *others])
    _loops().column_tops(first, tuple(arrays), deltas, tops.view(torch.int32).numpy().view(np.uint32))
    return tops


def column_dots(origin: Tensor, others: Sequence[Tensor], deltas: bool, cutters: Tensor) -> Tensor:  # int64
    """The totals of `methods.columns`, (1 + 2K, columns): sums of the terms in units of the cutters' last bits."""
    totals = np.zeros(tuple(cutters.shape), np.int64)
    first, *arrays = _arrays([origin, *others])
    _loops().column_dots(first, tuple(arrays), deltas, cutters.numpy(), totals)
    totals -= origin.shape[0] * cutters.numpy().view(np.int64)  # modulo 2^64, like the sums themselves
    return torch.from_numpy(totals)


def scaled_deltas(base: Tensor, experts: Sequence[Tensor], scales: Tensor, by_row: bool) -> Tensor:
    """W0 + sum si Di, added in model order; float32. `scales` is (K, rows) if `by_row`, else (K, columns)."""
    out = torch.empty(base.shape)
    first, *arrays = _arrays([base, *experts])
    _loops().scaled_deltas(
        first, tuple(arrays), scales.contiguous().numpy(), by_row, base.shape[1], out.view(-1).numpy()
    )
    return out


def with_low_rank(stored: Tensor, left: Tensor, right: Tensor, scaling: float, factors: Tensor | None) -> Tensor:
    """(stored + scaling * left right) * factors, as `methods.low_rank`; float32, of the shape of `stored`."""
    out = torch.empty(stored.shape)
    (array,) = _arrays([stored])
    by_row, by_column = np.empty(0), np.empty(0)
    if factors is not None and factors.shape[1] == 1 and stored.shape[0] == factors.shape[0]:
        by_row = factors.contiguous().view(-1).numpy()
    elif factors is not None:
        by_column = factors.contiguous().view(-1).numpy()
    factors_left, factors_right = left.contiguous().numpy(), right.contiguous().numpy()
    _loops().with_low_rank(
        array, factors_left, factors_right, np.float64(scaling), by_row, by_column, out.view(-1).numpy()
    )
    return out


def add_column_squares(rows: Tensor, totals: Tensor) -> None:
    """Add the squares of (rows, columns) float32 to the (columns,) float64 totals, row by row."""
    _loops().add_column_squares(rows.contiguous().numpy(), totals.numpy())


def _units(bins: Any) -> int:
    """The sum of bins of 2^(index - BIN_ZERO) as an integer in units of 2^-1074."""
    lowest = 1074 - _loops().BIN_ZERO
    return sum(int(bins[index]) << (int(index) + lowest) for index in bins.nonzero()[0])
