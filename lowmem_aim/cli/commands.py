"""The commands. torch and transformers are imported only once work starts.

stdout gets the path of what was made; everything else goes to stderr. Exit codes: see `errors`; 129, 130 and 143 after
SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lowmem_aim
from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import (
    AIM_FLAGS,
    CALIBRATION_FLAGS,
    JOB_FLAGS,
    OUTPUT_FLAGS,
    RECIPE_FLAGS,
    NumberRange,
    PathType,
    options_of,
)
from lowmem_aim.cli.usage import Choice
from lowmem_aim.errors import UsageError, printable
from lowmem_aim.recipe.words import NORMALISATIONS
from lowmem_aim.system import interrupts
from lowmem_aim.system.address_space import check_address_space

if TYPE_CHECKING:
    from lowmem_aim.events import Event
    from lowmem_aim.recipe.recipe import Recipe
    from lowmem_aim.view.dashboard import Style


LOAD_TORCH = ("init", "merge", "plan", "relax", "calibrate", "verify", "demo")


@click.group(cls=usage.Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lowmem_aim.__version__, prog_name=usage.PROGRAM)
@click.pass_context
def cli(context: click.Context) -> None:
    """Activation-informed merging (AIM) of large language models, streamed from disk in little memory."""
    if context.invoked_subcommand in LOAD_TORCH and not set(sys.argv) & {"-h", "--help"}:
        check_address_space()


def _refuse_if_running(out: Path) -> None:
    """Raise LockedError if a run holds `out`, before anything slow is imported; the run itself checks again."""
    from lowmem_aim.system.lock import is_held, locked_error, owner_of

    lock = out / ".lowmem_aim" / "lock"
    if is_held(lock):
        raise locked_error(lock, owner_of(lock))


def _run(work: Callable[[Any], Path], flags: Mapping[str, Any], merges: bool = False) -> None:
    """Run a command's work with its progress shown, then print the path of what it made. `merges`: that is a model."""
    from lowmem_aim.events import RunEnded, Sampled, Worked
    from lowmem_aim.view import summary
    from lowmem_aim.view.dashboard import showing

    style: Style = "json" if flags.get("as_json") else "quiet" if flags["quiet"] else "auto"
    with interrupts.work(), showing(style) as view:

        def checked(event: Event) -> None:
            if isinstance(event, Worked):
                interrupts.hold()
            if not isinstance(event, Sampled | RunEnded):  # these are shown also when the run is being ended
                interrupts.check()
            view(event)

        made = work(checked)
    if style == "auto" and view.progress.planned:
        told = summary.summary_lines(view.progress, shutil.get_terminal_size((100, 24)).columns)
        with contextlib.suppress(OSError):  # nobody reads it any more
            for line in (*told, *(summary.next_commands(made) if merges else ())):
                click.echo(line, err=True)
    if style != "json":
        click.echo(click.format_filename(made))


# --- commands -------------------------------------------------------------------------------------------------------


_PATHS = click.argument(
    "paths", nargs=-1, metavar="[RECIPE] OUT", type=PathType(), required=True, shell_complete=completion.recipes
)


def _recipe(command: str, paths: tuple[Path, ...], flags: dict[str, Any]) -> Recipe:
    """The recipe of a command line: the file's, as the flags edit it, or the flags' alone. Raises UsageError."""
    if (
        len(paths) > 2
        or (len(paths) == 1 and paths[0].suffix in (".yml", ".yaml"))
        or (len(paths) == 2 and os.path.isdir(paths[0]))
    ):
        hint = f"lowmem-aim {command} recipe.yml out/"
        raise UsageError(f"{command} takes a recipe and then an output folder", hint=hint)
    from lowmem_aim.recipe import from_flags
    from lowmem_aim.recipe.reader import read_recipe
    from lowmem_aim.recipe.yaml_tree import load_tree

    tree = load_tree(paths[0]) if len(paths) == 2 else from_flags.empty_recipe()
    return read_recipe(from_flags.applied(tree, flags))


