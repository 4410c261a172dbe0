"""The commands that work: they make recipes, models, activations, or check what was made.

torch and transformers are imported only once work starts. stdout gets the path of what was made; everything else goes
to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowmem_aim.cli import completion, formats, usage
from lowmem_aim.cli.flags import (
    AIM_FLAGS,
    CALIBRATION_FLAGS,
    FORMAT_FLAGS,
    JOB_FLAGS,
    OUTPUT_FLAGS,
    RECIPE_FLAGS,
    STAGE_FLAGS,
    flags_of,
    new_file,
    options_of,
)
from lowmem_aim.cli.from_mergekit import mergekit_flags
from lowmem_aim.cli.running import print_path, refuse_if_running, run
from lowmem_aim.cli.usage import Choice
from lowmem_aim.cli.values import NumberRange, PathType
from lowmem_aim.errors import UsageError, printable
from lowmem_aim.recipe.words import NORMALISATIONS
from lowmem_aim.system import interrupts

if TYPE_CHECKING:
    from lowmem_aim.events import Emit, Notice
    from lowmem_aim.recipe.recipe import Recipe
    from lowmem_aim.system.options import Options
    from lowmem_aim.view.dashboard import Style


_flag, _machine, _run, _relaxation = map(flags_of, ("", "Machine", "Run", "Relaxation"))


_PATHS = click.argument(
    "paths", nargs=-1, metavar="[RECIPE] OUT", type=PathType(), required=True, shell_complete=completion.recipes
)


def _check_paths(command: str, paths: Sequence[Path]) -> None:
    """Raise UsageError for paths that are not a recipe and an output folder, or a folder alone."""
    names = [path.suffix in (".yml", ".yaml") for path in paths]
    given = [shlex.quote(printable(str(path))) for path in paths]
    start = f"{usage.PROGRAM} {command}"
    if len(paths) > 2:
        wrong, hint = f"{len(paths)} paths are given", f"`{start} RECIPE OUT`: each model has a flag, `--expert`"
    elif names == [True]:
        wrong, hint = "the output folder is missing", f"`{start} {given[0]} OUT`"
    elif len(paths) == 2 and names[1] and not names[0]:
        wrong, hint = "these are the wrong way round", f"`{start} {given[1]} {given[0]}`"
    elif len(paths) == 2 and os.path.isdir(paths[0]):
        wrong, hint = f"`{printable(str(paths[0]))}` is a folder", f"`{start} RECIPE {given[1]}`"
    else:
        return
    raise UsageError(f"{command} takes a recipe and then an output folder: {wrong}", hint)


def _recipe(command: str, paths: tuple[Path, ...], flags: dict[str, Any]) -> Recipe:
    """The recipe of a command line: the file's, as the flags edit it, or the flags' alone. Raises UsageError."""
    _check_paths(command, paths)
    from lowmem_aim.jobs.preparation import sound_recipe
    from lowmem_aim.recipe import from_flags
    from lowmem_aim.recipe.yaml_tree import load_tree, read_tree

    if len(paths) < 2:
        tree = from_flags.empty_recipe()
    elif str(paths[0]) == "-":
        tree = read_tree(sys.stdin.buffer, "stdin")
    else:
        tree = load_tree(paths[0])
    errors = usage.wrong_values()
    recipe = sound_recipe(from_flags.applied(tree, flags, errors), paths[-1], options_of(flags), errors)
    return replace(recipe, notices=(*recipe.notices, *flags["notices"]))


@click.command("init", cls=usage.Command)
@click.argument("method", required=False, shell_complete=completion.methods)
@_flag(
    "--base",
    metavar="MODEL",
    shell_complete=completion.folders,
    help="Name the model that the experts were tuned from. [default: none]",
)
@_flag(
    "--expert",
    metavar="MODEL",
    multiple=True,
    required=True,
    shell_complete=completion.folders,
    help="Name a model to merge, a folder or a Hub id; repeat the flag for each.",
)
@_flag("--aim", is_flag=True, help="Relax the merge with AIM, with its authors' omega of 0.4.")
@_flag(
    "--omega",
    metavar="NUMBER",
    type=NumberRange(0, 1),
    help="Relax the merge with AIM, with this omega: 1 changes nothing. [default: no AIM]",
)
@_flag(
    "--output",
    "-o",
    metavar="FILE",
    type=PathType(),
    default="recipe.yml",
    help="Write the recipe into this new file. [default: recipe.yml]",
)
def init_command(
    method: str | None, base: str | None, expert: tuple[str, ...], aim: bool, omega: float | None, output: Path
) -> None:
    """Write a commented recipe for the given models.

    METHOD defaults to `ties` with a base, and to `linear` without one. Only the headers of the models are read.
    """
    from lowmem_aim.jobs.init import init
    from lowmem_aim.recipe.recipe import DEFAULT_OMEGA
    from lowmem_aim.view import summary
    from lowmem_aim.view.dashboard import showing

    with showing("plain") as view:
        made = init(method, base, expert, output, omega=DEFAULT_OMEGA if aim and omega is None else omega, emit=view)
    for line in summary.commands_for(made, usage.program()):
        click.echo(line, err=True)
    print_path(made)


@click.command("merge", cls=usage.RecipeCommand)
@mergekit_flags
@_PATHS
@RECIPE_FLAGS
@AIM_FLAGS
@OUTPUT_FLAGS
@STAGE_FLAGS
@JOB_FLAGS
def merge_command(paths: tuple[Path, ...], style: Style, **flags: Any) -> None:
    """Merge by RECIPE (mergekit's YAML) into the new folder OUT.

    A RECIPE of `-` is read from stdin. Flags override the recipe, or replace it. The same command resumes an
    interrupted run.
    """
    recipe = _recipe("merge", paths, flags)
    refuse_if_running(paths[-1])
    from lowmem_aim.jobs.merge import merge

    run(lambda emit: merge(recipe, paths[-1], options_of(flags), emit), style, merges=True)


@click.command("plan", cls=usage.RecipeCommand)
@mergekit_flags
@_PATHS
@RECIPE_FLAGS
@AIM_FLAGS
@OUTPUT_FLAGS
@STAGE_FLAGS
@JOB_FLAGS
@_machine(
    "--measure/--no-measure",
    default=True,
    help="Measure the disk and the device for two seconds, to estimate the time. [default: --measure]",
)
@_run(
    "--activations",
    is_flag=True,
    help="Then run the experts on their texts, and compute the merge without writing it, to show how much of what each "
    "expert does would be kept.",
)
def plan_command(paths: tuple[Path, ...], measure: bool, activations: bool, style: Style, **flags: Any) -> None:
    """Show what `merge` with the same arguments would do and need.

    The memory, disk and time needed are compared with what this machine has. Without --activations, only headers are
    read, also for models on the Hub. The exit code is 0 if the merge would run, otherwise the one that it would end
    with. For a sweep, there is `sweep --plan`.
    """
    recipe, options = _recipe("plan", paths, flags), options_of(flags)
    if activations:
        from lowmem_aim.jobs.unwritten import check_texts

        check_texts(recipe, paths[-1], options)
    from lowmem_aim.jobs.plan import plan
    from lowmem_aim.view import plan_lines
    from lowmem_aim.view.dashboard import showing

    if style == "human" and sys.stderr.isatty():  # the seconds that follow would look like a hang
        click.echo(f"reading headers{', and measuring this machine' * measure} ...", err=True)
    with showing("quiet" if style in ("quiet", "json") else "plain") as view:
        found = plan(recipe, paths[-1], options, view, measure=measure)
    known = found.as_json()
    if style != "json":
        _print_lines([*plan_lines.survey_lines(known["survey"]), *plan_lines.forecast_lines(known)])
    if activations and found.fits:
        known["effects"] = _effects(recipe, paths[-1], options, style, view.progress.notices)
    if style == "json":
        click.echo(json.dumps(known))
        formats.answered()
    else:
        _print_lines([*plan_lines.effect_lines(known["effects"])])
    if found.problems:
        raise found.error()


def _effects(
    recipe: Recipe, out: Path, options: Options, style: Style, told: Sequence[Notice]
) -> Sequence[Mapping[str, Any]]:
    """The shares that each output would keep of each expert; progress is shown meanwhile, on stderr."""
    from lowmem_aim.jobs.unwritten import effects

    found: list[Mapping[str, Any]] = []
    run(
        lambda emit: found.extend(effects(recipe, out, options, emit, told=told)),
        "quiet" if style == "json" else style,  # stdout is to hold one value
    )
    return found


def _print_lines(lines: Sequence[str]) -> None:
    from lowmem_aim.view import plan_lines
    from lowmem_aim.view.wrapping import for_terminal

    if lines:
        click.echo(for_terminal(lines, plan_lines.INDENT))


@click.command("relax", cls=usage.RecipeCommand)
@click.argument("merged", shell_complete=completion.folders)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@_relaxation(
    "--base",
    metavar="MODEL",
    required=True,
    shell_complete=completion.folders,
    help="Compare with this model, from which MERGED's experts were tuned: a folder or a Hub id.",
)
@_relaxation(
    "--with",
    "relaxations",
    type=Choice(["aim", "acm", "both"]),
    default="aim",
    show_default=True,
    help="Relax with AIM (by input channel), with ACM (by layer), or with both: ACM after AIM.",
)
@_relaxation(
    "--theta",
    type=float,
    help="Set how fast a layer keeps more of its delta as its mutual information falls; for ACM only. [default: 0.7]",
)
@_relaxation(
    "--normalise",
    "--normalize",
    "normalise",
    metavar="OVER",
    shell_complete=completion.words(*NORMALISATIONS),
    help="Take mutual information relative to the `samples` of a layer, or to all `layers`; for ACM only. "
    "[default: samples]",
)
@AIM_FLAGS
@OUTPUT_FLAGS
@JOB_FLAGS
def relax_command(merged: str, out: Path, style: Style, **flags: Any) -> None:
    """Apply AIM or ACM to MERGED, a model merged earlier.

    Any tool may have merged it. The result is the new folder OUT. The same command resumes an interrupted run.
    """
    refuse_if_running(out)
    from lowmem_aim.jobs.merge import merge
    from lowmem_aim.jobs.preparation import sound_recipe
    from lowmem_aim.recipe import from_flags

    errors = usage.wrong_values()
    recipe = sound_recipe(from_flags.relax_recipe(merged, flags, errors), out, options_of(flags), errors)
    run(lambda emit: merge(recipe, out, options_of(flags), emit), style, merges=True)


@click.command("calibrate", cls=usage.Command)
@click.argument("base", shell_complete=completion.folders)
@new_file("activations to this new .safetensors")
@CALIBRATION_FLAGS
@JOB_FLAGS
def calibrate_command(base: str, output: Path, style: Style, **flags: Any) -> None:
    """Measure the activations of BASE once, for many merges.

    Pass the file to them as --calibration. The same command resumes an interrupted run.
    """
    from lowmem_aim.system.files import partial_folder

    refuse_if_running(partial_folder(output))
    from lowmem_aim.jobs.calibrate import calibrate
    from lowmem_aim.recipe import from_flags

    aim = from_flags.calibration_settings(flags)
    run(lambda emit: calibrate(base, aim, output, options_of(flags), emit), style)


@click.command("verify", cls=usage.Command)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@FORMAT_FLAGS
def verify_command(out: Path, style: Style) -> None:
    """Compare every file of the finished OUT with what was written.

    The exit code is 8 if one differs.
    """
    from lowmem_aim.output.verify import verify_outputs

    def work(emit: Emit) -> Path:
        interrupts.note_kept(False)
        return verify_outputs(out, emit)

    run(work, style)


@click.command("convert", cls=usage.Command)
@click.argument("folder", shell_complete=completion.folders)
@click.argument("new", type=PathType(), shell_complete=completion.folders)
@_flag(
    "--in-memory",
    is_flag=True,
    help="Load each file whole instead of one tensor at a time: files of torch before 1.6 need that.",
)
@FORMAT_FLAGS
def convert_command(folder: str, new: Path, in_memory: bool, style: Style) -> None:
    """Make safetensors of the pickled weights in FOLDER.

    pytorch_model*.bin and adapter_model.bin are loaded as weights only, in a process of its own without network. The
    new folder NEW gets the safetensors, the config and the tokenizer. FOLDER stays as it is.
    """
    from lowmem_aim.system.files import partial_folder

    refuse_if_running(partial_folder(new))
    from lowmem_aim.jobs.convert import convert

    def work(emit: Emit) -> Path:
        interrupts.note_kept(False)
        return convert(folder, new, in_memory=in_memory, emit=emit)

    run(work, style)


@click.command("demo", cls=usage.Command)
@click.argument("folder", type=PathType(), default="demo-run", shell_complete=completion.folders)
@_flag(
    "--tiny",
    is_flag=True,
    help="Train models of a million parameters, the only kind today: for scripts that should keep these when larger "
    "models become the default.",
)
@_flag("--models", "only_models", is_flag=True, help="Only make models to try merges on; this takes half a minute.")
def demo_command(folder: Path, tiny: bool, only_models: bool) -> None:
    """Train small models in FOLDER, merge them, and compare.

    The first run trains a base and three experts. They are merged with and without AIM. The demo ends with commands for
    your own merges of these models.
    """
    from lowmem_aim.demo import run

    run(folder, click.echo, usage.program(), only_models=only_models)
