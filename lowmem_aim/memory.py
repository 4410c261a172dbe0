"""Budgets of memory, what the process really uses, and what is free: the one place that asks the system.

RAM is counted as anonymous memory: what a process owns and the system can only swap. Pages of mapped files are not
in it; the system takes those back when it likes. In a container the cgroup's limit counts, not the host's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lowmem_aim.errors import MemoryBudgetError, UsageError, printable
from lowmem_aim.units import shown

# Left to the rest of the machine when no budget is given: a tenth, at least this much.
RESERVE_BYTES = 500_000_000
_APART_BYTES = 1 << 20  # smaller ones leave smaller holes
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Raised by torch and numpy when an allocation fails; torch's CPU allocator says so with a plain RuntimeError.
_ALLOCATION_ERRORS = (MemoryError, torch.OutOfMemoryError)
_ALLOCATION_TEXTS = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Budget:
    """Bytes that this process may use in all: of RAM (anonymous memory), and of the device's memory if it has its own.

    `ram` holds for everything, interpreter and libraries included.
    """

    ram: int
    vram: int | None = None  # None: the device works in RAM

    def ram_used(self) -> int:
        """Bytes of RAM that the process has now."""
        return anonymous_bytes()

    def ram_left(self) -> int:
        """Bytes of RAM that may still be allocated; 0 if the budget is used up."""
        return max(0, self.ram - self.ram_used())

    def vram_left(self, device: torch.device) -> int:
        """Bytes that may still be allocated on a device with memory of its own."""
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        return max(0, (self.vram or 0) - used)

    def left(self, device: torch.device) -> int:
        """Bytes that may still be allocated where `device` works."""
        return self.ram_left() if self.vram is None else self.vram_left(device)


def make_budget(device: torch.device, ram: int | None = None, vram: int | None = None) -> Budget:
    """The budget that is asked for, or what is free less a reserve. Limits torch on a CUDA device to it.

    Raises UsageError for a `vram` without such a device, MemoryBudgetError if `ram` is less than what runs already.
    """
    used = anonymous_bytes()
    if ram is None:
        free = free_bytes()
        ram = used + max(free - max(RESERVE_BYTES, free // 10), 0)
    elif ram <= used:
        raise MemoryBudgetError(
            f"--ram {shown(ram)}: the program itself takes {shown(used)} before any work",
            hint=f"the smallest that makes sense is about {shown(used + (64 << 20))}",
        )
    if device.type != "cuda":
        if vram is not None:
            raise UsageError(f"--vram has no meaning on the device `{printable(str(device))}`", hint="leave it out")
        return Budget(ram)
    free, total = torch.cuda.mem_get_info(device)
    vram = max(free - max(RESERVE_BYTES, free // 10), 0) if vram is None else min(vram, total)
    torch.cuda.set_per_process_memory_fraction(vram / total, device)
    return Budget(ram, vram)


# --- how a merge divides it -------------------------------------------------------------------------------------------

# A slice of three experts and a base then has 2 MB of bfloat16: it stays in a processor's cache from read to write.
CPU_SLICE_ELEMENTS = 1 << 20
# Without compiled loops each operation makes a tensor of its own, of which these stay in the cache.
TORCH_SLICE_ELEMENTS = 1 << 17
# Large enough that starting a kernel costs nothing against running it.
GPU_SLICE_ELEMENTS = 1 << 22
# What a method may hold between its rounds, an expert: histograms, collected magnitudes.
STATS_BYTES = 24 << 20
# Slices read ahead, and finished ones that wait to be written, where the budget allows it.
AHEAD, WAITING = 4, 4
# Slices on a GPU at the same time: one copied in, one computed, one copied out.
LANES = 3


@dataclass(frozen=True)
class Shares:
    """The parts of a budget that a merge lives in."""

    slice_elements: int  # of each model, in work at a time
    workers: int  # slices computed at the same time
    ahead: int  # slices read ahead
    kept_bytes: int  # a tensor of at most so many bytes, all models together, is kept between its passes


def share_out(
    budget: Budget,
    device: torch.device,
    *,
    models: int,
    stored_bytes: int,
    row: int,
    threads: int,
    compiled: bool,
    scratch: int = 0,
) -> Shares:
    """Divide what is left of the budget.

    `stored_bytes`: of one element in all models and in the output; `row`: elements of the longest row; `compiled`:
    numba's loops run, which need no float32 copies; `scratch`: bytes an element that the method needs besides. Raises
    MemoryBudgetError if not even single rows fit.
    """
    on_host = budget.vram is None
    work = _work_bytes(models, on_host and compiled, scratch)
    left = budget.ram_left()
    ram = left - min(models * STATS_BYTES, left // 4)
    for workers, ahead in ((threads if on_host else LANES, AHEAD), (1, 1)):
        held = _held_bytes(stored_bytes, ahead, workers, work if on_host else 0)
        room = ram // 2 // held
        if not on_host:
            room = min(room, budget.vram_left(device) * 9 // 10 // ((stored_bytes + work) * workers))
        if room >= row:
            on_cpu = CPU_SLICE_ELEMENTS if compiled else TORCH_SLICE_ELEMENTS
            largest = on_cpu if device.type == "cpu" else GPU_SLICE_ELEMENTS
            return Shares(max(row, min(room, largest)), workers, ahead, kept_bytes=ram // 6)  # two tensors at a time
    where, there = ("RAM", left) if on_host else ("RAM or VRAM", min(left, budget.vram_left(device)))
    raise MemoryBudgetError(
        f"a row of {row} elements in {models} models needs some {shown(3 * row * held)}, but of the budget "
        f"{shown(there)} of {where} are left",
        hint="give more memory (`--ram`, `--vram`), close other programs, or merge fewer models at a time",
    )


def least_ram(*, models: int, stored_bytes: int, row: int, on_host: bool, compiled: bool, scratch: int = 0) -> int:
    """Bytes of RAM beside the program itself with which `share_out` finds room for single rows."""
    held = _held_bytes(stored_bytes, 1, 1, _work_bytes(models, on_host and compiled, scratch) if on_host else 0)
    rows = 2 * row * held
    return min(rows + models * STATS_BYTES, -(-rows * 4 // 3))


def _work_bytes(models: int, compiled: bool, scratch: int) -> int:
    """That computing an element takes."""
    return (12 if compiled else 4 * (2 * models + 6)) + scratch


def _held_bytes(stored_bytes: int, ahead: int, workers: int, work: int) -> int:
    """Of an element of a slice, which is held while it is read, waits, is computed, waits for its turn, is written."""
    return stored_bytes * (ahead + 2 * workers + WAITING) + work * workers


# --- what is used ---------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Anonymous memory of this process now. Where the system does not tell it apart: all that is resident."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _table(Path("/proc/self/status"))["RssAnon"] * 1024
    return int(psutil.Process().memory_info().rss)


def file_cache_bytes() -> int:
    """Pages of mapped files that this process has in memory; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _table(Path("/proc/self/status"))["RssFile"] * 1024
    return 0


