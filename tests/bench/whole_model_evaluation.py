"""The accuracy on the task `requests` by the harness itself, the whole model in memory: MODEL TASKS OUT.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    model, tasks, out = sys.argv[1:]
    loaded = TaskManager(include_path=tasks, include_defaults=False).load(["requests"])
    found = evaluate(lm=HFLM(model, device="cpu", dtype="bfloat16", batch_size=1), task_dict=loaded, log_samples=False)
    Path(out).write_text(json.dumps(found["results"]["requests"]["acc,none"]))


main()
