"""The rows of the screen that show a sweep: how many points are scored, the best of them, and the front."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import PointScored
from lowmem_aim.view.layer_rows import LABEL
from lowmem_aim.view.progress import Progress

MOST_ROWS = 8
NAME, CELL = 28, 9  # columns


def point_rows(run: Progress, width: int) -> Iterator[Text]:
    """The line of all points; then, in a window of `width` columns, a table of the best ones with a head."""
    if not run.points:
        return
    last = next(reversed(run.points.values()))
    front = f"; {len(last.front)} on the front" if last.front else ""
    yield _row("points", Text(f"{last.done} of {last.of} scored{front}"))
    best = best_points(run)
    tasks = list(last.scores)[: max(1, (width - LABEL - NAME) // CELL - 2)]
    if best:
        head = "".join(f"{printable(task, 20)[: CELL - 1]:>{CELL}}" for task in tasks)
        yield _row("", Text(f"{'':{NAME}}{head}{'HV gain':>{CELL}}", "dim"))
    for point in best:
        yield _row("", _cells(point, tasks, on_front=point.name in last.front))


def best_points(run: Progress) -> list[PointScored]:
    """The scored points with the highest gains, or without gains the last ones; no experts."""
    points = [point for point in run.points.values() if not point.expert]
    if any(point.gain is not None for point in points):
        points.sort(key=lambda point: -(point.gain or 0.0))
        return points[:MOST_ROWS]
    return points[-MOST_ROWS:]


def line_of_point(point: PointScored) -> str:
    """A point, or an expert, and its scores in one line."""
    scores = ", ".join(f"{printable(task)} {value:.4g}" for task, value in point.scores.items())
    gain = f"; HV gain {point.gain:.4f}" if point.gain is not None else ""
    front = ", on the front" if point.name in point.front else ""
    done = "" if point.expert else f"; {point.done} of {point.of} points"
    return f"{'expert ' * point.expert}{printable(point.name)}: {scores}{gain}{front}{done}"


def _row(label: str, text: Text) -> Text:
    return Text.assemble((f"{label:<{LABEL}}", "dim"), text)


def _cells(point: PointScored, tasks: list[str], *, on_front: bool) -> Text:
    name = printable(point.name, 200)
    name = name if len(name) < NAME else f"…{name[len(name) - NAME + 2 :]}"  # the end says more than the beginning
    scores = "".join(f"{point.scores.get(task, 0.0):>{CELL}.4g}" for task in tasks)
    gain = f"{point.gain:>{CELL}.4f}" if point.gain is not None else f"{'':{CELL}}"
    return Text(f"{name:<{NAME}}{scores}{gain}{'  front' * on_front}", "bold" if on_front else "")
