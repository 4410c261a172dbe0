"""The file of defaults: values of flags that a user does not want to type each time.

It is `$XDG_CONFIG_HOME/lowmem-aim/config.toml` (`~/.config` unless set), and only the command line reads it. A flag
counts more than the file. The file may hold only what changes no byte of a merge; anything else in it is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import UsageError, did_you_mean, printable
from lowmem_aim.system.faults import named
from lowmem_aim.system.files import open_to_read, unreadable
from lowmem_aim.units import bytes_of

MOST_BYTES = 64_000
FORMATS = ("human", "plain", "json", "quiet")
DEVICES = ("auto", "cpu", "cuda", "mps")
_HINT = "docs/command-line.md describes the file of defaults"


def defaults_file() -> Path | None:
    """The path of the file of defaults, whether it is there or not; None if no home is known."""
    root = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(root) if root else Path.home() / ".config") / "lowmem-aim" / "config.toml"
    except RuntimeError:
        return None


def read_defaults() -> dict[str, Any]:
    """The values in the file of defaults by key, sizes in bytes; empty if there is no file.

    Raises UsageError with every problem, each with the file's name and, where it is known, the line.
    """
    file = defaults_file()
    data = _data(file) if file else None
    if file is None or data is None:
        return {}
    where, text = named(file).strip("`"), _text(file, data)
    table = _parsed(where, text)
    found, problems = {}, []
    for key, value in table.items():
        try:
            found[key] = _checked(key, value)
        except ValueError as error:
            problems.append(f"{where}:{_line_of(key, text)} {error}")
    if problems:
        raise UsageError(problems, hint=f"the keys are {', '.join(f'`{key}`' for key in KEYS)}; {_HINT}")
    return found


def _data(file: Path) -> bytes | None:
    """The bytes of the file; None if there is none. Raises UsageError."""
    try:
        with open_to_read(file) as stream:
            data = stream.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(error, file, UsageError) from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"{named(file)} has more than {MOST_BYTES // 1000} kB", hint=_HINT)
    return data


def _text(file: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{named(file)} is not UTF-8 text", hint=_HINT) from error


def _parsed(where: str, text: str) -> Mapping[str, Any]:
    import tomllib  # here, because most users have no such file

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        message, _, place = str(error).partition(" (at line ")
        line = f"{place.partition(',')[0]}:" if place[:1].isdigit() else ""
        raise UsageError(f"{where}:{line} this is not TOML: {printable(message)}", hint=_HINT) from error


def _line_of(key: str, text: str) -> str:
    """`7:` for a key that stands in line 7; empty if the line is not found."""
    begins = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[].=]""")
    return next((f"{number}:" for number, line in enumerate(text.splitlines(), 1) if begins.match(line)), "")


# --- keys -------------------------------------------------------------------------------------------------------------


def _checked(key: str, value: Any) -> Any:
    """The value of a key. Raises ValueError with what is wrong."""
    if key not in KEYS:
        raise ValueError(f"unknown key `{printable(key)}`{did_you_mean(key, KEYS)}")
    try:
        return KEYS[key](value)
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}") from None


def _device(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"cuda:\d{1,3}", value):
        return value
    return _word(value, DEVICES)


def _format(value: Any) -> str:
    return _word(value, FORMATS)


def _word(value: Any, words: tuple[str, ...]) -> str:
    if value in words:
        return str(value)
    shown = printable(str(value), 100)
    near = did_you_mean(value, words) if isinstance(value, str) else ""
    raise ValueError(f"`{shown}` is not one of {', '.join(words)}{near}")


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        return bytes_of(value)
    raise ValueError(f'`{printable(str(value), 100)}` is not a size; write "5GB", "512MB" or "1GiB"')


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"`{printable(str(value), 100)}` is neither true nor false")


KEYS: dict[str, Callable[[Any], Any]] = {
    "device": _device,
    "ram": _size,
    "vram": _size,
    "cache": _switch,
    "format": _format,
}
