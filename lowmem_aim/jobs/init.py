"""`init`: a recipe to start from, for models that are there and fit together, written as a new file.

Only headers and small files of the models are read, those on the Hub too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowmem_aim.errors import (
    LowmemAimError,
    ModelError,
    NetworkError,
    RecipeError,
    UsageError,
    did_you_mean,
    noted,
    printable,
    raise_all,
)
from lowmem_aim.events import Emit, Event, Notice, silent
from lowmem_aim.jobs.headers import Headers
from lowmem_aim.methods.registry import find_method, names
from lowmem_aim.models.hub import Located
from lowmem_aim.models.opening import Finder, compared, opened, opened_models, parts_found, told
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.tied_heads import check_repeated
from lowmem_aim.planning.fitting import check_sources
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.starting import Start
from lowmem_aim.recipe.yaml_tree import parse, tree_of
from lowmem_aim.system.files import write_file

# Any number of experts, each with its changes thinned out, and conflicts between them settled by sign.
ON_A_BASE = "ties"
WITHOUT_A_BASE = "linear"  # the plain mean: nothing else is known of the models

_Part = tuple[str, bool]  # of a reference: a model's own, or (True) an adapter's


def init(
    method: str | None,
    base: str | None,
    experts: Sequence[str],
    output: Path,
    *,
    omega: float | None = None,
    emit: Emit = silent,
) -> Path:
    """Write a recipe for these models into the new file `output`; returns `output`.

    Raises UsageError, RecipeError, ModelError or DiskError, before anything is written. A model on the Hub that cannot
    be reached is taken for right, with a notice.
    """
    errors: list[LowmemAimError] = []
    start: Start | None = None
    with noted(errors):
        _check_new(output)
    with noted(errors):
        start = _start(method, base, experts, omega)
    if errors and start is not None:
        with noted(errors), contextlib.ExitStack() as stack:
            _find_all(start, Headers(stack), emit)
    raise_all(errors)
    assert start is not None  # else there was an error
    start = _checked(start, emit)
    text = start.text()
    read_recipe(parse(text, str(output), os.path.dirname(output)))  # its paths, as they will be looked for
    _check_new(output)
    write_file(output, text.encode())
    return output


def _check_new(output: Path) -> None:
    if os.path.lexists(output):
        raise UsageError(f"`{printable(str(output))}` exists already", hint="name a new file with `-o`")
    if not os.path.isdir(output.absolute().parent):
        raise UsageError(f"there is no folder `{printable(str(output.absolute().parent))}`", hint="make it first")


def _start(name: str | None, base: str | None, experts: Sequence[str], omega: float | None) -> Start:
    """The values to start from, for a method that takes these models. Raises RecipeError."""
    wanted = name or (ON_A_BASE if base else WITHOUT_A_BASE)
    method = find_method(wanted)
    if method is None:
        near = did_you_mean(wanted, names())
        raise RecipeError(f"unknown merge method `{printable(wanted)}`{near}", hint="see `lowmem-aim methods`")
    start = Start(method, base, experts, omega)
    read_recipe(tree_of(start.table(), "command line"))
    return start


def _checked(start: Start, emit: Emit) -> Start:
    """The start for models that fit together; tokens are matched by text if they do not fit otherwise.

    Raises ModelError.
    """
    with contextlib.ExitStack() as stack:
        headers = Headers(stack)
        found = _find_all(start, headers, emit)
        if found is None:
            return start
        starts = [start, replace(start, by_text=True)]
        errors: list[ModelError] = []
        for tried in starts:
            told: list[Event] = []
            try:
                _open(tried, found, headers, told.append)
            except ModelError as error:
                errors.append(error)
            else:
                for event in told:
                    emit(event)
                return tried
    raise errors[0]


def _find_all(start: Start, headers: Headers, emit: Emit) -> dict[_Part, Located] | None:
    """Each model and adapter; None, with a notice, if one is on the Hub and that cannot be reached.

    Raises ModelError for models that are wrong by themselves.
    """
    found: dict[_Part, Located] = {}
    errors: list[LowmemAimError] = []
    unseen: list[str] = []
    recipe = read_recipe(tree_of(start.table(), "command line"))

    def find(part: str, is_adapter: bool) -> Located:
        found[part, is_adapter] = headers.find(part, emit, is_adapter)
        return found[part, is_adapter]

    references = dict.fromkeys([*([start.base] if start.base else []), *start.experts])
    whole = []
    for reference in references:
        with noted(errors):
            try:
                parts_found(reference, told(recipe, find))
                whole.append(reference)
            except NetworkError:
                unseen.append(f"`{printable(reference)}`")
    if unseen or errors:
        for reference in whole:
            with noted(errors), Reader() as reader:
                opened(reference, lambda *part: found[part], "mmap", reader).close()
    raise_all(errors)
    if unseen:
        text = f"not checked, because the Hub cannot be reached: {', '.join(unseen)}; `plan` checks them once it can be"
        emit(Notice(text, "warning"))
    return None if unseen else found


def _open(start: Start, found: dict[_Part, Located], headers: Headers, emit: Emit) -> None:
    """Open and compare the models. Raises ModelError."""
    recipe = read_recipe(tree_of(start.table(), "command line"))
    finder = Finder(
        lambda part, emit, is_adapter: found[part, is_adapter], lambda folder: not headers.stands_in(folder), False
    )
    errors: list[LowmemAimError] = []
    with Reader() as reader, opened_models(recipe, "mmap", emit, finder, reader, errors) as models:
        raise_all(errors)
        with noted(errors):
            inputs = compared(recipe, models, reader, emit, errors)
            if inputs:
                check_sources(recipe, inputs, emit)
                check_repeated(inputs, finder.has_weights)
        raise_all(errors)
