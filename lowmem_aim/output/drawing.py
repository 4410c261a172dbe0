"""matplotlib (the extra `[report]`) as pictures use it: apart from the user's settings, files and terminal.

It is imported only here and by what draws, and only to draw. pyplot is not used, so that no window system is asked and
no state is left behind.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowmem_aim.system.files import cache_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 120  # per inch


def drawn_with() -> dict[str, str]:
    """The versions that a picture depends on, found without importing anything; empty if no picture can be drawn."""
    if find_spec("matplotlib") is None:
        return {}
    try:
        return {name: metadata.version(name) for name in ("matplotlib", "pillow")}
    except metadata.PackageNotFoundError:
        return {}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Have matplotlib draw in the block with its own defaults, its messages off the terminal, its files in the cache.

    When it is imported, matplotlib looks for fonts and keeps a list of them; so does fontconfig, which matplotlib asks.
    """
    cache, logger = str(cache_folder()), logging.getLogger("matplotlib")
    own = {"XDG_CACHE_HOME": cache, "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or os.path.join(cache, "matplotlib")}
    before, level = {name: os.environ.get(name) for name in own}, logger.level
    os.environ.update(own)
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _defaults():
                yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    import matplotlib

    settings = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    own = {"text.parse_math": False, "svg.hashsalt": "lowmem-aim"}  # else `$x_1$` is a formula, and ids are random
    with matplotlib.rc_context(settings | own):
        yield


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG of DOTS per inch, without a date. Call it within `drawing`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, png = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(png, metadata={"Software": None})
    return png.getvalue()


def svg_of(figure: Figure) -> bytes:
    """The figure as an SVG, texts drawn as paths, without a date. Call it within `drawing`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    canvas, svg = FigureCanvasSVG(figure), io.StringIO()
    canvas.print_svg(svg, metadata={"Date": None, "Creator": None})
    return svg.getvalue().encode()
