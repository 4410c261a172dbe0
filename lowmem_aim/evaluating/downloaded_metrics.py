"""Metrics that the library `evaluate` would download as code, and run in this process: none is.

`code_eval` has ours in its place; tasks that ask for another one are refused. Some ask when they are loaded, others
only when they score: what these are scored by is looked through for it, without being run.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.code_scoring import CodeEval

OURS = "code_eval"
_ASKED = re.compile(r"\bevaluate\s*\.\s*load\(\s*[\"']([^\"']+)[\"']")


@contextlib.contextmanager
def nothing_downloaded() -> Iterator[None]:
    """Give whoever asks the library `evaluate` for `code_eval` in this block ours, and for anything else an error."""
    import evaluate

    load = evaluate.load

    def ours(path: str, *_: Any, **__: Any) -> CodeEval:
        if path == OURS:
            return CodeEval()
        raise refusal("a task", path)

    evaluate.load = ours
    try:
        yield
    finally:
        evaluate.load = load


def refusal(who: str, metric: str) -> UsageError:
    """The error for a task whose metric would be downloaded."""
    return UsageError(
        f"{who} is scored by `{printable(metric)}`, which would be downloaded as code and run here",
        hint="leave it out of `--tasks`: nothing that is downloaded is run",
    )


def scored_by_downloads(tasks: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for each such metric of loaded tasks, in their files or in what they are scored by."""
    for name, task in tasks.items():
        asked = asked_by(task) - {OURS}
        if getattr(getattr(task, "config", None), "process_results", None) is None:
            # The harness has none of that name, and was given none when it asked the library.
            asked |= {metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None}
        yield from (refusal(f"the task `{printable(name)}`", metric) for metric in sorted(asked))


def asked_by(task: Any) -> set[str]:
    """The metrics that the functions which score a loaded task ask the library for."""
    return {metric for function in functions_of(task) for metric in _asked_for(function, set())}


def functions_of(task: Any) -> Iterator[Callable[..., Any]]:
    """The functions that score a task: those of its file, its metrics, and those of a class of its own."""
    config = vars(task.config).values() if getattr(task, "config", None) is not None else ()
    lists = (getattr(task, name, {}).values() for name in ("_metric_fn_list", "_aggregation_list"))
    own = vars(type(task)).values() if not type(task).__module__.startswith("lm_eval.api.") else ()
    for value in (*config, *(value for values in lists for value in values), *own):
        function = inspect.unwrap(getattr(value, "func", value))  # of a partial
        if inspect.isfunction(function):
            yield function


def _asked_for(function: Any, seen: set[Any]) -> Iterator[str]:
    """The metrics that a function, or one of its module that it calls, asks the library for."""
    if function in seen:
        return
    seen.add(function)
    with contextlib.suppress(OSError, TypeError):  # its text is not to be had
        yield from _ASKED.findall(inspect.getsource(function))
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if inspect.isfunction(called) and called.__module__ == function.__module__:
            yield from _asked_for(called, seen)
