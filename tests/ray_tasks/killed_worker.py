"""A sweep on Ray's workers, one of which is killed while it works: the scores of a sweep without Ray.

    python tests/ray_tasks/killed_worker.py [PYTHON]        `make test-ray`

Two workers of this machine make the points of a grid. Once a worker holds the lock of a point, it is ended by SIGKILL;
Ray starts its task again, which resumes. The sweeps run in an environment of their own, which is made from the package
index and sees the packages of this one (or in PYTHON's). Ends with 1 if a score differs, or if nothing was killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent)]

import tiny  # noqa: E402

RAY = "ray==2.60.0"
DEADLINE_SECONDS = 600
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
GRID = ("--methods", "ties,task_arithmetic", "--omega", "0.2,0.5", "--no-controls")


def prepared(work: Path) -> None:
    """Models, a recipe, texts and a task, in `work`."""
    base = tiny.build("llama", work / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        tiny.perturbed(base, work / name, scale=0.05, seed=seed)
    items = [{"q": f"{a} + {b} =", "choices": [str(a + b), str(a)], "label": 0} for a in range(8) for b in range(1, 9)]
    (work / "tasks").mkdir()
    (work / "tasks" / "sums.jsonl").write_text("\n".join(map(json.dumps, items)))
    (work / "tasks" / "sums.yaml").write_text(TASK.replace("FOLDER", str(work / "tasks")))
    models = [{"model": name} for name in ("math", "code")]
    recipe = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"weight": 1}}
    (work / "recipe.yml").write_text(json.dumps(recipe))
    (work / "texts.txt").write_text("one two three four five six seven\n" * 20)


def sweep(work: Path, python: str, out: str, *more: str) -> subprocess.Popen[bytes]:
    """A sweep that has begun, with a cache of its own: no score comes from another one."""
    words = ["sweep", "recipe.yml", out, *GRID, "--tasks", "sums", "--include-path", "tasks", "--device", "cpu"]
    texts = [
        "--calibration",
        "texts.txt",
        "--samples",
        "8",
        "--block-size",
        "32",
        "--threads",
        "1",
        "--format",
        "plain",
    ]
    own = {"XDG_CACHE_HOME": str(work / f"cache-{out}"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "lowmem_aim", *words, *texts, *more]
    return subprocess.Popen(command, cwd=work, env=os.environ | own)


def kill_a_worker(driver: subprocess.Popen[bytes], out: Path) -> str:
    """Wait until a worker of Ray holds the lock of a point whose merge has begun; kill it, and name the point."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while driver.poll() is None and time.monotonic() < deadline:
        for process in psutil.Process(driver.pid).children(recursive=True):
            if (point := _held_by(process)) and (out / "models" / point).is_dir():
                process.kill()
                return point
        time.sleep(0.01)
    return ""


def _held_by(process: psutil.Process) -> str:
    try:
        if not process.name().startswith("ray::"):
            return ""
        files = [Path(file.path) for file in process.open_files()]
    except psutil.Error:  # it has ended meanwhile
        return ""
    return next((file.stem for file in files if file.suffix == ".lock" and file.stem != "lock"), "")


def scores(out: Path) -> dict[str, Any]:
    """The scores of all points, by name."""
    return {file.stem: json.loads(file.read_text())["scores"] for file in sorted((out / "scores").glob("*.json"))}


def environment(work: Path) -> str:
    """A Python with Ray and all packages of this one."""
    print(f"making an environment with {RAY}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
    python = work / "venv" / "bin" / "python"
    (own,) = (work / "venv").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (own / "seen.pth").write_text("\n".join(seen) + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", RAY], check=True)
    return str(python)


def main() -> int:
    """Compare the two sweeps; 1 if they differ."""
    with tempfile.TemporaryDirectory(prefix="ray-tasks-") as folder:
        work = Path(folder)
        prepared(work)
        python = sys.argv[1] if len(sys.argv) > 1 else environment(work)
        if sweep(work, sys.executable, "alone").wait(DEADLINE_SECONDS):
            return 1
        driver = sweep(work, python, "by-ray", "--ray", "local")
        killed = kill_a_worker(driver, work / "by-ray")
        code = driver.wait(DEADLINE_SECONDS)
        alone, by_ray = scores(work / "alone"), scores(work / "by-ray")
        print(f"\nkilled while it made {killed or 'nothing'}; the sweep ended with {code}; {len(by_ray)} points")
        differing = [name for name in alone if alone[name] != by_ray.get(name)]
        print(f"other scores: {', '.join(differing) or 'none'}")
        return int(bool(differing or code or not killed or alone.keys() != by_ray.keys()))


if __name__ == "__main__":
    sys.exit(main())
