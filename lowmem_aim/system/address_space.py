"""The limit of a process's address space (`ulimit -v`), looked at before libraries are loaded that abort beneath it."""

from __future__ import annotations

import contextlib

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.units import shown

# torch, numba's compiler and numpy's threads map some 1.2 GB, most of which is never touched. With less, their
# compiled code aborts the process, or fails in ways that name no cause.
LIBRARIES_BYTES = 1_500_000_000


def check_address_space() -> None:
    """Raise MemoryBudgetError if the address space is limited to less than the libraries map."""
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY and limit < LIBRARIES_BYTES:
            raise MemoryBudgetError(
                f"the address space is limited to {shown(limit)} (`ulimit -v`), and the libraries alone map more",
                hint=f"`ulimit -v {LIBRARIES_BYTES // 1000}` or more; `--ram` is what limits the memory in use",
            )
