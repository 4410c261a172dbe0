"""Pictures of a comparison: Pareto fronts of pairs of tasks, and every score over AIM's omega.

Both are drawn in black and greys, with other marks and dashes for what is different, and name every model.
Call them within `output.drawing.drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import printable
from lowmem_aim.evaluating.comparison import Comparison, Row
from lowmem_aim.evaluating.families import Curve
from lowmem_aim.evaluating.fronts import Front
from lowmem_aim.evaluating.scores import Score
from lowmem_aim.output.drawing import DOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.7, 3.2)  # inches
ACROSS = 3  # panels
LINE = 0.18  # inches of a line of text below the panels
LONGEST = 48  # characters of a name
SMALL = 7  # points of the smallest letters
MOST_PANELS = 23  # tasks drawn over omega: hundreds are more than matplotlib draws
MOST_NUMBERED = 12  # points of a panel; of more, only those of the front and the population have their number
ASIDE = 0.012  # of omega, between the bars of AIM and its controls

# By kind of model, and by control ("": AIM itself): told apart by their marks alone, where there is no colour.
_MARKS: dict[str, dict[str, Any]] = {
    "population": {"linestyle": "", "marker": "s", "markersize": 6.5, "markerfacecolor": "white", "color": "0"},
    "merge": {"linestyle": "", "marker": "o", "markersize": 6, "color": "0.55"},
    "relaxed": {"linestyle": "", "marker": "^", "markersize": 7, "color": "0"},
    "control": {"linestyle": "", "marker": "x", "markersize": 6, "color": "0"},
}
_LINES: dict[str, dict[str, Any]] = {
    "": {"linestyle": "-", "marker": "o", "color": "0"},
    "uniform": {"linestyle": "--", "marker": "s", "color": "0.4", "markerfacecolor": "white"},
    "permuted": {"linestyle": ":", "marker": "^", "color": "0.4"},
    "inverted": {"linestyle": "-.", "marker": "x", "color": "0.4"},
}
_FRONT: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "color": "0.4", "zorder": 2}
_FROM_PARENT: dict[str, Any] = {"linewidth": 0.8, "color": "0.8", "zorder": 1}
_ERRORS: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2}


def _panels(count: int, lines: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, and room for `lines` lines of text under them."""
    from matplotlib.figure import Figure

    across = min(count, ACROSS)
    down = math.ceil(count / across)
    below = LINE * (lines + 0.5)
    width, height = PANEL[0] * across, PANEL[1] * down + below
    figure = Figure(figsize=(width, height), dpi=DOTS)
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    figure.subplots_adjust(
        left=0.62 / width,
        right=1 - 0.12 / width,
        bottom=(below + 0.5) / height,
        top=1 - 0.3 / height,
        wspace=0.62 / (PANEL[0] - 0.75),
        hspace=0.75 / (PANEL[1] - 0.75),
    )
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.tick_params(labelsize=SMALL)
        panel.margins(0.12)
    return figure, panels[:count]


def _legend(figure: Figure, panel: Axes, styles: Mapping[str, Mapping[str, Any]], line: float) -> None:
    """Say what marks mean, on a line of its own, so many lines above the figure's lower edge."""
    handles = [panel.plot([], [], label=name, **style)[0] for name, style in styles.items()]
    place = (0.5, LINE * line / figure.get_figheight())
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=place, ncols=len(styles), fontsize=SMALL + 1, frameon=False
    )


def _label(task: str, score: Score) -> str:
    unit = printable(score.unit, 30) if score.unit else "%"
    return f"{printable(task, 30)}, {unit}{'' if score.higher_is_better else ' (less is better)'}"


def _drawn(value: float, score: Score) -> float:
    """A score, or its standard error, as it is drawn: fractions in percent."""
    return value if score.unit else 100 * value


# --- fronts -----------------------------------------------------------------------------------------------------------


def pareto_figure(found: Comparison, fronts: Sequence[Front]) -> Figure:
    """Draw a panel for each pair of tasks; the numbers at the points are those of the models listed below them."""
    names = [f"{number}  {printable(row.name, LONGEST)}" for number, row in enumerate(found.every, start=1)]
    columns = min(len(fronts), ACROSS)
    lines = math.ceil(len(names) / columns)
    figure, panels = _panels(len(fronts), lines + 1)
    for front, panel in zip(fronts, panels, strict=True):
        _draw_front(found, front, panel)
    for at, name in enumerate(names):
        column, line = divmod(at, lines)
        place = (0.03 + column / columns, LINE * (lines - line - 0.25) / figure.get_figheight())
        figure.text(*place, name, fontsize=SMALL + 1, va="center")
    kinds = dict.fromkeys(_kind(found, row) for row in found.every)
    styles: dict[str, Mapping[str, Any]] = {kind: _MARKS[kind] for kind in kinds}
    _legend(figure, panels[0], styles | {"front": _FRONT}, lines + 0.75)
    return figure


