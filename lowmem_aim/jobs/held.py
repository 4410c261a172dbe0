"""The outputs of a merge while a run holds their folders: agreed on with what earlier runs have left there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from lowmem_aim.errors import printable
from lowmem_aim.events import Emit, Notice, Phase, Planned
from lowmem_aim.jobs.finished import check_content, of_stage
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.jobs.resume import activations_kept, agree, differing_tensors
from lowmem_aim.measuring.calibration import Measurement
from lowmem_aim.merging.targets import Sink
from lowmem_aim.output.folder import check_disk, is_finished
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import KeptActivations, PlanSize
from lowmem_aim.output.shards import Shards
from lowmem_aim.output.workspace import Workspace, workspace
from lowmem_aim.planning.survey import survey
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.relaxing.relaxation import Consensus
from lowmem_aim.system.on_demand import torch


class Output(Protocol):
    """One output while it is merged: its plan, where its rows go, and what its relaxations have found."""

    plan: Plan
    consensus: Consensus | None  # of ACM
    weaker: Sequence[str]  # the weights of which a control takes back less than AIM would

    @property
    def scratch(self) -> Path:
        """The folder for what does not fit in memory, in files without a name."""
        ...

    @property
    def journal(self) -> Journal | None:
        """The journal of what is finished; None if nothing is kept for another run."""
        ...

    def sink(self, emit: Emit) -> Sink:
        """The place where finished rows go."""
        ...


@dataclass
class HeldOutput:
    """One output while it is made: its plan, its folder, which this run holds, and what its relaxations have found."""

    name: str  # of its folder, where there are several; else empty
    plan: Plan
    space: Workspace
    consensus: Consensus | None = None  # of ACM
    weaker: Sequence[str] = ()  # the weights of which a control takes back less than AIM would

    @property
    def scratch(self) -> Path:
        """The folder for what does not fit in memory, and for snapshots."""
        return self.space.private

    @property
    def journal(self) -> Journal:
        """The journal of what is finished."""
        return self.space.journal

    def sink(self, emit: Emit) -> Shards:
        """The shards, in the staging folder."""
        return Shards(self.plan, self.space.staging, self.space.journal, emit, self.name)


@contextlib.contextmanager
def holding(out: Path, names: Iterable[str], *, fresh: bool) -> Iterator[dict[str, Workspace]]:
    """Hold the folder of each output in `out` against other runs. Raises LockedError, DiskError, UsageError."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(workspace(out / name, fresh=fresh, stages=out)) for name in names}


def agreed(ready: Prepared, spaces: Mapping[str, Workspace]) -> list[HeldOutput]:
    """The outputs that are still to be made, once their folders are sure to be this job's.

    Raises ResumeError, UsageError, DiskError.
    """
    outputs = [HeldOutput(name, plan, spaces[name]) for name, plan in ready.plans.items()]
    left = [output for output in outputs if _is_left(ready, output.name, output.space)]
    if left:
        check_disk(ready.out, ready.bytes_to_write())
    return left


def _is_left(ready: Prepared, name: str, space: Workspace) -> bool:
    """Whether an output is still to be made; its folder is checked to be this job's. Raises ResumeError, UsageError."""
    plan = ready.plans[name]
    reread = partial(differing_tensors, plan, ready.inputs, space.journal)
    if is_finished(space.out):
        with of_stage(ready.position.stage):
            check_content(space.journal, ready.lasting(name), space.out, reread, ready.emit)
        ready.emit(Notice(f"`{printable(str(space.out))}` is finished already"))
        return False
    _forget_lost(space)
    accept = ready.options.accept_environment
    agree(space.journal, ready.identity(name), reread, accept_environment=accept, emit=ready.emit)
    space.journal.keep(PlanSize(**plan.size()))
    space.take_back()
    return True


def planned(ready: Prepared, names: Sequence[str]) -> Planned:
    """The event that says what a merge will do: it makes the outputs with these names."""
    plans: Mapping[str, Plan] = {name: ready.plans[name] for name in names}
    recipes, budget = [plan.recipe for plan in plans.values()], ready.run.budget
    relaxed = any(recipe.aim for recipe in recipes)
    phases: list[Phase] = ["calibrate"] if relaxed and isinstance(ready.calibration, Measurement) else []
    phases += ["compare"] if any(recipe.acm for recipe in recipes) else []
    layers = Counter("" if task.layer is None else str(task.layer) for plan in plans.values() for task in plan.tasks)
    surveyed = survey(plans, ready.inputs)
    return Planned(
        surveyed.title,
        (*phases, "merge", "finish"),
        str(ready.run.device),
        torch.get_num_threads(),
        budget.ram,
        budget.vram,
        tensors=sum(len(plan.tasks) for plan in plans.values()),
        layers=_in_order(layers),
        about=surveyed.as_json(),
    )


def planned_in_all(stages: Mapping[str, Planned], last: Planned) -> Planned:
    """The event for a run that makes several merges: the named stages, and the output at the end."""
    parts = [*stages.values(), last]
    layers = sum((Counter(part.layers) for part in parts), Counter[str]())
    about = {"stages": {name: part.about for name, part in stages.items()}}
    return replace(
        last,
        tensors=sum(part.tensors for part in parts),
        layers=_in_order(layers),
        about={**last.about, **about},
        stages=tuple((name, phase) for name, part in stages.items() for phase in part.phases),
    )


def _in_order(layers: Counter[str]) -> dict[str, int]:
    return {name: layers[name] for name in sorted(layers, key=lambda name: int(name or -1))}


def _forget_lost(space: Workspace) -> None:
    """Forget kept activations whose file is gone: measuring them again then requires the same environment."""
    if space.journal.holds(KeptActivations) and not activations_kept(space.private, space.journal):
        space.journal.forget(KeptActivations)
