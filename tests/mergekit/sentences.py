"""Each sentence of docs/methods.md, "Where mergekit differs", against both tools: `make test-mergekit` runs it.

A sentence is quoted by its first words and holds if mergekit does what it says of mergekit, and we what it says of us.
Every sentence of that list has a check here; else the run fails, as it does where mergekit has changed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "methods.md"
GRID = 1 / 128  # weights are multiples of it: exact in bfloat16, and their sums and differences in float32
QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
FUSED = "model.layers.0.mlp.experts.down_proj"  # (experts, rows, columns)

Tensors = dict[str, Tensor]
Model = Callable[[str], Tensors]
# The models that sentences need, as `tiny.build` takes them; of the last, `sinks` has one element.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "experts": ("gpt_oss", {}),
    "one head": ("gpt_oss", {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}),
}


@dataclass(frozen=True)
class Result:
    """What a tool made of a recipe: tensors, or the error that it ended with."""

    tensors: Tensors
    error: str = ""


Holds = Callable[[Result, Result, Model], bool]


@dataclass(frozen=True)
class Check:
    """A recipe that shows what a sentence says. `holds` gets our result, theirs, and the models by name."""

    recipe: Mapping[str, Any]
    holds: Holds
    models: str = "llama"


def recipe(method: str, *experts: str, dtype: str = "float32", base: bool = True, **more: Any) -> dict[str, Any]:
    """A recipe; `own` are parameters of every expert, `weights` one for each."""
    own, weights, listed = more.pop("own", {}), more.pop("weights", ()), more.pop("listed", False)
    models = [{"model": "base"}] if listed else []
    for number, expert in enumerate(experts):
        parameters = own | ({"weight": weights[number]} if weights else {})
        models.append({"model": expert} | ({"parameters": parameters} if parameters else {}))
    table: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype}
    table |= {"base_model": "base"} if base else {}
    return table | ({"parameters": more} if more else {})


# --- the models -------------------------------------------------------------------------------------------------------


def build(folder: Path, architecture: str, **changes: Any) -> None:
    """A base and experts with exact deltas, each made for a sentence."""
    tiny.build(architecture, folder / "base", **changes)
    base = {name: _on_grid(value) for name, value in load_file(folder / "base" / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(0)
    a, b = ({n: v + _on_grid(0.05 * torch.randn(v.shape, generator=draw)) for n, v in base.items()} for _ in "ab")
    holed = a[QUERY].clone()
    holed[0, 5] = torch.nan
    made = {
        "base": base,
        "a": a,
        "b": b,
        "c": {n: v + 0.05 * torch.randn(v.shape, generator=draw) for n, v in base.items()},
        "d": {n: v + 0.05 * torch.randn(v.shape, generator=draw) for n, v in base.items()},
        "equal": {n: v + 0.25 for n, v in base.items()},
        "near": {n: v + GRID / 128 * torch.randn(v.shape, generator=draw) for n, v in base.items()},
        "opposite": {n: 2 * v - a[n] for n, v in base.items()},
        "nan": a | {QUERY: holed},
        "without a norm": b | {NORM: torch.zeros_like(b[NORM])},
        "close": {n: v + GRID / 256 * _signs(v, draw) for n, v in base.items()},
        "closer": {n: v + GRID / 256 * _signs(v, draw) for n, v in base.items()},
        "rising": {n: v + _rising(v) for n, v in base.items()},
    }
    for name in ("c", "d"):
        made[f"{name} in bfloat16"] = {n: v.to(torch.bfloat16).float() for n, v in made[name].items()}
    for name, tensors in made.items():
        if name != "base":
            tiny.perturbed(folder / "base", folder / name, scale=0.0)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def _on_grid(value: Tensor) -> Tensor:
    return (value / GRID).round() * GRID


def _signs(value: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, value.shape, generator=draw) * 2.0 - 1.0


def _rising(value: Tensor) -> Tensor:
    """Deltas that grow along the last dimension but one, and are equal along the last."""
    if value.ndim < 3:
        return torch.full_like(value, GRID)
    return GRID * torch.arange(1.0, value.shape[1] + 1)[None, :, None].expand(value.shape).clone()


# --- what the sentences say -------------------------------------------------------------------------------------------


def _stored(dtype: torch.dtype) -> Holds:
    def holds(ours: Result, theirs: Result, model: Model) -> bool:
        return {t.dtype for t in ours.tensors.values()} == {torch.bfloat16} and {
            t.dtype for t in theirs.tensors.values()
        } == {dtype}

    return holds


def _noise(ours: Result, theirs: Result, model: Model) -> bool:
    """Of close rows the tools choose other elements, and of others (the cases of `cases.py`) hardly any."""
    differ = sum(int((ours.tensors[n] != theirs.tensors[n]).sum()) for n in model("base"))
    return differ > 0.01 * sum(t.numel() for t in model("base").values())


def _nan(ours: Result, theirs: Result, model: Model) -> bool:
    return bool(theirs.tensors[QUERY].isnan().any()) and QUERY in ours.error and "`nan` holds 1 value" in ours.error


def _ties(ours: Result, theirs: Result, model: Model) -> bool:
    """Half of equal magnitudes: ours are the first; theirs as many, but others."""
    same, by_index = [], []
    for name, origin in model("base").items():
        mine, other = ((r.tensors[name] != origin).flatten() for r in (ours, theirs))
        first = torch.arange(mine.numel()) < mine.numel() // 2
        by_index.append(torch.equal(mine, first) and int(other.sum()) == int(first.sum()))
        same.append(torch.equal(mine, other))
    return all(by_index) and not all(same)


def _share_that_differs(ours: Result, theirs: Result) -> float:
    """Of all elements, stored in bfloat16."""
    differ = sum(int((t != theirs.tensors[n].to(torch.bfloat16)).sum()) for n, t in ours.tensors.items())
    return differ / sum(t.numel() for t in ours.tensors.values())


def _once(ours: Result, theirs: Result, model: Model) -> bool:
    """They round once, as we do, but for elements where float32 falls to either side."""
    return _share_that_differs(ours, theirs) < 0.001


def _often(ours: Result, theirs: Result, model: Model) -> bool:
    return _share_that_differs(ours, theirs) > 0.01


def _other_masks(ours: Result, theirs: Result, model: Model) -> bool:
    return any(
        not torch.equal(ours.tensors[n] != model("base")[n], theirs.tensors[n] != model("base")[n])
        for n in model("base")
    )


def _cancelling(ours: Result, theirs: Result, model: Model) -> bool:
    return "sum to zero" in ours.error and not all(t.isfinite().all() for t in theirs.tensors.values())


def _mean_length(ours: Result, theirs: Result, model: Model) -> bool:
    """Of two models, one of which has only zeros in a tensor: ours is the other, theirs half of it."""
    whole = ours.tensors[NORM]
    return torch.allclose(theirs.tensors[NORM], whole / 2, atol=1e-6) and not torch.allclose(whole, whole / 2)


def _antipodal(ours: Result, theirs: Result, model: Model) -> bool:
    """Of D and -D by equal weights, theirs is the base and ours the first expert."""
    return all(
        torch.allclose(theirs.tensors[name], value, atol=1e-6)
        and torch.allclose(ours.tensors[name], model("a")[name], atol=1e-6)
        for name, value in model("base").items()
    )


def _small_deltas(ours: Result, theirs: Result, model: Model) -> bool:
    """Of deltas whose lengths multiply to less than 1e-6, theirs takes a smaller cosine."""
    mine, other = (float((r.tensors[NORM] - model("base")[NORM]).norm()) for r in (ours, theirs))
    return mine > 1.5 * other


def _ranked_across(ours: Result, theirs: Result, model: Model) -> bool:
    """The chance to stay rises along the dimension in which magnitudes rise in theirs, and not in ours."""
    shares = []
    for result in (ours, theirs):
        kept = (result.tensors[FUSED] != model("base")[FUSED]).double()
        half = kept.shape[1] // 2
        shares.append(float(kept[:, half:].mean() - kept[:, :half].mean()))
    return abs(shares[0]) < 0.1 and shares[1] > 0.3


def _one_element(ours: Result, theirs: Result, model: Model) -> bool:
    return not ours.error and "Expected p_in" in theirs.error


def _same(ours: Result, theirs: Result, model: Model) -> bool:
    return all(torch.allclose(ours.tensors[n], theirs.tensors[n], rtol=0, atol=1e-6) for n in model("base"))


def _two(method: str, **more: Any) -> dict[str, Any]:
    return recipe(method, "c in bfloat16", "d in bfloat16", dtype="bfloat16", **more)


WEIGHTS = (0.7123, 0.5377)  # such that no sum lies half-way between two floats
SENTENCES: dict[str, Sequence[Check]] = {
    "`arcee_fusion` computes": (
        Check(recipe("arcee_fusion", "near", listed=True), _noise),
        Check(recipe("arcee_fusion", "a", dtype="bfloat16", listed=True), _stored(torch.float32)),
    ),
    "NaN and Inf in an input": (Check(recipe("task_arithmetic", "nan", weights=(1.0,)), _nan),),
    "Ties at a threshold": (Check(recipe("ties", "equal", weights=(1.0,), own={"density": 0.5}), _ties),),
    "In mergekit, `dtype: bfloat16`": (
        Check(_two("linear", base=False, weights=WEIGHTS), _once),
        Check(recipe("slerp", "c in bfloat16", dtype="bfloat16", listed=True, t=0.3), _once),
        *(Check(_two(m, weights=WEIGHTS), _often) for m in ("task_arithmetic", "ties", "multislerp", "nuslerp")),
        *(Check(_two(m), _often) for m in ("sce", "karcher", "model_stock", "ram")),
        Check(recipe("nearswap", "c in bfloat16", dtype="bfloat16", listed=True, t=0.01), _often),
    ),
    "`ramplus_tl` is stored": (Check(_two("ramplus_tl"), _stored(torch.float32)),),
    "Random masks differ": tuple(
        Check(recipe(method, "a", weights=(1.0,), own={"density": 0.5}), _other_masks)
        for method in ("dare_linear", "dare_ties", "della", "della_linear")
    ),
    "`linear` with weights": (Check(recipe("linear", "a", "b", base=False, weights=(1.0, -1.0)), _cancelling),),
    "`karcher` takes": (Check(recipe("karcher", "b", "without a norm", base=False), _mean_length),),
    "`multislerp` of directions": (Check(recipe("multislerp", "a", "opposite", weights=(1.0, 1.0)), _antipodal),),
    "`model_stock` takes": (Check(recipe("model_stock", "close", "closer"), _small_deltas),),
    "`della*` ranks": (
        Check(
            recipe("della_linear", "rising", weights=(1.0,), own={"density": 0.5, "epsilon": 0.45}),
            _ranked_across,
            "experts",
        ),
        Check(recipe("della", "a", weights=(1.0,), own={"density": 0.5}), _one_element, "one head"),
    ),
}
# Not in the list: tensors of one element, and densities that keep none, are the same in both tools.
SAME = (
    Check(recipe("ties", "c", "d", weights=WEIGHTS, own={"density": 0.3}), _same, "one head"),
    Check(recipe("breadcrumbs", "c", "d", weights=WEIGHTS, own={"density": 0.3}), _same, "one head"),
    Check(recipe("sce", "c", "d", select_topk=0.3), _same, "one head"),
    *(
        Check(recipe(method, "c", "d", weights=WEIGHTS, own={"density": 0.0}), _same, "one head")
        for method in ("ties", "breadcrumbs", "dare_linear", "dare_ties", "della", "della_linear")
    ),
)


# --- the run ----------------------------------------------------------------------------------------------------------


def sentences_on(page: Path) -> list[str]:
    """The items of the list "Where mergekit differs"."""
    part = page.read_text(encoding="utf-8").partition("## Where mergekit differs\n")[2].partition("\n## ")[0]
    return [re.sub(r"\s+", " ", item).strip() for item in re.split(r"^- ", part, flags=re.M)[1:]]


def sentences(work: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(sentence, what is wrong with it, or an empty text), for each check and for each that has none."""
    listed = sentences_on(PAGE)
    yield "sentences", "" if listed else "there are none"
    for item in listed:
        if not any(item.startswith(words) for words in SENTENCES):
            yield item, "has no check in sentences.py"
    for words in SENTENCES:
        if not any(item.startswith(words) for item in listed):
            yield words, "is not in docs/methods.md"
    checks = [(words, check) for words, of_it in {**SENTENCES, "the same": SAME}.items() for check in of_it]
    for name, (architecture, changes) in MODELS.items():
        build(work / name, architecture, **changes)
        (work / name / "recipes").mkdir()
    for number, (_, check) in enumerate(checks):
        text = yaml.safe_dump(_with_paths(check.recipe, work / check.models))
        (work / check.models / "recipes" / f"{number:03}.yml").write_text(text)
    for name in MODELS:
        driver = [str(python), str(HERE / "driver.py"), str(work / name / "recipes")]
        subprocess.run(driver, check=True, capture_output=True)
    for number, (words, check) in enumerate(checks):
        folder = work / check.models
        file = folder / "recipes" / f"{number:03}.yml"
        good = check.holds(_ours(file), _theirs(file), partial(_model, folder))
        yield f"{words} ({check.recipe['merge_method']})", "" if good else "does not hold"


def _model(folder: Path, name: str) -> Tensors:
    return load_file(folder / name / "model.safetensors")


def _with_paths(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    models = [entry | {"model": str(folder / entry["model"])} for entry in table["models"]]
    base = {"base_model": str(folder / table["base_model"])} if "base_model" in table else {}
    return {**table, **base, "models": models}


def _ours(file: Path) -> Result:
    try:
        out = merge(read_recipe(load_tree(file)), file.with_suffix(".ours"), Options(use_cache=False))
    except LowmemAimError as error:
        return Result({}, str(error))
    return Result(_tensors_in(out))


def _theirs(file: Path) -> Result:
    error = file.with_suffix(".error")
    return Result(_tensors_in(file.with_suffix("")), error.read_text() if error.is_file() else "")


def _tensors_in(folder: Path) -> Tensors:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
