"""`compare`: scores of models side by side, what merging and AIM have changed, and a report of it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import DATA_FLAGS, flags_of
from lowmem_aim.cli.values import PathType
from lowmem_aim.errors import printable

if TYPE_CHECKING:
    from lowmem_aim.evaluating.comparison import Comparison
    from lowmem_aim.evaluating.fronts import Front
    from lowmem_aim.view.dashboard import Style

_flag = flags_of("")
AGAINST = "--against"
INDENT = 2  # columns, where a line goes on


class CompareCommand(usage.Command):
    """A command whose `--against` takes all words up to the next flag.

    A shell turns `--against experts/*.json` into several words. If the flag took one of them, the others would become
    models to compare, and the gain would silently be that over another population.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with the flag repeated before each of its words."""
        return super().parse_args(ctx, _spread(args))


def _spread(words: Sequence[str]) -> list[str]:
    spread, goes_on = [], False
    for before, word in itertools.pairwise(["", *words]):
        goes_on = not word.startswith("-") and (goes_on or before == AGAINST)
        spread += [AGAINST, word] if goes_on and before != AGAINST else [word]
    return spread


@click.command("compare", cls=CompareCommand)
@click.argument(
    "scores", nargs=-1, required=True, metavar="SCORES...", type=PathType(), shell_complete=completion.scores
)
@_flag(
    AGAINST,
    multiple=True,
    metavar="SCORES...",
    type=PathType(),
    shell_complete=completion.scores,
    help="Compute the hypervolume gain over these models, usually the experts that were merged. The flag takes all "
    "files up to the next flag. [default: no hypervolume gain]",
)
@_flag(
    "--output",
    "-o",
    metavar="FOLDER",
    type=PathType(),
    shell_complete=completion.folders,
    help="Write the report into this new folder: the table, pictures, all numbers as CSV and JSON. "
    "[default: no report]",
)
@_flag("--tasks", metavar="TASK,...", default="", help="Compare these tasks, in this order. [default: all]")
@_flag(
    "--pair",
    "pairs",
    multiple=True,
    metavar="TASK,TASK",
    help="Draw and list the Pareto front of these two tasks; repeat the flag for further pairs. "
    "[default: draw the six pairs with the longest fronts]",
)
@_flag(
    "--sort",
    default="family",
    metavar="WHAT",
    help="Sort the models by family (the unrelaxed merge, then by omega), by name, or the best first by hv (the "
    "hypervolume gain) or a task. [default: family]",
)
@_flag("--force", is_flag=True, help="Compare even models that were evaluated with other settings.")
@DATA_FLAGS
def compare_command(
    scores: tuple[Path, ...],
    against: tuple[Path, ...],
    output: Path | None,
    tasks: str,
    pairs: tuple[str, ...],
    sort: str,
    force: bool,
    style: Style,
) -> None:
    """Compare the scores of models, and what AIM changed.

    SCORES are files that `evaluate` made or that were written by hand (docs/evaluation.md). Each merge with AIM or ACM
    is compared with the same merge without, if its scores are among the files. Differences of less than two standard
    errors are marked.
    """
    import json

    from lowmem_aim.evaluating.report import as_json
    from lowmem_aim.jobs.compare import compare

    found, fronts = compare(scores, against, output, tasks=_words(tasks), pairs=pairs, sort=sort, force=force)
    if style == "json":
        click.echo(json.dumps(as_json(found)))
    else:
        print_comparison(found, fronts if pairs else [])
    if output is not None:
        click.echo(f"the report is in `{printable(str(output))}`", err=True)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def print_comparison(found: Comparison, fronts: Sequence[Front] = (), *, err: bool = False) -> None:
    """Print the table of a comparison, what its marks mean, and these fronts; `err`: on stderr."""
    from lowmem_aim.evaluating.columns import legend_of
    from lowmem_aim.evaluating.table import table_lines
    from lowmem_aim.view.wrapping import columns_of, for_terminal

    stream = sys.stderr if err else sys.stdout
    bold = _bold if _shows_bold(stream) else str
    click.echo("\n".join(table_lines(found, columns_of(stream), bold)), err=err)
    told = [*legend_of(found), *found.notes]
    for front in fronts:
        first, second = map(printable, front.pair)
        told.append(f"Pareto front of {first} and {second}: {', '.join(printable(row.name) for row in front.rows)}")
    click.echo(err=err)
    click.echo(for_terminal(told, INDENT, stream), err=err)


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def _shows_bold(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
