"""Programs that a model has written, tried in processes of their own; and `code_eval`, which the harness asks for.

The library `evaluate` would download `code_eval` as code, which then runs the programs in the process that asks. Here
each program gets a process with an environment of its own (no tokens, another home), an empty folder, no network where
the system allows that, and limits of memory, time and file sizes. All that comes back is whether it passed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.apart import run_apart

MEMORY_BYTES = 4_000_000_000
FILE_BYTES = 100_000_000  # of a file that a program writes
SECONDS = 10
START_SECONDS = 20  # of the process itself, on a busy machine
_LONGEST = 2000  # bytes of what comes back
_PROGRAM = "evaluating.code_program"


@dataclass(frozen=True)
class Tried:
    """The result of a program, as its process gave it."""

    passed: bool = False
    network: str | None = None  # why the program could use the network; "": it could not; None: it never ran


def tried(program: str) -> Tried:
    """Run a program in a process of its own until it ends, or until its time is over. Raises DiskError."""
    limits = (MEMORY_BYTES, FILE_BYTES, SECONDS)
    content = program.encode("utf-8", "replace")
    return checked(run_apart(_PROGRAM, limits, content, SECONDS + START_SECONDS, _LONGEST).results)


def checked(content: bytes) -> Tried:
    """The result that the process has written; of anything else than it may write, a program that has not passed."""
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
    except (ValueError, RecursionError):
        return Tried()
    if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get("network"), str):
        return Tried()
    said = lines[1] if len(lines) == 2 and isinstance(lines[1], dict) else {}
    return Tried(said.keys() == {"passed"} and said["passed"] is True, lines[0]["network"])


def require_processes() -> str:
    """Run a program that does nothing; return why it could use the network, or "". Raises UsageError if it fails."""
    if os.name != "posix":
        raise UsageError("programs that a model writes are run on Linux and macOS alone", "leave these tasks out")
    found = tried("pass")
    if found.network is None or not found.passed:
        raise UsageError("the process that runs what the model writes cannot be started", "leave these tasks out")
    return found.network


class CodeEval:
    """The metric `code_eval` of the library `evaluate`, made anew: the share of programs that pass their tests."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """({"pass@k": mean over all items}, {item: [(number of the program, what it did)]}), as `code_eval` gives.

        `references` has the tests of each item, `predictions` the programs that are to pass them. pass@k is the chance
        that one of k programs passes, estimated from all that there are; it is left out where an item has fewer.
        """
        done = {
            item: [tried(f"{program}\n{tests}").passed for program in programs]
            for item, (programs, tests) in enumerate(zip(predictions, references, strict=True))
        }
        rates = {
            f"pass@{n}": sum(_one_of(n, passed) for passed in done.values()) / len(done)
            for n in k
            if done and all(len(passed) >= n for passed in done.values())
        }
        told = {
            item: [(number, {"passed": passed}) for number, passed in enumerate(all_of)]
            for item, all_of in done.items()
        }
        return rates, told


def _one_of(n: int, passed: Sequence[bool]) -> float:
    """The chance that one of `n` programs, drawn from all, passes."""
    return 1 - math.comb(len(passed) - sum(passed), n) / math.comb(len(passed), n)
