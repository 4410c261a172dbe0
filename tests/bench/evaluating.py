"""Log-likelihoods of a 1.1B model: `lowmem-aim evaluate` under 1 GB against the harness with the model in memory.

    python tests/bench/evaluating.py [--requests 500] [--repeats 2]

Requests of 30 to 80 tokens, bfloat16 on both sides, as many threads, one text at a time; imports and loading count.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Cost, cost_of
from models import build

HERE = Path(__file__).parent
RAM = "1GB"
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
    peaks = [max(cost.anonymous for cost in costs) / 1e9 for costs in runs.values()]
    print(f"wall: {ours:.0f} s against {harness:.0f} s, {ours / harness:.2f} times")
    print(f"peak anonymous memory: {peaks[0]:.2f} GB (allowed: {RAM}) against {peaks[1]:.2f} GB")
    print(f"accuracy: {found['ours']['scores']['requests']['value']} against {found['harness']}")


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
