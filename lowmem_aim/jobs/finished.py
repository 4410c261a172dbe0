"""Whether a finished output is of this very job, and its inputs are what they were when it was made.

The journal has a digest of every tensor as it was read. An input whose files have other times or inodes is read again
and compared with these digests. If nothing differs, the new times are kept in a file beside the journal, which is
sealed, and the next run need not read. A damaged file of that kind leads to reading again, nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_aim.errors import DiskError, ResumeError, UsageError, VerifyError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.jobs.differences import differences, most
from lowmem_aim.jobs.identity import as_kept, asked_for, content_of, digest_of, is_moved, sizes_of
from lowmem_aim.jobs.resume import RESUME_HINT, Reread
from lowmem_aim.output.folder import PRIVATE, SEEN, SUMS
from lowmem_aim.output.journal import FINISHED_HINT, Journal
from lowmem_aim.output.journal import NAME as JOURNAL
from lowmem_aim.output.records import Identity, MadeStage, PlanSize
from lowmem_aim.output.verify import missing_files
from lowmem_aim.system.files import input_errors, is_file, write_file

RereadStage = Callable[[Mapping[str, str], int], Iterator[str]]  # digests, number of an input -> what is not as it was
_DAMAGED_HINT = "remove this folder and give the same command again, or name a new folder"


def check_same(journal: Journal, now: Identity, out: Path) -> list[int]:
    """The numbers of the inputs whose files have other times or inodes than before: only reading shows their content.

    Nothing is read of the models. Raises UsageError if the finished output in `out` is of another job, ResumeError if
    it is certain to be of other inputs, VerifyError if files of it are lost or cut.
    """
    before, now = journal.kept(Identity), as_kept(now)
    if before is None:
        raise UsageError([_not_empty(out, "its journal is damaged")], FINISHED_HINT)
    _compare(before, now, out)
    _check_files(journal, out)
    seen = _seen(out / PRIVATE) or before.inputs
    return [
        number
        for number, (model, *known) in enumerate(zip(now.inputs, before.inputs, seen, strict=True))
        if all(is_moved(old, model) for old in known)
    ]


@contextlib.contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Raise ResumeError for what is wrong with a finished stage: the run that it belongs to is not over.

    `name`: of the stage; "": it is an output, whose errors are raised as they are.
    """
    try:
        yield
    except (UsageError, ResumeError) as error:
        if not name:
            raise
        raise ResumeError(error.problems, RESUME_HINT) from error


def check_stage(stage: MadeStage, now: Identity, out: Path, reread: RereadStage | None, emit: Emit) -> None:
    """Check that a finished output was made of this very stage, whose folder is gone.

    `reread` reads inputs that may have changed; None: they are not read. Raises UsageError, ResumeError.
    """
    before, now = Identity(stage.job, stage.inputs, {}), as_kept(now)
    _compare(before, now, out)
    for number, (old, model) in enumerate(zip(before.inputs, now.inputs, strict=True)):
        if reread and is_moved(old, model):
            _read_again(model, partial(reread, stage.digests.get(str(number), {}), number), out, emit)


def _compare(before: Identity, now: Identity, out: Path) -> None:
    """Raise UsageError for another job, ResumeError for inputs that are certain to be others."""
    others = [*_other_inputs(before, now)]
    elsewhere = differences(before.job, now.job, explained=bool(others))
    inputs_changed = bool(others) or content_of(before) != content_of(now)
    if elsewhere and (asked_for(before) != asked_for(now) or not inputs_changed):
        raise UsageError([_not_empty(out, "it holds another merge"), *most(elsewhere)], FINISHED_HINT)
    if inputs_changed:
        raise ResumeError([_not_of_these(out), *most([*others, *elsewhere])], FINISHED_HINT)


def check_content(journal: Journal, now: Identity, out: Path, reread: Reread, emit: Emit) -> None:
    """Check a finished output as `check_same` does, and read the inputs that may have changed.

    Raises UsageError, and ResumeError with the first tensor of an input that differs.
    """
    moved = check_same(journal, now, out)
    if moved and not _is_whole(journal):
        raise UsageError([_not_empty(out, "its journal is damaged")], FINISHED_HINT)
    for number in moved:
        _read_again(now.inputs[number], partial(reread, number), out, emit)
    if moved:
        _keep(out / PRIVATE, as_kept(now).inputs)


def _read_again(model: Mapping[str, Any], reread: Callable[[], Iterator[str]], out: Path, emit: Emit) -> None:
    label = printable(str(model["label"]))
    emit(Notice(f"`{label}` has new or moved files: what was read from it is read again"))
    for name in reread():
        raise ResumeError([_not_of_these(out), f"`{label}` no longer has the same `{printable(name)}`"], FINISHED_HINT)


def _other_inputs(before: Identity, now: Identity) -> Iterator[str]:
    if len(before.inputs) != len(now.inputs):
        yield f"it was made from {len(before.inputs)} models, and there are {len(now.inputs)} now"
        return
    for old, new in zip(before.inputs, now.inputs, strict=True):
        if (old["label"], old["tensors"], sizes_of(old)) != (new["label"], new["tensors"], sizes_of(new)):
            yield f"`{printable(str(new['label']))}` no longer has the same tensors or files"


def _check_files(journal: Journal, out: Path) -> None:
    """Raise VerifyError if files of the output are missing, or shards have another size; `verify` reads them all."""
    problems = [f"`{printable(name)}` is missing" for name in missing_files(out, f"{PRIVATE}/{SUMS}")]
    with input_errors(out, VerifyError):
        for shard in (journal.kept(PlanSize) or PlanSize()).shards:
            expected = max((group.end for group in journal.groups(shard)), default=0)
            size = (out / shard).stat().st_size if is_file(out / shard) else expected
            if size != expected > 0:
                problems.append(f"`{printable(shard)}` has {size} bytes instead of {expected}")
    if problems:
        raise VerifyError([f"`{printable(str(out))}` was finished, but is damaged:", *problems], _DAMAGED_HINT)


def _is_whole(journal: Journal) -> bool:
    """Whether the journal still has the digests of every tensor of the output."""
    size = journal.kept(PlanSize) or PlanSize()
    groups = [group for shard in size.shards for group in journal.groups(shard)]
    names = {name for group in groups for digests in group.digests.values() for name in digests}
    return len(names) == size.tensors > 0


def _not_empty(out: Path, why: str) -> str:
    return f"the output folder `{printable(str(out))}` is not empty: {why}"


def _not_of_these(out: Path) -> str:
    return f"`{printable(str(out))}` is finished, but its inputs have changed since:"


def _seen(private: Path) -> Sequence[Mapping[str, Any]] | None:
    """The inputs as a later run has read them; None if no run has, of this journal."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads((private / SEEN).read_text(encoding="utf-8"))
        if kept["journal"] == _digest_of_journal(private) and isinstance(kept["inputs"], list):
            return list(kept["inputs"])
    return None


def _keep(private: Path, inputs: Sequence[Mapping[str, Any]]) -> None:
    kept = {"journal": _digest_of_journal(private), "inputs": inputs}
    with contextlib.suppress(DiskError):  # then the next run reads again
        write_file(private / SEEN, json.dumps(kept).encode())


def _digest_of_journal(private: Path) -> str:
    return digest_of((private / JOURNAL).read_bytes())
