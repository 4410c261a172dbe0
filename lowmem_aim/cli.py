"""Commands, flags, exit codes, signals. torch and transformers are imported only once work starts.

stdout gets the path of what was made; everything else goes to stderr. Exit codes: see `errors`; 129, 130 and 143 after
SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import lowmem_aim
from lowmem_aim import bugs, completion, interrupts, usage
from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, printable
from lowmem_aim.usage import Choice

if TYPE_CHECKING:
    from lowmem_aim.dashboard import Style
    from lowmem_aim.events import Event
    from lowmem_aim.job import Options
    from lowmem_aim.recipe import Recipe

MOST_PROBLEMS = 100  # on the screen; a model of another size has one for each tensor
LONGEST_NAME = 255  # bytes
LONGEST_PROBLEM = 2000  # characters
Command = TypeVar("Command", bound=Callable[..., Any])


def report(error: LowmemAimError) -> None:
    """The error on stderr, plain text: what happened, then what to do."""
    first, *others = [printable(problem, LONGEST_PROBLEM) for problem in error.problems] or ["unknown"]
    lines = [f"error: {first}", *(f"       {problem}" for problem in others[:MOST_PROBLEMS])]
    if len(others) > MOST_PROBLEMS:
        lines.append(f"       ... and {len(others) - MOST_PROBLEMS} more")
    print("\n".join(lines) + (f"\n\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)


def main() -> None:
    """The entry point of the command."""
    # Spinning worker threads cost up to four times the CPU time on a shared machine. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_closed_streams()
    sys.exit(_exit_code(usage.wanted(sys.argv)))


def _open_closed_streams() -> None:
    """Streams that the caller has closed (`2>&-`) lead nowhere: else the next file that is opened would be one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def _exit_code(debug: bool) -> int:
    try:
        cli(prog_name=usage.PROGRAM, standalone_mode=False)
        return 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.exceptions.Abort:
        return 130
    except interrupts.Interrupted:
        return _interrupted()
    except Exception as error:
        if interrupts.received():  # what a library made of it
            return _interrupted()
        told = _told(error, debug)
        report(told)
        if debug:
            bugs.print_traceback(error)
        return told.exit_code


