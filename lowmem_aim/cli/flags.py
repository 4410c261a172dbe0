"""The flags that several commands share, in the groups in which a command's help lists them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from lowmem_aim.cli import completion, formats
from lowmem_aim.cli.usage import Choice, Flag, command_line
from lowmem_aim.cli.values import PathType, SizeType
from lowmem_aim.recipe.words import CONTROLS, DTYPES, SCALINGS
from lowmem_aim.system.defaults_file import FORMATS, read_defaults
from lowmem_aim.system.options import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    from lowmem_aim.system.options import Options


Command = TypeVar("Command", bound=Callable[..., Any])


def bundle(*flags: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several flags as one decorator."""

    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


def settled(command: Command) -> Command:
    """Settle a command's flags: those not given take the file of defaults' values; `style` stands for the formats.

    The command is called with the flags that it has, but with `style` in the place of `format`, `as_json` and `quiet`.
    """

    @functools.wraps(command)
    def call(**flags: Any) -> Any:
        context = click.get_current_context()
        runs = context.info_name in formats.RUNS
        kept = read_defaults() if runs else {}
        flags["style"] = formats.style_of(flags, kept.get("format") if runs else "human")
        for name in ("format", "as_json", "quiet"):
            flags.pop(name, None)
        for name in _not_given(context) & {"device", "ram", "vram", "cache"}:
            flags[name] = kept.get(name, flags[name])
        if "vram" in _not_given(context) and flags["device"] in ("cpu", "mps"):
            flags["vram"] = None  # the file is written for a machine, and the device given for this run
        return command(**flags)

    return cast("Command", call)


def _not_given(context: click.Context) -> set[str]:
    """The names of flags that stand at their defaults."""
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.DEFAULT}


def flags_of(name: str = "") -> Callable[..., Callable[[Command], Command]]:
    """`click.option` for flags that a command's help lists in the group `name`, or in none."""
    return partial(click.option, cls=Flag, group=name)


def new_file(contents: str, kind: type[Flag] = Flag) -> Callable[[Command], Command]:
    """The flag, of a `kind`, for the new file that a command writes; `contents` of it, for the help."""
    return flags_of("Output")(
        "--output",
        "-o",
        cls=kind,
        metavar="FILE",
        type=PathType(),
        required=True,
        help=f"Write the {contents} file.",
    )


_DTYPES = completion.words(*DTYPES)
_recipe, _aim, _calibration = flags_of("Recipe"), flags_of("AIM"), flags_of("Calibration")
_output, _machine, _run = flags_of("Output"), flags_of("Machine"), flags_of("Run")

