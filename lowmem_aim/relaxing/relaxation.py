"""The relaxation of merged rows, after the method: AIM's of each weight, then ACM's of the weight's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.methods.method import Rows
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import broadcasts
from lowmem_aim.planning.tasks import Task
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.aim import relax, shrinkage, shrinkage_rows
from lowmem_aim.relaxing.controls import controlled, falls_short
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # not imported for a name in signatures

Relax = Callable[[Tensor, Rows], Tensor]  # merged rows (overwritten) and their inputs -> relaxed rows

UNFITTING_WEIGHTS_NAMED = 5  # more are only counted: activations of another model fit none of the weights


@dataclass(frozen=True)
class Consensus:
    """The result of ACM for one merged model, by group: "0", "1", ... the layers, and those of `relaxing.acm`."""

    information: Mapping[str, Sequence[float]]  # nats between base and merged model, for each text
    freezing: Mapping[str, float]  # the share of the delta that is not taken
    named: Mapping[str, str]  # tensor -> group, of those outside the layers
    texts: int
    tokens: int  # of all texts together

    def of(self, task: Task) -> float:
        """The share of a tensor's delta that is not taken."""
        return self.freezing.get(self.named.get(task.name, "") if task.layer is None else str(task.layer), 0.0)


class Step(Protocol):
    """One relaxation of a finished delta; an output's are applied one after another."""

    def touches(self, task: Task) -> bool:
        """Whether the step changes this weight."""
        ...

    def of(self, task: Task) -> Relax | None:
        """The relaxation of one weight; None where it has none."""
        ...

    def check_base(self, task: Task, digest: str | None) -> None:
        """Raise ModelError if the step was measured on another base than the one whose tensor has `digest`."""
        ...


@dataclass(frozen=True)
class ByChannel:
    """AIM: each weight's delta shrinks by input channel (arXiv 2502.02421). Or a control of AIM, see `controls`."""

    aim: Aim
    activations: Activations  # of `base`
    base: Checkpoint

    def touches(self, task: Task) -> bool:
        """Whether AIM relaxes this weight."""
        return self._statistic(task) is not None

    def of(self, task: Task) -> Relax | None:
        """The relaxation of one weight by its input channels; None where it has no statistic."""
        name = self._statistic(task)
        if name is None:
            return None
        means, aim = self.activations.means[name], self.aim
        if aim.control:
            shrink = controlled(means, task.omega, aim, task.name)
        else:
            shrink = shrinkage(means, task.omega, aim.scaling)

        def relaxed(merged: Tensor, rows: Rows) -> Tensor:
            first = rows.start // merged.shape[1]
            part = shrinkage_rows(shrink, task.shape, first, first + rows.count)
            part = _known(_rows_of_base(task), part, first, rows.count)
            return relax(merged, rows.stored_base, part.to(merged.device))

        return relaxed

    def weaker(self, tasks: Iterable[Task]) -> list[str]:
        """The names of the weights of which a control takes back less than AIM would."""
        means, merged = self.activations.means, [task for task in tasks if task.action == "merge"]
        found = [(task, name) for task in merged if (name := self._statistic(task)) is not None]
        return [task.name for task, name in found if falls_short(means[name], task.omega, self.aim)]

    def check_base(self, task: Task, digest: str | None) -> None:
        """Raise ModelError unless the activations were measured on the base's tensor that has this digest."""
        name = task.base.tensor if task.base and self.touches(task) else ""
        expected = self.activations.base_digests.get(name)
        if expected is not None and expected != digest:
            raise ModelError(
                f"the activations were measured on another base: `{printable(name)}` differs in "
                f"`{printable(self.base.label)}`",
                hint="calibrate this base (`lowmem-aim calibrate`), or, if they came from the cache, pass `--no-cache`",
            )

    def _statistic(self, task: Task) -> str | None:
        """The name of the statistic that relaxes this weight; None where it is not relaxed."""
        return statistic_of(task.base.tensor, self.activations, self.aim) if task.base else None


