"""The table of a comparison: its cells as text, for a terminal of any width and for markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowmem_aim.errors import printable
from lowmem_aim.evaluating.comparison import Change, Comparison, Gain, Row
from lowmem_aim.evaluating.families import relaxation_of
from lowmem_aim.output.card import inline

BEST, CHANCE, UNKNOWN = "*", "≈", "?"
NONE = "-"
GAP = "  "  # between columns
_WIDEST = {"model": 40, "models": 48}  # columns of a terminal; names beyond are cut there, and whole in the report
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
    """The names of the compared models that are best; nobody, if there is no choice."""
    values = {row.name: value_of(row) for row in found.listed}
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


# --- on a terminal ----------------------------------------------------------------------------------------------------


def table_lines(found: Comparison, width: int | None, strong: Callable[[str], str] = str) -> Iterator[str]:
    """Yield the table's lines, in several parts one below the other if it is wider than `width` columns.

    Each part begins with the models' names. `strong` is applied to the best numbers, once their columns are aligned.
    """
    first, *others = [_aligned(column, width) for column in columns_of(found)]
    for number, part in enumerate(_parts(first, others, width)):
        yield from [""] * (number > 0)
        yield from _lines(found, [first, *part], strong)


def _lines(found: Comparison, part: Sequence[_Aligned], strong: Callable[[str], str]) -> Iterator[str]:
    yield GAP.join(column.head for column in part).rstrip()
    for number in range(len(found.every)):
        if number == len(found.population) and number:
            yield ""
        yield GAP.join(column.line(number, strong) for column in part).rstrip()


@dataclass(frozen=True)
class _Aligned:
    """A column as texts of one width."""

    head: str
    texts: Sequence[str]
    best: Sequence[bool]

    def line(self, number: int, strong: Callable[[str], str]) -> str:
        """The text of one model."""
        return strong(self.texts[number]) if self.best[number] else self.texts[number]


def _aligned(column: Column, width: int | None) -> _Aligned:
    if not column.cells:
        texts = [_cut(text, column.head, width) for text in column.texts]
        wide = max(map(len, (column.head, *texts)))
        return _Aligned(column.head.ljust(wide), [text.ljust(wide) for text in texts], [False] * len(texts))
    marked = any(cell.is_best for cell in column.cells)
    values = _right(cell.value + (BEST if cell.is_best else " " * marked) for cell in column.cells)
    # Marks stand behind the numbers, whose last digits are below each other.
    marks = (CHANCE, UNKNOWN)
    changed = any(cell.change.endswith(marks) for cell in column.cells)
    changes = _right(cell.change + " " * (changed and not cell.change.endswith(marks)) for cell in column.cells)
    texts = [f"{value} {change}" if change else value for value, change in zip(values, changes, strict=True)]
    head = _cut(column.head, "", width)
    wide = max(len(head), *map(len, texts))
    return _Aligned(head.rjust(wide), [text.rjust(wide) for text in texts], [cell.is_best for cell in column.cells])


def _right(texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    wide = max(map(len, texts))
    return [text.rjust(wide) if wide and any(map(str.strip, texts)) else "" for text in texts]


def _cut(text: str, head: str, width: int | None) -> str:
    """A text without its middle if it is too long: names that belong together differ at their ends."""
    text = printable(text)
    most = len(text) if width is None else min(_WIDEST.get(head, 24), width // (2 if head == "model" else 3))
    left = (most - 1) // 2
    return text if len(text) <= most else f"{text[:left]}…{text[left + 1 - most :]}"


def _parts(first: _Aligned, others: Sequence[_Aligned], width: int | None) -> Iterator[list[_Aligned]]:
    """Yield the columns of each part: as many as fit beside the first one, and one at least."""
    part: list[_Aligned] = []
    used = len(first.head)
    for column in others:
        if part and width is not None and used + len(GAP) + len(column.head) > width:
            yield part
            part, used = [], len(first.head)
        part.append(column)
        used += len(GAP) + len(column.head)
    yield part


# --- in markdown ------------------------------------------------------------------------------------------------------


def markdown_rows(found: Comparison) -> Iterator[str]:
    """Yield the table's lines in markdown: names whole, standard errors beside the scores, the best numbers bold."""
    columns = columns_of(found)
    yield _markdown_row(
        column.head if column.texts or column.head == "HV gain" else inline(column.head) for column in columns
    )
    yield _markdown_row("---:" if column.cells else "---" for column in columns)
    for number in range(len(found.every)):
        yield _markdown_row(_markdown_cell(column, number) for column in columns)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(column: Column, number: int) -> str:
    if column.texts:
        text = column.texts[number]
        return text if text == NONE or column.head == "AIM" else inline(text)
    cell = column.cells[number]
    text = cell.value + (f" ± {cell.error}" if cell.error else "") + (f" ({cell.change})" if cell.change else "")
    return f"**{text}**" if cell.is_best else text
