"""The harness' tasks: found by name, checked before anything of them runs, and the metric that each is scored by."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError, NetworkError, UsageError, did_you_mean, printable, raise_all
from lowmem_aim.evaluating.downloaded_metrics import nothing_downloaded, scored_by_downloads
from lowmem_aim.evaluating.harness_settings import set_generation, wrong_settings
from lowmem_aim.evaluating.task_code import codes
from lowmem_aim.evaluating.task_data import data_sets, is_offline, missing, missing_punkt, not_here
from lowmem_aim.evaluating.task_index import index_of
from lowmem_aim.evaluating.unsafe_tasks import is_unsafe, not_allowed, refusal

HARNESS = "lm_eval"
_INSTALL = "`pip install 'lowmem-aim[eval]'`"
# The metric that a task is known by, where that is not the first of its list; after a comma, the filter of answers.
USUAL = {
    "humaneval": "pass@1",
    "mbpp": "pass_at_1",
    "mmlu": "acc",
    "minerva_math": "math_verify",
    "gsm8k": "exact_match,flexible-extract",
    "ifeval": "prompt_level_strict_acc",
}
WRITES = "generate_until"  # the harness' name for tasks that let the model write
ROLLING = "loglikelihood_rolling"  # likewise, of those that score whole texts
KINDS = ("multiple_choice", "loglikelihood", ROLLING, WRITES)
BETTER = {"hendrycks_math": "`minerva_math`: `hendrycks_math` scores next to nothing, whatever the model"}


@dataclass(frozen=True)
class Asked:
    """The tasks that a user asks for, and how they are to be run."""

    names: tuple[str, ...]
    folders: tuple[Path, ...] = ()  # of further task files
    metrics: Mapping[str, str] = field(default_factory=dict)  # task -> the metric that it is scored by
    limit: float | None = None  # items of each task; below 1: the share of them
    num_fewshot: int | None = None
    chat_template: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the harness, see `harness_settings`
    seed: int = 0
    allow_code: bool = False  # of the tasks' own files
    allow_execution: bool = False  # of programs that the model writes

    def metric(self, task: str) -> str:
        """The metric that a task is scored by; "": the first of its list."""
        return self.metrics.get(task) or USUAL.get(task, "")


def better(asked: Asked) -> Iterator[str]:
    """Yield what is to be known of tasks that there is a better one for."""
    for name, text in BETTER.items():
        if any(task == name or task.startswith(f"{name}_") for task in asked.names):
            yield f"consider {text}"


def missing_harness() -> Iterator[UsageError]:
    """Yield an error if the harness is not installed. Nothing is imported."""
    if importlib.util.find_spec(HARNESS) is None:
        yield UsageError("`evaluate` needs lm-evaluation-harness, which is not installed", hint=_INSTALL)


def version() -> str:
    """The version of the harness that is installed."""
    return importlib.metadata.version(HARNESS)


def wrong_requests(asked: Asked) -> Iterator[UsageError]:
    """Yield an error for each thing that is wrong with what is asked for, as far as that is known at once."""
    if not asked.names:
        yield UsageError("no task is named", hint="name them: `--tasks arc_easy,hellaswag`")
    for folder in asked.folders:
        if not folder.is_dir():
            yield UsageError(f"there is no folder `{printable(str(folder))}` of task files", "check `--include-path`")
    for task in asked.metrics:
        if task not in asked.names:
            hint = "give it as `--metric TASK=NAME`, with a task of `--tasks`"
            yield UsageError(f"`--metric {printable(task)}=...`: this task is not evaluated", hint)
    yield from wrong_settings(asked.settings, asked.chat_template)


def quiet() -> None:
    """Silence the harness and its libraries, which print while they work: what users need comes as events.

    To be called before any of them is imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # standard errors: a process for each core, as large as this one


def _quiet_datasets() -> None:
    logging.getLogger(HARNESS).setLevel(logging.CRITICAL)
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


@dataclass(frozen=True)
class Loaded:
    """Tasks with their items, as the harness takes them."""

    tasks: Any  # the harness' table of tasks and groups
    names: Sequence[str]  # of those that are scored: what was asked for, and in place of a tag all that have it


@dataclass(frozen=True)
class Found:
    """The harness' index of tasks, which takes seconds to make, and its entries of those that are asked for."""

    manager: Any
    entries: Sequence[Any]  # of groups and tags, of all their tasks


def found(asked: Asked) -> Found:
    """Find the tasks that are asked for. Nothing of a task is loaded or run. Raises UsageError."""
    _quiet_datasets()
    manager = _manager(asked)
    errors: list[LowmemAimError] = [*_unknown(asked, manager)]
    entries = [entry for name in asked.names for entry in _below(manager, name)]
    errors += [*([] if asked.allow_code else codes(asked.folders, entries)), *_kinds(asked, entries)]
    raise_all(errors)
    return Found(manager, entries)


