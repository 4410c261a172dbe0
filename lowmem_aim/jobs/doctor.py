"""The report of `lowmem-aim doctor`: facts about machine, disk and terminal that a merge depends on, and advice.

A fact that cannot be found out is `unknown`, and the others are reported all the same. What a machine does not have is
None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from huggingface_hub import constants
from rich.console import Console

import lowmem_aim
from lowmem_aim import units
from lowmem_aim.errors import UsageError, printable
from lowmem_aim.jobs.speed import disk_speed
from lowmem_aim.methods import kernels
from lowmem_aim.system import memory
from lowmem_aim.system.defaults_file import defaults_file, read_defaults
from lowmem_aim.system.files import cache_folder
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.run import usable_cores
from lowmem_aim.view.doctor_lines import UNKNOWN, doctor_lines

SCHEMA = 1  # of the JSON
# Asked for by name: importing transformers takes seconds.
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numba", "rich")
LITTLE_RAM = 2_000_000_000  # the libraries take 0.3 GB, and a merge is quick with 1
COUNTING_SECONDS = 0.5  # for one cache's size
_NETWORK = re.compile(r"nfs\d*|cifs|smb\w*|9p|afs|ceph|lustre|beegfs\w*|gpfs|glusterfs|fuse\..*|davfs\w*")
_PROBE_BYTES = 1 << 20
_DRIVER = Path("/proc/driver/nvidia/version")

Facts = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """A piece of advice, with its level."""

    level: Literal["hint", "warning"]
    text: str


@dataclass(frozen=True)
class Doctor:
    """Sections of facts by name: numbers of bytes and of bytes per second, texts as the system has them."""

    software: Facts
    processor: Facts
    memory: Facts
    gpus: list[Facts] | Literal["unknown"]
    folder: Facts
    caches: Facts
    terminal: Facts
    defaults: Facts

    @property
    def advice(self) -> list[Advice]:
        """Advice on what is worth mending, or knowing."""
        return [
            *_about_software(self),
            *_about_the_machine(self),
            *_about_the_folder(self.folder),
            *_about_defaults(self.defaults),
            *_about_the_terminal(self.terminal),
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"doctor": SCHEMA, **asdict(self), "advice": [asdict(advice) for advice in self.advice]}

    def lines(self) -> list[str]:
        """The report as lines for people."""
        return doctor_lines(self.as_json())


def examine(folder: Path) -> Doctor:
    """Find out all facts, in some seconds; the disk of `folder` is measured. Raises UsageError if there is none."""
    if not os.path.isdir(folder):
        raise UsageError(
            f"there is no folder `{printable(str(folder))}`", hint="name the folder that an output would be in"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the facts say themselves: an old driver, no swap
        return Doctor(
            software=_software(),
            processor=_processor(),
            memory=_memory(),
            gpus=_asked(_gpus),
            folder=_folder(folder.absolute()),
            caches=_caches(),
            terminal=_terminal(),
            defaults=_defaults(),
        )


def _asked(ask: Callable[[], Any]) -> Any:
    """The answer, or `unknown` if asking fails: no fact is worth losing the others."""
    try:
        return ask()
    except Exception:
        return UNKNOWN


def _known(**asks: Callable[[], Any]) -> Facts:
    return {name: _asked(ask) for name, ask in asks.items()}


# --- software ---------------------------------------------------------------------------------------------------------


def _software() -> Facts:
    versions = {name: partial(_version, name) for name in PACKAGES}
    return {"lowmem-aim": lowmem_aim.__version__} | _known(
        python=platform.python_version, platform=platform.platform, **versions, nvidia_driver=_driver
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if _DRIVER.is_file():
        text = _DRIVER.read_text()
    elif tool := shutil.which("nvidia-smi"):
        ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=2).stdout
    else:
        return None
    version = re.search(r"\d{3,}(\.\d+)+", text)
    return version[0] if version else UNKNOWN


# --- the machine ------------------------------------------------------------------------------------------------------


def _processor() -> Facts:
    return _known(
        model=_model,
        cores=usable_cores,
        container_cores=_container_cores,
        threads=torch.get_num_threads,
        instructions=torch.backends.cpu.get_cpu_capability,
        compiled_loops=kernels.available,
    )


def _model() -> str:
    with contextlib.suppress(OSError):
        if named := re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return named[1]
    return platform.processor() or platform.machine() or UNKNOWN


def _container_cores() -> float | None:
    """The number of cores whose time the process's cgroups allow; None without a limit."""
    limits = []
    for folder in memory.cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            quota, period = (folder / "cpu.max").read_text().split()  # version 2
            limits.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / "cpu.cfs_quota_us").read_text())  # version 1; -1: none
            limits += [limit / int((folder / "cpu.cfs_period_us").read_text())] * (limit > 0)
    return min(limits, default=None)


def _memory() -> Facts:
    return _known(
        total=lambda: psutil.virtual_memory().total,
        free=memory.free_bytes,
        container_limit=memory.container_limit,
        swap_total=lambda: psutil.swap_memory().total,
        swap_free=lambda: psutil.swap_memory().free,
    )


