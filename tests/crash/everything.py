"""Every proof: one line each, with its figures; ends with 1 if one fails.

    python tests/crash/everything.py [--short] [--work crash-run] [name ...]

Those that are named run in turn in this process; else all of them, each in a process of its own, two at a time.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from crash.workshop import Job, make_job

SUITES = (
    "kills",
    "kills_at_calls",
    "calibration_calls",
    "solving_kills",
    "many_merges",
    "power_loss",
    "failing_calls",
    "full_disk",
    "flipped_bits",
    "damaged_journal",
    "other_versions",
    "spoilt_shards",
    "changed_inputs",
    "changed_afterwards",
    "memory_cap",
    "clock_jumps",
    "evaluations",
    "sweeps",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--work", type=Path, default=Path("crash-run"))
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        print("skipped: forks, strace and /proc are Linux's")
        return 0
    if options.names:
        job = make_job(options.work.resolve() / "tiny")
        passed = [_passes(name, job, options.short) for name in options.names]
    else:
        with ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(lambda name: _passes_apart(name, options), SUITES))
    return int(not all(passed))


def _passes_apart(name: str, options: argparse.Namespace) -> bool:
    command = [sys.executable, __file__, name, "--work", str(options.work / name), *["--short"] * options.short]
    return subprocess.run(command).returncode == 0


def _passes(name: str, job: Job, short: bool) -> bool:
    started = time.monotonic()
    try:
        line, good = importlib.import_module(f"crash.{name}").suite(job, short), True
    except Exception:
        line, good = traceback.format_exc(), False
    print(f"{'ok' if good else 'FAILED'} {name}: {line} ({time.monotonic() - started:.0f} s)", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
