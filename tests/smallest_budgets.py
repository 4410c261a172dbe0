"""A program: merges with the smallest budgets that are accepted, and the peaks they reach, as lines of JSON.

    python tests/smallest_budgets.py FOLDER METHOD:READ ...

FOLDER holds the models `base`, `one` and `two`. The smallest budget is the one that a refusal names. Several methods,
as `ties+dare_ties:mmap`, are merged in one reading of the models; `regmean/both:mmap` is relaxed by AIM and ACM.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from merge_cases import recipe

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.events import silent
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.merge_many import merge_many
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe, Solve
from lowmem_aim.system.memory import anonymous_bytes
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import reported

PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"weight": ("0.3",), "density": ("0.4",), "parameter": ("rescale=true",)}
}


class Peak:
    """The most anonymous memory of this process during a `with` block, looked at every millisecond."""

    def __enter__(self) -> Peak:
        self.nbytes, self._over = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.nbytes = max(self.nbytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def experts_of(method: str) -> tuple[str, ...]:
    names = ("one",) if METHODS[method].most == 1 else ("one", "two")
    return tuple(f"{name}=builtin" for name in names) if METHODS[method].texts else names


def asked(folder: Path, method: str, *relaxed: str) -> Recipe:
    plain = recipe(folder, method, experts_of(method), **PARAMETERS.get(method, {}))
    if not relaxed:
        return plain
    texts = folder / "texts.txt"
    texts.write_text("A few words: counting pairs of logits takes its time.")
    return replace(plain, aim=Aim(calibration=str(texts)), acm=Acm(calibration=str(texts)), solve=Solve(samples=4))


def merged(recipes: dict[str, Recipe], out: Path, options: Options) -> None:
    if len(recipes) == 1:
        merge(next(iter(recipes.values())), out, options)
        return
    with reported("merge", out, silent) as feed:
        merge_many(recipes, out, options, feed)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[1]) / "out"
    for case in sys.argv[2:]:
        methods, read = case.split(":")
        made = {method: asked(folder, *method.split("/")) for method in methods.split("+")}
        with pytest.raises(MemoryBudgetError) as refused:
            merged(made, out, Options(ram=1, read=read))  # type: ignore[arg-type]
        named = re.search(r"--ram (\d+)MB", refused.value.hint)
        assert named, refused.value.hint
        budget = int(named[1]) * 10**6
        with Peak() as peak:
            merged(made, out, Options(ram=budget, read=read))  # type: ignore[arg-type]
        shutil.rmtree(out)
        print(json.dumps({"case": case, "budget": budget, "peak": peak.nbytes}), flush=True)


if __name__ == "__main__":
    main()
