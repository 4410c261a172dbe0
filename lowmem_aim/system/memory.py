"""Memory budgets, what the process really uses, and what is free: the one place that asks the system.

RAM means anonymous memory: what a process owns and the system can only swap. Pages of mapped files are not counted;
the system takes those back when it likes. In a container the cgroup's limit counts, not the host's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lowmem_aim.errors import MemoryBudgetError, UsageError, printable
from lowmem_aim.system.on_demand import torch
from lowmem_aim.units import shown

# Left to the rest of the machine when no budget is given: a tenth of what is free, at least this much.
RESERVE_BYTES = 500_000_000
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Allocations of this size get pages of their own. Smaller ones would take several times as long.
LARGE_BYTES = 1 << 20
_TRIM_BYTES = 128 << 10  # glibc's own, before it grows by itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # names of malloc.h
# torch's allocators raise RuntimeErrors when an allocation fails; that of the CPU says so only in its text.
_ALLOCATION_TEXTS = (
    *("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    *("std::bad_alloc", "enforce fail at alloc"),
)


Kind = Literal["RAM", "VRAM"]


@dataclass(frozen=True)
class Budget:
    """Bytes that this process may use in all: of RAM (anonymous memory), and of the device's own memory if it has any.

    `ram` covers everything, the interpreter and libraries included.
    """

    ram: int
    vram: int | None = None  # None: the device works in RAM

    def ram_used(self) -> int:
        """Bytes of RAM that the process uses now."""
        return anonymous_bytes()

    def ram_left(self) -> int:
        """Bytes of RAM that may still be allocated; 0 if the budget is used up."""
        return max(0, self.ram - self.ram_used())

    def vram_left(self, device: torch.device) -> int:
        """Bytes that may still be allocated on a device with memory of its own; 0 if the budget is used up."""
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        return max(0, (self.vram or 0) - used)

    def left(self, device: torch.device) -> int:
        """Bytes that may still be allocated where `device` works."""
        return self.ram_left() if self.vram is None else self.vram_left(device)


def make_budget(device: torch.device, ram: int | None = None, vram: int | None = None) -> Budget:
    """Make the budget that is asked for, in bytes; by default, what is free less a reserve. Limits torch on CUDA to it.

    Raises UsageError for a `vram` on a device other than CUDA.
    """
    if ram is None:  # one that is given may be less than is used already: who divides it knows what would do
        free = free_bytes()
        ram = anonymous_bytes() + max(free - max(RESERVE_BYTES, free // 10), 0)
    if device.type != "cuda":
        if vram is not None:
            raise UsageError(
                f"--vram has no meaning on the device `{printable(str(device))}`",
                hint="leave it out, and out of the file of defaults",
            )
        return Budget(ram)
    free, total = torch.cuda.mem_get_info(device)
    vram = max(free - max(RESERVE_BYTES, free // 10), 0) if vram is None else min(vram, total)
    torch.cuda.set_per_process_memory_fraction(vram / total, device)
    return Budget(ram, vram)


def enough(used: int, least: int) -> int:
    """Bytes of a budget that are enough for `least` bytes besides the `used` ones of the program.

    A whole number of MB, from 1 GB on of 100 MB, so that the figure is the same wherever it is shown.
    """
    used += used // 50  # what the program itself uses differs a little from process to process
    step = 10**6 if used + least <= 10**9 else 10**8
    return -(-(used + least) // step) * step


def too_small(what: str, kind: Kind, least: int, used: int, budget: int, otherwise: str) -> MemoryBudgetError:
    """The error for a budget in which `least` bytes besides the `used` ones are not left.

    `what` needs them; `otherwise` says what else would help than a larger budget.
    """
    total = enough(used, least)
    return MemoryBudgetError(
        f"{what} needs {shown(total)} of {kind}, {shown(least)} of that besides the program itself, "
        f"but the budget is {shown(budget)}",
        hint=f"`--{kind.lower()} {total // 10**6}MB` would do; {otherwise}",
        kind=kind,
        enough=total,
    )


# --- what is used ---------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Bytes of anonymous memory of this process; of all resident memory if the system does not count the two apart."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _table(Path("/proc/self/status"))["RssAnon"] * 1024
    return int(psutil.Process().memory_info().rss)


def file_cache_bytes() -> int:
    """Bytes of mapped files that this process has in memory; 0 if the system does not count them apart."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _table(Path("/proc/self/status"))["RssFile"] * 1024
    return 0


def vram_bytes(device: str) -> tuple[int | None, int | None]:
    """(now, peak) bytes of a device's own memory that torch has reserved; (None, None) for devices other than CUDA."""
    if not device.startswith("cuda"):
        return None, None
    return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)


def _table(file: Path) -> dict[str, int]:
    """Numbers by name from lines such as `Name: 12 kB` or `name 12`. Raises ValueError if there are none."""
    found = {}
    for line in file.read_text().splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            found[parts[0]] = int(parts[1])
    if not found:
        raise ValueError(f"{file} holds no numbers")
    return found


def trim() -> None:
    """Give freed memory back to the system.

    glibc would keep several blocks' worth, which `top` shows and budgets count.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """Have large allocations go back to the system as soon as they are freed, for the rest of the process.

    glibc keeps them for reuse, the more the larger they are: where something small that stays lies between them, much
    is kept and little reused. Their pages must then be made anew each time, which costs a tenth of the time, and more
    where they are not much larger than LARGE_BYTES.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            library = ctypes.CDLL(None)
            # Two heaps, not one a thread: each keeps some of what is freed.
            for setting, value in ((_MMAP_THRESHOLD, LARGE_BYTES), (_TRIM_THRESHOLD, _TRIM_BYTES), (_ARENA_MAX, 2)):
                library.mallopt(setting, value)


# --- what is free ---------------------------------------------------------------------------------------------------


def free_bytes() -> int:
    """Bytes that may be allocated now: the machine's available memory, or what the process's cgroups leave, if less."""
    return min([psutil.virtual_memory().available, *_cgroups_free()])


def container_limit() -> int | None:
    """Bytes that the process's cgroups allow; None if that is no less than the machine has."""
    limit = min((limit for limit, _ in _limited_cgroups()), default=None)
    return limit if limit is not None and limit < psutil.virtual_memory().total else None


def most_bytes() -> int:
    """Bytes of memory that there are at all: the machine's, or what the process's cgroups allow, if less."""
    return container_limit() or int(psutil.virtual_memory().total)


def _cgroups_free(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[int]:
    """Bytes that the limit of each limited cgroup of the process leaves; pages of files count as free."""
    return (max(limit - held, 0) for limit, held in _limited_cgroups(root, membership))


def _limited_cgroups(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that are not pages of files) of each cgroup of the process that has a limit."""
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
    """Folders of the process's cgroup for a controller such as `memory`, in either version, and of its ancestors."""
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
    """Whether `error` says that an allocation has failed, on the host or on a device."""
    if isinstance(error, MemoryError):  # numpy's too
        return True
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _ALLOCATION_TEXTS)
