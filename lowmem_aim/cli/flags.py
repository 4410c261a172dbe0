"""The flags that several commands share, in groups, and the types of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lowmem_aim.cli import completion
from lowmem_aim.cli.usage import Choice, command_line
from lowmem_aim.errors import printable
from lowmem_aim.recipe.words import DTYPES, SCALINGS
from lowmem_aim.system.options import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    from lowmem_aim.system.options import Options


LONGEST_NAME = 255  # bytes
Command = TypeVar("Command", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Turn `5GB`, `512MiB` or `1000000` into bytes: GB is 1e9, GiB is 2^30. Raises click.BadParameter."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise click.BadParameter(f"`{text}` is no size; write 5GB, 512MB or 1GiB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


class SizeType(click.ParamType[int]):
    """A size in bytes, written as `parse_size` takes it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """The value in bytes. Raises click.BadParameter."""
        return value if isinstance(value, int) else parse_size(str(value))


class NumberRange(click.FloatRange):
    """A number in a range; NaN, which click's FloatRange lets through, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """The value as a number. Raises click.BadParameter."""
        number = super().convert(value, param, context)
        return self.fail("that is not a number", param, context) if number != number else number


class PathType(click.Path):
    """A pathlib.Path; a name that is too long is an error here, and not wherever the path is first looked at."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """The value as a path. Raises click.BadParameter."""
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(value).parts):
            self.fail(f"`{printable(str(value))}` is too long for a path", param, context)
        return super().convert(value, param, context)


def _options(*flags: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


_DTYPES = completion.words(*DTYPES)
CALIBRATION_FLAGS = _options(
    click.option(
        "--calibration",
        metavar="WHAT",
        shell_complete=completion.texts,
        help="file.jsonl, file.txt, activations.safetensors, `builtin`, or a Hub dataset id "
        "[default: the AIM authors' Pile set, from the Hub]",
    ),
    click.option("--samples", type=int, help="texts to take [default: 256]"),
    click.option("--block-size", type=int, help="tokens in a sequence [default: 512]"),
    click.option("--calibration-seed", type=int, help="shuffles a Hub dataset [default: 42]"),
    click.option("--pack/--no-pack", default=None, help="join the texts into full blocks [default: pack]"),
    click.option("--calibration-dtype", shell_complete=_DTYPES, help="of the forward passes [default: the base's]"),
)
RECIPE_FLAGS = _options(
    click.option("--method", shell_complete=completion.methods, help="merge_method"),
    click.option("--base", shell_complete=completion.folders, help="base_model: a folder or a Hub id"),
    click.option(
        "--expert", multiple=True, shell_complete=completion.folders, help="a model to merge; repeat it for each"
    ),
    click.option("--weight", multiple=True, help="one for all experts, or one for each, in order [default: 1]"),
    click.option("--density", multiple=True, help="as --weight"),
    click.option(
        "--parameter",
        "-p",
        multiple=True,
        metavar="NAME=VALUE",
        shell_complete=completion.parameters,
        help="any other parameter, such as -p lambda=0.5",
    ),
    click.option("--seed", "--random-seed", type=int, default=0, show_default=True, help="of the random masks"),
    click.option(
        "--nonfinite",
        type=Choice(["stop", "base"]),
        default="stop",
        show_default=True,
        help="at NaN or Inf in an expert: stop, or take the base's value there",
    ),
)
AIM_FLAGS = _options(
    click.option(
        "--omega",
        metavar="NUMBER",
        help="AIM: 1 changes nothing, 0 freezes the most active channels; several (0.2,0.4) give an output each",
    ),
    click.option(
        "--scaling",
        shell_complete=completion.words(*SCALINGS),
        help="of AIM's activations: identity, sqrt, square or rank [default: identity]",
    ),
    click.option("--exclude", multiple=True, help="part of the names of weights that AIM leaves alone; repeat it"),
    click.option("--tied", type=Choice(["relax", "keep"]), help="AIM on a tied embedding [default: relax]"),
    CALIBRATION_FLAGS,
)
JOB_FLAGS = _options(
    click.option("--read", type=Choice(["mmap", "pread"]), default="mmap", show_default=True),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        shell_complete=completion.words("auto", "cpu", "cuda", "mps"),
        help="cpu, cuda, cuda:N or mps",
    ),
    click.option("--ram", type=SizeType(), help="memory budget, such as 4GB [default: what is free, less a reserve]"),
    click.option("--vram", type=SizeType(), help="the same for the GPU's memory"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads [default: torch's]"),
    click.option("--fresh", is_flag=True, help="discard what an interrupted run has left"),
    click.option("--accept-environment", is_flag=True, help="resume under other versions or on another device"),
    click.option("--json", "as_json", is_flag=True, help="progress as JSON lines on stdout, for programs"),
    click.option("--quiet", "-q", is_flag=True, help="no progress; stdout still gets the path"),
)
OUTPUT_FLAGS = _options(
    click.option(
        "--shard-size", type=SizeType(), default=DEFAULT_SHARD_BYTES, show_default="5GB", help="largest output file"
    ),
    click.option("--dtype", shell_complete=_DTYPES, help="float32, float16 or bfloat16 [default: as the inputs]"),
    click.option(
        "--tokenizer-source", shell_complete=completion.words("base"), help="`base` matches tokens by their text"
    ),
    click.option("--cache/--no-cache", default=True, show_default=True, help="keep and reuse activations"),
)


def options_of(flags: dict[str, Any]) -> Options:
    """The options of a job, from a command's flags; flags that the command does not have take their defaults."""
    from lowmem_aim.system.options import Options

    return Options(
        seed=flags.get("seed", 0),
        nonfinite=flags.get("nonfinite", "stop"),
        shard_bytes=flags.get("shard_size", Options.shard_bytes),
        read=flags["read"],
        device=flags["device"],
        threads=flags["threads"],
        ram=flags["ram"],
        vram=flags["vram"],
        use_cache=flags.get("cache", True),
        fresh=flags["fresh"],
        accept_environment=flags["accept_environment"],
        command=command_line(),
    )
