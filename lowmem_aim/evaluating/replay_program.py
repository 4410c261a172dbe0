"""The program of the process that scores tasks which run what the model has written: the answers are given, not asked.

On standard input: what is asked for, and the answers, see `replay`. On standard output: {"scores": {task: {"value",
"stderr", "metric", "n"}}}. A failure is the last line of standard error, and an exit code that is not 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.system.confinement import cannot_confine, confine
from lowmem_aim.system.process_limits import end_with_parent, leave_network, limit_for_good

_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/etc", "/proc", "/sys")
_DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")  # and no disks, which root could read
# After an item was told to end, in case its program goes on. Long, so that the task is not told while it looks at that.
_AGAIN_SECONDS = 10


def main() -> None:
    """Score the tasks.

    The arguments: the id of the parent, bytes of memory and of a file, processor seconds, and seconds for a text.
    """
    parent, memory, file_bytes, seconds, seconds_each = map(int, sys.argv[1:])
    results = os.fdopen(os.dup(1), "w")
    given = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    leave_network()  # while there is one thread
    end_with_parent(parent)
    limit_for_good(memory, file_bytes, seconds)
    if not cannot_confine():  # the caches of data sets have locks
        confine(["/"], [*_writable(), os.environ["HF_HUB_CACHE"], os.environ["HF_DATASETS_CACHE"]])
    try:
        scores = _scores(given["asked"], given["answers"], seconds_each)
    except LowmemAimError as error:
        sys.exit("; ".join(error.problems))
    except (Exception, SystemExit) as error:  # whatever a task raises, or a program in its place
        sys.exit(f"{type(error).__name__}: {str(error).strip()}".replace("\n", " "))
    print(json.dumps({"scores": scores}), file=results, flush=True)
    os._exit(0)  # whatever threads or handlers the programs have left


def _scores(table: Mapping[str, Any], answers: Mapping[str, Sequence[Any]], seconds_each: int) -> dict[str, Any]:
    from lowmem_aim.evaluating import tasks
    from lowmem_aim.evaluating.unsafe_tasks import uses_code_eval

    tasks.quiet()
    import datasets

    from lowmem_aim.evaluating.harness import scored
    from lowmem_aim.evaluating.replayed_model import ReplayedModel

    datasets.disable_caching()  # of items as a task changes them: that cache cannot be reached later on
    folders = [Path(folder) for folder in table["folders"]]
    asked = tasks.Asked(**{**table, "names": tuple(table["names"]), "folders": tuple(folders)})
    loaded = tasks.loaded(asked)
    os.chdir(tempfile.gettempdir())  # not before: the files of tasks may name others by relative paths
    if not cannot_confine():
        confine([*sys.path, sys.prefix, sys.base_prefix, *_FOLDERS, *_DEVICES, *folders], _writable())
    for task in loaded.tasks["tasks"].values():
        if not uses_code_eval(task):  # whose programs have a limit each
            task.process_results = _within(seconds_each * int(task.get_config("repeats") or 1), task.process_results)
    found = scored(ReplayedModel(answers), loaded, asked)
    return {
        name: {"value": score.value, "stderr": score.stderr, "metric": score.metric, "n": score.n}
        for name, score in found.items()
    }


def _writable() -> list[str]:
    return [tempfile.gettempdir(), os.devnull]


def _within(seconds: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a TimeoutError raised in it once its time is over, and again until it ends."""

    def ended(*_: Any) -> None:
        raise TimeoutError(f"an item takes more than {seconds} seconds")

    def timed(*given: Any) -> Any:
        signal.signal(signal.SIGALRM, ended)
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
        try:
            return function(*given)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    return timed


if __name__ == "__main__":
    main()
