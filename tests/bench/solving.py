"""Merges that solve: wall time, the shares of its parts, and peak memory, under a budget.

    python tests/bench/solving.py [--scale 1b] [--layers 4] [--methods covariance regmean] [--ram 2GB] [--experts 2]

A base and three experts of random numbers, bfloat16, on the CPU; for methods with texts 4 of 256 tokens an expert.
Prints the rows of the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import yaml
from measure import Cost, cost_of
from models import EXPERTS, SCALES, build, save_texts

METHODS = ("covariance", "regmean", "regmean_plus")
TEXTS, TOKENS = 4, 256
PARTS = {"moments": "added to the moments", "factors": "factorised", "rows": "rows solved", "texts": "texts run"}


def main() -> None:
    options = _options()
    if options.timed:
        _timed(options.timed, by_texts=options.methods != ["covariance"])
        return
    measure.PATIENCE_SECONDS = options.patience
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    models = build(options.scale, work, options.layers)
    save_texts(work / "solving.jsonl", TEXTS, TOKENS, SCALES[options.scale].vocabulary)
    print(
        f"| {options.scale}, --ram | layers | wall s | CPU s | {' | '.join(PARTS.values())} | file MB | anonymous MB |"
    )
    print("|" + "---|" * (len(PARTS) + 6))
    for method in options.methods:
        for ram in options.ram:
            print(_row(method, ram, *_cost(method, models, options, ram)), flush=True)
    print(f"load before and after: {options.load:.1f}, {os.getloadavg()[0]:.1f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="1b")
    parser.add_argument("--layers", type=int, help="default: all of the scale")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:2]))
    parser.add_argument("--ram", nargs="+", default=["2GB"])
    parser.add_argument("--experts", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait until nothing else runs")
    parser.add_argument("--work", type=Path, default=Path("bench-run"))
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(load=os.getloadavg()[0])
    return parser.parse_args()


def _cost(method: str, models: Path, options: argparse.Namespace, ram: str) -> tuple[int, Cost, dict[str, Any]]:
    """The layers that were merged, what that cost, and its parts."""
    work = options.work.resolve()
    recipe, out, found = work / f"{method}.yml", work / "out-solved", work / "parts.json"
    experts = [{"model": str(models / name)} for name in EXPERTS[: options.experts]]
    if method != "covariance":
        experts = [expert | {"calibration": str(work / "solving.jsonl")} for expert in experts]
    asked: dict[str, Any] = {"merge_method": method, "base_model": str(models / "base"), "models": experts}
    if method != "covariance":
        asked["solve"] = {"block_size": TOKENS}
    recipe.write_text(yaml.safe_dump({**asked, "dtype": "bfloat16"}))
    shutil.rmtree(out, ignore_errors=True)
    command = ["merge", str(recipe), str(out), "--ram", ram, "--device", "cpu", "--quiet"]
    timed = [sys.executable, __file__, "--methods", method, "--timed", str(found), *command]
    cost = cost_of(timed, work / "log.txt")
    if cost.exit_code:
        raise SystemExit(f"{' '.join(command)} ended with {cost.exit_code}:\n{(work / 'log.txt').read_text()[-2000:]}")
    shutil.rmtree(out)
    layers = json.loads((models / "base" / "config.json").read_text())["num_hidden_layers"]
    return layers, cost, json.loads(found.read_text())


def _row(method: str, ram: str, layers: int, cost: Cost, found: dict[str, float]) -> str:
    shares = " | ".join(f"{found.get(part, 0.0) / cost.wall:.0%}" for part in PARTS)
    sizes = f"{found['file'] / 1e6:,.0f} | {cost.anonymous / 1e6:,.0f}"
    return f"| {method}, {ram} | {layers} | {cost.wall:.0f} | {cost.cpu:.0f} | {shares} | {sizes} |"


# --- the process that is measured -------------------------------------------------------------------------------------


def _timed(arguments: list[str], *, by_texts: bool) -> None:
    """Run a command of this tool, and write to the file named first how many seconds each part took."""
    from lowmem_aim.cli.main import main as command
    from lowmem_aim.methods import solved, systems
    from lowmem_aim.methods.moments import Moment
    from lowmem_aim.system.tensor_store import TensorStore

    found, workers, stores = Counter[str](), os.cpu_count() or 1, list[TensorStore]()
    inside = threading.local()

    def time_of(owner: Any, name: str, part: str, threads: int = 1) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **given: Any) -> Any:
            outer, inside.part = getattr(inside, "part", None), part
            begun = time.perf_counter()
            try:
                return work(*args, **given)
            finally:
                inside.part = outer
                seconds = (time.perf_counter() - begun) / threads
                found[part] += seconds
                if outer:  # its own time is what is left
                    found[outer] -= seconds

        setattr(owner, name, measured)

    time_of(Moment, "add", "moments")
    time_of(systems.System, "__init__", "factors")
    time_of(solved.Solution, "of", "rows", workers)
    if by_texts:  # else without transformers
        from lowmem_aim.solving.expert_moments import ExpertMoments

        time_of(ExpertMoments, "come_to", "texts")
    opened = TensorStore.__init__

    def noted(self: TensorStore, *args: Any, **given: Any) -> None:
        opened(self, *args, **given)
        stores.append(self)

    TensorStore.__init__ = noted  # type: ignore[method-assign]
    sys.argv = ["lowmem-aim", *arguments[1:]]
    try:
        command()
    finally:
        found["file"] = max((store.file_bytes for store in stores), default=0)
        Path(arguments[0]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
