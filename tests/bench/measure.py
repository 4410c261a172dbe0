"""What a command costs: wall and CPU seconds, peak anonymous and resident memory of its whole process tree."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.02
BUSY = 0.3  # of one core: another program is at work
PATIENCE_SECONDS: float = 60
BUFFER = 8 << 20


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds, user and system
    anonymous: int  # bytes
    resident: int  # bytes
    exit_code: int
    noisy: bool  # something else was running

    def as_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)


def cost_of(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end; what it says goes into `log`."""
    noisy = not _quiet()
    before, started = _cpu_seconds(), time.monotonic()
    anonymous = resident = 0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, **(environment or {})})
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            own = _memory(tree)
            anonymous, resident = max(anonymous, own[0]), max(resident, own[1])
            time.sleep(SAMPLE_SECONDS)
    wall = time.monotonic() - started
    return Cost(round(wall, 2), round(_cpu_seconds() - before, 2), anonymous, resident, process.returncode, noisy)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory(tree: psutil.Process) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process and its children now."""
    anonymous = resident = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.Error:
        return 0, 0
    for member in members:
        try:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
        except OSError:
            continue
        table = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
        anonymous += int(table.get("RssAnon", 0)) * 1024
        resident += int(table.get("VmRSS", 0)) * 1024
    return anonymous, resident


def _quiet() -> bool:
    """Wait until nothing else runs, for a while; whether it came to that."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1) > BUSY:
        if time.monotonic() > deadline:
            return False
    return True


def digests(folder: Path) -> dict[str, str]:
    """File name -> sha256 of all that lies in a folder, what lies deeper excepted."""
    found = {}
    for file in (file for file in sorted(folder.iterdir()) if file.is_file()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def disk_limit(inputs: list[Path], output: Path, size: int) -> None:
    """Read every input once, write `size` bytes once, fsync. Run as `measure.py IN... OUT SIZE`."""
    buffer = bytearray(BUFFER)
    for file in inputs:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as stream:
        left = size
        while left:
            left -= stream.write(memoryview(buffer)[: min(left, BUFFER)])
        os.fsync(stream.fileno())
    output.unlink()


if __name__ == "__main__":
    disk_limit([Path(name) for name in sys.argv[1:-2]], Path(sys.argv[-2]), int(sys.argv[-1]))
