"""Log-likelihoods of a 1.1B model: `lowmem-aim evaluate` under 1 GB against the harness with the model in memory.

    python tests/bench/evaluating.py [--requests 500] [--repeats 2]

Requests of 30 to 80 tokens, bfloat16 on both sides, as many threads, one text at a time; imports and loading count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Cost, cost_of
from models import build

HERE = Path(__file__).parent
RAM = "1GB"
IMPORTS = "import datasets, torch, transformers, lm_eval.evaluator, lm_eval.tasks, lm_eval.models.huggingface"
TASK = """
task: requests
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: context
doc_to_target: continuation
metric_list: [{metric: acc}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("bench-run"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = build("1b", options.work.resolve()) / "base"
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        tasks = Path(folder).resolve()
        _save_task(tasks, model, options.requests)
        runs: dict[str, list[Cost]] = {"ours": [], "harness": []}
        for _ in range(options.repeats):
            for name, costs in runs.items():
                costs.append(_cost(name, model, tasks))
                print(f"{name:8} {costs[-1].as_dict()}", flush=True)
        found = {name: json.loads((tasks / f"{name}.json").read_text()) for name in runs}
    ours, harness = (statistics.median(cost.wall for cost in costs) for costs in runs.values())
    cpu = [statistics.median(cost.cpu for cost in costs) for costs in runs.values()]
    peaks = [max(cost.anonymous for cost in costs) / 1e9 for costs in runs.values()]
    print(f"wall: {ours:.0f} s against {harness:.0f} s, {ours / harness:.2f} times")
    print(f"CPU: {cpu[0]:.0f} s against {cpu[1]:.0f} s, {cpu[0] / cpu[1]:.2f} times; load {os.getloadavg()[1]:.1f}")
    print(f"peak anonymous memory: {peaks[0]:.2f} GB (allowed: {RAM}) against {peaks[1]:.2f} GB")
    print(f"of that, the imports of torch, transformers and the harness: {_imports():.2f} GB")
    print(f"accuracy: {found['ours']['scores']['requests']['value']} against {found['harness']}")


def _imports() -> float:
    """GB of anonymous memory of a program that only imports what the harness needs."""
    code = f"{IMPORTS}; print(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[1]) * 1024 / 1e9


def _save_task(folder: Path, model: Path, requests: int) -> None:
    rng = random.Random(0)
    count = json.loads((model / "config.json").read_text())["vocab_size"]
    rows = []
    for _ in range(requests):
        words = [f"w{rng.randrange(3, count)}" for _ in range(rng.randint(30, 80))]  # a token each
        rows.append({"context": " ".join(words[:-3]), "continuation": " " + " ".join(words[-3:])})
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "requests.yaml").write_text(TASK.replace("FILE", str(folder / "requests.jsonl")))


def _cost(name: str, model: Path, tasks: Path) -> Cost:
    out = tasks / f"{name}.json"
    out.unlink(missing_ok=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    if name == "ours":
        asked = ["--tasks", "requests", "--include-path", str(tasks), "--ram", RAM, "--no-cache", "--quiet"]
        command = [sys.executable, "-m", "lowmem_aim", "evaluate", str(model), *asked, "-o", str(out)]
    else:
        command = [sys.executable, str(HERE / "whole_model_evaluation.py"), str(model), str(tasks), str(out)]
    cost = cost_of(command, tasks / "log.txt")
    if cost.exit_code:
        raise RuntimeError(f"{name} ended with {cost.exit_code}:\n{(tasks / 'log.txt').read_text()[-2000:]}")
    return cost


if __name__ == "__main__":
    main()
