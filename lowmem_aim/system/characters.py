"""The characters that stdout and stderr can show: in ASCII, bars, marks and lines are drawn in ASCII too.

This is the one place that decides it. Everything else writes block characters; a stream whose encoding lacks one gets
its stand-in from `STAND_INS`, of the same width, whoever writes to the stream.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Mapping

# Of the same width. Bars are half full at least where they show "#"; heights rise from "_" to "#".
STAND_INS = {
    **dict(zip("█▉▊▋▌▍▎▏░│", "#####----|", strict=True)),
    **dict(zip("▁▂▃▄▅▆▇", "_.:-=+*", strict=True)),
    **dict(zip("✓▶·…≈", "+>.~~", strict=True)),
}
_HANDLER, _ASCII = "lowmem_aim.stand_ins", "lowmem_aim_ascii"


def use_what_streams_can_show() -> None:
    """Have stdout and stderr replace what their encoding lacks; in a locale without UTF-8 they are made ASCII."""
    codecs.register_error(_HANDLER, _replaced)
    codecs.register(_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not has_unicode(stream.encoding, os.environ):
            ascii_ = _is_unicode(stream.encoding) or codecs.lookup(stream.encoding).name == "ascii"
            narrow = _ASCII if ascii_ else stream.encoding  # an old code page has letters of names
            stream.reconfigure(encoding=narrow, errors=_HANDLER)


def _ascii(name: str) -> codecs.CodecInfo | None:
    """The codec of ASCII by another name: click takes a stream in "ascii" for a mistake, and writes UTF-8 to it."""
    if name != _ASCII:
        return None
    found = codecs.lookup("ascii")
    return codecs.CodecInfo(
        found.encode,
        found.decode,
        found.streamreader,
        found.streamwriter,
        found.incrementalencoder,
        found.incrementaldecoder,
        name=_ASCII,
    )


def has_unicode(encoding: str, environment: Mapping[str, str]) -> bool:
    """Whether block characters may be written: the encoding has them, and the locale does not say otherwise.

    In the locales C and POSIX Python writes UTF-8 all the same, unless it is told what to write.
    """
    told = environment.get("PYTHONIOENCODING", "").partition(":")[0] or environment.get("PYTHONUTF8") == "1"
    locale = next(filter(None, map(environment.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return _is_unicode(encoding) and (bool(told) or locale not in ("C", "POSIX"))


def _is_unicode(encoding: str) -> bool:
    return encoding.lower().startswith("utf")


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Stand-ins for the characters that could not be encoded; others, from names, are escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("unicode_escape").decode() for c in lacking), error.end
