"""What a run has come to, told from its journal and lock: alive, interrupted or finished. Nothing is changed."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_aim.durable import is_held, owner_of
from lowmem_aim.errors import DiskError, UsageError, printable
from lowmem_aim.journal import Journal
from lowmem_aim.output import ACTIVATIONS, PRIVATE, is_finished


@dataclass(frozen=True)
class Status:
    state: Literal["running", "interrupted", "finished"]
    owner: str  # who is, or was last, at work; "" where that is not known
    activations: bool  # measured and kept
    tensors: int  # finished
    tensors_total: int
    bytes: int
    bytes_total: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        by = f" by {self.owner}" if self.owner else ""
        if self.state == "finished":
            return ["finished; `lowmem-aim verify` reads it all again"]
        heading = f"running{by}" if self.state == "running" else "interrupted: run the same command again to go on"
        done = f"{self.tensors}/{self.tensors_total} tensors, "
        done += f"{self.bytes / 2**30:.1f} of {self.bytes_total / 2**30:.1f} GiB are finished"
        if self.state == "interrupted" and not self.tensors and not self.activations:
            return ["interrupted before anything was finished: the same command starts again"]
        return [heading, done, *(["activations are measured"] if self.activations else [])]


def status_of(out: Path) -> Status:
    """Raises UsageError if no run has been here."""
    private = out / PRIVATE
    if not private.is_dir():
        raise UsageError(f"no run of this tool has been in `{printable(str(out))}`")
    if not os.access(private, os.R_OK | os.X_OK):
        raise DiskError(f"`{printable(str(private))}` cannot be read: no permission")
    finished = is_finished(out)
    running = not finished and is_held(private / "lock")
    with Journal(private, read_only=True) as journal:
        plan: dict[str, Any] = journal.get("plan") or {"tensors": 0, "bytes": 0, "shards": []}
        last = [groups[-1] for name in plan["shards"] if (groups := journal.groups(name))]
        owner = owner_of(private / "lock")
        return Status(
            state="finished" if finished else "running" if running else "interrupted",
            owner=str(owner) if owner and running else "",
            activations=(private / ACTIVATIONS).is_file() and journal.get("activations") is not None,
            tensors=sum(group.tensors for group in last),
            tensors_total=plan["tensors"],
            bytes=sum(group.end for group in last),
            bytes_total=plan["bytes"],
        )