CALIBRATION_FLAGS = bundle(
    _calibration(
        "--calibration",
        metavar="WHAT",
        shell_complete=completion.texts,
        help="Calibrate on these texts: a .jsonl or .txt file, `builtin`, or the Hub id of a dataset. "
        "A .safetensors file of activations is used as it is. [default: the AIM authors' Pile set, from the Hub]",
    ),
    _calibration("--samples", type=int, help="Use this many texts. [default: 256, or 100 for ACM]"),
    _calibration("--block-size", type=int, help="Run the texts in sequences of this many tokens. [default: 512]"),
    _calibration("--calibration-seed", type=int, help="Shuffle a dataset from the Hub with this seed. [default: 42]"),
    _calibration(
        "--pack/--no-pack",
        default=None,
        help="Join the texts and cut them into full sequences, or run each text by itself. [default: --pack]",
    ),
    _calibration(
        "--calibration-dtype",
        metavar="DTYPE",
        shell_complete=_DTYPES,
        help="Run the forward passes in float32, float16 or bfloat16. [default: as the base is stored]",
    ),
)
RECIPE_FLAGS = bundle(
    _recipe(
        "--method",
        metavar="METHOD",
        shell_complete=completion.methods,
        help="Merge by this method; `lowmem-aim methods` describes them all. [default: the recipe's]",
    ),
    _recipe(
        "--base",
        metavar="MODEL",
        shell_complete=completion.folders,
        help="Use this model as the base: a folder, a Hub id, or MODEL+ADAPTER (LoRA). [default: the recipe's]",
    ),
    _recipe(
        "--expert",
        metavar="MODEL",
        multiple=True,
        shell_complete=completion.folders,
        help="Merge this model, or MODEL+ADAPTER; repeat the flag for each. MODEL=TEXTS names texts such as it was "
        "tuned on, for methods that measure them. [default: the recipe's models]",
    ),
    _recipe(
        "--solve-calibration",
        metavar="TEXTS",
        shell_complete=completion.texts,
        help="Measure experts that have no texts of their own on these: a .jsonl or .txt file, `builtin`, or the Hub "
        "id of a dataset. [default: none]",
    ),
    _recipe(
        "--weight",
        metavar="NUMBER",
        multiple=True,
        help="Give the experts this weight; repeat the flag for one weight each, in order. "
        "[default: the recipe's, or 1]",
    ),
    _recipe(
        "--density",
        metavar="NUMBER",
        multiple=True,
        help="Keep this share of what each expert changed; repeat the flag for one share each, in order. "
        "[default: the recipe's, or the method's]",
    ),
    _recipe(
        "--parameter",
        "-p",
        multiple=True,
        metavar="NAME=VALUE",
        shell_complete=completion.parameters,
        help="Set any other parameter of the method, such as `-p lambda=0.5`; repeat the flag for each. "
        "[default: the recipe's, or the method's]",
    ),
    _recipe(
        "--seed", "--random-seed", type=int, default=0, show_default=True, help="Draw the random masks with this seed."
    ),
    _recipe(
        "--nonfinite",
        type=Choice(["stop", "base"]),
        default="stop",
        show_default=True,
        help="Stop at NaN or Inf in an expert, or use the base's value there.",
    ),
)
AIM_FLAGS = bundle(
    _aim(
        "--omega",
        metavar="NUMBER",
        help="Relax the merge with AIM: 1 changes nothing, 0 keeps the most active channels as they are in the base. "
        "Several values, such as 0.2,0.4, give one output each. [default: the recipe's; 0.4 for `relax`]",
    ),
    _aim(
        "--scaling",
        metavar="HOW",
        shell_complete=completion.words(*SCALINGS),
        help="Scale the activations by identity, sqrt, square or rank. [default: identity]",
    ),
    _aim(
        "--exclude",
        multiple=True,
        metavar="PART",
        help="Leave weights with PART in their names out of AIM; repeat the flag for each part. [default: none]",
    ),
    _aim(
        "--control",
        metavar="WHAT",
        shell_complete=completion.words(*CONTROLS),
        help="Make a control to judge AIM by, not a model to use: uniform, permuted or inverted factors in place of "
        "AIM's. [default: none]",
    ),
    _aim("--control-seed", type=int, help="Draw the order of permuted factors with this seed. [default: 0]"),
    _aim(
        "--tied",
        type=Choice(["relax", "keep"]),
        help="Relax an embedding that is also the output head, or keep it as merged. [default: relax]",
    ),
    CALIBRATION_FLAGS,
)
_JSON: dict[str, Any] = {"is_flag": True, "help": "Print JSON on stdout; the same as `--format json`."}
DATA_FLAGS = bundle(
    flags_of()(
        "--format",
        type=Choice(["human", "plain", "json"]),
        help="Print lines for people (human and plain are the same here) or JSON. [default: human]",
    ),
    flags_of()("--json", "as_json", **_JSON),
    settled,
)
FORMAT_FLAGS = bundle(
    _run(
        "--format",
        type=Choice(FORMATS),
        help="Show a live screen (human), plain lines, JSON lines on stdout, or nothing but the result (quiet). "
        "[default: human on a terminal, else plain]",
    ),
    _run("--json", "as_json", **_JSON),
    _run(
        "--quiet/--no-quiet",
        "-q",
        default=False,
        help="Print only the path of what was made; the same as `--format quiet`. [default: --no-quiet]",
    ),
    settled,
)
JOB_FLAGS = bundle(
    _machine(
        "--device",
        metavar="DEVICE",
        default="auto",
        show_default=True,
        shell_complete=completion.words("auto", "cpu", "cuda", "mps"),
        help="Compute on cpu, cuda, cuda:N or mps; auto uses the first GPU if there is one.",
    ),
    _machine(
        "--ram",
        type=SizeType(),
        help="Stay within this much memory in all, such as 4GB. [default: what is free, less a reserve]",
    ),
    _machine(
        "--vram",
        type=SizeType(),
        help="Stay within this much of the GPU's memory. [default: what is free, less a reserve]",
    ),
    _machine(
        "--threads",
        "--num-threads",
        "-j",
        metavar="NUMBER",
        type=click.IntRange(1),
        help="Use this many CPU threads. [default: as many as torch uses]",
    ),
    _machine(
        "--read",
        type=Choice(["mmap", "pread"]),
        default="mmap",
        show_default=True,
        help="Read model files through a memory map or by system calls; the result is the same.",
    ),
    _run("--fresh", is_flag=True, help="Discard what an interrupted run left behind and start over."),
    _run(
        "--accept-environment",
        is_flag=True,
        help="Resume an interrupted run even if versions or the device have changed.",
    ),
    FORMAT_FLAGS,
)
OUTPUT_FLAGS = bundle(
    _output(
        "--shard-size",
        type=SizeType(),
        default=DEFAULT_SHARD_BYTES,
        help="Make no file of weights larger than this. [default: 5GB]",
    ),
    _output(
        "--dtype",
        metavar="DTYPE",
        shell_complete=_DTYPES,
        help="Store the result as float32, float16 or bfloat16. [default: the recipe's, or as the inputs]",
    ),
    _output(
        "--tokenizer-source",
        metavar="SOURCE",
        shell_complete=completion.words("base", "union"),
        help="Match rows of the vocabularies by the text of their tokens, and give the output the tokenizer of `base`, "
        "the `union` of all models' tokenizers, or that of a model. [default: the recipe's, or row by row]",
    ),
    _output(
        "--cache/--no-cache",
        default=True,
        help="Keep measured activations in the cache and reuse those there, or measure anew. [default: --cache]",
    ),
)

STAGE_FLAGS = bundle(
    _output(
        "--keep-stages",
        metavar="DIR",
        type=PathType(),
        shell_complete=completion.folders,
        help="Move the recipe's named stages into this folder once the output is finished. [default: remove them]",
    ),
)


def options_of(flags: dict[str, Any]) -> Options:
    """The options of a job, from a command's flags; flags that the command does not have take their defaults."""
    from lowmem_aim.system.options import Options

    return Options(
        seed=flags.get("seed", 0),
        nonfinite=flags.get("nonfinite", "stop"),
        shard_bytes=flags.get("shard_size", Options.shard_bytes),
        shard_parameters=flags.get("shard_parameters"),
        read=flags["read"],
        device=flags["device"],
        threads=flags["threads"],
        ram=flags["ram"],
        vram=flags["vram"],
        use_cache=flags.get("cache", True),
        fresh=flags["fresh"],
        accept_environment=flags["accept_environment"],
        keep_stages=flags.get("keep_stages"),
        command=command_line(),
    )
