"""Numbers as people read them: sizes in bytes with decimal units (powers of ten), and times."""

from __future__ import annotations

import re

_SIZES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def shown(count: float) -> str:
    """`count` bytes as text: `1.2 GB`."""
    for unit, one in _SIZES:
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count:.0f} bytes"


def bytes_of(text: str) -> int:
    """Turn `5GB`, `512MiB` or `1000000` into bytes: GB is 1e9, GiB is 2^30. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"`{text[:100]}` is not a size; write 5GB, 512MB or 1GiB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


def clock(seconds: float) -> str:
    """`seconds` as text: `0:07`, `12:30`, `3:05:00` or `2 d 03:05`."""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(number: int, noun: str) -> str:
    """A number of things as text: `1 expert`, `3 experts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
