"""A Survey of a merge: its plan and inputs as plain data. Of the models only their cards are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.untied import as_tied
from lowmem_aim.models.vocabulary import vocabulary_rows
from lowmem_aim.planning.layers import layer_count
from lowmem_aim.planning.modules import portions, unnamed
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe

TOLD = 3  # titles of several merges
LARGEST_CARD = 1_000_000  # bytes; a README.md beyond this is an error
_LICENCE = re.compile(r"^license:\s*(\S[^\n]{0,100})$", re.MULTILINE)


@dataclass(frozen=True)
class Model:
    """One model of the merge."""

    label: str
    role: str  # `base` or `expert`
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    layers: int
    vocabulary: int  # rows of the embedding
    tied: bool
    licence: str  # as its card says; "" if it says none
    missing_bytes: int = 0  # to download
    adapter: str = ""  # the adapter that is added to it, in a few words


@dataclass(frozen=True)
class Kind:
    """The tensors that have the same role in each layer."""

    kind: str
    action: str  # merge or copy
    tensors: int
    parameters: int
    settings: Mapping[str, str]  # parameters of the method and AIM's omega that are not the same for all tensors


@dataclass(frozen=True)
class Survey:
    """A merge before it runs, as plain data for people and for `--json`."""

    title: str
    source: str  # of the method
    models: tuple[Model, ...]
    outputs: tuple[str, ...]  # folders, if there are several
    settings: Mapping[str, str]  # the same for all tensors
    aim: Mapping[str, Any] | None
    acm: Mapping[str, Any] | None
    experts: tuple[str, ...]  # labels of those that are run on texts of their own
    kinds: tuple[Kind, ...]
    left_out: Mapping[str, tuple[str, ...]]  # why -> tensors that are not merged
    shards: int
    read_bytes: int  # each byte counted once
    write_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The survey as it comes back from JSON: lists for tuples."""
        same: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return same


def survey(plans: Mapping[str, Plan], inputs: Inputs, missing: Mapping[str, int] | None = None) -> Survey:
    """Survey a merge. `plans` are by output folder ("" for the only one).

    `missing` holds the bytes that are still to be downloaded, by the label of the model.
    """
    first = next(iter(plans.values()))
    recipe, tasks = first.recipe, first.tasks
    recipes = [plan.recipe for plan in plans.values()]
    commons = [_common(plan.tasks) for plan in plans.values()]
    common = commons[0]
    names = [name for name in plans if name]
    return Survey(
        title=all_told([recipe.title for recipe in recipes]),
        source=all_told([recipe.method.source for recipe in recipes]),
        models=tuple(_models(inputs, missing or {})),
        outputs=tuple(names),
        settings={key: text for key, text in common.items() if all(own.get(key) == text for own in commons)},
        aim=_aim([one.aim for one in recipes if one.aim], listed=bool(names)),
        acm=next((_acm(one.acm) for one in recipes if one.acm), None),
        experts=_experts(recipe, inputs),
        kinds=tuple(_kinds(tasks, common)),
        left_out=_left_out(tasks, recipe, inputs),
        shards=len(first.shards),
        read_bytes=_read_bytes(
            tasks,
            with_base=inputs.base is not None
            and any(one.builds_on_base or one.relaxed or one.solve for one in recipes),
        ),
        write_bytes=sum(plan.output_bytes for plan in plans.values()),
    )


def _experts(recipe: Recipe, inputs: Inputs) -> tuple[str, ...]:
    experts = recipe.slices[0].experts if recipe.solve else ()
    return tuple(inputs.opened[expert.reference].label for expert in experts)


def all_told(texts: Sequence[str]) -> str:
    """The first few of several texts, each once, and the number of the others."""
    distinct = list(dict.fromkeys(texts))
    return ", ".join(distinct[:TOLD]) + f" and {len(distinct) - TOLD} more" * (len(distinct) > TOLD)


def _models(inputs: Inputs, missing: Mapping[str, int]) -> Iterator[Model]:
    for checkpoint in dict.fromkeys(inputs.checkpoints):
        yield Model(
            label=checkpoint.label,
            role="base" if checkpoint is inputs.base else "expert",
            parameters=checkpoint.numel,
            nbytes=checkpoint.nbytes,
            dtypes=tuple(sorted({info.output_dtype.name for info in checkpoint})),
            layers=layer_count(checkpoint.config),
            vocabulary=vocabulary_rows(inputs.roles, checkpoint),
            tied=bool(inputs.roles.tied) or as_tied(checkpoint) is not None,
            licence=_licence(checkpoint),
            missing_bytes=sum(missing.get(label, 0) for label in checkpoint.labels),
            adapter=checkpoint.adapter,
        )


