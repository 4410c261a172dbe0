"""The options that the installed mergekit's help lists, against those that `merge` and `plan` take here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import mergekit_options

from lowmem_aim.cli.commands import cli

_LISTED = re.compile(r"^  (?:(-\w), )?(--?[\w-]+)(?: / (--no-[\w-]+))?(?: ([A-Z]+)(?=\s|$))?", re.M)


def options(tool: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it), for each option of `mergekit-yaml` in the environment of `tool`."""
    asked = [str(tool.with_name("mergekit-yaml")), "--help"]
    told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    theirs = {flag: bool(value) for *flags, value in _LISTED.findall(told) for flag in flags if flag}
    theirs.pop("--help", None)
    ours = {name: _taken(cli.commands[name]) for name in ("merge", "plan")}
    for flag, takes_value in theirs.items():
        wrong = [name for name, taken in ours.items() if taken.get(flag) != takes_value]
        yield f"option {flag}", f"{' and '.join(wrong)}: not taken, or not as in mergekit" if wrong else ""
    known = {word[0] for word in mergekit_options.words()}
    yield "options", f"other options: {sorted(theirs.keys() ^ known)}" if theirs.keys() ^ known else ""


def _taken(command: click.Command) -> dict[str, bool]:
    """Each flag of a command -> whether it takes a value."""
    flags = (param for param in command.params if isinstance(param, click.Option))
    return {word: not (flag.is_flag or flag.count) for flag in flags for word in (*flag.opts, *flag.secondary_opts)}