@dataclass(frozen=True)
class ByLayer:
    """ACM: each layer's delta shrinks as a whole (arXiv 2505.14009)."""

    consensus: Consensus

    def touches(self, task: Task) -> bool:
        """Whether ACM takes back some of this weight's delta."""
        return self._frozen(task) > 0.0

    def of(self, task: Task) -> Relax | None:
        """The relaxation of one weight by its layer; None where ACM takes nothing back."""
        frozen = self._frozen(task)
        if not frozen:
            return None

        def relaxed(merged: Tensor, rows: Rows) -> Tensor:
            first = rows.start // merged.shape[1]
            part = torch.full((1, merged.shape[1]), frozen)
            part = _known(_rows_of_base(task), part, first, rows.count)
            return relax(merged, rows.stored_base, part.to(merged.device))

        return relaxed

    def check_base(self, task: Task, digest: str | None) -> None:
        """Check nothing: ACM is measured in the run that applies it, and `Consensus` is stamped with its inputs."""

    def _frozen(self, task: Task) -> float:
        """The share of the delta that ACM takes back."""
        return self.consensus.of(task) if task.base else 0.0


@dataclass(frozen=True)
class Relaxation:
    """All relaxations of one output's merged rows, one after another; without a step, rows stay as they are."""

    steps: tuple[Step, ...] = ()

    def touches(self, task: Task) -> bool:
        """Whether any step changes this weight."""
        return any(step.touches(task) for step in self.steps)

    def of(self, task: Task) -> Relax | None:
        """The relaxations of one weight as one; None where it has none."""
        relaxations = [found for step in self.steps if (found := step.of(task)) is not None]
        if not relaxations:
            return None

        def relaxed(merged: Tensor, rows: Rows) -> Tensor:
            for one in relaxations:
                merged = one(merged, rows)
            return merged

        return relaxed

    def check_base(self, task: Task, digest: str | None) -> None:
        """Raise ModelError if a step was measured on another base."""
        for step in self.steps:
            step.check_base(task, digest)

    def then(self, step: Step) -> Relaxation:
        """Return this relaxation with one more step at its end."""
        return Relaxation((*self.steps, step))


def _rows_of_base(task: Task) -> Tensor | None:
    return task.base.row_map if task.base else None


def _known(
    row_map: Tensor | None,
    part: Tensor,  # (1 or count, columns) of a shrinkage: `count` rows from `first` on
    first: int,
    count: int,
) -> Tensor:
    """Return `part` with zeros in the rows that the base does not have: new vocabulary is not relaxed."""
    if row_map is None:
        return part
    known = row_map[first : first + count] >= 0
    return torch.where(known[:, None], part, 0.0)


def statistic_of(name: str, activations: Activations, aim: Aim) -> str | None:
    """Name of the statistic that relaxes the weight `name`: its own, its head's for a tied embedding, or None."""
    return None if any(part in name for part in aim.exclude) else _fitting(name, activations, aim)


def _fitting(name: str, activations: Activations, aim: Aim) -> str | None:
    if name in activations.tied and aim.tied == "keep":
        return None  # the head itself is what the file holds of the pair
    if name in activations.means:
        return name
    heads = [head for head, embedding in activations.tied.items() if embedding == name and head in activations.means]
    return heads[0] if heads and aim.tied == "relax" else None


def check_activations(activations: Activations, base: Checkpoint, aim: Aim) -> None:
    """Raise ModelError, with all problems at once, unless the statistics fit the weights they are for."""
    problems = []
    fitting = 0
    for info in base:
        name = _fitting(info.name, activations, aim)
        if name is None:
            continue
        if not broadcasts(activations.means[name].shape, info.shape):
            found = list(activations.means[name].shape)
            problems.append(f"the activations of `{printable(name)}` {found} do not fit {list(info.shape)}")
        fitting += 1
    if len(problems) > UNFITTING_WEIGHTS_NAMED:
        problems[UNFITTING_WEIGHTS_NAMED:] = [f"nor do those of {len(problems) - UNFITTING_WEIGHTS_NAMED} more weights"]
    strange = [name for name in activations.means if name not in base.tensors and name not in activations.tied]
    if fitting and strange:
        what = f"{len(strange)} weights of the activations, such as `{printable(strange[0])}`"
        problems.append(f"{what}, do not exist in `{printable(base.label)}`")
    if not fitting:
        problems.append(f"the activations name no weight of `{printable(base.label)}`")
    if problems:
        raise ModelError(problems, hint="they were measured on another model; make them with `lowmem-aim calibrate`")


def idle_exclusions(activations: Activations, base: Checkpoint, aim: Aim) -> Iterator[str]:
    """The entries of `aim.exclude` that are part of no weight that would be relaxed."""
    relaxed = [info.name for info in base if _fitting(info.name, activations, aim) is not None]
    return (part for part in aim.exclude if not any(part in name for name in relaxed))
