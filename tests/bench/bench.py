"""The benchmark: the same recipes through this tool and mergekit, in turn, with the disk's own limit beside them.

    python tests/bench/bench.py [--scale 1b] [--methods ties ...] [--only ours] [--repeats 3]

Needs Linux (memory is read from /proc), a quiet machine, and for scale 1b 20 GB of disk. Builds its models itself.
Results go into docs/benchmarks/results.json, scale by scale and method by method, so that runs add up; the table and
the chart in docs/performance.md are drawn from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))

import contenders
import measure
import report
from contenders import FURTHER, METHODS, ROOT, Setting
from measure import Cost
from models import SCALES, build, model_bytes, save_texts

SLOW_SECONDS = 60  # a contender that takes longer runs `--slow-repeats` times
BLOCK = 512


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    measure.PATIENCE_SECONDS = options.patience
    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    results["machine"] = _machine()
    tool = contenders.install_mergekit(options.work.resolve()) if "mergekit" in options.only else None
    for scale in options.scale:
        setting = Setting(build(scale, options.work.resolve()), options.work.resolve())
        found = results.setdefault("scales", {}).setdefault(scale, {})
        if "calibration" in options.only:
            found["calibration"] = _calibrations(setting, options)
            _save(results, options)
        for method in options.methods:
            found.setdefault("methods", {}).setdefault(method, {}).update(_merges(method, setting, tool, options))
            _save(results, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", nargs="+", choices=SCALES, default=["1b"])
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *FURTHER], default=list(METHODS))
    parts = ("ours", "aim", "mergekit", "disk", "calibration")
    parser.add_argument("--only", nargs="+", choices=parts, default=["ours", "aim", "mergekit", "disk"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait until nothing else runs")
    parser.add_argument("--slow-repeats", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=121, help="calibration: blocks of 512 tokens")
    parser.add_argument("--dtype", default="float32", help="calibration: of the forward passes")
    parser.add_argument("--work", type=Path, default=Path("bench-run"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "results.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    return parser.parse_args()


def _merges(method: str, setting: Setting, tool: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    experts = contenders.experts_of(method, setting)
    based = contenders.KNOWN[method].base in ("required", "optional")
    models = [setting.base, *experts] if based else experts
    size = model_bytes(setting.base)
    ways: dict[str, Callable[[], Cost]] = {}
    if "ours" in options.only:
        ways["ours"] = lambda: contenders.ours(method, setting)
    if "mergekit" in options.only and tool is not None and method != "widen":  # which it lacks
        ways["mergekit"] = lambda: contenders.mergekit(method, setting, tool)
    if "aim" in options.only and based:
        activations = _activations(setting)
        ways["aim"] = lambda: contenders.ours(method, setting, activations)
    if "disk" in options.only:
        ways["disk"] = lambda: contenders.disk(setting, models, size)
    return _in_turn(ways, options, method)


def _in_turn(ways: dict[str, Callable[[], Cost]], options: argparse.Namespace, label: str) -> dict[str, Any]:
    """A B C A B C ...: each way's runs and their medians."""
    runs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(options.repeats):
        for name, way in ways.items():
            if turn >= options.slow_repeats and runs[name][0].wall > SLOW_SECONDS:
                continue
            cost = way()
            runs[name].append(cost)
            print(f"{label:16} {name:10} {cost.as_dict()}", flush=True)
    return {name: _summary(costs) for name, costs in runs.items()}


def _summary(costs: list[Cost]) -> dict[str, Any]:
    medians = {key: statistics.median(getattr(c, key) for c in costs) for key in ("wall", "cpu")}
    peaks = {key: max(getattr(c, key) for c in costs) for key in ("anonymous", "resident")}
    return {**medians, **peaks, "runs": [cost.as_dict() for cost in costs]}


def _activations(setting: Setting) -> Path:
    """A short calibration of the base, made once: what it says does not matter for the time it takes to apply."""
    file = setting.models / "activations.safetensors"
    if not file.is_file():
        texts = setting.models / "few.jsonl"
        save_texts(texts, 1, 64, 500)
        contenders.calibrate(setting, texts, "bfloat16", file)
    return file


def _calibrations(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    texts, out = setting.scratch / "texts.jsonl", setting.scratch / "calibration.safetensors"
    vocabulary = json.loads((setting.base / "config.json").read_text())["vocab_size"]
    save_texts(texts, options.blocks, BLOCK, vocabulary)

    def ours() -> Cost:
        out.unlink(missing_ok=True)
        return contenders.calibrate(setting, texts, options.dtype, out)

    ways = {
        "ours": ours,
        "whole model": lambda: contenders.whole_model_calibration(setting, texts, options.dtype),
    }
    return {"blocks": options.blocks, "dtype": options.dtype, **_in_turn(ways, options, "calibration")}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mergekit": contenders.mergekit_version(),
    }


def _save(results: dict[str, Any], options: argparse.Namespace) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    report.draw(results, options.page, options.output.with_name("chart.svg"))


if __name__ == "__main__":
    main()
