"""The command that evaluates a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import JOB_FLAGS, flags_of, new_file, options_of
from lowmem_aim.cli.running import refuse_if_running, run
from lowmem_aim.cli.values import PathType, SizeType
from lowmem_aim.errors import UsageError, printable
from lowmem_aim.recipe.words import DTYPES

if TYPE_CHECKING:
    from lowmem_aim.evaluating.tasks import Asked
    from lowmem_aim.view.dashboard import Style

_tasks, _forwards, _output = flags_of("Tasks"), flags_of("Model"), flags_of("Output")


@click.command("evaluate", cls=usage.Command)
@click.argument("model", shell_complete=completion.folders)
@_tasks(
    "--tasks",
    metavar="NAMES",
    required=True,
    help="Evaluate on these tasks of lm-evaluation-harness, separated by commas.",
)
@_tasks(
    "--include-path",
    metavar="DIR",
    multiple=True,
    type=PathType(),
    shell_complete=completion.folders,
    help="Take further tasks from the YAML files in this folder; repeat the flag for each folder. [default: none]",
)
@_tasks(
    "--metric",
    metavar="TASK=NAME",
    multiple=True,
    help="Score a task by this metric; repeat the flag for each task. [default: the one that the task is known by]",
)
@_tasks(
    "--limit",
    metavar="NUMBER",
    type=click.FloatRange(0, min_open=True),
    help="Score only this many items of each task, or, below 1, this share of them. [default: all]",
)
@_tasks(
    "--num-fewshot",
    metavar="NUMBER",
    type=click.IntRange(0),
    help="Put this many solved items before each. [default: as many as the task asks for]",
)
@_tasks("--chat-template", is_flag=True, help="Put each item into the model's chat template.")
@_tasks("--seed", type=int, default=1234, show_default=True, help="Draw the solved items with this seed.")
@_tasks("--allow-task-code", is_flag=True, help="Run Python code that the tasks in --include-path name.")
@_tasks(
    "--allow-code-execution",
    is_flag=True,
    help="Run the programs that the model writes, each in a process of its own.",
)
@_forwards(
    "--dtype",
    metavar="DTYPE",
    shell_complete=completion.words(*DTYPES),
    help="Run the model in float32, float16 or bfloat16. [default: as it is stored]",
)
@_forwards(
    "--max-length",
    metavar="TOKENS",
    type=click.IntRange(1),
    help="Read at most this many tokens at a time. [default: as many as the model allows]",
)
@_forwards(
    "--batch-size",
    metavar="NUMBER",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Write this many texts at a time, in tasks that let the model write.",
)
@_forwards(
    "--spill",
    metavar="SIZE",
    type=SizeType(),
    help="Use this much disk for what does not fit the memory, and to resume from. [default: 10GB]",
)
@new_file("scores to this new .json")
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
    asked = _asked(flags)
    from lowmem_aim.jobs.evaluate import SPILL_BYTES, Forwards, evaluate

    spill = SPILL_BYTES if flags["spill"] is None else flags["spill"]
    forwards = Forwards(flags["dtype"], flags["max_length"], spill, flags["batch_size"])
    run(lambda emit: evaluate(model, asked, output, forwards, options_of(flags), emit), style)


def _asked(flags: dict[str, Any]) -> Asked:
    """The tasks that the flags ask for, and how. Raises UsageError for a metric without its task."""
    from lowmem_aim.evaluating.tasks import Asked

    wrong = [text for text in flags["metric"] if not all(text.partition("=")[::2])]
    if wrong:
        raise UsageError(
            [f"`--metric {printable(text)}` does not say which task and which metric" for text in wrong],
            hint="`--metric gsm8k=exact_match`",
        )
    limit = flags["limit"]
    return Asked(
        names=tuple(dict.fromkeys(name.strip() for name in flags["tasks"].split(",") if name.strip())),
        folders=tuple(flags["include_path"]),
        metrics=dict(text.split("=", 1) for text in flags["metric"]),
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        num_fewshot=flags["num_fewshot"],
        chat_template=flags["chat_template"],
        seed=flags["seed"],
        allow_code=flags["allow_task_code"],
        allow_execution=flags["allow_code_execution"],
    )
