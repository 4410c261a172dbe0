"""The state of a run, from its journal and lock: running, interrupted or finished.

Nothing is changed, except that a commit cut short by a kill is taken back, as the next run would do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, printable
from lowmem_aim.output.folder import ACTIVATIONS, LOG, PRIVATE, check_private, is_finished
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import (
    CalibrationSnapshot,
    KeptActivations,
    KeptAnswers,
    KeptComparison,
    PlanSize,
    SolvingSnapshot,
    SweepSize,
)
from lowmem_aim.system import interrupts
from lowmem_aim.system.files import input_errors, is_folder
from lowmem_aim.system.lock import Owner, is_held, owner_of
from lowmem_aim.units import shown
from lowmem_aim.view.plain_lines import line_of
from lowmem_aim.view.progress import Progress, seen
from lowmem_aim.view.record import runs_in


@dataclass(frozen=True)
class Status:
    """The state of a run, and how much of it is done."""

    state: Literal["running", "interrupted", "finished"]
    owner: str  # the process at work; "" if none is, or it is not known
    blocks: int  # calibrated, and kept for the next run
    blocks_total: int  # 0 if nothing is known of a calibration
    activations: bool  # measured and kept
    tensors: int  # finished
    tensors_total: int
    bytes: int  # of finished tensors, as the screen counts them
    bytes_total: int
    now: str = ""  # the progress of a running one, from its log: what its screen shows
    paused: bool = False  # by a key or by `lowmem-aim pause`
    stopped: bool = False  # the process at work sleeps, by Ctrl-Z or SIGSTOP
    pid: int = 0  # of the process at work; 0 if none is, or it is not known
    kept: bool = False  # the next run can build on something
    command: str = ""  # that resumes the run, or starts it again, from the log of the last one
    texts: int = 0  # that have passed one block more than `blocks`, and are kept too
    answered: int = 0  # requests of an evaluation, and kept for the next run
    job: str = ""  # of the last run, from its log
    asked: int = 0  # requests of an evaluation; 0 if none is known
    holds: str = ""  # what the finished file of a calibration holds
    points: int = 0  # of a sweep, that are scored
    points_total: int = 0  # 0 if it is no sweep

    def as_json(self) -> dict[str, Any]:
        """The status as `--json` prints it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The status as lines for people."""
        if self.holds:
            return [f"finished: {self.holds}", "merges take it as `--calibration`"]
        if self.state == "finished" and self.points_total:
            return [f"finished: {self.points} points are scored; the report is in `report`"]
        if self.state == "finished":
            return ["finished; `lowmem-aim verify` checks it"]
        if self.state == "interrupted":
            command = [f"  {printable(self.command, 4096)}"] if self.command else []
            return [interrupts.message(self.kept), *command, *(self._done() if self.kept else ())]
        on_disk = [f"on the disk: {line}" for line in self._done()]
        return [self._at_work(), *([self.now] if self.now else []), *on_disk]

    @property
    def _run_for(self) -> str:
        return "calibrated" if self.job != "evaluate" else "evaluated"

    def _at_work(self) -> str:
        if self.stopped:
            return f"stopped: {self.owner}; `fg` in its terminal continues it, or `kill -CONT {self.pid}`"
        if self.paused:
            return f"paused{': the run is ' * bool(self.owner)}{self.owner}"
        return f"running{f' by {self.owner}' * bool(self.owner)}"

    def _done(self) -> Iterator[str]:
        if self.tensors_total:  # else it is only a calibration
            share = self.bytes / self.bytes_total if self.bytes_total else 0.0
            sizes = f"{share:.0%}, {shown(self.bytes)} of {shown(self.bytes_total)}"
            yield f"{self.tensors}/{self.tensors_total} tensors, {sizes} are finished"
        if self.points_total:
            yield f"{self.points}/{self.points_total} points are scored"
        if self.asked:
            yield f"{self.answered}/{self.asked} requests are answered"
        if self.activations:
            yield "activations are measured"
        elif self.blocks or self.texts:
            more = f", and {self.texts} texts of the next" if self.texts else ""
            yield f"{self.blocks}/{self.blocks_total} blocks are {self._run_for}{more}"


def status_of(out: Path, stages: Sequence[Path] = ()) -> Status:
    """The status of the run in `out`; `stages` are the folders of the stages that it is made of.

    Raises UsageError if no run has been there, DiskError if it cannot be read.
    """
    private = out / PRIVATE
    with input_errors(private, DiskError):
        there = is_folder(private)
    if not there:
        raise UsageError(
            f"there is no run in `{printable(str(out))}`",
            hint="name the output of a merge or of a calibration; a run that kept nothing leaves nothing there",
        )
    check_private(out)
    with Journal(private, read_only=True) as journal:
        sweep = journal.kept(SweepSize)
        finished = sweep.finished if sweep else is_finished(out)
        running = is_held(private / "lock") and (sweep is not None or not finished)
        finished = finished and not running
        size = journal.kept(PlanSize) or PlanSize()
        calibration = journal.kept(CalibrationSnapshot)
        last = {name: groups[-1] for name in size.shards if (groups := journal.groups(name))}
        headers = dict(zip(size.shards, size.headers, strict=False))
        owner = owner_of(private / "lock")
        activations = os.path.isfile(private / ACTIVATIONS) and journal.kept(KeptActivations) is not None
        measured = any(journal.kept(kind) for kind in (KeptComparison, SolvingSnapshot))
        kept = bool(finished or last or activations or calibration or measured)
        answers = journal.kept(KeptAnswers)
        kept = kept or answers is not None or sweep is not None or any(map(keeps_something, stages))
        progress = None if finished else _now(private / LOG)
        return Status(
            state="finished" if finished else "running" if running else "interrupted",
            owner=str(owner) if owner and running else "",
            blocks=calibration.blocks if calibration else 0,
            blocks_total=calibration.of if calibration else 0,
            texts=calibration.texts if calibration else 0,
            activations=activations,
            tensors=sum(group.tensors for group in last.values()),
            tensors_total=size.tensors,
            bytes=sum(group.end - headers.get(name, 0) for name, group in last.items()),
            bytes_total=size.bytes - sum(headers.values()),
            now=line_of(progress) if progress and running else "",
            paused=running and progress is not None and progress.paused,
            stopped=running and owner is not None and _is_stopped(owner),
            pid=owner.pid if owner and running else 0,
            kept=kept,
            answered=answers.answered if answers else 0,
            asked=answers.of if answers else 0,
            points=sweep.scored if sweep else 0,
            points_total=sweep.of if sweep else 0,
            job=progress.started.job if progress and progress.started else "",
            command=progress.started.command if progress and progress.started else "",
        )


def status_of_file(file: Path) -> Status:
    """The status of a calibration whose file is there, and what the file holds. Raises ModelError if it is another."""
    from lowmem_aim.relaxing.activations import facts_of  # only here: `status` is quick

    found, weights = facts_of(file)
    texts = f"measured on {found.sequences} sequences, {found.tokens} tokens in all, in {printable(found.dtype)}"
    return Status(
        "finished", "", 0, 0, True, 0, 0, 0, 0, kept=True, holds=f"activations for {weights} weights, {texts}"
    )


def keeps_something(out: Path) -> bool:
    """Whether the next run in `out` can build on what earlier ones have left."""
    try:
        return status_of(out).kept
    except LowmemAimError:  # nothing is there, or what is there cannot be read
        return False


def _is_stopped(owner: Owner) -> bool:
    """Whether a process on this machine is suspended. False if that cannot be found out."""
    import psutil  # only where a run is alive: `status` is quick

    try:
        return owner.host == socket.gethostname() and psutil.Process(owner.pid).status() == psutil.STATUS_STOPPED
    except (psutil.Error, ValueError, OverflowError):
        return False


def _now(log: Path) -> Progress | None:
    runs = runs_in(log)
    return seen(runs[-1]) if runs else None
