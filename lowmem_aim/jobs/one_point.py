"""One point of a sweep, merged and scored by itself, beside other processes that do the same with other points."""

from __future__ import annotations

from pathlib import Path

from lowmem_aim.jobs.evaluate import score
from lowmem_aim.jobs.merge_many import merge_many
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.sweep_folder import MODELS, SCORES
from lowmem_aim.recipe.points import Point
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import Part


def make_and_score(point: Point, swept: Swept, out: Path, options: Options, feed: Part) -> None:
    """Merge a point and score it, or go on where a killed process has left it; nothing if its scores are there.

    `out` is the folder of the sweep; the caller holds the point's lock. Raises the errors of `merge` and `evaluate`.
    """
    models, file = out / MODELS, out / SCORES / f"{point.name}.json"
    if not file.is_file():
        merge_many({point.name: point.recipe}, models, options, feed)
        score(str(models / point.name), swept.asked, file, swept.forwards, options, feed, point.name)
