"""The sections of the output, and the slices that each is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowmem_aim.errors import ModelError, RecipeError, did_you_mean, printable
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.roles import Section
from lowmem_aim.planning.stacks import Stack, count_in, is_of_text
from lowmem_aim.recipe.recipe import ModelEntry, Recipe, Slice

DEFAULT = "default"  # mergekit's name of the one section of most models


@dataclass(frozen=True)
class Portion:
    """A section of the output, and the slices that it is made of; without any it is the reference's, as it is."""

    section: Section
    slices: tuple[Slice, ...]

    @property
    def sliced(self) -> bool:
        """Whether the recipe says which of the section's layers are taken."""
        return any(part.sliced for part in self.slices)

    @property
    def stack(self) -> Stack:
        """The section's layers; of a section without layers, or with several lists of them, a stack without names."""
        return Stack(self.section.layers or "")


def portions(recipe: Recipe, inputs: Inputs) -> list[Portion]:
    """The sections of the output; without `modules` in the recipe, all of it is one.

    Raises RecipeError for modules that the reference does not have.
    """
    if not recipe.modules:
        return [Portion(_whole(inputs), recipe.slices)]
    return [
        Portion(section, tuple(part for part in recipe.slices if part.module and part.module.name == section.name))
        for section in _complete(_division(recipe, inputs), inputs)
    ]


def unnamed(divided: Sequence[Portion]) -> list[Portion]:
    """The sections that the recipe makes of nothing."""
    return [portion for portion in divided if not portion.slices]


def text_slices(recipe: Recipe, inputs: Inputs) -> list[Slice]:
    """The slices of the layers that continue text."""
    divided = [portion for portion in portions(recipe, inputs) if is_of_text(portion.stack, inputs.roles)]
    return [part for portion in divided for part in portion.slices]


def _whole(inputs: Inputs) -> Section:
    """All of the model as one section."""
    stack, after = Stack(inputs.roles.layers), inputs.roles.after_layers
    outside = frozenset(name for name in inputs.reference.tensors if stack.layer(name) is None)
    return Section(DEFAULT, inputs.roles.layers or None, outside - after, outside & after)


def _division(recipe: Recipe, inputs: Inputs) -> Sequence[Section]:
    """The division of the reference that has all modules of the recipe."""
    divisions: list[Sequence[Section]] = [*inputs.roles.divisions]
    if len(divisions) < 2:  # a model without parts is one by name, whatever lists of layers it has
        divisions.insert(0, [_whole(inputs)])
    names = [[section.name for section in sections] for sections in divisions]
    lacking = [[module for module in recipe.modules if module.name not in known] for known in names]
    best = min(range(len(divisions)), key=lambda place: len(lacking[place]))
    if not lacking[best]:
        return divisions[best]
    label, all_names = printable(inputs.reference.label), [name for known in names for name in known]
    problems = []
    for module in lacking[best]:
        shown = printable(module.name)
        near = " beside the others" if module.name in all_names else did_you_mean(module.name, all_names)
        problems.append(f"{module.where}: `{label}` has no module `{shown}`{near}")
    listed = "; or ".join(", ".join(f"`{printable(name)}`" for name in known) for known in names)
    raise RecipeError(problems, hint=f"its modules are {listed}")


def _complete(division: Sequence[Section], inputs: Inputs) -> list[Section]:
    """The sections with all of the reference's tensors: the first also has those that transformers has no place for."""
    first, *others = division
    left = [name for name in inputs.reference.tensors if not any(section.holds(name) for section in division)]
    heads = inputs.roles.head.intersection(left)
    return [replace(first, before=first.before.union(left) - heads, after=first.after | heads), *others]


def check_ranges(divided: Sequence[Portion], inputs: Inputs) -> None:
    """Check the layers that slices take.

    Raises RecipeError for sources that end beyond their models' layers, ModelError for a section whose layers are not
    one list.
    """
    problems = []
    for portion in (portion for portion in divided if portion.sliced):
        if portion.section.layers is None:
            raise ModelError(
                f"the layers of {_named(portion, inputs)} are not one list, so `slices` cannot be taken",
                hint="list whole models under `models`",
            )
        if portion.section.layers:
            problems += [problem for part in portion.slices for problem in _beyond(part, portion, inputs)]
    if problems:
        raise RecipeError(dict.fromkeys(problems), hint="layers count from 0, and the end of a range is not in it")


def _named(portion: Portion, inputs: Inputs) -> str:
    label = f"`{printable(inputs.reference.label)}`"
    within = portion.slices[0].module is not None and portion.section.name != DEFAULT
    return f"the module `{printable(portion.section.name)}` of {label}" if within else label


def _beyond(part: Slice, portion: Portion, inputs: Inputs) -> Iterator[str]:
    """Yield what is wrong with the layers that a slice takes of each model."""
    within = f" in `{printable(portion.section.name)}`" if part.module and portion.section.name != DEFAULT else ""
    for entry in part.entries:
        model, taken = inputs.opened.get(entry.reference), layers_of(entry)
        count = count_in(portion.stack, model, inputs.roles) if model else 0
        if model and taken.stop > count:
            has = f"`{printable(model.label)}` has {count} layers{within}"
            yield f"{entry.where}: `layer_range` ends at {taken.stop}, but {has}"
        elif not taken:
            yield f"{entry.where}: `layer_range` takes no layer of `{printable(entry.reference)}`"


def layers_of(entry: ModelEntry) -> range:
    """The layers that a source of a slice takes of its model."""
    return entry.layers or range(0)
