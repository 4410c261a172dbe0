"""The command that evaluates a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import JOB_FLAGS, flags_of, new_file, options_of
from lowmem_aim.cli.running import refuse_if_running, run
from lowmem_aim.cli.task_flags import FORWARD_FLAGS, TASK_FLAGS, asked_for, forwards_of
from lowmem_aim.cli.usage import Flag
from lowmem_aim.errors import UsageError
from lowmem_aim.recipe.words import DTYPES

if TYPE_CHECKING:
    from lowmem_aim.view.dashboard import Style

_tasks, _forwards, _output = flags_of("Tasks"), flags_of("Model"), flags_of("Output")
_OF_FETCHING = {"fetch", "tasks", "include_path", "allow_task_code", "format", "as_json", "quiet"}


class _UnlessFetching(click.Parameter):
    """A parameter that is required, unless `--fetch` is given."""

    def value_is_missing(self, value: Any) -> bool:
        return super().value_is_missing(value) and not click.get_current_context().params.get("fetch")


class _Argument(_UnlessFetching, click.Argument): ...


class _Flag(_UnlessFetching, Flag): ...


@click.command("evaluate", cls=usage.Command)
@click.argument("model", cls=_Argument, shell_complete=completion.folders)
@TASK_FLAGS
@_tasks(
    "--fetch",
    is_flag=True,
    is_eager=True,
    help="Download what the tasks need, and end: no MODEL, no `-o`. Then evaluate with HF_HUB_OFFLINE=1.",
)
@_tasks("--seed", type=int, default=1234, show_default=True, help="Draw the solved items with this seed.")
@_forwards(
    "--dtype",
    metavar="DTYPE",
    shell_complete=completion.words(*DTYPES),
    help="Run the model in float32, float16 or bfloat16. [default: as it is stored]",
)
@FORWARD_FLAGS
@new_file("scores to this new .json", _Flag)
@_output(
    "--cache/--no-cache",
    default=True,
    help="Keep the model's answers in the cache and reuse those there, or ask anew. [default: --cache]",
)
@JOB_FLAGS
def evaluate_command(model: str, output: Path, fetch: bool, style: Style, **flags: Any) -> None:
    """Score MODEL on benchmarks, one of its blocks at a time.

    The tasks are those of lm-evaluation-harness. Tasks that score given texts are evaluated within `--ram` and
    `--vram`, whatever the model's size. For tasks that let the model write, it is loaded whole, and what does not fit
    is read from disk again and again. The same command resumes an interrupted run.
    """
    from lowmem_aim.system.files import partial_folder

    if fetch:
        return _fetch(flags, style)
    refuse_if_running(partial_folder(output))
    errors = usage.wrong_values()
    if errors:
        from lowmem_aim.errors import joined

        raise joined(errors)
    asked = asked_for(flags, flags["seed"])
    forwards = forwards_of(flags, flags["dtype"])
    from lowmem_aim.jobs.evaluate import evaluate

    return run(lambda emit: evaluate(model, asked, output, forwards, options_of(flags), emit), style)


def _fetch(flags: dict[str, Any], style: Style) -> None:
    """Download what the tasks need. Raises UsageError for flags that mean nothing then."""
    context = click.get_current_context()
    given = [
        parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(context)
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        and parameter.name not in _OF_FETCHING
    ]
    from lowmem_aim.evaluating.tasks import fetch_command

    if given:
        problems = [f"`{name}` means nothing beside `--fetch`" for name in given]
        only = asked_for({**flags, "metric": (), "settings": ()}, flags["seed"])
        raise UsageError(problems, hint=f"write `{fetch_command(only)}`")
    from lowmem_aim.jobs.fetch import fetch

    asked = asked_for(flags, flags["seed"])
    run(lambda emit: fetch(asked, emit), style)
