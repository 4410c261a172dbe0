"""Whether an interrupted run may be resumed, and why not: only if the output would be the same.

The journal holds the run's identity. Job and settings must be the same; so must the versions and the device (and, in
the middle of a calibration, the number of threads), unless the user accepts others. An input whose files have other
times or inodes (copied, downloaded anew) is read again as far as the run had come, and accepted if it still gives what
it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_aim.errors import DiskError, ResumeError, printable
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.jobs.differences import differences, most
from lowmem_aim.jobs.identity import INSTRUCTIONS, SOLVING, THREADS, as_kept, digest_of, is_moved, sizes_of
from lowmem_aim.merging.slices import Stride, TensorInputs
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.folder import ACTIVATIONS
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import (
    PROGRESS,
    AcceptedEnvironments,
    CalibrationSnapshot,
    Identity,
    KeptActivations,
    KeptComparison,
    Record,
)
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.system.files import input_errors, is_there, read_file

REREAD_ELEMENTS = 1 << 20

RESUME_HINT = "`--fresh` starts over; to resume it, give the same command and inputs as before"
Reread = Callable[[int], Iterator[str]]  # number of an input -> its tensors that are not what they were


def agree(journal: Journal, now: Identity, reread: Reread, *, accept_environment: bool, emit: Emit) -> None:
    """Record the identity of a new run, or check that an interrupted run has the same one.

    Raises ResumeError with every difference; emits a notice for each that the user accepts.
    """
    before = journal.kept(Identity)
    if before is None:  # new; or what it was of is lost, and with it what the rest is worth
        journal.forget(AcceptedEnvironments, *PROGRESS)
        journal.keep(now)
        return
    now = as_kept(now)
    changed = list(_changed_inputs(before, now, reread, emit))
    elsewhere = _refuse_differences(journal, before, now, changed, accept_environment)
    if elsewhere:
        for difference in elsewhere:
            emit(Notice(f"resumed although the environment differs: {difference}", "warning"))
        accepted = journal.kept(AcceptedEnvironments) or AcceptedEnvironments([_compared(before, journal)])
        journal.keep(AcceptedEnvironments([*accepted.environments, _compared(now, journal)]))
    journal.keep(now)


def activations_kept(private: Path, journal: Journal) -> bool:
    """Whether the activations that an interrupted run has measured lie in its folder as they were written.

    Raises DiskError for a file that cannot be read.
    """
    file, kept = private / ACTIVATIONS, journal.kept(KeptActivations)
    with input_errors(file, DiskError):
        return kept is not None and is_there(file) and kept.file == digest_of_file(file)


def digest_of_file(file: Path) -> str:
    """xxh3-128 of the bytes of a small file in the output's folder. Raises OSError."""
    return digest_of(read_file(file, follow=False))


def check_same_job(
    journal: Journal, now: Identity, *, accept_environment: bool, lost: Sequence[type[Record]] = ()
) -> None:
    """Raise ResumeError if an interrupted run is certain to be another one. Nothing is read of the models.

    `lost`: kinds of records that the run would find to be worth nothing.
    """
    before = journal.kept(Identity)
    if before is not None:
        now = as_kept(now)
        changed = list(_changed_inputs(before, now, lambda number: iter(()), silent))
        _refuse_differences(journal, before, now, changed, accept_environment, lost)


def _refuse_differences(
    journal: Journal,
    before: Identity,
    now: Identity,
    changed: list[str],
    accept_environment: bool,
    lost: Sequence[type[Record]] = (),
) -> list[str]:
    """Raise ResumeError for another job, changed inputs, or another environment that the user does not accept.

    Returns the differences of the environment that are accepted.
    """
    problems = [*differences(before.job, now.job, explained=bool(changed)), *changed]
    elsewhere = differences(_compared(before, journal, lost), _compared(now, journal, lost))
    if elsewhere and not accept_environment:
        problems += elsewhere
    if problems:
        only = "`--accept-environment` resumes it anyway; " if len(elsewhere) == len(problems) else ""
        raise ResumeError(
            ["the interrupted run in this folder was a different one:", *most(problems)],
            hint=f"{only}{RESUME_HINT}",
        )
    return elsewhere


def _compared(identity: Identity, journal: Journal, lost: Sequence[type[Record]] = ()) -> dict[str, str]:
    """The parts of the environment that still make a difference."""
    job = identity.job
    needed = ((KeptActivations, "calibration"), (KeptComparison, "texts of ACM"))
    there = [kind for kind in PROGRESS if kind not in lost and journal.holds(kind)]
    measured = all(kind in there for kind, key in needed if key in job)
    dropped: tuple[str, ...] = () if there and not measured else (THREADS, INSTRUCTIONS)
    dropped += () if there else SOLVING
    return {key: value for key, value in identity.environment.items() if key not in dropped}


def _changed_inputs(before: Identity, now: Identity, reread: Reread, emit: Emit) -> Iterator[str]:
    """Yield why models are not what they were."""
    if len(before.inputs) == len(now.inputs):
        for number, (old, new) in enumerate(zip(before.inputs, now.inputs, strict=True)):
            yield from _changed(old, new, partial(reread, number), emit)


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], reread: Callable[[], Iterator[str]], emit: Emit
) -> Iterator[str]:
    """Yield why a model is not what it was."""
    label = printable(str(new["label"]))
    if old["tensors"] != new["tensors"] or sizes_of(old) != sizes_of(new):
        yield f"`{label}` no longer has the same tensors or files"
    elif is_moved(old, new):
        emit(Notice(f"`{label}` has new or moved files: what was read from it is read again"))
        for name in reread():
            yield f"`{label}` no longer has the same `{printable(name)}`"
            return  # one says enough; others would take their time


def differing_tensors(plan: Plan, inputs: Inputs, journal: Journal, number: int) -> Iterator[str]:
    """Yield the tensors of one input that do not give what they gave to an interrupted merge."""
    if inputs.base is not None and inputs.places[number] == inputs.base.place:
        yield from differing_weights(inputs.base, journal)
    yield from not_as_read(
        plan, inputs, digests_read([shard.name for shard in plan.shards], journal).get(str(number), {}), number
    )


def not_as_read(plan: Plan, inputs: Inputs, digests: Mapping[str, str], number: int) -> Iterator[str]:
    """Yield the tensors of one input that do not give what they gave to a merge: tensor -> digest."""
    known, place = dict(digests), inputs.places[number]
    stride = Stride(REREAD_ELEMENTS)
    for task in plan.tasks:
        for reader in TensorInputs(task, True, stride).sources:
            if reader.checkpoint.place == place and reader.tensor in known:
                for start, stop in stride.cuts(task.shape):
                    reader.enter_digest(reader.pieces(start, stop))
                if reader.digest() != known.pop(reader.tensor):  # each once: several tasks may read it
                    yield reader.tensor


def digests_read(shards: Iterable[str], journal: Journal) -> dict[str, dict[str, str]]:
    """xxh3-128 of what a merge has read for its shards: number of an input -> tensor -> digest."""
    found: dict[str, dict[str, str]] = {}
    for shard in shards:
        for group in journal.groups(shard):
            for number, digests in group.digests.items():
                found.setdefault(number, {}).update(digests)
    return found


def differing_weights(base: Checkpoint, journal: Journal, number: int = 0) -> Iterator[str]:
    """Yield the tensors of the base that do not give what they gave to an interrupted calibration."""
    seen = journal.kept(KeptActivations) or journal.kept(CalibrationSnapshot)
    for name, known in seen.weights.items() if seen else ():
        if base.digest(name) != known:
            yield name
