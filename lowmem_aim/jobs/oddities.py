"""Warnings before work, of what the user may not have meant: idle filters, a missing tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lowmem_aim.errors import printable
from lowmem_aim.events import Notice
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.models.known_files import TOKENIZERS, fits
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Setting


def tell_oddities(ready: Prepared) -> None:
    """Emit a warning for each; none of them stops the merge."""
    known = not ready.incomplete  # else the files of the reference could not be read
    idle = [text for plan in ready.plans.values() for text in _idle_filters(plan)]
    for text in dict.fromkeys([*idle, *(_missing_tokenizer(ready) if known else ())]):
        ready.emit(Notice(text, "warning"))


def _idle_filters(plan: Plan) -> Iterator[str]:
    recipe, merged = plan.recipe, [task for task in plan.tasks if task.action == "merge"]
    names = {name for task in merged for name in (task.name, *(source.tensor for source in task.experts))}
    tables: list[Mapping[str, Setting]] = [recipe.parameters, *(module.parameters for module in recipe.modules)]
    tables += [part.parameters for part in recipe.slices]
    tables += [model.parameters for model in recipe.models]
    tables += [{"aim.omega": recipe.aim.omega}] if recipe.aim else []
    settings = [(key, setting) for table in tables for key, setting in table.items() if setting.filtered]
    idle = [
        f"`{key}`: the filter `{printable(pattern)}` matches no name of a merged tensor"
        for key, setting in settings
        for pattern, _ in setting.value
        if pattern not in ("", "*") and not any(pattern in name for name in names)
    ]
    yield from dict.fromkeys(idle)


def _missing_tokenizer(ready: Prepared) -> Iterator[str]:
    if not any(fits(name, TOKENIZERS) for name in ready.copied):
        yield f"`{printable(ready.inputs.reference.label)}` has no tokenizer, and the output will have none"
