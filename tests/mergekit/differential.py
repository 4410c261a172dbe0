"""Our merges against mergekit's, tensor by tensor: `make test-mergekit`. Ends with 1 if a bound is broken.

float32: a deterministic method differs by 1e-6 of a tensor's largest magnitude at most; a random one keeps the same
share and expects the same sum to three standard errors. bfloat16: our error against the float32 merge of the same
inputs (which the test suite holds to 1e-6 of float64 formulas) is never above mergekit's. What docs/methods.md says of
the differences is checked sentence by sentence (see `sentences`), each of mergekit's options is one that `merge` takes,
and recipes as people publish them are made by both (see `published`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]

import tiny  # noqa: E402
from against_peft import adapters  # noqa: E402
from cases import Case, cases, defaults  # noqa: E402
from comparing import error_not_above, same_expectation, same_tensors, tensors_in  # noqa: E402
from contenders import install_mergekit  # noqa: E402
from modules import modules  # noqa: E402
from options import options  # noqa: E402
from page import page  # noqa: E402
from published import differences as differences_of_recipes  # noqa: E402
from reading_here import read_here  # noqa: E402
from sentences import sentences  # noqa: E402
from stages import stages  # noqa: E402
from tokens import differences as differences_of_tokens  # noqa: E402

from lowmem_aim.jobs.merge import merge  # noqa: E402
from lowmem_aim.recipe.reader import read_recipe  # noqa: E402
from lowmem_aim.recipe.yaml_tree import load_tree  # noqa: E402
from lowmem_aim.system.options import Options  # noqa: E402

# A mixture of experts whose tensors mergekit takes as they are stored; others it fuses before it merges.
ARCHITECTURES = ("llama", "qwen2", "gemma", "gpt2", "gpt_oss")
EXPERTS = 4


@dataclass(frozen=True)
class Models:
    """A base and its experts on disk, and both tools' merges of them."""

    folder: Path
    python: Path  # of mergekit's environment

    @classmethod
    def build(cls, work: Path, architecture: str, dtype: torch.dtype, python: Path) -> Models:
        folder = work / f"{architecture}-{str(dtype).removeprefix('torch.')}"
        base = tiny.build(architecture, folder / "base", dtype=dtype)
        for i in range(EXPERTS):
            tiny.perturbed(base, folder / f"expert-{i}", scale=0.01 * (i + 1), seed=i + 1)
        return cls(folder, python)

    def tensors(self, model: str) -> dict[str, Tensor]:
        return tensors_in(self.folder / model)

    def merged(self, chosen: Sequence[Case], dtype: str) -> Iterator[tuple[Case, dict[str, Tensor], Path]]:
        """(case, our tensors, the folder of mergekit's): it has run all of them before the first comes."""
        recipes = self.folder / f"recipes-{dtype}"
        recipes.mkdir()
        for number, case in enumerate(chosen):
            (recipes / f"{number:03}.yml").write_text(case.recipe(self.folder, dtype))
        subprocess.run([str(self.python), str(HERE / "driver.py"), str(recipes)], check=True, capture_output=True)
        for number, case in enumerate(chosen):
            yield case, self.ours(recipes / f"{number:03}.yml"), recipes / f"{number:03}"

    def ours(self, recipe: Path, seed: int = 0) -> dict[str, Tensor]:
        out = recipe.with_suffix(f".ours-{seed}")
        return tensors_in(merge(read_recipe(load_tree(recipe)), out, Options(use_cache=False, seed=seed)))


# --- the run ----------------------------------------------------------------------------------------------------------


def differences(work: Path, python: Path, methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it)."""

    def wanted(chosen: Sequence[Case]) -> list[Case]:
        return [case for case in chosen if not methods or case.method in methods]

    for architecture in ARCHITECTURES:
        models = Models.build(work, architecture, torch.float32, python)
        chosen = wanted(cases() if architecture == ARCHITECTURES[0] else defaults())
        for case, ours, folder in models.merged(chosen, "float32"):
            label = f"{architecture} float32 {case.name}"
            theirs = tensors_in(folder)
            if not theirs:
                yield label, f"mergekit failed: {folder.with_suffix('.error').read_text().splitlines()[-1]}"
            elif case.random:
                base = models.tensors("base")
                experts = [models.tensors(f"expert-{i}") for i in range(case.experts)]
                wrong = same_expectation(ours, theirs, base, experts)
                if wrong:  # by chance one in three hundred is; other masks of ours tell
                    again = models.ours(folder.with_suffix(".yml"), seed=1)
                    wrong = same_expectation(again, theirs, base, experts)
                yield label, wrong
            else:
                yield label, same_tensors(ours, theirs, case.tolerance, case.may_differ)
    models = Models.build(work, ARCHITECTURES[0], torch.bfloat16, python)
    exactly = [case for case in wanted(cases()) if not case.random]
    for number, (case, ours, folder) in enumerate(models.merged(exactly, "bfloat16")):
        truth_recipe = models.folder / f"truth-{number:03}.yml"
        truth_recipe.write_text(case.recipe(models.folder, "float32"))
        yield f"bfloat16 {case.name}", error_not_above(ours, tensors_in(folder), models.ours(truth_recipe))


def comparisons(tool: Path, scratch: Path, methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it): of these methods, or of everything."""
    python = tool.with_name("python").absolute()
    if not methods:
        yield from options(tool)
        yield from page(scratch / "page", tool)
        yield from sentences(scratch / "sentences", python)
        yield from adapters(scratch / "adapters", python)
        yield from differences_of_tokens(scratch / "tokens", python)
        yield from differences_of_recipes(scratch / "recipes", python)
        yield from stages(scratch / "stages", python)
        yield from modules(scratch / "modules", python)
    yield from differences(scratch, python, methods)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("mergekit-run"), help="mergekit's environment lies in it")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    asked = parser.parse_args()
    read_here()  # hundreds of merges: a child for each takes seconds to import transformers
    work = asked.work
    work.mkdir(exist_ok=True)
    tool = install_mergekit(work)
    if tool is None:
        sys.exit("mergekit could not be installed")
    scratch = Path(tempfile.mkdtemp(dir=work.absolute()))
    made, outside = 0, 0
    try:
        for label, problem in comparisons(tool, scratch, asked.methods):
            made += 1
            if problem:
                outside += 1
                print(f"{label}: {problem}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{made} comparisons, {outside} outside their bounds")
    sys.exit(1 if outside else 0)


if __name__ == "__main__":
    main()