def _told(error: Exception, debug: bool) -> LowmemAimError:
    """Whatever has ended a command, for the user's eyes."""
    if isinstance(error, LowmemAimError):
        return error
    if isinstance(error, click.ClickException):
        return usage.explained(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return DiskError(f"what was to be written was not: {error.strerror}", "is it the device that stdout goes to?")
    return LowmemAimError(f"{type(error).__name__}: {error}", bugs.hint(error, _command_line(), debug))


def _command_line() -> str:
    return shlex.join([usage.PROGRAM, *sys.argv[1:]])


def _interrupted() -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone: that is a SIGHUP
        sys.stderr.write(interrupts.MESSAGE.decode())
    return 128 + interrupts.received()


@click.group(cls=usage.Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lowmem_aim.__version__, prog_name=usage.PROGRAM)
def cli() -> None:
    """Activation-informed merging (AIM) of large language models, streamed from disk in little memory."""


# --- flags ----------------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`5GB`, `512MiB`, `1000000` -> bytes. GB is 1e9 bytes, GiB is 2^30."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise click.BadParameter(f"`{text}` is no size; write 5GB, 512MB or 1GiB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(str(value))


class _Number(click.FloatRange):
    """Not NaN either, which lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, param, context)
        return self.fail("that is no number", param, context) if number != number else number


class _Path(click.Path):
    """A pathlib.Path; too long a name is an error here, and not wherever the path is first looked at."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(value).parts):
            self.fail(f"`{printable(str(value))}` is too long for a path", param, context)
        return super().convert(value, param, context)


def _options(*flags: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


_DTYPES = completion.words(*completion.DTYPES)
_CALIBRATION = _options(
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
_RECIPE = _options(
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
_AIM = _options(
    click.option(
        "--omega",
        metavar="NUMBER",
        help="AIM: 1 changes nothing, 0 freezes the most active channels; several (0.2,0.4) give an output each",
    ),
    click.option(
        "--scaling",
        shell_complete=completion.words(*completion.SCALINGS),
        help="of AIM's activations: identity, sqrt, square or rank [default: identity]",
    ),
    click.option("--exclude", multiple=True, help="part of the names of weights that AIM leaves alone; repeat it"),
    click.option("--tied", type=Choice(["relax", "keep"]), help="AIM on a tied embedding [default: relax]"),
    _CALIBRATION,
)
_JOB = _options(
    click.option("--read", type=Choice(["mmap", "pread"]), default="mmap", show_default=True),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        shell_complete=completion.words("auto", "cpu", "cuda", "mps"),
        help="cpu, cuda, cuda:N or mps",
    ),
    click.option("--ram", type=_Size(), help="memory budget, such as 4GB [default: what is free, less a reserve]"),
    click.option("--vram", type=_Size(), help="the same for the GPU's memory"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads [default: torch's]"),
    click.option("--fresh", is_flag=True, help="discard what an interrupted run has left"),
    click.option("--accept-environment", is_flag=True, help="resume under other versions or on another device"),
    click.option("--json", "as_json", is_flag=True, help="progress as JSON lines on stdout, for programs"),
    click.option("--quiet", "-q", is_flag=True, help="no progress; stdout still gets the path"),
)
_OUTPUT = _options(
    click.option("--shard-size", type=_Size(), default="5GB", show_default=True, help="largest output file"),
    click.option("--dtype", shell_complete=_DTYPES, help="float32, float16 or bfloat16 [default: as the inputs]"),
    click.option(
        "--tokenizer-source", shell_complete=completion.words("base"), help="`base` matches tokens by their text"
    ),
    click.option("--cache/--no-cache", default=True, show_default=True, help="keep and reuse activations"),
)


def _job(flags: dict[str, Any]) -> Options:
    from lowmem_aim.job import Options

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
        command=_command_line(),
    )


def _refuse_if_running(out: Path) -> None:
    """At once, before anything slow is imported; the run itself asks again."""
    from lowmem_aim.durable import is_held, locked_error, owner_of

    lock = out / ".lowmem_aim" / "lock"
    if is_held(lock):
        raise locked_error(lock, owner_of(lock))


def _run(work: Callable[[Any], Path], flags: Mapping[str, Any], merges: bool = False) -> None:
    """The work of a command with its progress shown; then the path of what it made, on stdout. `merges`: a model."""
    from lowmem_aim import summary
    from lowmem_aim.dashboard import showing
    from lowmem_aim.events import RunEnded, Sampled, Worked

    style: Style = "json" if flags.get("as_json") else "quiet" if flags["quiet"] else "auto"
    with interrupts.work(), showing(style) as view:

        def checked(event: Event) -> None:
            if isinstance(event, Worked):
                interrupts.hold()
            if not isinstance(event, Sampled | RunEnded):  # those are told also when the run is being ended
                interrupts.check()
            view(event)

        made = work(checked)
    if style == "auto" and view.progress.planned:
        told = summary.lines(view.progress, shutil.get_terminal_size((100, 24)).columns)
        with contextlib.suppress(OSError):  # nobody reads it any more
            for line in (*told, *(summary.next_commands(made) if merges else ())):
                click.echo(line, err=True)
    if style != "json":
        click.echo(click.format_filename(made))


# --- commands -------------------------------------------------------------------------------------------------------


_PATHS = click.argument(
    "paths", nargs=-1, metavar="[RECIPE] OUT", type=_Path(), required=True, shell_complete=completion.recipes
)


def _recipe(command: str, paths: tuple[Path, ...], flags: dict[str, Any]) -> Recipe:
    """The recipe of a command line: the file's, with what the flags override; or the flags'."""
    if (
        len(paths) > 2
        or (len(paths) == 1 and paths[0].suffix in (".yml", ".yaml"))
        or (len(paths) == 2 and paths[0].is_dir())
    ):
        hint = f"lowmem-aim {command} recipe.yml out/"
        raise UsageError(f"{command} takes a recipe and then an output folder", hint=hint)
    from lowmem_aim import flags as overrides
    from lowmem_aim.recipe_reader import read_recipe
    from lowmem_aim.yaml_tree import load_tree

    tree = load_tree(paths[0]) if len(paths) == 2 else overrides.empty_recipe()
    return read_recipe(overrides.applied(tree, flags))


@cli.command()
@_PATHS
@_RECIPE
@_AIM
@_OUTPUT
@_JOB
def merge(paths: tuple[Path, ...], **flags: Any) -> None:
    """Merge by RECIPE (mergekit's YAML) into the new folder OUT. Flags override the recipe, or replace it.

    The same command goes on with a run that was interrupted.
    """
    recipe = _recipe("merge", paths, flags)
    _refuse_if_running(paths[-1])
    from lowmem_aim.run import merge as work

    _run(lambda emit: work(recipe, paths[-1], _job(flags), emit), flags, merges=True)


@cli.command()
@_PATHS
@_RECIPE
@_AIM
@_OUTPUT
@_JOB
@click.option("--measure/--no-measure", default=True, help="two seconds, for an estimate of time [default: measure]")
def plan(paths: tuple[Path, ...], measure: bool, **flags: Any) -> None:
    """Tell what `merge` with the same arguments would do, what it needs of this machine, and how long it would take.

    Only headers are read, also of models on the Hub. Exit code 0 if it would run; else what merge would end with.
    """
    import json

    recipe = _recipe("plan", paths, flags)
    from lowmem_aim import forecast, survey
    from lowmem_aim.dashboard import showing
    from lowmem_aim.foresee import foresee

    with showing("quiet" if flags["quiet"] or flags["as_json"] else "lines") as view:
        found = foresee(recipe, paths[-1], _job(flags), view, measure=measure)
    known = found.as_json()
    if flags["as_json"]:
        click.echo(json.dumps(known))
    else:
        click.echo("\n".join([*survey.lines(known["survey"]), *forecast.lines(known)]))
    if found.problems:
        raise found.error()


@cli.command()
@click.argument("merged", shell_complete=completion.folders)
@click.argument("out", type=_Path(), shell_complete=completion.folders)
@click.option(
    "--base",
    required=True,
    shell_complete=completion.folders,
    help="the model that MERGED's experts were tuned from",
)
@click.option(
    "--with",
    "relaxations",
    type=Choice(["aim", "acm", "both"]),
    default="aim",
    show_default=True,
    help="AIM by input channel, ACM by layer, or ACM after AIM",
)
@click.option("--theta", type=float, help="of ACM [default: 0.7]")
@click.option(
    "--normalise",
    shell_complete=completion.words(*completion.NORMALISATIONS),
    help="ACM's mutual information by its `samples` or over the `layers` [default: samples]",
)
@_AIM
@_OUTPUT
@_JOB
def relax(merged: str, out: Path, **flags: Any) -> None:
    """Apply AIM or ACM to MERGED, a model that any tool merged, against its base; write the new folder OUT."""
    _refuse_if_running(out)
    from lowmem_aim import flags as overrides
    from lowmem_aim.recipe_reader import read_recipe
    from lowmem_aim.run import merge as work

    recipe = read_recipe(overrides.relax_recipe(merged, flags))
    _run(lambda emit: work(recipe, out, _job(flags), emit), flags, merges=True)


@cli.command()
@click.argument("base", shell_complete=completion.folders)
@click.option("--output", "-o", type=_Path(), required=True, help="activations.safetensors")
@_CALIBRATION
@_JOB
def calibrate(base: str, output: Path, **flags: Any) -> None:
    """Measure the activations of BASE once; pass the file to later merges as --calibration.

    The same command goes on with a run that was interrupted.
    """
    from lowmem_aim.durable import partial_folder

    _refuse_if_running(partial_folder(output))
    from lowmem_aim import flags as overrides
    from lowmem_aim.run import calibrate_base

    aim = overrides.calibration_settings(flags)
    _run(lambda emit: calibrate_base(base, aim, output, _job(flags), emit), flags)


@cli.command()
@click.argument("out", type=_Path(), shell_complete=completion.folders)
@click.option("--json", "as_json", is_flag=True, help="one line of JSON (for each omega)")
def status(out: Path, as_json: bool) -> None:
    """Tell how far the run in OUT is, and whether it is alive, interrupted or finished."""
    import json

    from lowmem_aim.output import outputs_in
    from lowmem_aim.status import status_of

    folders = outputs_in(out)
    for folder in folders:
        found = status_of(folder)
        if as_json:
            click.echo(json.dumps(({} if folder == out else {"output": folder.name}) | found.as_json()))
        else:
            heading = [] if folder == out else [f"{printable(folder.name)}:"]
            click.echo("\n".join([*heading, *found.lines()]))


@cli.command()
@click.argument("out", type=_Path(), shell_complete=completion.folders)
@click.option("--run", "number", type=int, default=-1, help="which: 1 the first, -1 the last [default: -1]")
@click.option("--speed", type=_Number(0.001, 1e6), default=10.0, show_default=True, help="times as fast")
@click.option("--at", "second", type=_Number(0, 1e9), help="print the screen at this second instead")
@click.option("--size", help="of that screen, in columns and rows [default: 80x24]")
@click.option("--svg", type=_Path(), help="write that screen into this file, as SVG")
def replay(out: Path, number: int, speed: float, second: float | None, size: str | None, svg: Path | None) -> None:
    """Show the recorded run of OUT as it was seen, faster."""
    from lowmem_aim import replay as recorded

    run = recorded.run_of(out, number)
    if second is None and svg is None and size is None:
        recorded.play(run, speed)
    else:
        recorded.picture(run, second, recorded.parse_size(size or "80x24"), svg)


@cli.command()
@click.argument("folder", type=_Path(), default=".", shell_complete=completion.folders)
@click.option("--json", "as_json", is_flag=True, help="all of it, as one JSON value")
def doctor(folder: Path, as_json: bool) -> None:
    """Tell versions, processor, memory, GPUs, the disk of FOLDER and its speed, caches, and what is worth mending."""
    import json

    from lowmem_aim.doctor import examine

    found = examine(folder)
    click.echo(json.dumps(found.as_json()) if as_json else "\n".join(found.lines()))


@cli.command()
@click.argument("out", type=_Path(), shell_complete=completion.folders)
@click.option("--quiet", "-q", is_flag=True, help="no progress; stdout still gets the path")
def verify(out: Path, quiet: bool) -> None:
    """Read every file of the finished OUT again and compare it with what was written. Exit code 8 if one differs."""
    from lowmem_aim.output import PRIVATE, SUMS, outputs_in
    from lowmem_aim.verify import verify as work

    def checked(emit: Callable[[Event], None]) -> Path:
        for folder in outputs_in(out):
            work(folder, f"{PRIVATE}/{SUMS}", emit)
        return out

    _run(checked, {"quiet": quiet})


@cli.command()
@click.argument("name", required=False, shell_complete=completion.methods)
@click.option("--json", "as_json", is_flag=True, help="all of it, as one JSON value")
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or tell all about the one called NAME."""
    import json

    from lowmem_aim import catalogue

    found, problems = ([catalogue.method_of(name)], []) if name else catalogue.all_methods()
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
    if as_json:
        known = [catalogue.facts(method) for method in found]
        click.echo(json.dumps(known[0] if name else known, indent=2))
    else:
        click.echo("\n".join(catalogue.description(found[0]) if name else catalogue.summary(found)))


@cli.command()
@click.argument("folder", type=_Path(), default="demo-run", shell_complete=completion.folders)
def demo(folder: Path) -> None:
    """Train a small base and three experts in FOLDER, merge them with and without AIM, compare, generate."""
    from lowmem_aim.demo import run

    run(folder, click.echo)


@cli.command("completion")
@click.argument("shell", type=Choice(completion.SHELLS), metavar="SHELL")
def completion_script(shell: str) -> None:
    """Print what SHELL needs to complete commands, flags and names after Tab. One line in its start file:

    \b
    bash   eval "$(lowmem-aim completion bash)"    in ~/.bashrc
    zsh    eval "$(lowmem-aim completion zsh)"     in ~/.zshrc, after compinit
    fish   lowmem-aim completion fish | source     in ~/.config/fish/config.fish
    """
    click.echo(completion.script(cli, shell), nl=False)
