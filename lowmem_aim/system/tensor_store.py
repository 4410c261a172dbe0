"""Tensors between two uses: on the device, in RAM or in a file, each as near as the budget allows.

The file never has a name (or loses it with its last handle, where the system has no such files): nothing is left of it
however the program ends.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import torch
from torch import Tensor

from lowmem_aim.errors import DiskError
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.tensors import empty_apart, raw

Place = Literal["device", "ram", "file"]


@dataclass(eq=False)
class Stored:
    """One tensor's place. Whoever puts another tensor into it forgets the one before."""

    place: Place | None = None  # None: empty
    nbytes: int = 0
    value: Tensor | None = None  # None where it is in the file; then an empty one on meta says what it was
    like: Tensor | None = None
    offset: int = 0  # in the file
    capacity: int = 0  # bytes of the file that are this slot's

    @property
    def is_contiguous(self) -> bool:
        return self.value is None or self.value.is_contiguous()


class TensorStore:
    """Holds tensors of `device`. A context manager: its file goes with it."""

    def __init__(self, device: torch.device, *, device_bytes: int, ram_bytes: int, folder: Path | None) -> None:
        """At most so many bytes on the device (if that is not the CPU) and in RAM; the rest in a file in `folder`.

        Without a folder everything else lies in RAM.
        """
        self._device, self._folder = device, folder
        self._left: dict[Place, int] = {"device": device_bytes if device.type != "cpu" else 0, "ram": ram_bytes}
        self._on_device: set[Stored] = set()
        self._file: IO[bytes] | None = None
        self._end = 0  # of what the file's slots have been given

    def put(self, value: Tensor, slot: Stored | None = None) -> Stored:
        """Keep `value`, which must not change from now on. Raises DiskError."""
        slot = Stored() if slot is None else slot
        nbytes = value.numel() * value.element_size()
        place = self._place_for(value, nbytes, instead=slot)
        # All that can fail comes first: what the slot held before is still there then.
        kept = None
        if place == "file":
            self._write(slot, value.cpu(), nbytes)
        else:
            kept = value if place == "device" else _in_ram(value, slot.value if slot.place == "ram" else None)
        self._clear(slot)
        slot.place, slot.nbytes, slot.value = place, nbytes, kept
        if place == "file":
            slot.like = torch.empty_like(value, device="meta")
            return slot
        self._left[place] -= nbytes
        if place == "device":
            self._on_device.add(slot)
        return slot

    def get(self, slot: Stored) -> Tensor:
        """The tensor, on the device. Not to be written to, nor used after the next `put` there. Raises DiskError."""
        if slot.value is not None:
            return slot.value.to(self._device)
        assert slot.like is not None, "an empty slot"
        value = torch.empty_like(slot.like, device="cpu")
        self._read(slot, memoryview(raw(value)))
        return value.to(self._device)

    def leave_device(self) -> bool:
        """Give the device's memory back: what is on it moves to RAM or the file. False if nothing was there."""
        self._left["device"] = 0
        moved = list(self._on_device)
        for slot in moved:
            assert slot.value is not None
            self.put(slot.value.cpu(), slot)
        self._left["device"] = 0
        return bool(moved)

    def _place_for(self, value: Tensor, nbytes: int, instead: Stored) -> Place:
        left = {place: self._left[place] + instead.nbytes * (instead.place == place) for place in self._left}
        if value.device.type != "cpu" and nbytes <= left["device"]:
            return "device"
        # A file would lose the strides (of an expanded mask), and with them, perhaps, the way in which it is computed.
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
            slot.offset, slot.capacity = self._end, nbytes
            self._end += nbytes
        assert self._folder is not None
        with disk_errors(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed on exit)
            self._file.seek(slot.offset)
            left = memoryview(raw(value))
            while left:
                left = left[self._file.write(left) :]

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
    """In memory apart from the heap, where it would lie among what a forward frees; in that of `before` if it fits."""
    if not value.is_contiguous():
        return value.cpu()
    if before is None or not before.is_contiguous() or (before.shape, before.dtype) != (value.shape, value.dtype):
        before = empty_apart(tuple(value.shape), value.dtype)
    return before.copy_(value)
