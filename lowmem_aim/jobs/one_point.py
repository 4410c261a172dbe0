"""One point of a sweep, merged and scored by itself, beside other processes that do the same with other points."""

from __future__ import annotations

from lowmem_aim.jobs.evaluate import score
from lowmem_aim.jobs.merge_many import merge_many
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.sweep_folder import SweepFolder
from lowmem_aim.recipe.points import Point
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import Part


def make_and_score(point: Point, swept: Swept, folder: SweepFolder, options: Options, feed: Part) -> None:
    """Merge a point and score it, or go on where a killed process has left it; nothing if its scores are there.

    The caller holds the point's lock. Raises the errors of `merge` and `evaluate`.
    """
    file = folder.scores_of(point.name)
    if not file.is_file():
        merge_many({point.name: point.recipe}, folder.models, options, feed)
        score(str(folder.models / point.name), swept.asked, file, swept.forwards, options, feed, point.name)
