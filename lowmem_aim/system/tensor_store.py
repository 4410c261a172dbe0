"""A store for tensors between two uses: on the device, in RAM or in a file, as near to the device as the budget allows.

Several threads may use a store at once, each its own slots. The file has no name (or, on systems that do not allow
this, loses it with its last handle): nothing is left of it, however the program ends.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal

from lowmem_aim.errors import DiskError
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import empty_apart, raw

if TYPE_CHECKING:
    from torch import Tensor

Place = Literal["device", "ram", "file"]


@dataclass(eq=False)
class Stored:
    """One tensor's place in the store. Putting another tensor there forgets the one before."""

    place: Place | None = None  # None: empty
    nbytes: int = 0
    value: Tensor | None = None  # None if the tensor is in the file
    like: Tensor | None = None  # shape and dtype of a tensor in the file, on the meta device
    offset: int = 0  # in the file
    capacity: int = 0  # bytes of the file that are reserved for this place

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor is contiguous; one in the file always is."""
        return self.value is None or self.value.is_contiguous()


class TensorStore:
    """A store for tensors of one device, within a budget. Use it as a context manager: at its end the file is gone."""

    def __init__(self, device: torch.device, *, device_bytes: int, ram_bytes: int, folder: Path | None) -> None:
        """Allow `device_bytes` on the device (unless that is the CPU) and `ram_bytes` in RAM.

        The rest goes to a file in `folder`, or, without a folder, stays in RAM.
        """
        self._device, self._folder = device, folder
        self._left: dict[Place, int] = {"device": device_bytes if device.type != "cpu" else 0, "ram": ram_bytes}
        self._on_device: set[Stored] = set()
        self._file: IO[bytes] | None = None
        self._end = 0  # bytes of the file that are given out
        self._free: list[tuple[int, int]] = []  # parts of the file that were given back: (bytes, offset)
        self._lock = threading.RLock()

    def put(self, value: Tensor, slot: Stored | None = None) -> Stored:
        """Keep `value`, which must not change from now on, in `slot` or in a new place. Raises DiskError."""
        slot = Stored() if slot is None else slot
        nbytes = value.numel() * value.element_size()
        with self._lock:
            place = self._place_for(value, nbytes, instead=slot)
            if place == "file":
                # Everything that can fail comes first: after a failure the slot still holds what it held before.
                self._write(slot, value.cpu(), nbytes)
                return self._now_holds(slot, place, nbytes, None, torch.empty_like(value, device="meta"))
            taken = nbytes - (slot.nbytes if slot.place == place else 0)
            self._left[place] -= taken
        try:  # copying a large tensor takes a while, and others may put and get meanwhile
            kept = value if place == "device" else _in_ram(value, slot.value if slot.place == "ram" else None)
        except BaseException:
            with self._lock:
                self._left[place] += taken
            raise
        with self._lock:
            self._left[place] += taken - nbytes  # what the slot held comes back now
            return self._now_holds(slot, place, nbytes, kept, None)

    def _now_holds(self, slot: Stored, place: Place, nbytes: int, value: Tensor | None, like: Tensor | None) -> Stored:
        self._clear(slot)
        slot.place, slot.nbytes, slot.value, slot.like = place, nbytes, value, like
        if place == "device":
            self._on_device.add(slot)
        return slot

    def get(self, slot: Stored) -> Tensor:
        """The tensor, on the device. Raises DiskError.

        Do not write to the tensor, and do not use it after the next `put` to the same slot.
        """
        if slot.value is not None:
            return slot.value.to(self._device)
        assert slot.like is not None, "an empty slot"
        value = torch.empty_like(slot.like, device="cpu")
        with self._lock:
            self._read(slot, memoryview(raw(value)))
        return value.to(self._device)

    def drop(self, slot: Stored) -> None:
        """Forget the tensor in a slot; its part of the file may be given to others."""
        with self._lock:
            self._clear(slot)
            if slot.capacity:
                self._free.append((slot.capacity, slot.offset))
                slot.capacity = 0

    @property
    def file_bytes(self) -> int:
        """The bytes of the file at its largest."""
        return self._end

    def leave_device(self) -> bool:
        """Move all tensors off the device, to RAM or the file, for good. Returns False if there were none."""
        self._left["device"] = 0
        moved = list(self._on_device)
        for slot in moved:
            assert slot.value is not None
            self.put(slot.value.cpu(), slot)
        self._left["device"] = 0  # `put` has counted the freed bytes as left
        return bool(moved)

    def _place_for(self, value: Tensor, nbytes: int, instead: Stored) -> Place:
        left = {place: self._left[place] + instead.nbytes * (instead.place == place) for place in self._left}
        if value.device.type != "cpu" and nbytes <= left["device"]:
            return "device"
        # A file would lose the strides of an expanded mask, and torch may compute with other kernels without them.
        if nbytes <= left["ram"] or self._folder is None or not value.is_contiguous():
            return "ram"
        return "file"

    def _clear(self, slot: Stored) -> None:
        if slot.place in ("device", "ram"):
            self._left[slot.place] += slot.nbytes
            self._on_device.discard(slot)
        slot.place = slot.value = slot.like = None

    # -- the file

    def _write(self, slot: Stored, value: Tensor, nbytes: int) -> None:
        if nbytes > slot.capacity:
            self._reserve(slot, nbytes)
        assert self._folder is not None
        with disk_errors(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed on exit)
            self._file.seek(slot.offset)
            left = memoryview(raw(value))
            while left:
                left = left[self._file.write(left) :]

    def _reserve(self, slot: Stored, nbytes: int) -> None:
        """Give a slot a part of the file: the smallest that was given back and is large enough, or one at the end."""
        found = min((part for part in self._free if part[0] >= nbytes), default=None)
        if found is None:
            slot.offset, slot.capacity = self._end, nbytes
            self._end += nbytes
        else:
            self._free.remove(found)
            slot.capacity, slot.offset = found

    def _read(self, slot: Stored, into: memoryview) -> None:
        assert self._file is not None
        assert self._folder is not None
        with disk_errors(self._folder):
            self._file.seek(slot.offset)
            while into:
                count = self._file.readinto(into)  # type: ignore[attr-defined]
                if not count:
                    raise DiskError(f"the temporary file in `{self._folder}` was cut off")
                into = into[count:]

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _in_ram(value: Tensor, before: Tensor | None) -> Tensor:
    """Copy `value` to memory outside the heap, away from the small tensors of a forward; reuse `before` if it fits."""
    if not value.is_contiguous():
        return value.cpu()
    if before is None or not before.is_contiguous() or (before.shape, before.dtype) != (value.shape, value.dtype):
        before = empty_apart(tuple(value.shape), value.dtype)
    return before.copy_(value)