def loaded(asked: Asked, tasks_found: Found | None = None) -> Loaded:
    """Load the tasks that are asked for. Nothing that came with a task's file is run unless that is allowed.

    Raises UsageError, and NetworkError for items that are not on this machine.
    """
    where = tasks_found or found(asked)
    manager, entries = where.manager, where.entries
    if is_offline():
        raise_all([*missing(entries, fetching(asked))])
    try:
        # What is printed is for people (nltk's downloads), and standard output is for data.
        with nothing_downloaded(), contextlib.redirect_stdout(io.StringIO()):
            tasks = manager.load(list(asked.names))
    except UsageError:
        raise
    except Exception as error:  # whatever datasets, or the file of a task, raises
        raise_all([*missing(entries, fetching(asked))] if _is_of_network(error) else [])
        raise _not_loaded(error, asked) from error
    raise_all(
        [
            *([] if asked.allow_execution else not_allowed(tasks["tasks"])),
            *scored_by_downloads(tasks["tasks"]),
            *missing_punkt(entries, fetching(asked)),
            *([] if is_offline() else _online_alone(entries, tasks["tasks"])),
            *_metrics(asked, tasks["tasks"]),
        ]
    )
    names = [part for name in asked.names for part in _scored(manager, name)]
    writing = {name: task for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE == WRITES}
    set_generation(asked.settings, [*writing.values()], [name for name in tasks["tasks"] if name not in writing])
    tasks["tasks"] = dict(sorted(tasks["tasks"].items(), key=lambda item: _place(item[1].OUTPUT_TYPE)))
    return Loaded(tasks, names)


def _online_alone(entries: Sequence[Any], tasks: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for each data set of an unsafe task that cannot be loaded where the task is scored."""
    unsafe = [entry for entry in entries if entry.name in tasks and is_unsafe(tasks[entry.name])]
    for name in not_here(data_sets(unsafe)):
        yield UsageError(
            f"the data set {name} is loaded with a network alone, and what runs the model's programs has none",
            hint="leave its task out of `--tasks`",
        )


def _place(kind: str) -> int:
    """The place of a kind of tasks among all: those that need the most memory come first, to be refused before work.

    Rolling ones read texts that are as long as the model allows. Those that let it write come last: it is loaded whole.
    """
    return {ROLLING: 0, WRITES: 2}.get(kind, 1)


def fetching(asked: Asked) -> str:
    """The hint for tasks whose data are not here."""
    return f"with a network, and HF_HUB_OFFLINE unset: `{fetch_command(asked)}`"


def fetch_command(asked: Asked) -> str:
    """The command that downloads the data of tasks, for people to type."""
    folders = [word for folder in asked.folders for word in ("--include-path", str(folder))]
    allowed = ["--allow-task-code"] if asked.allow_code else []
    words = ["lowmem-aim", "evaluate", "--fetch", "--tasks", ",".join(asked.names), *folders, *allowed]
    return printable(shlex.join(words), 1000)


def _metrics(asked: Asked, tasks: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for each metric that is asked for and that its task lacks; of a group, it is seen later."""
    for name, metric in asked.metrics.items():
        there = list(tasks[name].aggregation()) if name in tasks else []
        if there and metric.partition(",")[0] not in there:
            listed = ", ".join(f"`{printable(known)}`" for known in there)
            yield UsageError(
                f"`{printable(name)}` has no metric `{printable(metric)}`{did_you_mean(metric, there)}",
                hint=f"it has {listed}",
            )


def _scored(manager: Any, name: str) -> list[str]:
    entry = manager.task_index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _manager(asked: Asked) -> Any:
    """The harness' index of tasks: of the user's folders alone where they have all, else of its own, too."""
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in asked.folders]
    own = TaskManager(include_path=folders or None, include_defaults=False) if folders else None
    if own is not None and all(name in own.task_index for name in asked.names):
        return own
    return index_of(asked.names, folders)


def _unknown(asked: Asked, manager: Any) -> Iterator[UsageError]:
    for name in asked.names:
        if name not in manager.task_index:
            near = did_you_mean(name, manager.all_tasks)
            yield UsageError(
                f"there is no task `{printable(name)}`{near}",
                hint="`lm_eval ls tasks` lists the harness' own; `--include-path DIR` adds yours",
            )


def _below(manager: Any, name: str) -> Iterator[Any]:
    """Yield the harness' entries of a task, or of all tasks of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    parts = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else sorted(entry.tags)
    if entry.kind.name in ("GROUP", "TAG"):
        for part in parts if isinstance(parts, list) else []:
            yield from _below(manager, part if isinstance(part, str) else str(part.get("task", "")))
    else:
        yield entry


def _kinds(asked: Asked, entries: Sequence[Any]) -> Iterator[UsageError]:
    """Yield an error for each task that asks for what cannot be answered, or for what is not allowed."""
    for entry in entries:
        kind = (entry.cfg or {}).get("output_type", "generate_until")
        if kind not in KINDS:
            yield UsageError(
                f"the task `{printable(entry.name)}` asks for `{printable(str(kind))}`, which cannot be evaluated",
                hint="leave it out of `--tasks`",
            )
        if (entry.cfg or {}).get("unsafe_code") and not asked.allow_execution:
            yield refusal(entry.name)


def _is_of_network(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, ConnectionError) or "offline" in said or "couldn't reach" in said


def _not_loaded(error: Exception, asked: Asked) -> LowmemAimError:
    """The error for tasks whose items could not be loaded."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = f"the tasks cannot be loaded: {printable(said, 500)}"
    if _is_of_network(error):
        return NetworkError(text, hint=fetching(asked))
    return UsageError(text, hint="are the task's file and its data whole?")