def _kind(found: Comparison, row: Row) -> str:
    if row in found.population:
        return "population"
    return "control" if row.model.control else "relaxed" if row.model.relaxed else "merge"


def _draw_front(found: Comparison, front: Front, panel: Axes) -> None:
    scores = [found.score_of(task) for task in front.pair]
    places = {
        row.name: [_drawn(row.model.scores[task].value, score) for task, score in zip(front.pair, scores, strict=True)]
        for row in found.every
    }
    for row in found.every:
        if row.parent is not None:
            panel.plot(*zip(places[row.parent.name], places[row.name], strict=True), **_FROM_PARENT)
    corners = [places[row.name] for row in front.rows]
    panel.step(*zip(*corners, strict=True), where="pre", **_FRONT)  # down first, then on: what the front dominates
    for number, row in enumerate(found.every, start=1):
        x, y = places[row.name]
        panel.plot([x], [y], zorder=3, **_MARKS[_kind(found, row)])
        if len(places) <= MOST_NUMBERED or row in front.rows or row in found.population:
            aside = (4, 4) if number % 2 else (4, -10)  # two points at one place have their numbers at two
            panel.annotate(str(number), (x, y), xytext=aside, textcoords="offset points", fontsize=SMALL)
    panel.set_xlabel(_label(front.pair[0], scores[0]), fontsize=SMALL + 1)
    panel.set_ylabel(_label(front.pair[1], scores[1]), fontsize=SMALL + 1)
    for score, invert in zip(scores, (panel.invert_xaxis, panel.invert_yaxis), strict=True):
        if not score.higher_is_better:  # better is always up and to the right
            invert()


# --- over omega -------------------------------------------------------------------------------------------------------


def omega_figure(found: Comparison, curve: Curve) -> Figure:
    """Draw the HV gain and every score over omega, of AIM and its controls; bars are one standard error each way."""
    rows, tasks = {row.name: row for row in found.every}, found.tasks[:MOST_PANELS]
    has_gains = all(rows[model.name].gain for line in curve.lines.values() for _, model in line)
    figure, panels = _panels(len(tasks) + has_gains, 2)
    for number, (control, line) in enumerate(curve.lines.items()):
        omegas = [omega + ASIDE * (number - (len(curve.lines) - 1) / 2) for omega, _ in line]
        if has_gains:
            gains = [gain for _, model in line if (gain := rows[model.name].gain)]
            _draw_line(panels[0], control, omegas, [(gain.value, gain.stderr) for gain in gains])
        for task, panel in zip(tasks, panels[has_gains:], strict=True):
            scores = [model.scores[task] for _, model in line]
            _draw_line(panel, control, omegas, [_drawn_score(score) for score in scores])
    labels = ["HV gain"] * has_gains + [_label(task, found.score_of(task)) for task in tasks]
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel("omega", fontsize=SMALL + 1)
        panel.set_ylabel(label, fontsize=SMALL + 1)
    _legend(figure, panels[0], {control or "AIM": _LINES[control] for control in curve.lines}, 1.75)
    about = f"{printable(curve.name, LONGEST)}; omega 1 changes nothing; bars: one standard error each way"
    about += f"; the first {len(tasks)} of {len(found.tasks)} tasks" * (len(tasks) < len(found.tasks))
    figure.text(0.5, LINE * 0.75 / figure.get_figheight(), about, fontsize=SMALL + 1, ha="center", va="center")
    return figure


def _drawn_score(score: Score) -> tuple[float, float | None]:
    return _drawn(score.value, score), None if score.stderr is None else _drawn(score.stderr, score)


def _draw_line(
    panel: Axes, control: str, omegas: Sequence[float], points: Sequence[tuple[float, float | None]]
) -> None:
    """Draw points (value, standard error) and the line through them; a point whose error is not known has no bar."""
    errors = [float("nan") if error is None else error for _, error in points]
    panel.errorbar(omegas, [value for value, _ in points], errors, **_LINES[control], **_ERRORS)
