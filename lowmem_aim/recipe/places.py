"""The places that a recipe's relative paths lead to: the current folder, as in mergekit, else the recipe's own folder.

Only values from a file have a second place to look in; flags and Python's mappings have the current folder alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from lowmem_aim.errors import printable


@dataclass(frozen=True)
class Found:
    """The result of looking for a path: where it leads, and the places that were looked in."""

    path: str  # as it was written, or the same seen from the recipe's folder
    places: tuple[str, ...]  # whole paths of the folders in which nothing was found; () if something was
    doubt: str = ""  # a problem: two different things have this path


def find(text: str, folder: str, exists: Callable[[str], bool]) -> Found:
    """Look for a path in the current folder, then in the recipe's `folder` ("" if that is the current one).

    A path that is found nowhere is left as it is: it may be a Hub id. `exists` is asked with `~` expanded.
    """
    if os.path.isabs(os.path.expanduser(text)):
        return Found(text, ())
    paths = [text, *([os.path.join(folder, text.removeprefix("./"))] if folder else [])]
    there = {os.path.realpath(path): path for path in reversed(paths) if exists(os.path.expanduser(path))}
    if not there:
        return Found(text, tuple(dict.fromkeys(os.path.abspath(place) for place in (".", folder or "."))))
    if len(there) == 1:
        return Found(next(iter(there.values())), ())
    names = " or ".join(f"`{printable(os.path.abspath(path))}`" for path in paths)
    return Found(text, (), f"`{printable(text)}` may be {names}")
