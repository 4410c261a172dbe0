"""mergekit's flags on a command: those that act become flags of ours, and one line tells of those without effect."""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import click
from click.core import ParameterSource

from lowmem_aim.cli import completion
from lowmem_aim.cli.flags import Command, flags_of
from lowmem_aim.cli.mergekit_flags import COUNTED, GROUP, REFUSED, SWITCHES, VALUES, told_of
from lowmem_aim.cli.usage import Flag
from lowmem_aim.cli.values import CountType
from lowmem_aim.errors import UsageError

NO_LIMIT = sys.maxsize  # parameters in a shard, for a size of 0


class _Unlisted(Flag):
    """A flag that the note below its group names, rather than a line of its own."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return no line."""
        return None


_acting = flags_of(GROUP)
_FLAGS = (
    _acting("--cuda/--no-cuda", default=None, help="The same as `--device cuda`, or `cpu`. [default: --device's]"),
    _acting("--gpu-rich", is_flag=True, help="The same as `--device cuda`."),
    _acting(
        "--out-shard-size",
        type=CountType(),
        help="Put no more parameters than this, such as 2B or 500M, into a file. [default: --shard-size's]",
    ),
    _acting(
        "--transformers-cache",
        metavar="FOLDER",
        shell_complete=completion.folders,
        help="Keep models from the Hub in this folder. [default: HF_HUB_CACHE]",
    ),
)


def _unlisted(*names: str, **settings: Any) -> Any:
    return click.option(*names, cls=_Unlisted, group=GROUP, help="Without effect here. [default: none]", **settings)


def mergekit_flags(command: Command) -> Command:
    """Give a command mergekit's flags. It is called with its own flags, and `notices`: a line about those unneeded.

    Raises UsageError for flags that ask for what is not done, and for two sizes of shards.
    """
    options = [
        *_FLAGS,
        *(_unlisted(f"{flag}/--no-{flag[2:]}", default=None) for flag in SWITCHES),
        *(_unlisted(flag, type=int if flag == "--write-threads" else str) for flag in VALUES),
        *(_unlisted(flag, "--verbose", "verbosity", count=True) for flag in COUNTED),
    ]

    @functools.wraps(command)
    def call(**flags: Any) -> Any:
        return command(**_translated(flags))

    decorated: Any = call
    for option in reversed(options):
        decorated = option(decorated)
    return cast("Command", decorated)


def _translated(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with mergekit's turned into ours. Raises UsageError."""
    context = click.get_current_context()
    own = {name for name in flags if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    unneeded = _without_effect(flags)
    refused = {f"`{flag}`: {REFUSED[flag][0]}": REFUSED[flag][1] for flag in unneeded if flag in REFUSED}
    if {"shard_size", "out_shard_size"} <= own:
        refused["`--shard-size` and `--out-shard-size` are two limits of the same"] = "leave only one of them"
    if refused:
        raise UsageError(refused, [*refused.values()])
    on_gpu = [flags.pop("cuda"), flags.pop("gpu_rich") or None]
    if "device" not in own and on_gpu != [None, None]:  # as in mergekit, `--device` counts more
        flags["device"] = "cuda" if any(on_gpu) else "cpu"
        context.set_parameter_source("device", ParameterSource.COMMANDLINE)
    if (count := flags.pop("out_shard_size")) is not None:
        flags["shard_parameters"] = count or NO_LIMIT
    if folder := flags.pop("transformers_cache"):
        from lowmem_aim.models.hub import keep_downloads_in

        keep_downloads_in(folder)
    return {**flags, "notices": [told_of(unneeded)] if unneeded else []}


def _without_effect(flags: dict[str, Any]) -> list[str]:
    """The flags without effect that are given, as they were typed; `flags` is left without any of these."""
    found = []
    for flag in SWITCHES:
        value = flags.pop(flag[2:].replace("-", "_"))
        found += [] if value is None else [flag if value else f"--no-{flag[2:]}"]
    found += [flag for flag in VALUES if flags.pop(flag[2:].replace("-", "_")) is not None]
    return found + [flag for flag in COUNTED if flags.pop("verbosity")]
