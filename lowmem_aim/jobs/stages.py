"""The merges of a recipe with named stages, one after another: each is given the stages before it as models.

All are prepared, and checked, before the first one is made. Until a stage is made, its headers and small files stand in
for it: they follow from its plan, as its weights do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from lowmem_aim.errors import LowmemAimError, RecipeError, noted
from lowmem_aim.events import Emit, Event, Notice, of_stage
from lowmem_aim.jobs.finished import check_stage
from lowmem_aim.jobs.headers import scratch_folder
from lowmem_aim.jobs.identity import digest_of_stage
from lowmem_aim.jobs.preparation import look_for_models, prepared
from lowmem_aim.jobs.prepared import Behind, Position, Prepared
from lowmem_aim.jobs.resume import not_as_read
from lowmem_aim.models.hub import Located, local_model, plain_name
from lowmem_aim.models.opening import Finder
from lowmem_aim.models.stand_in import stand_in_for_output
from lowmem_aim.output.folder import PRIVATE, is_finished, stage_folder, stages_in
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.portable import local_labels
from lowmem_aim.output.records import MadeStage
from lowmem_aim.output.small_files import files_to_plan_with
from lowmem_aim.output.stages import check_kept
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.recipe.values import begins_with_place
from lowmem_aim.system.files import real
from lowmem_aim.system.options import Options


class Stages:
    """The merges of a recipe: its named stages and, with the name "", its output. A context manager."""

    def __init__(self, recipe: Recipe, out: Path, options: Options, emit: Emit, finder: Finder) -> None:
        self.recipe, self.out, self._options, self._emit, self._finder = recipe, out, options, emit, finder
        self.over = all(is_finished(out / name) for name in one_by_one(recipe))  # the stages may be gone then
        self._folders: dict[str, Path] = {}  # of stages that are made, or stood in for
        self._stand_ins = contextlib.ExitStack()
        self._scratch: Path | None = None
        self._planned: dict[str, Path] = {}  # the folders that stand in
        self._digests: dict[str, str] = {}
        self._local: dict[str, tuple[str, ...]] = {}
        self._told: set[Event] = set()  # notices of the check, which are not to come again
        self._inputs: list[Path] = []  # folders of all models so far
        self._unmade_bytes = self._stage_bytes = 0  # of the stages so far: those to be made, and all
        self._twins = _twins(recipe) if recipe.stages else frozenset[str]()

    def folder(self, name: str) -> Path:
        """The output folder of one merge."""
        return stage_folder(self.out, name) if name else self.out

    @contextlib.contextmanager
    def prepared(self, name: str, *, held: bool = False) -> Iterator[Prepared]:
        """Prepare one merge, after the stages that it uses are made or stood in for.

        `held`: this run holds the output folder already. Raises the errors of `preparation.prepared`.
        """
        recipe, options = self.recipe.in_order[name], self._options
        if name and held:  # this run has discarded what it was to discard
            options = replace(options, fresh=False)
        emit = of_stage(self._new if held else self._first, name)
        position = self._position(name, held)
        recipes, folder = one_by_one(recipe), self.folder(name)
        with _located(name), prepared(recipes, folder, options, emit, self._find(), position) as ready:
            yield ready

    def _first(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._told.add(event)
        self._emit(event)

    def _new(self, event: Event) -> None:
        if not (isinstance(event, Notice) and event in self._told):
            self._emit(event)

    def check(self, visit: Callable[[str, Prepared], None], *, reread: bool) -> list[LowmemAimError]:
        """Prepare all merges, and `visit` each while it is prepared; returns what is wrong with any.

        Stages that are not made are stood in for. If the output is finished, its stages are compared with what it was
        made of; `reread`: models whose files may have changed are read for that.
        """
        errors: list[LowmemAimError] = []
        for name, recipe in self.recipe.in_order.items():
            stages = self.recipe.stages.keys()
            if any(other in stages and other not in self._folders for other in recipe.named):
                look_for_models(recipe, self._finder, stages, errors)  # what the stage will be is not known
                continue
            with noted(errors), self.prepared(name) as ready:
                self._add(name, ready, reread=reread)
                with noted(ready.errors):
                    visit(name, ready)
                for error in ready.errors:
                    _tell_where(name, error)
                errors += ready.errors
        return errors

    def made(self, name: str) -> None:
        """Take the stage itself for a model from now on: it is made."""
        self._folders[name] = self.folder(name)
        self._planned.pop(name, None)

    def close(self) -> None:
        """Remove the stand-ins."""
        self._stand_ins.close()
        self._scratch = None

    # -- one stage, when it is prepared

    def _add(self, name: str, ready: Prepared, *, reread: bool) -> None:
        """Keep what later merges are to know of a stage, and note in `ready.errors` what is wrong with it."""
        self._inputs += ready.inputs.folders
        if not name:
            with noted(ready.errors):
                self._check_kept()
            return
        [plan] = ready.plans.values()
        self._stage_bytes += plan.output_bytes
        self._local[name] = tuple(local_labels(ready.recipe, ready.inputs))
        if not ready.errors and not ready.incomplete and not ready.unread:
            self._digests[name] = digest_of_stage(ready.lasting(""))
            if self.over:
                with noted(ready.errors):
                    self._compare(name, ready, reread=reread)
        counts = not self.over and not self._options.fresh
        if counts and not ready.errors and is_finished(self.folder(name)):
            self._folders[name] = self.folder(name)
        elif ready.config and ready.copied is not None:
            self._unmade_bytes += ready.bytes_to_write()
            self._stand_in(name, ready)

    def _check_kept(self) -> None:
        keep = self._options.keep_stages
        left = [folder.name for folder in stages_in(self.out)] if self.over else [*self.recipe.stages]
        if keep and left:
            check_kept(keep, left, self.out, self._inputs, self._stage_bytes)

    def _stand_in(self, name: str, ready: Prepared) -> None:
        self._scratch = self._scratch or self._stand_ins.enter_context(scratch_folder())
        folder = real(self._scratch) / name
        folder.mkdir()
        [plan] = ready.plans.values()
        shards = [(shard.name, shard.header, shard.nbytes) for shard in plan.shards]
        stand_in_for_output(folder, shards, files_to_plan_with(plan, ready.inputs, ready.copied, ready.config))
        self._folders[name] = self._planned[name] = folder

    def _compare(self, name: str, ready: Prepared, *, reread: bool) -> None:
        """Check that the finished output was made of this stage. Raises UsageError, ResumeError."""
        [plan] = ready.plans.values()
        again = partial(not_as_read, plan, ready.inputs) if reread else None
        for output in one_by_one(self.recipe):
            with Journal(self.out / output / PRIVATE, read_only=True) as journal:
                for stage in (found for found in journal.all_kept(MadeStage) if found.name == name):
                    check_stage(stage, ready.lasting(""), self.out / output, again, ready.emit)

    # -- the stages as models

    def _find(self) -> Finder:
        def local(reference: str, is_adapter: bool) -> Located | None:
            if reference in self._folders and not is_adapter:
                return Located(self._folders[reference], reference)
            found = self._finder.local(reference, is_adapter)
            return found and self._told_apart(found)

        def find(reference: str, emit: Emit, is_adapter: bool) -> Located:
            return local(reference, is_adapter) or self._finder.find(reference, emit, is_adapter)

        planned = tuple(self._planned.values())
        return replace(
            self._finder,
            find=find,
            local=local,
            planned=planned,
            has_weights=lambda folder: folder not in planned and self._finder.has_weights(folder),
        )

    def _told_apart(self, model: Located) -> Located:
        if model.label not in self._twins:
            return model
        return replace(model, label=f"{plain_name(real(model.folder).parent)}/{model.label}")

    def _position(self, name: str, held: bool) -> Position:
        used = [other for other in self.recipe.in_order[name].named if other in self.recipe.stages]
        return Position(
            stage=name,
            made_of={other: self._digests.get(other, "") for other in used},
            behind=tuple(Behind(other, self.folder(other), self._local.get(other, ())) for other in self._behind(name)),
            unmade_bytes=0 if name or held else self._unmade_bytes,
            known=all(other in self._digests for other in used),
            held=held and not name,
            over=self.over and name != "",
        )

    def _behind(self, name: str) -> list[str]:
        """The stages that a merge is made of, by itself or further back, in their order."""
        needed, left = set[str](), [name]
        while left:
            found = {other for other in self.recipe.in_order[left.pop()].named if other in self.recipe.stages}
            left += found - needed
            needed |= found
        return [other for other in self.recipe.stages if other in needed]

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _twins(recipe: Recipe) -> frozenset[str]:
    """The names of folders that two models have, or a model and a stage: they are no labels."""
    places: dict[str, set[Path]] = {name: {Path()} for name in recipe.stages}
    named = {(name, False) for part in recipe.in_order.values() for name in part.named}
    named |= {(adapter, True) for part in recipe.in_order.values() for adapter in part.adapters}
    for name, is_adapter in named:
        with contextlib.suppress(LowmemAimError):  # told when it is opened
            if name not in recipe.stages and (found := local_model(name, is_adapter)):
                places.setdefault(found.label, set()).add(real(found.folder))
    return frozenset(label for label, found in places.items() if len(found) > 1)


@contextlib.contextmanager
def _located(name: str) -> Iterator[None]:
    """Say of errors to which stage they belong."""
    try:
        yield
    except LowmemAimError as error:
        _tell_where(name, error)
        raise


def _tell_where(name: str, error: LowmemAimError) -> None:
    if name and not isinstance(error, RecipeError):  # that one has its line
        error.add_before_problems(f"stage `{name}`: ", unless=begins_with_place)
