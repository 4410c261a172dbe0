"""The table of a comparison as text: for a terminal of any width, and in markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lowmem_aim.errors import printable
from lowmem_aim.evaluating.columns import BEST, CHANCE, NONE, UNKNOWN, Column, columns_of
from lowmem_aim.evaluating.comparison import Comparison
from lowmem_aim.output.card import inline

GAP = "  "  # between columns
_WIDEST = {"model": 40, "models": 48}  # columns of a terminal; names beyond are cut there, and whole in the report

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
    """A text that is too long without its end; a model's name without its middle: names often differ at their ends."""
    text, is_name = printable(text), head == "model"
    most = len(text) if width is None else min(_WIDEST.get(head, 24), width // (2 if is_name else 3))
    if len(text) <= most:
        return text
    left = (most - 1) // 2 if is_name else most - 1
    return f"{text[:left]}…{text[len(text) - (most - 1 - left) :]}"


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
