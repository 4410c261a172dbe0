"""The flags of commands that evaluate models: which tasks, and how the model is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lowmem_aim.cli import completion
from lowmem_aim.cli.flags import bundle, flags_of
from lowmem_aim.cli.values import PathType, SizeType
from lowmem_aim.errors import UsageError, printable

if TYPE_CHECKING:
    from lowmem_aim.evaluating.tasks import Asked
    from lowmem_aim.jobs.evaluate import Forwards

_tasks, _forwards = flags_of("Tasks"), flags_of("Model")

TASK_FLAGS = bundle(
    _tasks(
        "--tasks",
        metavar="NAMES",
        required=True,
        help="Evaluate on these tasks of lm-evaluation-harness, separated by commas.",
    ),
    _tasks(
        "--include-path",
        metavar="DIR",
        multiple=True,
        type=PathType(),
        shell_complete=completion.folders,
        help="Take further tasks from the YAML files in this folder; repeat the flag for each folder. [default: none]",
    ),
    _tasks(
        "--metric",
        metavar="TASK=NAME",
        multiple=True,
        help="Score a task by this metric; repeat the flag for each task. [default: the one that the task is known by]",
    ),
    _tasks(
        "--limit",
        metavar="NUMBER",
        type=click.FloatRange(0, min_open=True),
        help="Score only this many items of each task, or, below 1, this share of them. [default: all]",
    ),
    _tasks(
        "--num-fewshot",
        metavar="NUMBER",
        type=click.IntRange(0),
        help="Put this many solved items before each. [default: as many as the task asks for]",
    ),
    _tasks("--chat-template", is_flag=True, help="Put each item into the model's chat template."),
    _tasks(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change another setting of the harness, such as gen_kwargs.max_gen_toks=512; repeat the flag for each. "
        "[default: none]",
    ),
    _tasks("--allow-task-code", is_flag=True, help="Run Python code that the tasks in --include-path name."),
    _tasks(
        "--allow-code-execution",
        is_flag=True,
        help="Run the programs that the model writes, in processes apart, with limits and without network.",
    ),
)
FORWARD_FLAGS = bundle(
    _forwards(
        "--max-length",
        metavar="TOKENS",
        type=click.IntRange(1),
        help="Read at most this many tokens at a time. [default: as many as the model allows]",
    ),
    _forwards(
        "--batch-size",
        metavar="NUMBER",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Write this many texts at a time, in tasks that let the model write.",
    ),
    _forwards(
        "--spill",
        metavar="SIZE",
        type=SizeType(),
        help="Use this much disk for what does not fit the memory, and to resume from. [default: 10GB]",
    ),
)


def asked_for(flags: dict[str, Any], seed: int) -> Asked:
    """The tasks that the flags ask for, and how. Raises UsageError for a metric without its task, or its like."""
    from lowmem_aim.evaluating.harness_settings import parsed
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
        settings=parsed(flags["settings"]),
        seed=seed,
        allow_code=flags["allow_task_code"],
        allow_execution=flags["allow_code_execution"],
    )


def forwards_of(flags: dict[str, Any], dtype: str | None = None) -> Forwards:
    """The way in which the flags run the model."""
    from lowmem_aim.jobs.evaluate import SPILL_BYTES, Forwards

    spill = SPILL_BYTES if flags["spill"] is None else flags["spill"]
    return Forwards(dtype, flags["max_length"], spill, flags["batch_size"])
