"""The sweep: many merges of the same models, each scored, all compared, and the best of them named.

The experts are scored first. Then as many points as the disk holds at a time are merged, with one reading of the inputs
where that is possible, and each is scored. A merged model is removed once it is scored, unless it stays. The scores
that are there say what is done: a killed sweep goes on with the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ResumeError, printable
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.comparison import Comparison
from lowmem_aim.evaluating.fronts import fronts_of
from lowmem_aim.evaluating.origin import digest_of_model
from lowmem_aim.evaluating.recommended import recommended
from lowmem_aim.evaluating.report import write_report
from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.by_ray import made_by_ray
from lowmem_aim.jobs.evaluate import score
from lowmem_aim.jobs.merge_many import merge_many
from lowmem_aim.jobs.resume import agree
from lowmem_aim.jobs.scored_points import ScoredPoints
from lowmem_aim.jobs.swept import Checked, Swept, checked, largest
from lowmem_aim.models.hub import locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader
from lowmem_aim.output.folder import is_finished
from lowmem_aim.output.provenance import versions
from lowmem_aim.output.records import Identity
from lowmem_aim.output.sweep_folder import sweep_folder
from lowmem_aim.recipe.points import Point
from lowmem_aim.recipe.written import written
from lowmem_aim.system.files import write_file
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.units import counted
from lowmem_aim.view.feed import Feed, Part, reported


@dataclass(frozen=True)
class Result:
    """The result of a sweep: its folder, all points compared, and which are recommended."""

    out: Path
    comparison: Comparison
    recommended: Mapping[str, str]  # name of the recipe's file, without `.yml` -> name of the point


def sweep(swept: Swept, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Result:
    """Merge, score and compare all points in the new folder `out`, or go on with an interrupted sweep there.

    Raises the errors of `merge` and `evaluate`, before any work where that is possible.
    """
    with reported("sweep", out, emit, options.command) as feed:
        ready = checked(swept, out, options, Part(feed, "sweep"))
        with sweep_folder(out, fresh=options.fresh) as folder:
            feed.record_in([folder.private])
            options = replace(options, fresh=False)  # what was there is gone
            return SweepRun(ScoredPoints(swept, folder, ready.experts), ready, options, feed).run()


@dataclass
class SweepRun:
    """A sweep while it runs."""

    points: ScoredPoints
    ready: Checked
    options: Options
    feed: Feed

    def run(self) -> Result:
        """Do what is left of the sweep. Raises as `sweep`."""
        self._agree()
        for name, reference in self.ready.experts.items():
            self.score_expert(name, reference)
        for point in self.points.swept.points:
            if self.points.is_scored(point):
                self.feed(self.points.event_of(point.name, earlier=True))
        if self.points.swept.ray:
            self._make_by_ray(self.points.left)
        for point in self.points.left:
            if is_finished(self.points.model(point)):  # by a run that was interrupted before it was scored
                self._score(point)
        for batch in self.ready.merges.batches if self.points.left else ():
            self._merge(list(batch.output_bytes))
            for point in self.points.left:
                if point.name in batch.output_bytes:
                    self._score(point)
        return self.finished()

    # -- what this sweep is

    def identity(self, **more: Any) -> Identity:
        """All that the scores of this sweep follow from, but for the points; `more`: of other ways to choose those."""
        swept = self.points.swept
        job: dict[str, Any] = {
            "tasks": {**asdict(swept.asked), "folders": [str(path) for path in swept.asked.folders]},
            "forwards": {key: getattr(swept.forwards, key) for key in ("dtype", "max_length")},
            "models": dict(self._digests()),
            "seed": self.options.seed,
            "nonfinite": self.options.nonfinite,
            **more,
        }
        return Identity(job, [], versions() | {"lm-eval": tasks.version()})

    def _agree(self) -> None:
        """Record what this sweep is, or check that the one which was here fits to it. Raises ResumeError."""
        swept, folder, identity = self.points.swept, self.points.folder, self.identity()
        accept = self.options.accept_environment
        agree(folder.journal, identity, lambda number: iter(()), accept_environment=accept, emit=self.feed)
        before = folder.noted()
        recipes = {point.name: written(point.tree) for point in swept.points}
        if changed := [name for name, recipe in recipes.items() if before.get(name, recipe) != recipe]:
            what = f"{counted(len(changed), 'point')} of the sweep in this folder had another recipe"
            hint = "`--fresh` starts over; another output folder leaves that sweep as it is"
            raise ResumeError(f"{what}, such as `{printable(changed[0])}`", hint)
        for name, recipe in recipes.items():
            if name not in before:
                folder.note(name, recipe)
        self.points.keep_size()

    def _digests(self) -> Iterator[tuple[str, str]]:
        """Yield (reference, digest) of every model, the base too."""
        named = dict.fromkeys(name for point in self.points.swept.points for name in point.recipe.references)
        for reference in named:
            with Reader(self.options.use_cache) as reader:
                found = opened(reference, self._located, self.options.read, reader)
            with found as checkpoint:
                yield reference, digest_of_model(checkpoint, self.feed)

    def _located(self, part: str, is_adapter: bool) -> Any:
        return locate(part, self.feed, is_adapter)

    # -- merge

    def _merge(self, names: Sequence[str]) -> None:
        recipes = {point.name: point.recipe for point in self.points.swept.points if point.name in names}
        merge_many(recipes, self.points.folder.models, self.options, Part(self.feed, self.title()))

    def title(self) -> str:
        """A title for what comes next: how much is done so far."""
        return f"sweep, {self.points.done} of {counted(self.points.of, 'point')} scored"

    # -- score

    def score_expert(self, name: str, reference: str) -> None:
        """Score an expert, unless its scores are there. Raises as `score`."""
        file = self.points.folder.scores_of_expert(name)
        earlier = file.is_file()
        if not earlier:
            part, swept = Part(self.feed, f"sweep, expert {printable(name)}"), self.points.swept
            score(reference, swept.asked, file, swept.forwards, self.options, part, name)
        self.feed(self.points.event_of_expert(name, earlier=earlier))

    def _score(self, point: Point) -> None:
        file, swept = self.points.folder.scores_of(point.name), self.points.swept
        part = Part(self.feed, f"{self.title()}, {point.name}")
        score(str(self.points.model(point)), swept.asked, file, swept.forwards, self.options, part, point.name)
        self._tell(point)

    def _make_by_ray(self, left: Sequence[Point]) -> None:
        swept, out = self.points.swept, self.points.folder.out
        one = max(1, largest(self.ready.merges.batches))
        at_once = max(1, swept.room(out) // one - swept.staying)
        emit = Part(self.feed, self.title())
        made = made_by_ray(left, swept, out, self.options, emit, address=swept.ray, at_once=at_once)
        with contextlib.closing(made):  # if telling fails, the tasks are ended before the folder is given back
            for point in made:
                self._tell(point)

    def _tell(self, point: Point) -> None:
        """Tell that a point is scored, and remove what is not needed any more."""
        self.points.keep_size()
        self.feed(self.points.event_of(point.name))
        self.points.remove_models()

    # -- finish

    def finished(self) -> Result:
        """Write the report and the recommended recipes. Raises DiskError."""
        folder = self.points.folder
        self.points.remove_models()
        found = self.points.comparison(draws=True)
        folder.remove_report()
        write_report(found, fronts_of(found), folder.report)
        best, recipes = recommended(found), folder.noted()
        for what, name in best.items():
            write_file(folder.out / f"{what}.yml", (self._comment(what, name) + recipes[name]).encode())
        self.points.keep_size(finished=True)
        return Result(folder.out, found, best)

    def _comment(self, what: str, name: str) -> str:
        flags = f" --seed {self.options.seed}" * (self.options.seed != 0)
        flags += f" --nonfinite {self.options.nonfinite}" * (self.options.nonfinite != "stop")
        return f"# {name}\n# To merge: lowmem-aim merge {what}.yml NEW-FOLDER{flags}\n"
