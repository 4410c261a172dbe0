"""SIGKILL at random times, until the merge is done; again and again. Every output must be the uninterrupted one's.

    python tests/crash/kills.py [--kills 60] [--method ties] [--scale 160m] [--seed 0]

Also counts what is done again: at most what was not committed, which is the tensors in work and 64 MB.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from contenders import Setting, save_recipe
from measure import digests
from models import build, save_texts

from lowmem_aim.output import PRIVATE
from lowmem_aim.status import status_of

ATTEMPTS = 400  # for one merge: none should need so many


def main() -> int:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    setting = Setting(build(options.scale, work), work)
    texts = work / "few.jsonl"
    save_texts(texts, 4, 64, 500)
    aim = ["--omega", "0.4", "--calibration", str(texts), "--no-cache", "--calibration-dtype", "float32"]
    command = [sys.executable, "-m", "lowmem_aim", "merge", str(save_recipe(options.method, setting))]
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    started = time.monotonic()
    subprocess.run([*command, str(whole), *aim, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - started
    expected = digests(whole)
    print(f"uninterrupted: {took:.1f} s, {len(expected)} files")
    draw, kills, rounds, wrong = random.Random(options.seed), 0, 0, 0
    while kills < options.kills:
        out = work / f"out-{rounds}"
        shutil.rmtree(out, ignore_errors=True)
        found, log = _until_done([*command, str(out), *aim, "--quiet"], out, draw, took)
        kills, rounds = kills + found, rounds + 1
        same = digests(out) == expected
        wrong += not same
        print(
            f"merge {rounds}: {found} kills, {'the same bytes' if same else 'OTHER BYTES'}; finished at: {log}",
            flush=True,
        )
        shutil.rmtree(out)
    print(f"{kills} kills in {rounds} merges, {wrong} of them with other bytes")
    return int(wrong > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--scale", default="160m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("crash-run"))
    return parser.parse_args()


def _until_done(command: list[str], out: Path, draw: random.Random, took: float) -> tuple[int, str]:
    """(how often it was killed, tensors that were finished after each kill)."""
    progress: list[int] = []
    for kills in range(ATTEMPTS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, err = process.communicate(timeout=draw.uniform(0, took * 1.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            _check_unfinished(out)
            now = status_of(out).tensors if (out / PRIVATE).is_dir() else 0
            if progress and now < progress[-1]:
                raise SystemExit(f"finished tensors were lost: {progress[-1]}, then {now}") from None
            progress.append(now)
            continue
        if process.returncode:
            raise SystemExit(f"after {kills} kills it ended with {process.returncode}:\n{err}")
        return kills, " ".join(map(str, progress))
    raise SystemExit(f"it was not done after {ATTEMPTS} attempts")


def _check_unfinished(out: Path) -> None:
    """config.json is there only if all the rest is."""
    if (out / "config.json").exists() and not (out / "model.safetensors").exists():
        raise SystemExit("a killed run left a config.json beside no weights")


if __name__ == "__main__":
    sys.exit(main())
