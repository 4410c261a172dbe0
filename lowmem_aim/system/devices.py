"""Where slices are computed: the CPU, or a device that they are copied to and from.

On CUDA every worker thread has a stream of its own, so that one slice is copied in, another computed and a third
copied out at the same time; host buffers are pinned, torch's caching allocators reuse them and the device's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_aim.errors import UsageError, printable


def usable_device(name: str) -> torch.device:
    """The device that is meant by `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises UsageError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch: unknown names, no driver, no such number
        raise UsageError(
            f"the device `{printable(name)}` cannot be used here: {printable(str(error).splitlines()[0])}",
            hint="`--device cpu` always works",
        ) from error
    return torch.device(name)


@contextlib.contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Slices are what is worked on in parallel; threads within torch's operations would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DeviceStreams:
    """One lane for each thread that computes on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.local()

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        """What the thread computes in here is done when it leaves."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._own.stream):
            yield
            self._own.stream.synchronize()

    def up(self, stored: Tensor) -> Tensor:
        """A CPU tensor on the device; itself, if that is the CPU."""
        if self.device.type == "mps" and stored.dtype == torch.float64:
            stored = stored.to(torch.float32)  # Apple's GPUs have no float64; slices are computed in float32 anyway
        if self.device.type != "cuda":
            return stored.to(self.device)
        pinned = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True)
        return pinned.copy_(stored).to(self.device, non_blocking=True)

    def down(self, result: Tensor) -> Tensor:
        """A tensor of the device on the CPU, contiguous; to be looked at once the lane is left."""
        if self.device.type != "cuda":
            return result.cpu().contiguous()
        pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        return pinned.copy_(result, non_blocking=True)

    def release(self) -> None:
        """Give back what torch's allocator holds in reserve, after an allocation has failed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
