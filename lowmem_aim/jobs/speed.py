"""The speed of a disk and of a device, measured in a second or two each, from which times are estimated.

Nothing stays on the disk, and files that are given are only read. Whatever else the machine does meanwhile counts too.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lowmem_aim.merging.pipeline import Job, Pass, Workers
from lowmem_aim.merging.shares import CPU_SLICE_ELEMENTS, GPU_SLICE_ELEMENTS, TORCH_SLICE_ELEMENTS
from lowmem_aim.methods import kernels
from lowmem_aim.methods.method import Combine, Method, Rounds, Rows, Script, Subject
from lowmem_aim.relaxing.aim import relax
from lowmem_aim.system.devices import DeviceStreams, threads_an_operation, wait_for
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

# --- the disk ---------------------------------------------------------------------------------------------------------

PIECE_BYTES = 8 << 20  # written at once, or read from one place
STEP_BYTES = 1 << 20  # read at once: how soon a slow disk is given up
MOST_BYTES = 1 << 30  # written, or read
_sync = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class DiskSpeed:
    """The speed of a disk, in bytes per second."""

    read: float | None  # None: unknown
    write: float


def disk_speed(folder: Path, inputs: Sequence[Path] = (), seconds: float = 1.0) -> DiskSpeed:
    """Measure how fast files in the folder are written durably, and how fast `inputs`, or what was written, are read.

    The folder must exist. What is written has no name, or loses its name at once, and is at most a tenth of the free
    space. Raises DiskError.
    """
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as scratch:
        most = min(MOST_BYTES, max(1, shutil.disk_usage(folder).free // 10))
        write = _write_speed(scratch, most, seconds / 2)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            files = [stack.enter_context(path.open("rb", buffering=0)) for path in inputs]
            return DiskSpeed(_read_speed(files or [scratch], seconds / 2), write)
        return DiskSpeed(None, write)


def _write_speed(file: IO[bytes], most: int, seconds: float) -> float:
    """Bytes per second. Batches double, and each is made durable: a slow disk never has a gigabyte left to sync."""
    piece = os.urandom(min(PIECE_BYTES, most))  # zeros would be fast where the filesystem compresses
    written, batch = 0, 1
    begun = time.perf_counter()
    while True:
        for _ in range(batch):
            written += file.write(piece)
            if time.perf_counter() - begun >= seconds:
                break
        _sync(file.fileno())
        elapsed = time.perf_counter() - begun
        batch *= 2
        if elapsed >= seconds or written + batch * len(piece) > most:
            return written / elapsed


def _read_speed(files: Sequence[IO[bytes]], seconds: float) -> float | None:
    """Bytes per second of random pieces of the files, read from the disk where the system can drop its own copy."""
    pieces = [(file, start) for file in files for start in range(0, os.fstat(file.fileno()).st_size, PIECE_BYTES)]
    buffer = bytearray(STEP_BYTES)
    read, elapsed = 0, 0.0
    for file, start in random.sample(pieces, min(len(pieces), MOST_BYTES // PIECE_BYTES)):
        _let_go(file, start)
        begun = time.perf_counter()
        for position in range(start, start + PIECE_BYTES, STEP_BYTES):
            file.seek(position)
            read += file.readinto(buffer)  # type: ignore[attr-defined]  # unbuffered
            if elapsed + time.perf_counter() - begun >= seconds:
                break
        elapsed += time.perf_counter() - begun
        if elapsed >= seconds:
            break
    return read / elapsed if read >= STEP_BYTES else None  # for less, opening and seeking take most of the time


def _let_go(file: IO[bytes], start: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is advice: some filesystems take none
            os.posix_fadvise(file.fileno(), start, PIECE_BYTES, os.POSIX_FADV_DONTNEED)


# --- a merge's arithmetic ---------------------------------------------------------------------------------------------

COLUMNS = 4096  # of the random tensor
DISTINCT_SLICES = 4  # of it; its further ones repeat them
_PRIME = 7919  # models are the same noise, moved by so many places


def merge_speed(
    method: Method,
    parameters: Mapping[str, Any],
    experts: int,
    *,
    device: torch.device,
    relaxed: bool,
    dtype: torch.dtype,
    threads: int,
    seconds: float = 1.0,
    slice_elements: int | None = None,
) -> float:
    """The number of elements of the output that are computed per second from random weights, by the code of a merge.

    These are the method's rounds and its combine, AIM if `relaxed`, rounding, and the copies to the device and back,
    but not reading, checking and writing. `parameters` are those of one tensor (`Recipe.resolve`); `threads`, and
    `slice_elements` if given, are those of `merging.shares.Shares`.
    """
    based = method.builds_on("a base")
    rows = max(1, (slice_elements or _slice_elements(method, device)) // COLUMNS)
    slices = _random_slices(experts, rows, max(DISTINCT_SLICES, 2 * threads), dtype, with_base=based or relaxed)
    shape = (rows * len(slices), COLUMNS)
    subject = Subject("random", shape, shape[0] * shape[1], experts, based=based)
    shrink = torch.rand(1, COLUMNS) if relaxed else None
    sample = _Sample(lambda: method.start(subject, parameters), slices, shrink, dtype, DeviceStreams(device))
    with threads_an_operation(1), Workers(threads) as workers:
        workers.run([sample.job()])  # numba compiles, allocators fill up
        sample.merged = 0
        begun = time.perf_counter()
        workers.run(sample.jobs(until=begun + seconds))
        return sample.merged / (time.perf_counter() - begun)


def _slice_elements(method: Method, device: torch.device) -> int:
    if device.type != "cpu":
        return GPU_SLICE_ELEMENTS
    return CPU_SLICE_ELEMENTS if method.compiled and kernels.available() else TORCH_SLICE_ELEMENTS


def _random_slices(experts: int, rows: int, count: int, dtype: torch.dtype, *, with_base: bool) -> list[Rows]:
    """`count` slices of numbers that are distributed like weights: methods that look at them have their usual work."""
    noise = torch.randn(DISTINCT_SLICES * rows, COLUMNS, generator=torch.Generator().manual_seed(0))

    def stored(model: int) -> tuple[Tensor, ...]:  # 0: the base
        tuned = noise.view(-1).roll(model * _PRIME).view_as(noise) * 0.002 if model else 0.0
        return torch.split((noise * 0.02 + tuned).to(dtype), rows)

    distinct = list(zip(*(stored(model) for model in range(experts + 1)), strict=True))
    slices = []
    for number in range(count):
        base, *others = distinct[number % DISTINCT_SLICES]
        slices.append(Rows(base if with_base else torch.empty(0), tuple(others), number * rows * COLUMNS))
    return slices


@dataclass
class _Sample:
    """A random tensor, and jobs that merge it."""

    script: Callable[[], Script]
    slices: Sequence[Rows]
    shrink: Tensor | None  # (1, columns)
    dtype: torch.dtype  # of the result
    streams: DeviceStreams
    merged: int = 0  # elements

    def jobs(self, until: float) -> Iterator[Job]:
        """Yield jobs until the time `until`, in seconds of `time.perf_counter`, and at least one."""
        yield self.job()
        while time.perf_counter() < until:
            yield self.job()

    def job(self) -> Job:
        """Yield the passes of one merge of the tensor."""
        rounds = Rounds(self.script())
        for fold in rounds:
            yield Pass(self.slices, partial(self._in_stream, fold.part), fold.add, last=False)
        finished = partial(self._finished, rounds.combine)
        yield Pass(self.slices, partial(self._in_stream, finished), self._count, last=True)

    def _in_stream(self, work: Callable[[Rows], Any], rows: Rows) -> Any:
        with self.streams.own_stream():
            up = self.streams.up
            return work(Rows(up(rows.stored_base), tuple(map(up, rows.stored_experts)), rows.start))

    def _finished(self, combine: Combine, rows: Rows) -> Tensor:
        merged = combine(rows)
        if self.shrink is not None:
            merged = relax(merged, rows.stored_base, self.shrink.to(merged.device))
        if self.dtype == torch.bfloat16 and kernels.usable([merged]):
            return kernels.to_bfloat16(merged)[0]
        return self.streams.down(merged.to(self.dtype))

    def _count(self, result: Tensor) -> None:
        self.merged += result.numel()


# --- calibration's forward passes -------------------------------------------------------------------------------------

TOKENS = 512  # of one sequence


def matmul_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3, tokens: int = TOKENS) -> float:
    """Floating-point operations per second of a linear layer on `tokens` rows, as in calibration's forward passes."""
    width = 1024 if device.type == "cpu" else 8192  # a GPU is not kept busy by less
    sequence = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(width, width, device=device).to(dtype)
    _multiply(sequence, weight)  # libraries are loaded, algorithms are chosen
    done, begun = 0, time.perf_counter()
    while True:
        _multiply(sequence, weight)
        done += 2 * tokens * width * width
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            return done / elapsed


def _multiply(sequence: Tensor, weight: Tensor) -> None:
    """Multiply, and return when the device is done."""
    torch.nn.functional.linear(sequence, weight)
    wait_for(sequence.device)