def _licence(checkpoint: Checkpoint) -> str:
    """The licence in the front matter of the model's card; empty if there is none."""
    card = (checkpoint.small_file("README.md", LARGEST_CARD) or b"").decode("utf-8", "replace")
    front = card.split("\n---", 1)[0] if card.startswith("---") else ""
    found = _LICENCE.search(front)
    return printable(found[1].strip().strip("'\""), 100) if found else ""


def _read_bytes(tasks: Iterable[Task], *, with_base: bool) -> int:
    """Bytes of all sources: what a merge of one round reads."""
    return sum(source.info.nbytes for task in tasks for source in task.sources(with_base=with_base))


# --- settings ---------------------------------------------------------------------------------------------------------


def _values(task: Task) -> dict[str, str]:
    """The method's parameters for a tensor, and AIM's omega, as texts.

    The experts' values are listed one by one only if they differ.
    """
    found = {name: _told(value) for name, value in task.parameters.items()}
    return found | ({"omega": f"{task.omega:g}"} if task.omega != 1.0 else {})


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        parts = [_told(part) for part in value]
        return parts[0] if len(set(parts)) == 1 else "/".join(parts)
    if isinstance(value, float):
        return f"{value:.4g}"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _common(tasks: Sequence[Task]) -> dict[str, str]:
    merged = [_values(task) for task in tasks if task.action == "merge"]
    return {name: text for name, text in (merged[0] if merged else {}).items() if _all_have(merged, name, text)}


def _all_have(all_values: Iterable[Mapping[str, str]], name: str, text: str) -> bool:
    return all(values.get(name) == text for values in all_values)


def _kinds(tasks: Sequence[Task], common: Mapping[str, str]) -> Iterator[Kind]:
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.kind, task.action), []).append(task)
    for (kind, action), group in groups.items():
        own: dict[str, list[str]] = {}
        for task in group:
            for name, text in _values(task).items():
                if name not in common:
                    own.setdefault(name, []).append(text)
        settings = {name: _span(texts) for name, texts in own.items()}
        yield Kind(kind, action, len(group), sum(task.numel for task in group), settings)


def _span(texts: Sequence[str]) -> str:
    """The values over a gradient as one text: the first and the last."""
    distinct = list(dict.fromkeys(texts))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]} ... {distinct[-1]}"


def _aim(aims: Sequence[Aim], *, listed: bool) -> dict[str, Any] | None:
    """The table of the first, with the omegas of all; `listed`: as a list of texts."""
    if not aims:
        return None
    aim, omegas = aims[0], [one.omega.value if not one.omega.filtered else "by tensor" for one in aims]
    texts = [f"{omega}".removesuffix(".0") for omega in omegas]
    return {
        "omega": list(dict.fromkeys(texts)) if listed else omegas[0],
        "scaling": aim.scaling,
        "exclude": list(aim.exclude),
        "calibration": aim.calibration,
        "samples": aim.samples,
        "block_size": aim.block_size,
        **{key: value for key, value in aim.keys.items() if key in ("control", "control_seed")},
    }


def _acm(acm: Acm) -> dict[str, Any]:
    return {key: getattr(acm, key) for key in ("theta", "normalise", "calibration", "samples")}


def _left_out(tasks: Sequence[Task], recipe: Recipe, inputs: Inputs) -> dict[str, tuple[str, ...]]:
    """The reason why tensors are copied or left out -> their names."""
    reasons: dict[str, list[str]] = {}
    left = unnamed(portions(recipe, inputs))
    for task in tasks:
        if any(portion.section.holds(task.name) for portion in left):
            reasons.setdefault("copied: the recipe does not name their module", []).append(task.name)
        elif task.action == "copy":
            reasons.setdefault(_why_copied(task, inputs), []).append(task.name)
    if inputs.dropped:
        reasons["left out: tied, it repeats its embedding"] = sorted(inputs.dropped)
    return {why: tuple(names) for why, names in reasons.items()}


def _why_copied(task: Task, inputs: Inputs) -> str:
    if task.name in inputs.carried:
        return "copied: a model has no such part"
    if task.experts[0].tensor in inputs.roles.buffers:
        return "copied: state of the model that is not a weight"
    if task.numel == 0:
        return "copied: it is empty"
    return "copied: some model lacks it" if task.dtype.is_floating_point else "copied: not floating-point numbers"