@cli.command("init")
@click.argument("method", required=False, shell_complete=completion.methods)
@click.option("--base", shell_complete=completion.folders, help="the model that the experts were tuned from")
@click.option(
    "--expert",
    multiple=True,
    required=True,
    shell_complete=completion.folders,
    help="a model to merge, a folder or a Hub id; repeat it for each",
)
@click.option("--aim", is_flag=True, help="with AIM, at its authors' omega of 0.4")
@click.option("--omega", type=NumberRange(0, 1), help="with AIM, at this omega: 1 changes nothing")
@click.option(
    "--output", "-o", type=PathType(), default="recipe.yml", show_default=True, help="the new file for the recipe"
)
def init_command(
    method: str | None, base: str | None, expert: tuple[str, ...], aim: bool, omega: float | None, output: Path
) -> None:
    """Write a commented recipe for these models, to start from: METHOD is `ties` on a base, and else `linear`.

    Only headers of the models are read, also on the Hub. `ties` takes any number of experts.
    """
    from lowmem_aim.jobs.init import init
    from lowmem_aim.recipe.recipe import DEFAULT_OMEGA
    from lowmem_aim.view import summary
    from lowmem_aim.view.dashboard import showing

    with showing("lines") as view:
        made = init(method, base, expert, output, omega=DEFAULT_OMEGA if aim and omega is None else omega, emit=view)
    for line in summary.commands_for(made, usage.program()):
        click.echo(line, err=True)
    click.echo(click.format_filename(made))


@cli.command("merge")
@_PATHS
@RECIPE_FLAGS
@AIM_FLAGS
@OUTPUT_FLAGS
@JOB_FLAGS
def merge_command(paths: tuple[Path, ...], **flags: Any) -> None:
    """Merge by RECIPE (mergekit's YAML) into the new folder OUT. Flags override the recipe, or replace it.

    The same command goes on with a run that was interrupted.
    """
    recipe = _recipe("merge", paths, flags)
    _refuse_if_running(paths[-1])
    from lowmem_aim.jobs.merge import merge

    _run(lambda emit: merge(recipe, paths[-1], options_of(flags), emit), flags, merges=True)


@cli.command("plan")
@_PATHS
@RECIPE_FLAGS
@AIM_FLAGS
@OUTPUT_FLAGS
@JOB_FLAGS
@click.option("--measure/--no-measure", default=True, help="two seconds, for an estimate of time [default: measure]")
def plan_command(paths: tuple[Path, ...], measure: bool, **flags: Any) -> None:
    """Tell what `merge` with the same arguments would do, what it needs of this machine, and how long it would take.

    Only headers are read, also of models on the Hub. Exit code 0 if it would run; else what merge would end with.
    """
    import json

    recipe = _recipe("plan", paths, flags)
    from lowmem_aim.jobs.plan import plan
    from lowmem_aim.view import plan_lines
    from lowmem_aim.view.dashboard import showing

    with showing("quiet" if flags["quiet"] or flags["as_json"] else "lines") as view:
        found = plan(recipe, paths[-1], options_of(flags), view, measure=measure)
    known = found.as_json()
    if flags["as_json"]:
        click.echo(json.dumps(known))
    else:
        click.echo("\n".join([*plan_lines.survey_lines(known["survey"]), *plan_lines.forecast_lines(known)]))
    if found.problems:
        raise found.error()


@cli.command("relax")
@click.argument("merged", shell_complete=completion.folders)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
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
    shell_complete=completion.words(*NORMALISATIONS),
    help="ACM's mutual information by its `samples` or over the `layers` [default: samples]",
)
@AIM_FLAGS
@OUTPUT_FLAGS
@JOB_FLAGS
def relax_command(merged: str, out: Path, **flags: Any) -> None:
    """Apply AIM or ACM to MERGED, a model that any tool merged, against its base; write the new folder OUT."""
    _refuse_if_running(out)
    from lowmem_aim.jobs.merge import merge
    from lowmem_aim.recipe import from_flags
    from lowmem_aim.recipe.reader import read_recipe

    recipe = read_recipe(from_flags.relax_recipe(merged, flags))
    _run(lambda emit: merge(recipe, out, options_of(flags), emit), flags, merges=True)


@cli.command("calibrate")
@click.argument("base", shell_complete=completion.folders)
@click.option("--output", "-o", type=PathType(), required=True, help="activations.safetensors")
@CALIBRATION_FLAGS
@JOB_FLAGS
def calibrate_command(base: str, output: Path, **flags: Any) -> None:
    """Measure the activations of BASE once; pass the file to later merges as --calibration.

    The same command goes on with a run that was interrupted.
    """
    from lowmem_aim.system.files import partial_folder

    _refuse_if_running(partial_folder(output))
    from lowmem_aim.jobs.calibrate import calibrate
    from lowmem_aim.recipe import from_flags

    aim = from_flags.calibration_settings(flags)
    _run(lambda emit: calibrate(base, aim, output, options_of(flags), emit), flags)


