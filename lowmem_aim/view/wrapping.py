"""Long lines broken at spaces for a terminal; into a file or a pipe they go whole."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import IO

NARROWEST = 20  # columns; below, nothing would be left beside the indent
_SHELL_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")


def columns_of(stream: IO[str]) -> int | None:
    """The columns of the terminal that `stream` writes to; None if it is no terminal, or does not tell."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError):
        return None


def wrapped(lines: Iterable[str], width: int | None, indent: int = 0) -> Iterator[str]:
    """Break lines of more than `width` columns at spaces; what goes on is indented. A width of None breaks nothing."""
    for line in lines:
        if width is None or len(line) <= width:
            yield line
        else:
            inner = indent if width - indent >= NARROWEST else 2
            yield from textwrap.wrap(
                line,
                max(width, NARROWEST),
                subsequent_indent=" " * inner,
                drop_whitespace=True,
                replace_whitespace=False,
                break_long_words=False,  # a path that is cut cannot be copied
                break_on_hyphens=False,
            )


def for_terminal(lines: Iterable[str], indent: int = 0, stream: IO[str] | None = None) -> str:
    """Lines as one text for `stream` (stdout, if None is given), broken where that is a terminal."""
    return "\n".join(wrapped(lines, columns_of(stream or sys.stdout), indent))


def wrapped_command(command: str, width: int | None, label: str = "") -> list[str]:
    """Break a command between the words of a shell, each line but the last ending with a backslash: it can be pasted.

    A word that is longer than a line is cut where the line ends, so that all of it can be read.
    """
    whole = f"{label}{command}"
    if width is None or len(whole) <= width:
        return [whole]
    indent = " " * (len(label) if width - len(label) >= 2 * NARROWEST else 2)
    words = _SHELL_WORD.findall(command)
    lines, line = [], label
    for word in words if " ".join(words) == command else command.split(" "):
        longer = f"{line}{word}" if line == label else f"{line} {word}"
        if line != label and len(longer) + 2 > width:  # two for the backslash
            lines.append(f"{line} \\")
            longer = f"{indent}{word}"
        line = longer
    return [piece for line in [*lines, line] for piece in _cut(line, width)]


def _cut(line: str, width: int) -> Iterator[str]:
    yield from (line[start : start + width] for start in range(0, len(line), width))
