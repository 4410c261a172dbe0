"""All that a merge finds out and checks before it works. `merge` and `plan` prepare here, with the same checks.

There are two rounds, and in each the user hears of all problems at once. The first takes a moment: recipe, folders,
headers, configs, output, disk, and whether an earlier run there was of this job. The second needs torch, or runs what
reads tokenizers and texts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lowmem_aim.errors import (
    LowmemAimError,
    ModelError,
    NoSuchModel,
    NoSuchTexts,
    UsageError,
    joined,
    noted,
    of_some,
    printable,
    raise_all,
)
from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.checks import AT_ONCE, LATER, OF_THE_FOLDER, OF_THE_IDENTITY, Check, check_certain_memory
from lowmem_aim.jobs.prepared import ALONE, Position, Prepared
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.opening import FETCHED, Finder, compared, opened_models
from lowmem_aim.models.reader import Reader, ReaderNeeded
from lowmem_aim.models.tied_heads import check_repeated
from lowmem_aim.output.folder import check_outputs, check_writable, existing_folder, is_finished
from lowmem_aim.output.portable import is_without_paths
from lowmem_aim.planning.fitting import check_sources
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.reader import readable_part
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.recipe.values import place_of
from lowmem_aim.recipe.words import BUILTIN, is_activations_file, is_here
from lowmem_aim.recipe.yaml_tree import Node
from lowmem_aim.system.files import input_errors, is_there
from lowmem_aim.system.options import Options, wrong_options


@contextlib.contextmanager
def prepared(
    recipes: Mapping[str, Recipe],
    out: Path,
    options: Options,
    emit: Emit,
    finder: Finder = FETCHED,
    position: Position = ALONE,
    *,
    together: bool = True,
) -> Iterator[Prepared]:
    """Open, plan and check everything; the errors of single checks are kept in the result.

    `recipes` are by the output's folder in `out` (see `one_by_one`); one reading of the models serves all of them (see
    `recipe.readings`). Unless they are made `together`, it is enough if each has the memory and the disk to itself.

    Raises the errors of models that cannot be opened or planned, together with all that can be checked without them.
    """
    _check_options(options)
    recipe = next(iter(recipes.values()))
    errors: list[LowmemAimError] = []
    if not position.over:
        with noted(errors):
            _check_output(out, [out / name for name in recipes])
    if options.keep_stages and not position.stage and not recipe.stages:
        errors.append(UsageError("`--keep-stages`: the recipe has no named stages", hint="leave it out"))
    errors += of_some({name: [*_missing_texts(one)] for name, one in recipes.items()})
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(options.use_cache))
        opened = stack.enter_context(opened_models(recipe, options.read, emit, finder, reader, errors))
        _point_to_comments(recipe, errors)
        # No process is started to find more problems; but `plan` describes the merge even if its output is in the way.
        reader.alone = bool(errors) and (finder.fetches or None in opened.values())
        inputs, plans, unfit = None, dict[str, Plan](), list[LowmemAimError]()
        with contextlib.suppress(ReaderNeeded), noted(unfit):
            inputs = compared(recipe, opened, reader, emit, unfit)
            if inputs:
                check_sources(recipe, inputs, emit)
        if inputs and not unfit and None not in opened.values():
            with noted(unfit):
                check_repeated(inputs, finder.has_weights)
                plans, refused = _plans(recipes, inputs, options)
                unfit += refused
        errors += unfit
        if not inputs or not plans:
            with noted(errors):
                check_certain_memory(options)
            raise_all(errors)
            raise AssertionError("models are opened, or it is told why not")
        reader.alone = False
        ready = Prepared(
            recipes,
            out,
            options,
            emit,
            finder,
            reader,
            inputs,
            plans,
            errors,
            notes=list(_local_names(recipe)),
            incomplete=not position.known,
            position=position,
            together=together,
        )
        _make(AT_ONCE, ready)
        if not errors and not ready.is_settled():
            _make(LATER, ready)
        elif errors and ready.unfinished():
            with noted(errors):
                check_certain_memory(options)
        reader.close()
        yield ready


def sound_recipe(tree: Node, out: Path, options: Options, before: Sequence[LowmemAimError] = ()) -> Recipe:
    """The recipe of a tree, if nothing is wrong in it, nor was `before`, with the flags.

    Raises RecipeError with every problem, together with those of the options, the output, the models that it names, and
    the texts, and with a budget in which no merge works.
    """
    recipe, wrong = readable_part(tree)
    errors = [*before, *([] if wrong is None else [wrong])]
    if recipe is not None and not errors:
        return recipe
    raise with_all_else(errors, recipe, out, options)


def with_all_else(
    before: Sequence[LowmemAimError], recipe: Recipe | None, out: Path, options: Options
) -> LowmemAimError:
    """The errors that a recipe, or what was asked of it, has already, as one with all that is found without planning.

    That is what is wrong with the output, the models and texts that the recipe names, the options and the budget.
    """
    errors = list(before)
    with noted(errors):
        _check_output(out, [out / name for name in one_by_one(recipe)] if recipe else [out])
    for part in recipe.in_order.values() if recipe else ():
        look_for_models(part, FETCHED, recipe.stages if recipe else (), errors)
    with noted(errors):
        _check_options(options)
        check_certain_memory(options)
    return joined(errors)


def look_for_models(recipe: Recipe, finder: Finder, stages: Collection[str], errors: list[LowmemAimError]) -> None:
    """Add to `errors`, of which there are some, what is wrong with the models and texts of a recipe not prepared.

    `stages` are no models yet. Beside errors, nothing is downloaded.
    """
    errors += _missing_texts(recipe)
    with Reader() as reader, opened_models(recipe, "mmap", silent, replace(finder, unknown=stages), reader, errors):
        _point_to_comments(recipe, errors)


def _check_options(options: Options) -> None:
    if problems := list(wrong_options(options)):
        raise UsageError(problems, hint="docs/python.md has the options")


def _check_output(out: Path, folders: list[Path]) -> None:
    check_outputs(out, folders, [])
    if not all(map(is_finished, folders)):
        check_writable(existing_folder(out))


def _plans(
    recipes: Mapping[str, Recipe], inputs: Inputs, options: Options
) -> tuple[dict[str, Plan], list[LowmemAimError]]:
    """The plan of each output, and what is wrong with those that have none."""
    plans, wrong = dict[str, Plan](), dict[str, list[LowmemAimError]]()
    for name, recipe in recipes.items():
        with noted(wrong.setdefault(name, [])):
            plans[name] = make_plan(
                recipe,
                inputs,
                seed=options.seed,
                shard_bytes=options.shard_bytes,
                shard_parameters=options.shard_parameters,
                nonfinite=options.nonfinite,
            )
    return plans, of_some(wrong)


def _make(checks: tuple[Check, ...], ready: Prepared) -> None:
    """Make checks one after another, and keep the errors that they raise."""
    for check in (check for check in checks if not (ready.position.over and check in OF_THE_FOLDER)):
        known = len(ready.errors)
        with noted(ready.errors):
            check(ready)
        ready.incomplete |= len(ready.errors) > known and check in OF_THE_IDENTITY


def _missing_texts(recipe: Recipe) -> Iterator[ModelError]:
    names = [recipe.aim.calibration] if recipe.aim else []
    names += [recipe.acm.calibration] if recipe.acm and not is_activations_file(recipe.acm.calibration) else []
    if recipe.solve:
        names += [texts for expert in recipe.models if (texts := expert.calibration or recipe.solve.calibration)]
    for name in dict.fromkeys(names):
        for error in missing_texts(name, recipe.looked(name)):
            error.add_before_problems(recipe.at(name))
            yield error


def missing_texts(calibration: str, looked: str = "") -> Iterator[ModelError]:
    """Yield an error for a file of texts or activations that is not there; `looked`: where it was looked for."""
    if calibration in ("", BUILTIN) or not is_here(calibration):
        return
    path = Path(os.path.expanduser(calibration))
    try:
        with input_errors(path):
            there = is_there(path)
    except ModelError as error:
        yield error
        return
    if not there:
        hint = "check the path; or name `builtin`, or a dataset on the Hub"
        yield NoSuchTexts(f"there is no calibration file `{printable(calibration)}`{looked}", hint)


def _point_to_comments(recipe: Recipe, errors: list[LowmemAimError]) -> None:
    """Change what to do about models and texts that are not there, if the recipe is an output's own, without paths."""
    file, _, _ = place_of(recipe.where)
    missing = [error for error in errors if isinstance(error, NoSuchModel | NoSuchTexts)]
    if missing and is_without_paths(Path(file)):
        hint = f"fill in the paths in `{printable(file)}`, as the comments at its top say"
        for error in missing:
            error.hints = (hint,) * len(error.problems)


def _local_names(recipe: Recipe) -> Iterator[str]:
    if recipe.preferred:
        names = ", ".join(f"`{printable(path)}`" for path in recipe.preferred)
        yield f"found on this machine, so the Hub is not asked for these names: {names}"