@cli.command("status")
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@click.option("--json", "as_json", is_flag=True, help="one line of JSON (for each omega)")
def status_command(out: Path, as_json: bool) -> None:
    """Tell how far the run in OUT is, and whether it is alive, interrupted or finished."""
    import json

    from lowmem_aim.output.folder import outputs_in
    from lowmem_aim.view.status import status_of

    folders = outputs_in(out)
    for folder in folders:
        found = status_of(folder)
        if as_json:
            click.echo(json.dumps(({} if folder == out else {"output": folder.name}) | found.as_json()))
        else:
            heading = [] if folder == out else [f"{printable(folder.name)}:"]
            click.echo("\n".join([*heading, *found.lines()]))


@cli.command("replay")
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@click.option("--run", "number", type=int, default=-1, help="which: 1 the first, -1 the last [default: -1]")
@click.option("--speed", type=NumberRange(0.001, 1e6), default=10.0, show_default=True, help="times as fast")
@click.option("--at", "second", type=NumberRange(0, 1e9), help="print the screen at this second instead")
@click.option("--size", help="of that screen, in columns and rows [default: 80x24]")
@click.option("--svg", type=PathType(), help="write that screen into this file, as SVG")
def replay_command(
    out: Path, number: int, speed: float, second: float | None, size: str | None, svg: Path | None
) -> None:
    """Show the recorded run of OUT as it was seen, faster."""
    from lowmem_aim.view import replay

    run = replay.run_of(out, number)
    if second is None and svg is None and size is None:
        replay.play(run, speed)
    else:
        replay.picture(run, second, replay.parse_size(size or "80x24"), svg)


@cli.command("doctor")
@click.argument("folder", type=PathType(), default=".", shell_complete=completion.folders)
@click.option("--json", "as_json", is_flag=True, help="all of it, as one JSON value")
def doctor_command(folder: Path, as_json: bool) -> None:
    """Tell versions, processor, memory, GPUs, the disk of FOLDER and its speed, caches, and what is worth mending."""
    import json

    from lowmem_aim.jobs.doctor import examine

    found = examine(folder)
    click.echo(json.dumps(found.as_json()) if as_json else "\n".join(found.lines()))


@cli.command("verify")
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@click.option("--quiet", "-q", is_flag=True, help="no progress; stdout still gets the path")
def verify_command(out: Path, quiet: bool) -> None:
    """Read every file of the finished OUT again and compare it with what was written. Exit code 8 if one differs."""
    from lowmem_aim.output.verify import verify_outputs

    _run(lambda emit: verify_outputs(out, emit), {"quiet": quiet})


@cli.command("methods")
@click.argument("name", required=False, shell_complete=completion.methods)
@click.option("--json", "as_json", is_flag=True, help="all of it, as one JSON value")
def methods_command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or tell all about the one called NAME."""
    import json

    from lowmem_aim.cli import catalogue

    found, problems = ([catalogue.method_of(name)], []) if name else catalogue.all_methods()
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
    if as_json:
        known = [catalogue.facts(method) for method in found]
        click.echo(json.dumps(known[0] if name else known, indent=2))
    else:
        click.echo("\n".join(catalogue.description(found[0]) if name else catalogue.summary(found)))


@cli.command("demo")
@click.argument("folder", type=PathType(), default="demo-run", shell_complete=completion.folders)
@click.option("--tiny", is_flag=True, help="models of a million parameters, trained here: today the only kind there is")
@click.option(
    "--models", "only_models", is_flag=True, help="only make models to try merges on: quick ones, in half a minute"
)
def demo_command(folder: Path, tiny: bool, only_models: bool) -> None:
    """Train a small base and three experts in FOLDER, merge them with and without AIM, compare, generate.

    It ends with commands for merges of your own on these models.
    """
    from lowmem_aim.demo import run

    run(folder, click.echo, usage.program(), only_models=only_models)


@cli.command("completion")
@click.argument("shell", type=Choice(completion.SHELLS), metavar="SHELL")
def completion_command(shell: str) -> None:
    """Print what SHELL needs to complete commands, flags and names after Tab. One line in its start file:

    \b
    bash   eval "$(lowmem-aim completion bash)"    in ~/.bashrc
    zsh    eval "$(lowmem-aim completion zsh)"     in ~/.zshrc, after compinit
    fish   lowmem-aim completion fish | source     in ~/.config/fish/config.fish
    """
    click.echo(completion.script(cli, shell), nl=False)
