"""What becomes of merged rows after the method: AIM's relaxation of each weight, then ACM's of its layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.methods.method import Rows
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.layers import layer_count, layer_of
from lowmem_aim.planning.tasks import Task
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.aim import relax, shrinkage, shrinkage_rows

Relax = Callable[[Tensor, Rows], Tensor]  # merged rows (overwritten) and their inputs -> relaxed rows

MOST_PROBLEMS = 5  # of one kind that are told: activations of another model fit none of its weights


@dataclass(frozen=True)
class Consensus:
    """What ACM has found for one merged model, by group: "0", "1", ... the layers, and those of `relax.acm`."""

    information: Mapping[str, Sequence[float]]  # nats between base and merged model, for each text
    freezing: Mapping[str, float]  # the share of the delta that is not taken
    named: Mapping[str, str]  # tensor -> group, of those outside the layers
    texts: int
    tokens: int  # of all texts together

    def of(self, tensor: str, layers: int) -> float:
        """The share of a tensor's delta that is not taken."""
        layer = layer_of(tensor, layers)
        return self.freezing.get(self.named.get(tensor, "") if layer is None else str(layer), 0.0)


class Relaxation:
    """AIM and ACM as one recipe asks for them; nothing, where it does not."""

    def __init__(
        self, aim: Aim | None, activations: Activations | None, inputs: Inputs, consensus: Consensus | None = None
    ) -> None:
        self._aim, self._activations, self._inputs, self._consensus = aim, activations, inputs, consensus
        self._layers = layer_count(inputs.reference.config)

    def statistic(self, task: Task) -> str | None:
        """Whose statistic relaxes this weight; None where it is not relaxed."""
        if self._aim is None or self._activations is None or task.action == "copy":
            return None
        return statistic_of(task.name, self._activations, self._aim)

    def touches(self, task: Task) -> bool:
        return self.statistic(task) is not None or self._frozen(task) > 0.0

    def _frozen(self, task: Task) -> float:
        """How much of the delta ACM takes back."""
        if self._consensus is None or task.action == "copy":
            return 0.0
        return self._consensus.of(task.name, self._layers)

    def of(self, task: Task) -> Relax | None:
        """The relaxation of one weight; None where it has none."""
        by_channel, by_layer = self._by_channel(task), self._by_layer(task)
        if by_channel is None or by_layer is None:
            return by_channel or by_layer
        return lambda merged, rows: by_layer(by_channel(merged, rows), rows)

    def _by_layer(self, task: Task) -> Relax | None:
        frozen = self._frozen(task)
        if not frozen:
            return None

        def relaxed(merged: Tensor, rows: Rows) -> Tensor:
            first = rows.start // merged.shape[1]
            shrink = torch.full((1, merged.shape[1]), frozen)
            return relax(merged, rows.stored_base, self._known(task, shrink, first, rows.count).to(merged.device))

        return relaxed

    def _by_channel(self, task: Task) -> Relax | None:
        name = self.statistic(task)
        if name is None:
            return None
        assert self._activations is not None
        assert self._aim is not None
        shrink = shrinkage(self._activations.means[name], task.omega, self._aim.scaling)

        def relaxed(merged: Tensor, rows: Rows) -> Tensor:
            first = rows.start // merged.shape[1]
            part = shrinkage_rows(shrink, task.shape, first, first + rows.count)
            part = self._known(task, part, first, rows.count)
            return relax(merged, rows.stored_base, part.to(merged.device))

        return relaxed

    def _known(self, task: Task, part: Tensor, first: int, count: int) -> Tensor:
        """`part` of a shrinkage without the rows that the base does not have: new vocabulary is not relaxed."""
        assert self._inputs.base is not None
        row_map = self._inputs.row_map(self._inputs.base, task.name)
        if row_map is None:
            return part
        known = row_map[first : first + count] >= 0
        return torch.where(known[:, None], part, 0.0)

    def check_base(self, task: Task, digest: str | None) -> None:
        """The activations must have been taken on these very weights. Raises ModelError."""
        if self.statistic(task) is None:
            return
        assert self._inputs.base is not None
        assert self._activations is not None
        expected = self._activations.base_digests.get(task.name)
        if expected is not None and expected != digest:
            raise ModelError(
                f"the activations were measured on another base: `{printable(task.name)}` differs in "
                f"`{printable(self._inputs.base.label)}`",
                hint="calibrate this base (`lowmem-aim calibrate`), or, if they came from the cache, pass `--no-cache`",
            )


def statistic_of(name: str, activations: Activations, aim: Aim) -> str | None:
    """Whose statistic relaxes the weight `name`: its own; its head's, for a tied embedding; or none."""
    return None if any(part in name for part in aim.exclude) else _fitting(name, activations, aim)


def _fitting(name: str, activations: Activations, aim: Aim) -> str | None:
    if name in activations.tied and aim.tied == "keep":
        return None  # the head itself is what the file holds of the pair
    if name in activations.means:
        return name
    heads = [head for head, embedding in activations.tied.items() if embedding == name and head in activations.means]
    return heads[0] if heads and aim.tied == "relax" else None


def check_activations(activations: Activations, inputs: Inputs, aim: Aim) -> None:
    """Raises ModelError unless the statistics fit the weights they are for; all problems at once."""
    assert inputs.base is not None
    problems = []
    fitting = 0
    for info in inputs.base:
        name = _fitting(info.name, activations, aim)
        if name is None:
            continue
        means = activations.means[name]
        if means.ndim != len(info.shape) or any(m not in (1, s) for m, s in zip(means.shape, info.shape, strict=True)):
            problems.append(f"the activations of `{printable(name)}` {list(means.shape)} do not fit {list(info.shape)}")
        fitting += 1
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"nor do those of {len(problems) - MOST_PROBLEMS} more weights"]
    strange = [name for name in activations.means if name not in inputs.base.tensors and name not in activations.tied]
    if fitting and strange:
        what = f"the activations of {len(strange)} weights, `{printable(strange[0])}` the first"
        problems.append(f"{what}, are of none that `{printable(inputs.base.label)}` has")
    if not fitting:
        problems.append(f"the activations name no weight of `{printable(inputs.base.label)}`")
    if problems:
        raise ModelError(problems, hint="they were measured on another model; make them with `lowmem-aim calibrate`")


def idle_exclusions(activations: Activations, inputs: Inputs, aim: Aim) -> Iterator[str]:
    """Those of `aim.exclude` that are part of no weight that would be relaxed."""
    assert inputs.base is not None
    relaxed = [info.name for info in inputs.base if _fitting(info.name, activations, aim) is not None]
    return (part for part in aim.exclude if not any(part in name for name in relaxed))
