"""Budgets of memory, what the process really uses, and what is free: the one place that asks the system.

RAM is counted as anonymous memory: what a process owns and the system can only swap. Pages of mapped files are not
in it; the system takes those back when it likes. In a container the cgroup's limit counts, not the host's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lowmem_aim.errors import MemoryBudgetError, UsageError, printable
from lowmem_aim.units import shown

# Left to the rest of the machine when no budget is given: a tenth, at least this much.
RESERVE_BYTES = 500_000_000
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
