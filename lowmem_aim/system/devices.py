"""The device that computes slices: the CPU, or another one that slices are copied to and from.

On CUDA every worker thread has a stream of its own, so that one slice is copied in while another is computed and a
third is copied out. Host buffers are pinned; torch's caching allocators reuse them and the device's memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


def usable_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means. Raises UsageError if it cannot be used here.

    `auto` is CUDA where torch has it, and the CPU elsewhere.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch: unknown names, no driver, no such number
        raise UsageError(
            f"the device `{printable(name)}` cannot be used here: {printable(str(error).splitlines()[0])}",
            hint="`--device cpu` works everywhere",
        ) from error
    return torch.device(name)


def wait_for(device: torch.device) -> None:
    """Return when the device has computed all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def threads_an_operation(count: int) -> Iterator[None]:
    """Give each torch operation so many threads during the block: one where slices already run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DeviceStreams:
    """A CUDA stream for each thread that computes on `device`; on other devices, plain copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.local()

    @contextlib.contextmanager
    def own_stream(self) -> Iterator[None]:
        """Run the block on the thread's own stream, and wait at its end until everything is computed."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._own.stream):
            yield
            self._own.stream.synchronize()

    def up(self, stored: Tensor) -> Tensor:
        """Copy a CPU tensor to the device; on the CPU, return `stored` itself."""
        if self.device.type == "mps" and stored.dtype == torch.float64:
            stored = stored.to(torch.float32)  # Apple's GPUs have no float64; slices are computed in float32 anyway
        if self.device.type != "cuda":
            return stored.to(self.device)
        pinned = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True)
        return pinned.copy_(stored).to(self.device, non_blocking=True)

    def down(self, result: Tensor) -> Tensor:
        """Copy a tensor of the device to the CPU, contiguous. On CUDA, read the copy only after `own_stream`."""
        if self.device.type != "cuda":
            return result.cpu().contiguous()
        pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        return pinned.copy_(result, non_blocking=True)

    def release(self) -> None:
        """Give back the memory that torch's allocator holds in reserve, after an allocation has failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
