"""Tasks that are scored by running what the model has written: told apart, allowed or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.code_scoring import CodeEval
from lowmem_aim.evaluating.downloaded_metrics import OURS, asked_by, functions_of


def is_unsafe(task: Any) -> bool:
    """Whether scoring a loaded task runs what the model has written, as its file says, or its metric."""
    return bool(getattr(task, "UNSAFE_CODE", False)) or uses_code_eval(task)


def uses_code_eval(task: Any) -> bool:
    """Whether a loaded task runs programs by `code_eval`, each of which then gets a process of its own."""
    metrics = [getattr(metric, "__self__", metric) for metric in getattr(task, "_metric_fn_list", {}).values()]
    known = [value for function in functions_of(task) for value in getattr(function, "__globals__", {}).values()]
    return OURS in asked_by(task) or any(isinstance(value, CodeEval) for value in (*metrics, *known))


def unsafe_names(names: Iterable[str], tasks: Mapping[str, Any]) -> list[str]:
    """Return those of `names`, tasks or groups of the harness' table, of which a task is unsafe."""
    return [name for name in names if any(map(is_unsafe, tasks_of(name, tasks).values()))]


def tasks_of(name: str, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of a name in the harness' table: itself, or of a group all."""
    if name in tasks["tasks"]:
        return {name: tasks["tasks"][name]}
    return {task.task_name: task for task in tasks["groups"][name].get_all_tasks()}


def not_allowed(tasks: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for each unsafe task among loaded ones, by their names."""
    for name, task in tasks.items():
        if is_unsafe(task):
            yield refusal(name)


def refusal(task: str) -> UsageError:
    """The error for a task that runs programs without being allowed to."""
    return UsageError(
        f"the task `{printable(task)}` runs the programs that the model writes",
        hint="`--allow-code-execution`, if this machine may run them; docs/evaluation.md has the limits",
    )
