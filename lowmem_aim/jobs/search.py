"""The search: a sweep whose points are chosen one after the other, each by what the earlier ones have scored.

Several processes, on one machine or on several with a shared folder, work at the same search: each begins a trial, or
takes over that of a killed process, merges and scores it, and tells the others. What they share changes hands by locks:

    OUT/.lowmem_aim/lock              held by the worker that came first, as by a grid: it writes the log
    OUT/.lowmem_aim/trial-0007.lock   held by the worker that makes the trial
    OUT/.lowmem_aim/search.lock       held for moments, to change the study, the journal or the report
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowmem_aim.errors import LockedError, ResumeError, UsageError
from lowmem_aim.evaluating.comparison import compared
from lowmem_aim.evaluating.gains import why_no_gain
from lowmem_aim.evaluating.recommended import recommended
from lowmem_aim.evaluating.scores import Scores, read_scores
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.jobs.one_point import make_and_score
from lowmem_aim.jobs.resume import agree
from lowmem_aim.jobs.scored_points import ScoredPoints
from lowmem_aim.jobs.searched import GAIN, Searched, checked_search
from lowmem_aim.jobs.study import Study, Trial, agree_on_sampler, sampler_facts
from lowmem_aim.jobs.sweep import Result, SweepRun
from lowmem_aim.output.sweep_folder import (
    SAMPLER,
    SweepFolder,
    has_begun,
    shared_sweep_folder,
    sweep_folder,
    trial_name,
)
from lowmem_aim.recipe.points import Point
from lowmem_aim.recipe.search_space import Suggests, companions
from lowmem_aim.recipe.written import written
from lowmem_aim.system import interrupts
from lowmem_aim.system.lock import locked_error, locked_if_free, owner_of
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.view.feed import Part, reported

JOIN_SECONDS = 10.0  # for the worker that came first to say that this is a search
TURN_SECONDS = 600.0  # the longest that a worker changes what all share: it may write a report
POLL_SECONDS = 2.0


def search(searched: Searched, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Result:
    """Search in the new folder `out`, or take part in the search there, until `searched.trials` are finished.

    Raises the errors of `merge` and `evaluate`, before any work where that is possible.
    """
    with reported("sweep", out, emit, options.command) as feed, contextlib.ExitStack() as stack:
        ready = checked_search(searched, out, options, feed)
        folder, is_first = _entered(out, options.fresh, stack)
        if is_first:
            feed.record_in([folder.private])
        else:
            feed(Notice("another process searches in this folder: this one takes part"))
        options = replace(options, fresh=False)  # what was there is gone
        run = SweepRun(ScoredPoints(searched.swept, folder, ready.experts), ready, options, feed)
        return _Worker(searched, run).work()


def _entered(out: Path, fresh: bool, stack: contextlib.ExitStack) -> tuple[SweepFolder, bool]:
    """The folder, and whether this is the first worker there. Raises LockedError if something else is at work there."""
    patience = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return stack.enter_context(sweep_folder(out, fresh=fresh)), True
        except LockedError:
            is_search = (out / SAMPLER).is_file()
            if fresh or (not is_search and time.monotonic() > patience):
                raise
        if is_search and has_begun(out):
            return stack.enter_context(shared_sweep_folder(out)), False
        _wait()


def _wait() -> None:
    time.sleep(POLL_SECONDS)
    interrupts.check()


@dataclass
class _Worker:
    """One of the processes that work at a search."""

    searched: Searched
    run: SweepRun
    minimised: Sequence[bool] = (False,)  # of each objective, whether less is better
    chosen: dict[int, Point] = field(default_factory=dict)  # trial -> what it has chosen
    judges: dict[str, Point] = field(default_factory=dict)  # by name: what the recommended merges are compared with
    size: tuple[int, int] = (0, 0)  # points that are scored, and all, as the journal has them
    told: set[str] | None = None  # the names of points whose scores this worker has shown; None: it has yet to look

    @property
    def folder(self) -> SweepFolder:
        """The folder of the search."""
        return self.run.points.folder

    def work(self) -> Result:
        """Do what other workers do not, until all is done. Raises as `search`."""
        self._agree()
        self._score_experts()
        self._find_directions()
        self._make_all(self._trials)
        self._make_all(self._judges)
        with self._alone():
            return self.run.finished()

    # -- beside the other workers

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold for a moment what all workers share. Raises LockedError if another one holds it for too long."""
        lock = self.folder.lock_of("search")
        with locked_if_free(lock, TURN_SECONDS) as held:
            if not held:
                raise locked_error(lock, owner_of(lock))
            yield

    @contextlib.contextmanager
    def _study(self) -> Iterator[Study]:
        """The trials as they are now; no other worker changes them during the block."""
        with self._alone():
            yield Study(self.folder.out, self.minimised, self.run.options.seed)

    def _agree(self) -> None:
        """Record what this search is, or check that the one in the folder is the same. Raises ResumeError."""
        out, options, points = self.folder.out, self.run.options, self.run.points
        objectives = self.searched.objectives or (GAIN,)
        is_new = agree_on_sampler(out, sampler_facts(options.seed, objectives))  # at once: others wait for it
        try:
            identity = self.run.identity(**self.searched.identity())
            points.swept, points.unchosen = replace(self.searched.swept, points=()), self.searched.trials
            with self._alone():
                accept, emit = options.accept_environment, self.run.feed
                agree(self.folder.journal, identity, lambda number: iter(()), accept_environment=accept, emit=emit)
                if not has_begun(out):
                    points.keep_size()
        except ResumeError:
            if is_new:  # the folder holds a grid
                (out / SAMPLER).unlink()
            raise

    def _score_experts(self) -> None:
        """Score the experts that no other worker scores, and wait for the rest."""
        left = dict(self.run.ready.experts)
        while left:
            for name, reference in list(left.items()):
                with locked_if_free(self.folder.lock_of(f"expert-{name}")) as held:
                    if held:
                        self.run.score_expert(name, reference)
                        del left[name]
            if left:
                _wait()

    def _find_directions(self) -> None:
        """Find out of which objectives less is better. Raises UsageError if there is no gain to search for."""
        experts, objectives = self._experts(), self.searched.objectives
        if objectives and experts:
            self.minimised = [not experts[0].scores[name].higher_is_better for name in objectives]
        elif why := why_no_gain(
            experts, compared(experts, experts, forced=True, draws=False).volume if experts else ()
        ):
            raise UsageError(f"there is no hypervolume gain to search for: {why}", "name tasks with `--objective`")

    def _make_all(self, left: Callable[[Study], Iterator[Point]]) -> None:
        """Make the points that are `left` and that no other worker makes, and wait for those."""
        has_said = False
        while True:
            with contextlib.ExitStack() as held:
                with self._study() as study:
                    self._show(study)
                    is_left, point = self._taken(left(study), held)
                if point is not None:
                    self._make(point)
                    continue
            if not is_left:
                return
            if not has_said:
                self.run.feed(Notice("waiting for what other processes are making"))
                has_said = True
            _wait()

    def _taken(self, points: Iterator[Point], held: contextlib.ExitStack) -> tuple[bool, Point | None]:
        """Whether there are any points, and the first that no other worker makes, whose lock `held` then has."""
        any_left = False
        for point in points:
            any_left = True
            if held.enter_context(locked_if_free(self.folder.lock_of(point.name))):
                self.folder.note(point.name, written(point.tree))
                return True, point
        return any_left, None

    def _make(self, point: Point) -> None:
        """Merge and score a point whose lock this worker holds, and tell the others."""
        part = Part(self.run.feed, f"{self.run.title()}, {point.name}")
        make_and_score(point, self.searched.swept, self.folder.out, self.run.options, part)
        with self._study() as study:
            for number, chosen in self.chosen.items():
                if chosen is point:
                    study.tell(number, self._values(point))
            self._show(study)
            self.run.points.remove_models()

    # -- trials

    def _trials(self, study: Study) -> Iterator[Point]:
        """The trials that are not finished, and then new ones as they are asked for, until there are enough."""
        for trial in study.trials():
            if not trial.is_finished and trial.repeats is None:
                yield self._point(trial)
        while len(trials := study.trials()) < self.searched.trials:
            trial = self._begin(study, trials)
            if trial.repeats is None:
                yield self._point(trial)

    def _begin(self, study: Study, trials: Sequence[Trial]) -> Trial:
        """Begin a trial; one that chooses what an earlier one has chosen gets that one's scores."""
        known = {written(self._point(trial).tree): trial.number for trial in trials if trial.repeats is None}

        def choose(suggests: Suggests) -> int | None:
            return known.get(written(self.searched.space.point("", self.searched.space.chosen(suggests)).tree))

        trial = study.begin(choose)
        if trial.repeats is not None and self.run.points.is_scored(self.chosen[trial.repeats]):
            study.tell(trial.repeats, self._values(self.chosen[trial.repeats]))
        return trial

    def _point(self, trial: Trial) -> Point:
        """The point of what a trial has chosen."""
        if trial.number not in self.chosen:
            chosen = self.searched.space.chosen(trial.suggests)
            self.chosen[trial.number] = self.searched.space.point(trial_name(trial.number), chosen)
        return self.chosen[trial.number]

    # -- scores

    def _experts(self) -> list[Scores]:
        return [read_scores(self.folder.scores_of_expert(name)) for name in self.run.ready.experts]

    def _values(self, point: Point) -> list[float]:
        """The objectives of a point that is scored."""
        scores = read_scores(self.folder.scores_of(point.name))
        if self.searched.objectives:
            return [scores.scores[name].value for name in self.searched.objectives]
        gain = compared([scores], self._experts(), forced=True, draws=False).rows[0].gain
        return [gain.value if gain is not None else math.nan]

    def _show(self, study: Study) -> None:
        """Count the trials, and show the scores that this worker has not shown yet."""
        trials, points = study.trials(), self.run.points
        own = [self._point(trial) for trial in trials if trial.repeats is None]
        repeating = [trial for trial in trials if trial.repeats is not None]
        points.swept = replace(self.searched.swept, points=[*own, *self.judges.values()])
        points.repeated = sum(trial.is_finished for trial in repeating)
        points.unchosen = max(0, self.searched.trials - len(trials)) + len(repeating) - points.repeated
        if (points.done, points.of) != self.size:  # not at every look of a worker that waits
            points.keep_size()
            self.size = points.done, points.of
        scored = [point.name for point in points.swept.points if points.is_scored(point)]
        for name in scored:
            if self.told is None or name not in self.told:
                self.run.feed(points.event_of(name, earlier=self.told is None))
        self.told = set(scored)

    # -- what the recommended merges are compared with

    def _judges(self, study: Study) -> Iterator[Point]:
        """The unrelaxed merge and the control of each recommended merge, unless they are there, as trials for one."""
        points, noted = self.run.points, self.folder.noted()
        names = {recipe: name for name, recipe in noted.items() if self.folder.scores_of(name).is_file()}
        best = set(recommended(points.comparison()).values())
        for point in [point for point in points.swept.points if point.name in best]:
            for judge in companions(point, self.searched.controls):
                if names.setdefault(written(judge.tree), judge.name) == judge.name:
                    self.judges.setdefault(judge.name, judge)
        yield from (judge for judge in self.judges.values() if not points.is_scored(judge))
