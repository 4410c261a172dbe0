"""The points of a sweep in its folder: which are scored, how they compare, and whose models stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.comparison import Comparison, compared
from lowmem_aim.evaluating.fronts import undominated
from lowmem_aim.evaluating.recommended import recommended
from lowmem_aim.evaluating.scores import Scores, read_scores
from lowmem_aim.events import PointScored
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.records import SweepSize
from lowmem_aim.output.sweep_folder import SweepFolder, is_scored
from lowmem_aim.recipe.points import Point


@dataclass
class ScoredPoints:
    """The points of a sweep, and what is known of them so far."""

    swept: Swept
    folder: SweepFolder
    experts: Collection[str]  # by the names of their files
    repeated: int = 0  # trials of a search that chose what an earlier one had chosen: they have no scores of their own
    unchosen: int = 0  # trials of a search that are still to come

    @property
    def of(self) -> int:
        """The number of points, scored or not."""
        return len(self.swept.points) + self.repeated + self.unchosen

    @property
    def left(self) -> list[Point]:
        """The points that are not scored yet."""
        return [point for point in self.swept.points if not self.is_scored(point)]

    @property
    def done(self) -> int:
        """The number of points that are scored."""
        return len(self.swept.points) - len(self.left) + self.repeated

    def model(self, point: Point) -> Path:
        """The folder of a point's merged model."""
        return self.folder.models / point.name

    def is_scored(self, point: Point) -> bool:
        """Whether the scores of a point are there."""
        return is_scored(self.folder.out, point.name)

    def keep_size(self, *, finished: bool = False) -> None:
        """Keep in the journal how much is done. Raises DiskError."""
        self.folder.journal.keep(SweepSize(self.done, self.of, finished))

    def comparison(self, *, draws: bool = False) -> Comparison:
        """The comparison of all that is scored so far; the points of earlier sweeps here too. Raises UsageError.

        With `draws`, gains have standard errors, which takes a moment for each point.
        """
        names = dict.fromkeys([*(point.name for point in self.swept.points), *self.folder.noted()])
        scored = _read({name: self.folder.scores_of(name) for name in names})
        experts = _read({name: self.folder.scores_of_expert(name) for name in self.experts})
        return compared(scored, experts, forced=True, draws=draws)

    def event_of(self, name: str, *, earlier: bool = False) -> PointScored:
        """The event that tells a point's scores, and how it stands among the others."""
        found = self.comparison()
        row = next(row for row in found.rows if row.name == name)
        front = undominated(found, found.volume or found.tasks)
        return PointScored(
            name,
            {task: score.value for task, score in row.model.scores.items()},
            self.done,
            self.of,
            gain=row.gain.value if row.gain else None,
            front=tuple(other.name for other in front),
            earlier=earlier,
        )

    def event_of_expert(self, name: str, *, earlier: bool) -> PointScored:
        """The event that tells an expert's scores."""
        scores = read_scores(self.folder.scores_of_expert(name)).scores
        values = {task: score.value for task, score in scores.items()}
        return PointScored(name, values, self.done, self.of, expert=True, earlier=earlier)

    def staying(self) -> set[str]:
        """The names of the scored points whose merged models stay."""
        scored = {point.name for point in self.swept.points if self.is_scored(point)}
        if self.swept.keep == "all" or not scored:
            return scored
        return set(recommended(self.comparison()).values()) if self.swept.keep == "best" else set()

    def remove_models(self) -> None:
        """Remove the models of scored points that do not stay. Raises DiskError."""
        stay = self.staying()
        for point in self.swept.points:
            if self.is_scored(point) and point.name not in stay:
                self.folder.remove_model(point.name)


def _read(files: Mapping[str, Path]) -> Sequence[Scores]:
    """The scores in those of the files that are there, by the names that they must be of. Raises UsageError."""
    found = {name: read_scores(file) for name, file in files.items() if file.is_file()}
    if wrong := [name for name, scores in found.items() if scores.name != name]:
        told = [f"`{printable(str(files[name]))}` has the scores of `{printable(found[name].name)}`" for name in wrong]
        raise UsageError(told, hint="remove the file: what it stands for is then scored again")
    return list(found.values())
