"""SIGKILL to a sweep, at ten moments from start to end: the same scores, report and recipes, byte by byte."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from crash.evaluations import import_harness, save_tasks
from crash.workshop import EXPERTS, Ended, Job, at_call, build_models, emptied, ended, start

from lowmem_aim.measuring import snapshots
from lowmem_aim.output.folder import PRIVATE

FEW = slice(3, None, 4)  # one in a merge, one when scores are there


def suite(job: Job, short: bool) -> str:
    work = emptied(job.work.parent / "sweeps")
    build_models(work, num_hidden_layers=2)
    save_tasks(work / "tasks")
    models = [{"model": str(work / name), "parameters": {"weight": 1, "density": 0.5}} for name in EXPERTS]
    recipe = {"merge_method": "ties", "base_model": str(work / "base"), "models": models}
    (work / "recipe.yml").write_text(yaml.safe_dump(recipe | {"aim": {"calibration": "builtin", "samples": 2}}))
    snapshots.SECONDS = 0.0  # every block is kept
    import_harness()
    done = attempt(work, lambda: None)
    assert done.code == 0, done
    expected, moments = files_in(work / "out"), kills()[FEW if short else slice(None)]
    for told, kill in moments:
        emptied(work / "out")
        emptied(work / "cache")
        killed = attempt(work, kill)
        assert killed.code == -signal.SIGKILL, f"{told}: {killed}"
        assert not (work / "out" / "report").exists() or "report" in told, told
        finished = attempt(work, lambda: None)
        assert finished.code == 0, f"{told}: {finished}"
        assert files_in(work / "out") == expected, f"killed {told}: another result"
    return f"{len(moments)} kills ({'; '.join(told for told, _ in moments)}): the same result"


def attempt(work: Path, before: Callable[[], object]) -> Ended:
    """Run the command in a fork that leads a process group; `before` prepares that process for its trouble."""

    def prepare() -> None:
        os.setsid()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        before()

    command = ["sweep", str(work / "recipe.yml"), str(work / "out"), "--methods", "ties,dare_linear", "--omega", "0.4"]
    tasks = ["--tasks", "choice,flow", "--include-path", str(work / "tasks")]
    return ended(*start([*command, *tasks, "--ram", "4GB", "--quiet"], prepare))


def files_in(out: Path) -> dict[str, str]:
    """Path -> sha256 of each file of the result; what differs from run to run lies in folders of its own."""
    files = [file for file in out.rglob("*") if file.is_file() and PRIVATE not in file.relative_to(out).parts]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def kills() -> list[tuple[str, Callable[[], object]]]:
    """Ten moments of a sweep, in order, and what kills the process group then."""
    from lowmem_aim.jobs import evaluate, sweep
    from lowmem_aim.output.shards import Shards
    from lowmem_aim.output.sweep_folder import SweepFolder

    def at(owner: Any, name: str, number: int, after: bool = False) -> Callable[[], object]:
        return lambda: at_call(owner, name, number, lambda: os.killpg(0, signal.SIGKILL), after=after)

    return [
        ("before the recipes are noted", at(SweepFolder, "note", 2)),
        ("between two experts", at(evaluate, "write_scores", 1, True)),
        ("before anything is merged", at(sweep, "merge_many", 1)),
        ("in the merge", at(Shards, "tensor_done", 40)),
        ("when all is merged", at(sweep, "merge_many", 1, True)),
        ("before a point's scores are written", at(evaluate, "write_scores", 4)),
        ("when they are", at(evaluate, "write_scores", 4, True)),
        ("when a model is removed", at(SweepFolder, "remove_model", 1, True)),
        ("before the report is written", at(sweep, "write_report", 1)),
        ("when the report is there", at(sweep, "write_report", 1, True)),
    ]