def vram_bytes(device: str) -> tuple[int | None, int | None]:
    """(now, peak) of what torch holds of a device's own memory; None where it has none."""
    if not device.startswith("cuda"):
        return None, None
    return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)


def _table(file: Path) -> dict[str, int]:
    """`Name: 12 kB` or `name 12` lines -> numbers; ValueError if there is none such."""
    found = {}
    for line in file.read_text().splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            found[parts[0]] = int(parts[1])
    if not found:
        raise ValueError(f"{file} holds no numbers")
    return found


def trim() -> None:
    """Give freed memory back: glibc would keep several blocks' worth, which `top` shows and budgets count."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def empty_apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty in pages of its own, which go back to the system with it.

    For weights that come and go between a forward's small tensors: the heap would have holes where they were.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _APART_BYTES:
        return torch.empty(shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"no room for {shown(nbytes)}") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


# --- what is free ---------------------------------------------------------------------------------------------------


def free_bytes() -> int:
    """What may be allocated now: the machine's available memory, or what the process's cgroups leave, if less."""
    return min([psutil.virtual_memory().available, *_cgroups_free()])


def container_limit() -> int | None:
    """The most that the process's cgroups allow; None where that is no less than what the machine has."""
    limit = min((limit for limit, _ in _limited_cgroups()), default=None)
    return limit if limit is not None and limit < psutil.virtual_memory().total else None


def _cgroups_free(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[int]:
    """For each limited cgroup that the process is in, what its limit leaves; file pages count as free."""
    return (max(limit - held, 0) for limit, held in _limited_cgroups(root, membership))


def _limited_cgroups(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[int, int]]:
    """(limit, bytes that are held and no file pages) of each cgroup that has a limit."""
    for folder in cgroup_folders("memory", root, membership):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
        ):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                limit = int((folder / limit_name).read_text())
                usage = int((folder / usage_name).read_text())
                stat = _table(folder / "memory.stat")
                pages = stat.get("total_inactive_file", stat.get("inactive_file", 0))
                pages += stat.get("total_active_file", stat.get("active_file", 0))
                yield limit, usage - pages


def cgroup_folders(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """The process's cgroup of a controller, such as `memory`, in either version, and all that it lies in."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / controller if controllers else root
            place = top / path.lstrip("/")
            yield from (folder for folder in (place, *place.parents) if folder == top or top in folder.parents)


# --- when an allocation fails ---------------------------------------------------------------------------------------


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left, on the host or on a device."""
    if isinstance(error, _ALLOCATION_ERRORS):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_TEXTS)
