"""The heat map as a PNG, by matplotlib (the extra `[report]`).

The bytes follow from the figures and from the versions in `drawn_with`: no date, none of the user's settings, and the
fonts that matplotlib brings along.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_aim.output.drawing import DOTS, drawing, drawn_with, png_of
from lowmem_aim.output.heatmap import (
    MOST_KINDS,
    Modules,
    Scale,
    colour_of,
    heat_rows,
    inside,
    label_of,
    layers_of,
    scale_of,
    shares_by,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

COLUMN, ROW, CHARACTER = 0.16, 0.24, 0.078  # inches
NARROWEST, WIDEST = 3.0, 24.0  # inches of cells: a thousand layers get three dots each
NOT_RELAXED = "#e6e6e6"


def heatmap_png(kept: Modules) -> bytes | None:
    """Draw layers by kinds of module; None if no layer was relaxed, or matplotlib is absent or does not work here."""
    if not drawn_with() or not any(heat_rows(kept)):
        return None
    try:
        with drawing():
            return png_of(_figure(kept))
    except Exception:  # whatever it is: hours of merging must not fail for a picture
        return None


def _figure(kept: Modules) -> Figure:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    every, layers = list(heat_rows(kept)), layers_of(kept)
    rows, title = every[:MOST_KINDS], "How much of the delta is left"
    if len(rows) < len(every):
        title += f", the first {len(rows)} of {len(every)} kinds"
    shares = shares_by(inside(kept), 1)
    labels = [f"{label_of(kind)}  {shares[kind]:4.0%}" for kind, _ in rows]
    left, below, above, right = 0.3 + CHARACTER * max(map(len, labels)), 0.6, 0.45, 1.0
    across, down = min(max(COLUMN * len(layers), NARROWEST), WIDEST), ROW * max(len(rows), 4)
    width, height = left + across + right, below + down + above
    figure = Figure(figsize=(width, height), dpi=DOTS)
    cells = figure.add_axes((left / width, below / height, across / width, down / height))
    colours = ListedColormap([colour_of(step / 255) for step in range(256)]).with_extremes(bad=NOT_RELAXED)
    numbers = [[float("nan") if share is None else share for share in row] for _, row in rows]
    scale = scale_of(every)
    image = cells.imshow(
        numbers, cmap=colours, vmin=scale.least, vmax=scale.most, aspect="auto", interpolation="nearest"
    )
    bar = figure.add_axes(((left + across + 0.2) / width, below / height, 0.15 / width, down / height))
    figure.colorbar(image, cax=bar)
    cells.set_title(title, fontproperties=_font("DejaVuSans.ttf"), loc="left")
    _label(cells, bar, labels, layers, scale)
    return figure


def _label(cells: Axes, bar: Axes, labels: Sequence[str], layers: Sequence[str], scale: Scale) -> None:
    """Draw all texts, in matplotlib's own fonts by file: the system may have others of the same names."""
    text, names = _font("DejaVuSans.ttf"), _font("DejaVuSansMono.ttf")
    each = next(step for step in (1, 5, 10, 50, 100) if len(layers) <= 20 * step or step == 100)
    columns = range(0, len(layers), each)
    cells.set_xlabel("layer", fontproperties=text)
    cells.set_xticks(columns, [layers[column] for column in columns], fontproperties=text)
    cells.set_yticks(range(len(labels)), labels, fontproperties=names)
    quarters = [scale.least + (scale.most - scale.least) * part / 4 for part in range(5)]
    bar.set_yticks(quarters, [f"{share:.1%}" for share in quarters], fontproperties=text)


def _font(name: str) -> FontProperties:
    import matplotlib
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size=9)
