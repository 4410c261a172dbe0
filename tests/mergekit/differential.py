"""Our merges against mergekit's, tensor by tensor: `make test-mergekit`. Ends with 1 if a bound is broken.

float32: a deterministic method differs by 1e-6 of a tensor's largest magnitude at most; a random one keeps the same
share and expects the same sum to three standard errors. bfloat16: our error against the float32 merge of the same
inputs (which the test suite holds to 1e-6 of float64 formulas) is never above mergekit's. What docs/methods.md says of
the differences is checked sentence by sentence (see `sentences`), and each of its options is one that `merge` takes.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]

import tiny  # noqa: E402
from against_peft import adapters  # noqa: E402
from cases import Case, cases, defaults  # noqa: E402
from contenders import install_mergekit  # noqa: E402
from options import options  # noqa: E402
from page import page  # noqa: E402
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
STANDARD_ERRORS = 3.0


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


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


# --- what is compared; each gives what is wrong, or an empty text -----------------------------------------------------


def same_tensors(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Within the case's tolerance, but for as many elements as the case allows."""
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    beyond, worst, where = 0, 0.0, ""
    elements = sum(value.numel() for value in ours.values())
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            return f"`{name}` has the shape {list(value.shape)}, there {list(theirs[name].shape)}"
        difference = (value.double() - theirs[name].double()).abs() / max(float(value.double().abs().max()), 1e-30)
        beyond += int((difference > case.tolerance).sum())
        if float(difference.max()) > worst:
            worst, where = float(difference.max()), name
    return f"{beyond} elements differ, `{where}` by {worst:.1e}" if beyond > case.may_differ * elements else ""


def same_expectation(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor], models: Models) -> str:
    """The same kept share, and the same expected change along the experts' mean delta, to STANDARD_ERRORS."""
    base = models.tensors("base")
    experts = [models.tensors(f"expert-{i}") for i in range(case.experts)]
    kept: list[list[Tensor]] = [[], []]
    along: list[list[Tensor]] = [[], []]
    for name, origin in base.items():
        mean = sum((expert[name] - origin).double() for expert in experts) / len(experts)
        for tool, merged in enumerate((ours, theirs)):
            change = (merged[name].double() - origin.double()).flatten()
            kept[tool].append((change != 0.0).double())
            along[tool].append(change * mean.flatten())
    for what, (a, b) in (("kept share", kept), ("expected change", along)):
        if wrong := _apart(torch.cat(a), torch.cat(b)):
            return f"{what}: {wrong}"
    return ""


def _apart(a: Tensor, b: Tensor) -> str:
    error = math.sqrt(float(a.var() + b.var()) / a.numel())
    distance = abs(float(a.mean() - b.mean()))
    return f"{float(a.mean()):.4g} and {float(b.mean()):.4g}" if distance > STANDARD_ERRORS * error else ""


def error_not_above(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> str:
    """Of all elements together, the root of the mean squared error and the largest."""
    squares, largest = [0.0, 0.0], [0.0, 0.0]
    for name, exact in truth.items():
        for tool, merged in enumerate((ours, theirs)):
            # Some of mergekit's methods store float32 whatever is asked for.
            stored = merged[name].to(ours[name].dtype)
            error = (stored.double() - exact.double()).abs()
            squares[tool] += float((error**2).sum())
            largest[tool] = max(largest[tool], float(error.max()))
    if squares[0] > squares[1] or largest[0] > largest[1]:
        return f"squared error {squares[0]:.3g} against {squares[1]:.3g}, largest {largest[0]:.3g}, {largest[1]:.3g}"
    return ""


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
                wrong = same_expectation(case, ours, theirs, models)
                if wrong:  # by chance one in three hundred is; other masks of ours tell
                    wrong = same_expectation(case, models.ours(folder.with_suffix(".yml"), seed=1), theirs, models)
                yield label, wrong
            else:
                yield label, same_tensors(case, ours, theirs)
    models = Models.build(work, ARCHITECTURES[0], torch.bfloat16, python)
    exactly = [case for case in wanted(cases()) if not case.random]
    for number, (case, ours, folder) in enumerate(models.merged(exactly, "bfloat16")):
        truth_recipe = models.folder / f"truth-{number:03}.yml"
        truth_recipe.write_text(case.recipe(models.folder, "float32"))
        yield f"bfloat16 {case.name}", error_not_above(ours, tensors_in(folder), models.ours(truth_recipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("mergekit-run"), help="mergekit's environment lies in it")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    asked = parser.parse_args()
    work = asked.work
    work.mkdir(exist_ok=True)
    tool = install_mergekit(work)
    if tool is None:
        sys.exit("mergekit could not be installed")
    scratch = Path(tempfile.mkdtemp(dir=work))
    try:
        python = tool.with_name("python").absolute()
        found: list[tuple[str, str]] = []
        if not asked.methods:
            found += [*options(tool), *page(scratch / "page", tool), *sentences(scratch / "sentences", python)]
            found += [*adapters(scratch / "adapters", python), *differences_of_tokens(scratch / "tokens", python)]
            found += stages(scratch / "stages", python)
        found += differences(scratch, python, asked.methods)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    wrong = [(label, problem) for label, problem in found if problem]
    for label, problem in wrong:
        print(f"{label}: {problem}")
    print(f"{len(found)} comparisons, {len(wrong)} outside their bounds")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
