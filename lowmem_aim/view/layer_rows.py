"""The rows of the screen with a cell for each layer: what is done, and what AIM and ACM have left by kind of module.

The cells of all rows stand below each other, in the order of the layers: 0, 1, 2, ... A merge finishes the layers in
another order, that of its files, which hold tensors by name: 0, 1, 10, 11, 2, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import Planned
from lowmem_aim.output.heatmap import BLOCKS, Scale, heat_rows, layers_of, scale_of
from lowmem_aim.view.progress import Progress

LABEL = 10  # columns of a label
KIND_LABEL = 28  # the same where rows below name kinds of module
MOST_KINDS = 16
WIDEST_CELL = 3  # columns

Cell = tuple[str, Style | str]  # a character and its style


@dataclass(frozen=True)
class Cells:
    """The cells that all rows have: the layers of each, their columns, and the columns of the label before them."""

    layers: Sequence[Sequence[str]]
    columns: int
    label: int

    @classmethod
    def of(cls, run: Progress, width: int) -> Cells | None:
        """The cells in a window of `width` columns; None if nothing is known of layers."""
        layers = sorted(filter(None, run.planned.layers), key=int) if run.planned else []
        if not layers:
            return None
        beside = len(f"  {_relaxed_by(run)} kept 100%")
        # Known from the plan on: the cells must not jump when the first share is known.
        label = KIND_LABEL if _relaxed_by(run) and KIND_LABEL + len(layers) + beside <= width else LABEL
        room = max(width - label - beside, 4)
        each = -(-len(layers) // room)  # layers a cell
        cells = [layers[first : first + each] for first in range(0, len(layers), each)]
        return cls(cells, max(1, min(WIDEST_CELL, room // len(cells))), label)

    def row(self, label: str, cells: Sequence[Cell], figures: Text) -> Text:
        """One row: its label, its cells, and figures behind them."""
        text = Text.assemble((f"{label:<{self.label}}", "dim"))
        for character, style in cells:
            text.append(character * self.columns, style)
        return text.append("  ").append_text(figures) if figures else text


def layer_row(run: Progress, width: int) -> Text | None:
    """The row of all layers: a cell fills as its layers' tensors are finished, or, in calibration, its blocks."""
    cells, planned = Cells.of(run, width), run.planned
    if cells is None or planned is None:
        return None
    shares, scale = run.kept_by(0), scale_of(heat_rows(run.kept))
    drawn: list[Cell] = []
    for names in cells.layers:
        done, share = _done(run, planned, names), _mean([shares.get(name) for name in names])
        unknown = "green" if run.merging else "cyan"
        style = Style(color=unknown if share is None else scale.colour(share))
        drawn.append((BLOCKS[min(int(done * len(BLOCKS)), len(BLOCKS) - 1)], style) if done else ("·", "dim"))
    return cells.row("layers", drawn, Text(_figures(run, planned)))


def effect_rows(run: Progress, width: int) -> Iterator[Text]:
    """Yield a row for each expert: what the merge keeps, layer by layer, of the expert's effect on its own texts."""
    cells = Cells.of(run, width)
    for expert, name in enumerate(run.expert_names()):
        share, layers = run.effects.in_all(expert), run.effects.by_layer(expert)
        if cells is None or share is None:
            continue
        own = [_mean([layers.get(layer) for layer in of_cell]) for of_cell in cells.layers]
        label = printable(name, 60)
        label = label if len(label) < cells.label else f"{label[: cells.label - 2]}…"
        yield cells.row(label, [_heat(one, Scale()) for one in own], Text(f"kept {share:.0%}"))


def heat_map(run: Progress, width: int) -> Iterator[Text]:
    """Yield a row for each kind of module, then the scale of heights and colours; nothing without the room for it."""
    cells, rows = Cells.of(run, width), list(heat_rows(run.kept))
    if not rows or cells is None or cells.label != KIND_LABEL:
        return
    scale, known = scale_of(rows), layers_of(run.kept)
    for kind, row in rows[:MOST_KINDS]:
        of_layer = dict(zip(known, row, strict=True))
        shares = [_mean([of_layer.get(name) for name in names]) for names in cells.layers]
        yield cells.row(_shortened(kind), [_heat(share, scale) for share in shares], Text(f"{_mean(row):.0%}", "dim"))
    yield Text(f"{'':<{KIND_LABEL}}kept: {scale}", "dim")


def _heat(share: float | None, scale: Scale) -> Cell:
    return (" ", "") if share is None else (scale.block(share), Style(color=scale.colour(share)))


def _shortened(kind: str) -> str:
    name = printable(kind, 60)
    return name if len(name) < KIND_LABEL else f"…{name[len(name) - KIND_LABEL + 2 :]}"  # the end says more


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _done(run: Progress, planned: Planned, layers: Sequence[str]) -> float:
    """The share of some layers that is done: of their tensors, or, during calibration, of the layers as blocks."""
    blocks = run.current if "merge" in planned.phases else run.phases.get("calibrate")
    if blocks and blocks.unit == "blocks":
        return sum(min(max(blocks.done - int(name), 0.0), 1.0) for name in layers) / len(layers)
    of = sum(planned.layers[name] for name in layers)
    return sum(run.layers[name] for name in layers) / of if of else 0.0


def _figures(run: Progress, planned: Planned) -> str:
    """The share of the delta that is kept or, without AIM and ACM, the number of merged layers."""
    kept = run.kept_share()
    if kept is not None:
        return f"{_relaxed_by(run)} kept {kept:.0%}"
    layers = [name for name in planned.layers if name]
    whole = sum(_done(run, planned, [name]) >= 1 for name in layers)
    return f"{whole} of {len(layers)}" if run.merging or "merge" not in planned.phases else ""


def _relaxed_by(run: Progress) -> str:
    _, *relaxations = run.planned.title.split(" + ") if run.planned else [""]
    named = " + ".join(title.partition(" (")[0] for title in relaxations)
    return named or ("relaxing" if run.kept else "")
