"""The command that evaluates a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import JOB_FLAGS, flags_of, options_of
from lowmem_aim.cli.running import refuse_if_running, run
from lowmem_aim.cli.task_flags import FORWARD_FLAGS, TASK_FLAGS, asked_for, forwards_of
from lowmem_aim.cli.values import PathType
from lowmem_aim.recipe.words import DTYPES

if TYPE_CHECKING:
    from lowmem_aim.view.dashboard import Style

_tasks, _forwards, _output = flags_of("Tasks"), flags_of("Model"), flags_of("Output")


@click.command("evaluate", cls=usage.Command)
@click.argument("model", shell_complete=completion.folders)
@TASK_FLAGS
@_tasks("--seed", type=int, default=1234, show_default=True, help="Draw the solved items with this seed.")
@_forwards(
    "--dtype",
    metavar="DTYPE",
    shell_complete=completion.words(*DTYPES),
    help="Run the model in float32, float16 or bfloat16. [default: as it is stored]",
)
@FORWARD_FLAGS
@_output(
    "--output",
    "-o",
    metavar="FILE",
    type=PathType(),
    required=True,
    help="Write the scores to this new .json file.",
)
@_output(
    "--cache/--no-cache",
    default=True,
    help="Keep the model's answers in the cache and reuse those there, or ask anew. [default: --cache]",
)
@JOB_FLAGS
def evaluate_command(model: str, output: Path, style: Style, **flags: Any) -> None:
    """Score MODEL on benchmarks, one of its blocks at a time.

    The tasks are those of lm-evaluation-harness. Tasks that score given texts are evaluated within `--ram` and
    `--vram`, whatever the model's size. For tasks that let the model write, it is loaded whole, and what does not fit
    is read from disk again and again. The same command resumes an interrupted run.
    """
    from lowmem_aim.system.files import partial_folder

    refuse_if_running(partial_folder(output))
    errors = usage.wrong_values()
    if errors:
        from lowmem_aim.errors import joined

        raise joined(errors)
    asked = asked_for(flags, flags["seed"])
    forwards = forwards_of(flags, flags["dtype"])
    from lowmem_aim.jobs.evaluate import evaluate

    run(lambda emit: evaluate(model, asked, output, forwards, options_of(flags), emit), style)
