"""The columns of a comparison's table: what each model is, its scores with their changes, and what marks mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lowmem_aim.evaluating.comparison import Change, Comparison, Gain, Row
from lowmem_aim.evaluating.families import relaxation_of

BEST, CHANCE, UNKNOWN = "*", "≈", "?"
NONE = "-"
_DIGITS = 4  # of a number with a unit


@dataclass(frozen=True)
class Cell:
    """One number of the table, in parts that stand below those of other rows."""

    value: str
    error: str = ""  # standard error of the value
    change: str = ""  # against the parent, with its mark
    is_best: bool = False


# --- numbers as text --------------------------------------------------------------------------------------------------


def shown_value(value: float, unit: str) -> str:
    """A score as text: a fraction in percent, another number with its first digits."""
    return f"{value:#.{_DIGITS}g}".removesuffix(".") if unit else f"{100 * value:.2f}"


def shown_change(change: Change, unit: str) -> str:
    """A change as text: in percentage points, or in the score's unit."""
    text = f"{change.value:+.2g}" if unit else f"{100 * change.value:+.2f}"
    return text if float(text) else "0" if unit else "0.00"


Marks = Mapping[bool | None, str]  # by `Change.is_clear`


def _marks(found: Comparison) -> Marks:
    """The marks of changes. Where no standard error is known at all, a line below the table says so instead."""
    known = any(change.stderr is not None for change in _changes(found))
    return {True: "", False: CHANCE, None: UNKNOWN if known else ""}


def _changes(found: Comparison) -> Iterator[Change]:
    for row in found.every:
        yield from row.changes.values()
        if row.gain and row.gain.change:
            yield row.gain.change


def _score_cells(found: Comparison, task: str) -> list[Cell]:
    sign, marks = 1 if found.score_of(task).higher_is_better else -1, _marks(found)
    best = _best(found, lambda row: sign * row.model.scores[task].value)
    return [_score_cell(row, task, marks, row.name in best) for row in found.every]


def _score_cell(row: Row, task: str, marks: Marks, is_best: bool) -> Cell:
    score, change = row.model.scores[task], row.changes.get(task)
    error = "" if score.stderr is None else shown_value(score.stderr, score.unit)
    shown = shown_change(change, score.unit) + marks[change.is_clear] if change else ""
    return Cell(shown_value(score.value, score.unit), error, shown, is_best)


def _gain_cells(found: Comparison) -> list[Cell]:
    best = _best(found, lambda row: row.gain.value if row.gain else 0.0)
    members = {row.name for row in found.population}
    gains = [(row, None if row.name in members else row.gain) for row in found.every]
    return [_gain_cell(gain, _marks(found), row.name in best) if gain else Cell(NONE) for row, gain in gains]


def _gain_cell(gain: Gain, marks: Marks, is_best: bool) -> Cell:
    shown = ""
    if gain.change and gain.relative is not None:
        shown = f"{100 * gain.relative:+.2f} %{marks[gain.change.is_clear]}"
    return Cell(f"{gain.value:.4f}", "" if gain.stderr is None else f"{gain.stderr:.4f}", shown, is_best)


def _best(found: Comparison, value_of: Callable[[Row], float]) -> set[str]:
    """The names of the compared models that are best; nobody, if there is no choice. Controls are none to choose."""
    values = {row.name: value_of(row) for row in found.listed if not row.model.control}
    most = max(values.values(), default=0.0)
    return (
        {name for name, value in values.items() if value == most}
        if min(values.values(), default=most) < most
        else set()
    )


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column: its head, and a text or a number for each model."""

    head: str
    texts: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()


def columns_of(found: Comparison) -> list[Column]:
    """The columns as in the AIM paper: what the model is, its score on each task with the change, the HV gain."""
    rows = found.every
    members = {row.name for row in found.population}
    methods = [row.model.method or ("(population)" if row.name in members else NONE) for row in rows]
    columns = [
        Column("model", tuple(row.name for row in rows)),
        Column("method", tuple(methods)),
        Column("models", tuple(", ".join(row.model.models) or NONE for row in rows)),
        Column("AIM", tuple(relaxation_of(row.model) or NONE for row in rows)),
        *(Column(task, cells=tuple(_score_cells(found, task))) for task in found.tasks),
    ]
    if any(row.gain is not None for row in rows):
        columns.append(Column("HV gain", cells=tuple(_gain_cells(found))))
    return columns


def legend_of(found: Comparison) -> Iterator[str]:
    """Yield what the numbers and the marks in the table mean, of those marks that occur."""
    changes = list(_changes(found))
    text = "scores in percent"
    if changes:
        text += ", then the change against the unrelaxed merge in percentage points (of the HV gain: relative)"
    yield text
    if any(cell.is_best for column in columns_of(found) for cell in column.cells):
        yield f"{BEST} best of the compared models"
    marks = _marks(found)
    if any(change.is_clear is False for change in changes):
        yield f"{CHANCE} smaller than two standard errors of the difference: may be chance"
    if changes and any(change.is_clear is None for change in changes):
        yield f"{marks[None]} no standard error is known: may be chance".lstrip()
