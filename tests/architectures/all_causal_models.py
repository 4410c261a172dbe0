"""Merge + AIM of every causal language model that transformers has, against a plain computation.

    python tests/architectures/all_causal_models.py [MODEL_TYPE ...]

Each is built tiny, by a shrunk config, and two experts of it are merged with ties and AIM in float32. The result is
compared tensor by tensor with `tests/plain.py`. Each runs in a forked process, under limits of time and memory.
The exit code is 1 if any result is wrong, or worse than docs/architectures.md says; otherwise the page is written anew.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import shrinking  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from small_merges import merged_and_compared  # noqa: E402
from workers import Result, in_processes  # noqa: E402


def main() -> int:
    chosen = sys.argv[1:] or shrinking.model_types()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="architectures-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        for result in in_processes(check, chosen, Path(scratch)):
            results.append(result)
            print(f"{result.model_type:28} {result.outcome:8} {result.text}", flush=True)
    known = tables.documented()
    worse = [problem for result in results for problem in tables.worse_than_documented(result, known)]
    if not worse:
        tables.write(results)
    print("\n".join(["", tables.summary(results), *worse]))
    return 1 if worse else 0


def check(model_type: str, folder: Path) -> tuple[str, str]:
    """The outcome for one model type, and a text about it."""
    found = merged_and_compared(model_type, folder)
    return found.kind, found.text


if __name__ == "__main__":
    sys.exit(main())