def _gpus() -> list[Facts]:
    found = [_cuda(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():  # it works in RAM
        total = torch.mps.recommended_max_memory
        found.append({"device": "mps", "name": "Apple GPU", **_known(total=total), "free": None, "capability": None})
    return found


def _cuda(number: int) -> Facts:
    return {"device": f"cuda:{number}"} | _known(
        name=lambda: torch.cuda.get_device_name(number),
        total=lambda: torch.cuda.get_device_properties(number).total_memory,
        free=lambda: torch.cuda.mem_get_info(number)[0],
        capability=lambda: ".".join(map(str, torch.cuda.get_device_capability(number))),
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Facts:
    found = {"path": str(folder)} | _known(
        mount=lambda: _mount(folder).mountpoint,
        filesystem=lambda: _mount(folder).fstype,
        network=lambda: _NETWORK.fullmatch(_mount(folder).fstype.lower()) is not None,
        free=lambda: shutil.disk_usage(folder).free,
        preallocates=lambda: _preallocates(folder),
        sparse=lambda: _sparse(folder),
    )
    return found | _speeds(folder)


def _mount(folder: Path) -> Any:
    """The mount nearest above the folder; of several in one place, the last."""
    place = folder.resolve()
    above = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    return max(reversed(above), key=lambda mount: len(Path(mount.mountpoint).parts))


def _preallocates(folder: Path) -> bool:
    """Whether a full disk shows before anything is written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if not hasattr(os, "posix_fallocate"):
            return False
        try:
            os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)
        except OSError:
            return False
        return True


def _sparse(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(_PROBE_BYTES)
        return os.fstat(file.fileno()).st_blocks * 512 < _PROBE_BYTES


def _speeds(folder: Path) -> Facts:
    try:
        speed = disk_speed(folder)
    except Exception as error:
        return {"read": UNKNOWN, "write": UNKNOWN, "problem": str(error)}
    return {"read": UNKNOWN if speed.read is None else speed.read, "write": speed.write, "problem": None}


# --- caches, the terminal and the file of defaults --------------------------------------------------------------------


def _caches() -> Facts:
    return _known(
        activations=lambda: _cache(cache_folder()),
        hub=lambda: _cache(Path(constants.HF_HUB_CACHE)),
        hf_home=lambda: constants.HF_HOME,
        offline=lambda: bool(constants.HF_HUB_OFFLINE),
        token=lambda: bool(os.environ.get("HF_TOKEN")),  # its value is nobody's business
    )


def _cache(folder: Path) -> Facts:
    return {"path": str(folder), "bytes": _bytes_in(folder)}


def _bytes_in(folder: Path) -> int | None:
    """Bytes in a folder; None if counting takes too long."""
    total, end = 0, time.monotonic() + COUNTING_SECONDS
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
            if time.monotonic() > end:
                return None
    return total


def _terminal() -> Facts:
    """Facts about stderr, as rich finds them."""
    console = partial(Console, stderr=True)
    return _known(
        terminal=lambda: console().is_terminal,
        columns=lambda: console().width if console().is_terminal else None,
        colours=lambda: None if console().no_color else console().color_system,
        blocks=lambda: not console().options.ascii_only,
        term=lambda: os.environ.get("TERM"),
        no_color=lambda: bool(os.environ.get("NO_COLOR")),
    )


def _defaults() -> Facts:
    """The file of defaults: whether it is there, its values, and what is wrong with it."""
    file = defaults_file()
    found: Facts = {"path": file and str(file), "there": bool(file and os.path.lexists(file))}
    try:
        return found | {"values": read_defaults(), "problem": None}
    except UsageError as error:
        return found | {"values": {}, "problem": "; ".join(error.problems)}


# --- advice -----------------------------------------------------------------------------------------------------------


def _about_software(found: Doctor) -> Iterator[Advice]:
    if found.software["numba"] is None:
        yield Advice("warning", "numba is not installed: merges on the CPU are several times slower; pip install numba")
    elif found.processor["compiled_loops"] is False:
        why = kernels.unavailable()
        yield Advice("warning", f"numba is installed, but its loops are not used ({why}): CPU merges are slower")
    elif trouble := kernels.cache_trouble():
        yield Advice("warning", f"compiled loops cannot be saved, so every merge compiles them again: {trouble}")
    if found.software["nvidia_driver"] not in (None, UNKNOWN) and found.gpus == []:
        torch_version = printable(str(found.software["torch"]))
        yield Advice("warning", f"there is an NVIDIA driver, but no GPU that torch {torch_version} can use")


def _about_the_machine(found: Doctor) -> Iterator[Advice]:
    free, allowed, threads = found.memory["free"], found.processor["container_cores"], found.processor["threads"]
    if isinstance(free, int) and free < LITTLE_RAM:
        yield Advice("warning", f"only {units.shown(free)} of RAM are free: close other programs")
    if isinstance(allowed, float) and isinstance(threads, int) and allowed < threads:
        yield Advice("hint", f"this container is limited to {allowed:g} cores: `--threads {max(1, round(allowed))}`")


def _about_the_folder(folder: Facts) -> Iterator[Advice]:
    if folder["problem"] is not None:
        yield Advice("warning", printable(folder["problem"], 500))
    if folder["network"] is True:
        yield Advice(
            "warning",
            f"`{printable(folder['filesystem'])}` may be a network filesystem: an output is safer on a local disk, "
            "and use `--read pread` for inputs that others may change",
        )


def _about_defaults(defaults: Facts) -> Iterator[Advice]:
    if defaults["problem"] not in (None, UNKNOWN):
        yield Advice("warning", f"the file of defaults is wrong: {printable(defaults['problem'], 500)}")


def _about_the_terminal(terminal: Facts) -> Iterator[Advice]:
    if terminal["blocks"] is False:
        yield Advice(
            "hint",
            "no UTF-8 here, so bars are drawn in ASCII: `export LC_ALL=C.UTF-8` (and unset PYTHONIOENCODING) "
            "if the terminal can show more",
        )
