"""The command that sweeps: many merges, each scored, all compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowmem_aim.cli import completion, formats, usage
from lowmem_aim.cli.comparing import print_comparison
from lowmem_aim.cli.flags import CALIBRATION_FLAGS, JOB_FLAGS, flags_of, options_of
from lowmem_aim.cli.running import refuse_if_running, run
from lowmem_aim.cli.task_flags import FORWARD_FLAGS, TASK_FLAGS, asked_for, forwards_of
from lowmem_aim.cli.usage import Choice
from lowmem_aim.cli.values import PathType, SizeType
from lowmem_aim.errors import LowmemAimError, UsageError, noted, printable, raise_all
from lowmem_aim.system.options import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowmem_aim.events import Emit
    from lowmem_aim.jobs.searched import Searched
    from lowmem_aim.jobs.swept import Swept
    from lowmem_aim.system.options import Options
    from lowmem_aim.view.dashboard import Style

_points, _tasks, _output, _run = flags_of("Points"), flags_of("Tasks"), flags_of("Output"), flags_of("Run")


@click.command("sweep", cls=usage.Command)
@click.argument("recipe", type=PathType(), shell_complete=completion.recipes)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@_points(
    "--methods",
    metavar="METHOD,...",
    default="",
    shell_complete=completion.methods,
    help="Merge by each of these methods. [default: the recipe's]",
)
@_points(
    "--omega",
    metavar="NUMBER,...",
    help="Relax each merge with AIM, with each of these omegas. The unrelaxed merge is always a point. "
    "[default: the recipe's]",
)
@_points(
    "--parameter",
    "-p",
    multiple=True,
    metavar="NAME=VALUE,...",
    shell_complete=completion.parameters,
    help="Merge with each of these values of a parameter, such as `-p density=0.3,0.5`; repeat the flag for each "
    "parameter. [default: the recipe's values]",
)
@_points(
    "--controls/--no-controls",
    default=True,
    help="Add a control to each merge with AIM: the same amount taken from all channels alike. [default: --controls]",
)
@_points(
    "--search",
    metavar="NUMBER",
    type=int,
    help="Try this many merges in place of all, each chosen by what the earlier ones scored. Values may then be "
    "ranges, such as `-p density=0.2:0.9 --omega 0:1`. Several processes may search in one OUT. "
    "[default: try all]",
)
@_points(
    "--objective",
    metavar="TASK,...",
    help="Search for the best scores on these tasks. [default: the hypervolume gain over the experts]",
)
@_points(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Draw the random masks, and what a search tries, with this seed.",
)
@_points(
    "--nonfinite",
    type=Choice(["stop", "base"]),
    default="stop",
    show_default=True,
    help="Stop at NaN or Inf in an expert, or use the base's value there.",
)
@CALIBRATION_FLAGS
@TASK_FLAGS
@_tasks("--tasks-seed", type=int, default=1234, show_default=True, help="Draw the solved items with this seed.")
@FORWARD_FLAGS
@_output(
    "--keep",
    type=Choice(["best", "all", "none"]),
    default="best",
    show_default=True,
    help="Keep the merged models that are recommended, all of them, or none.",
)
@_output(
    "--disk",
    metavar="SIZE",
    type=SizeType(),
    help="Use this much disk for merged models at a time; the inputs are read once for as many as that holds. "
    "[default: half of what is free]",
)
@_output(
    "--shard-size",
    type=SizeType(),
    default=DEFAULT_SHARD_BYTES,
    help="Make no file of weights larger than this. [default: 5GB]",
)
@_output(
    "--cache/--no-cache",
    default=True,
    help="Keep activations and answers in the cache and reuse those there, or make them anew. [default: --cache]",
)
@_run("--plan", "only_plan", is_flag=True, help="Show what the sweep would do and need, and do nothing.")
@_run(
    "--ray",
    metavar="ADDRESS",
    help="Make the points as tasks of the Ray cluster at this address, whose nodes share OUT and the models; `local` "
    "starts one here. A task gets the cores of `--threads` and the memory of `--ram`. [default: one after the other]",
)
@JOB_FLAGS
def sweep_command(recipe: Path, out: Path, only_plan: bool, style: Style, **flags: Any) -> None:
    """Merge by RECIPE in many ways, and score each.

    A RECIPE of `-` is read from stdin. The new folder OUT gets the scores, a report with Pareto fronts, the recipe of
    each point, and two recommended recipes: the one that adds most to the experts, and the one that loses least
    anywhere. The same command resumes an interrupted sweep.
    """
    if flags["search"] is None:
        refuse_if_running(out)
    asked = _asked(recipe, flags)
    from lowmem_aim.jobs.searched import Searched

    if only_plan:
        _plan(asked, out, options_of(flags), style)
        return
    from lowmem_aim.jobs.sweep import Result, sweep

    results: list[Result] = []

    def work(emit: Emit) -> Path:
        if isinstance(asked, Searched):
            from lowmem_aim.jobs.search import search

            results.append(search(asked, out, options_of(flags), emit))
        else:
            results.append(sweep(asked, out, options_of(flags), emit))
        return out

    run(work, style)
    if style in ("human", "plain"):
        print_comparison(results[0].comparison, err=True)
        for what, name in results[0].recommended.items():
            click.echo(f"{what.replace('-', ' ')}: {name} ({printable(str(out / what))}.yml)", err=True)


def _asked(recipe: Path, flags: dict[str, Any]) -> Swept | Searched:
    """The sweep, or the search, that the command line asks for. Raises everything that is wrong with it at once."""
    from lowmem_aim.recipe.points import Grid, points_of
    from lowmem_aim.recipe.search_space import space_of
    from lowmem_aim.recipe.yaml_tree import load_tree, read_tree

    errors: list[LowmemAimError] = [*usage.wrong_values(), *_wrong_search(flags)]
    methods = _listed(flags["methods"])
    calibration = {
        name: flags[name]
        for name in ("calibration", "samples", "block_size", "calibration_seed", "pack", "calibration_dtype")
    }
    grid = Grid(methods, flags["parameter"], flags["omega"], flags["controls"], calibration)
    space = None
    with noted(errors):
        tree = read_tree(sys.stdin.buffer, "stdin") if str(recipe) == "-" else load_tree(recipe)
        if flags["search"] is not None:
            space = space_of(tree, grid)
        points = points_of(tree, grid) if space is None else space.samples()
    with noted(errors):
        asked = asked_for(flags, flags["tasks_seed"])
    raise_all(errors)
    from lowmem_aim.jobs.searched import Searched
    from lowmem_aim.jobs.swept import Swept

    swept = Swept(points, asked, forwards_of(flags), flags["keep"], flags["disk"], flags["ray"] or "")
    if space is None:
        return swept
    return Searched(swept, space, flags["search"], _listed(flags["objective"] or ""), flags["controls"])


def _wrong_search(flags: dict[str, Any]) -> Iterator[LowmemAimError]:
    if flags["search"] is not None and flags["search"] < 1:
        yield UsageError("`--search` needs one trial or more", "such as `--search 20`")
    if flags["search"] is not None and flags["ray"] is not None:
        hint = "start the same command several times, on as many machines as you like: they share OUT"
        yield UsageError("`--search` and `--ray` exclude each other", hint)
    if flags["objective"] is not None and flags["search"] is None:
        yield UsageError("`--objective` has no meaning without `--search`", "add `--search 20`, or leave it out")


def _listed(text: str) -> tuple[str, ...]:
    """The names that commas separate, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _plan(asked: Swept | Searched, out: Path, options: Options, style: Style) -> None:
    """Print what the sweep, or the search, would do and need."""
    import json

    from lowmem_aim.jobs.search_plan import plan_search
    from lowmem_aim.jobs.sweep_plan import plan_sweep
    from lowmem_aim.jobs.swept import Swept
    from lowmem_aim.view.dashboard import showing
    from lowmem_aim.view.plan_lines import INDENT
    from lowmem_aim.view.sweep_lines import search_lines, sweep_lines
    from lowmem_aim.view.wrapping import for_terminal

    with showing("quiet" if style in ("quiet", "json") else "plain") as view:
        if isinstance(asked, Swept):
            known, lines = plan_sweep(asked, out, options, view).as_json(), sweep_lines
        else:
            known, lines = plan_search(asked, out, options, view).as_json(), search_lines
    if style == "json":
        click.echo(json.dumps(known))
        formats.answered()
    else:
        click.echo(for_terminal(lines(known), INDENT))
