"""The settings of a job: all that the command line says besides the recipe. Imports nothing slow, such as torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ReadMode = Literal["mmap", "pread"]  # how model files are read
NonFinite = Literal["stop", "base"]  # what an expert's NaN and Inf lead to: an error, or the base's value
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """Settings of one job. Only `seed`, `nonfinite` and the size of shards change the bytes of a merge.

    The low bits of what AIM and ACM measure depend on `device` and `threads` too.
    """

    seed: int = 0  # of the random masks
    nonfinite: NonFinite = "stop"
    shard_bytes: int = DEFAULT_SHARD_BYTES  # largest output file
    shard_parameters: int | None = None  # the same as a number of parameters, in place of `shard_bytes`
    read: ReadMode = "mmap"
    device: str = "auto"  # "cpu", "cuda", "cuda:N" or "mps"; "auto": the first GPU, if there is one
    threads: int | None = None  # of torch on the CPU; None: as many as torch takes by itself
    use_cache: bool = True  # keep measured activations in the cache, and reuse those in it
    ram: int | None = None  # bytes of anonymous memory; None: what is free, less a reserve
    vram: int | None = None  # the same on a device with memory of its own
    slice_rows: int | None = None  # rows in work at a time; None: what fits the budget and the processor's cache
    fresh: bool = False  # discard what an interrupted run has left
    accept_environment: bool = False  # resume under other versions or on another device
    keep_stages: Path | None = None  # move the recipe's finished stages into this folder, or remove them
    command: str = ""  # what to type to resume, for views of the run


DEFAULTS = Options()


def wrong_options(options: Options) -> Iterator[str]:
    """Yield what is wrong with options that were not checked by the command line."""
    for name, words in (("read", get_args(ReadMode)), ("nonfinite", get_args(NonFinite))):
        if getattr(options, name) not in words:
            yield f"`{name}` must be one of {', '.join(words)}, not {getattr(options, name)!r:.100}"
    counts = {"threads": 1, "slice_rows": 1, "ram": 0, "vram": 0, "shard_bytes": 1, "shard_parameters": 1, "seed": None}
    for name, least in counts.items():
        value = getattr(options, name)
        optional = name not in ("shard_bytes", "seed")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and (least is None or value >= least)) and not (optional and value is None):
            yield f"`{name}` must be a whole number{f' of at least {least}' if least else ''}, not {value!r:.100}"
    if not isinstance(options.keep_stages, Path | None):
        yield f"`keep_stages` must be a path, not {options.keep_stages!r:.100}"
    if not isinstance(options.device, str):
        yield f"`device` must be text, not {options.device!r:.100}"
