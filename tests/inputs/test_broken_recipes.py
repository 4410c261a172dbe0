"""Broken recipes: every mistake is told at once, with its file, line and column, and with what to do about it.

A `^` in a recipe stands before the place of a mistake; it is no part of the recipe.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from conftest import Place

from lowmem_aim.errors import RecipeError
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import parse


class Broken(NamedTuple):
    """A recipe, and for each `^` in it the beginning of what is told and a part of the hint."""

    recipe: str
    told: list[tuple[str, str]]

    @property
    def text(self) -> str:
        return self.recipe.replace("^", "")

    @property
    def places(self) -> list[str]:
        """`line:column` of each `^`."""
        found = []
        for number, line in enumerate(self.recipe.splitlines(), 1):
            marks = [match.start() for match in re.finditer(r"\^", line)]
            found += [f"{number}:{column - earlier + 1}" for earlier, column in enumerate(marks)]
        return found


BROKEN = {
    # -- the whole
    "nothing": Broken("^\n", [("this recipe is empty", "starts with `merge_method")]),
    "only comments": Broken("^# merge_method: ties\n", [("this recipe is empty", "starts with `merge_method")]),
    "a list": Broken("^- merge_method: ties\n- base_model: b\n", [("a recipe is a table", "starts with")]),
    "a text": Broken("^ties\n", [("a recipe is a table", "starts with")]),
    "another file": Broken(
        "^services: {web: {image: x}}\nversion: 3\n", [("this is not a recipe: its keys are `services`", "starts")]
    ),
    "no valid YAML": Broken("merge_method: linear\nmodels: [{model: a}\n^dtype: x\n", [("not valid YAML", "brackets")]),
    "a tab": Broken("merge_method: linear\nmodels:\n^\t- model: a\n", [("not valid YAML", "indentation")]),
    "objects": Broken(
        "merge_method: ^!!python/name:os.system ''\nmodels: ^!!python/object:os.x {}\n",
        [
            ("the YAML tag `tag:yaml.org,2002:python/name:os.system`", "plain values"),
            ("the YAML tag `tag:yaml.org,2002:python/object:os.x`", "plain values"),
        ],
    ),
    # -- methods and bases
    "a method's name": Broken(
        "^merge_method: tise\nmodels: [{model: a}]\n",
        [("unknown merge_method `tise`; did you mean `ties`?", "`lowmem-aim methods` lists them all")],
    ),
    "no method and no models": Broken(
        "^^base_model: b\n", [("`merge_method` is missing", "`merge_method: ties`"), ("no models", "list the models")]
    ),
    "no base": Broken(
        "^merge_method: dare_ties\nmodels: [{model: a, parameters: {weight: 1}}]\n",
        [("`dare_ties` needs a `base_model`", "name the model that the others were tuned from")],
    ),
    "only the base": Broken(
        "^merge_method: ties\nbase_model: b\nmodels: [{model: b}]\n", [("there is no expert", "list each model")]
    ),
    "a base that is no text": Broken(
        "merge_method: ties\n^base_model: [b]\n^dtype: 16\nmodels: [{model: a, parameters: {weight: 1}}]\n",
        [("`base_model` must be text", "folder-or-id"), ("`dtype` must be text", "bfloat16")],
    ),
    # -- models
    "models as text": Broken("merge_method: linear\n^models: a\n", [("`models` must be a list", "models: [{model:")]),
    "models as names": Broken(
        "merge_method: linear\nmodels:\n  - ^a\n  - ^b\n", [("a model is a table", "- model: folder-or-id")]
    ),
    "a model without a name": Broken(
        "merge_method: linear\nmodels:\n  - ^parameters: {weight: 1}\n  - ^modle: b\n    ^parameters: [1]\n",
        [
            ("`model` is missing", "- model:"),
            ("unknown key `modle`; did you mean `model`?", "model, parameters"),
            ("`parameters` must be a table", "weight: 1.0"),
        ],
    ),
    "models and slices": Broken(
        "merge_method: passthrough\nmodels: [{model: a}]\n^slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n",
        [("`models` and `slices` exclude each other", "whole models under `models`")],
    ),
    "a name that is no path": Broken(
        'merge_method: linear\nmodels:\n  - {^model: "a\\0b", parameters: {weight: 1}}\n'
        f"  - {{^model: {'x' * 300}, parameters: {{weight: 1}}}}\n",
        [("`model`: `a\\x00b` holds a NUL", "folder"), ("`model`: `xxx", "folder")],
    ),
    "too many models": Broken(
        "^merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {t: 0.5}\n",
        [("`slerp` takes exactly 1 model besides the base, not 2", "`lowmem-aim methods slerp`")],
    ),
    # -- parameters
    "weights that are missing": Broken(
        "merge_method: linear\n^models: [{model: a}, {model: b}]\n",
        [("`linear` needs a `weight` for each model", "in the top-level `parameters`")],
    ),
    "one weight that is missing": Broken(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - ^{model: b}\n",
        [("`b` needs a `weight`", "in the top-level `parameters`")],
    ),
    "a parameter of the merge that is missing": Broken(
        "^merge_method: nearswap\nbase_model: b\nmodels: [{model: a}]\n",
        [("`nearswap` needs the parameter `t`", "-p t")],
    ),
    "slips in parameters": Broken(
        "merge_method: ties\nbase_model: b\nmodels:\n"
        "  - {model: a, parameters: {^wieght: 1, ^densty: 0.5}}\nparameters: {^lamda: 1, ^rescle: true}\n",
        [
            ("unknown parameter `wieght`; did you mean `weight`?", "`lowmem-aim methods ties`"),
            ("unknown parameter `densty`; did you mean `density`?", "`lowmem-aim methods ties`"),
            ("unknown parameter `lamda`; did you mean `lambda`?", "`lowmem-aim methods ties`"),
            ("unknown parameter `rescle`; did you mean `rescale`?", "`lowmem-aim methods ties`"),
        ],
    ),
    "types of parameters": Broken(
        "merge_method: ties\nbase_model: b\nmodels:\n"
        "  - {model: a, parameters: {weight: [0.1, ^x], ^density: {^a: 1}}}\n"
        "parameters: {^normalize: maybe, ^lambda: true, int8_mask: 1.0}\n",
        [
            ("`weight` must be a finite number, not `x`", "`lowmem-aim methods ties`"),
            ("a filter of `density` needs a `value`", "`lowmem-aim methods ties`"),
            ("unknown key `a`", "filter, value"),
            ("`normalize` must be true or false, not `maybe`", "`lowmem-aim methods ties`"),
            ("`lambda` must be a finite number, not `True`", "`lowmem-aim methods ties`"),
        ],
    ),
    "ranges of parameters": Broken(
        "merge_method: ties\nbase_model: b\nmodels:\n"
        "  - {model: a, parameters: {^weight: .inf, ^density: 50}}\n"
        "  - {model: c, parameters: {weight: 1, ^density: -1}}\n",
        [
            ("`weight` must be a finite number, not `inf`", "`lowmem-aim methods ties`"),
            ("`density` must lie in [0, 1], not 50; did you mean 0.5?", "`lowmem-aim methods ties`"),
            ("`density` must lie in [0, 1], not -1", "`lowmem-aim methods ties`"),
        ],
    ),
    # -- gradients and filters
    "gradients": Broken(
        "merge_method: linear\nmodels:\n"
        "  - {model: a, parameters: {^weight: []}}\n  - {model: b, parameters: {^weight: [[0, 1], [1, 0]]}}\n"
        "  - {model: c, parameters: {weight: [0, ^~, 1]}}\n",
        [
            ("`weight` cannot be an empty list", "`lowmem-aim methods linear`"),
            ("`weight` cannot be a list of lists", "`lowmem-aim methods linear`"),
            ("`weight` must be a finite number, not `None`", "`lowmem-aim methods linear`"),
        ],
    ),
    "filters": Broken(
        "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters:\n  t:\n"
        "    - {^filtre: mlp, value: 0.5}\n    - ^{filter: self_attn}\n    - {^filter: 3, value: 1}\n"
        "    - {filter: norm, ^value: high}\n    - {value: [0, ^low]}\n",
        [
            ("unknown key `filtre`; did you mean `filter`?", "filter, value"),
            ("a filter of `t` needs a `value`", "`lowmem-aim methods slerp`"),
            ("a filter of `t` must be a part of tensor names", "`lowmem-aim methods slerp`"),
            ("`t` must be a finite number, not `high`", "`lowmem-aim methods slerp`"),
            ("`t` must be a finite number, not `low`", "`lowmem-aim methods slerp`"),
        ],
    ),
    "filters of a switch": Broken(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "parameters: {normalize: [{filter: mlp, ^value: often}]}\n",
        [("`normalize` must be true or false, not `often`", "`lowmem-aim methods linear`")],
    ),
    # -- slices and modules
    "slices that are none": Broken(
        "merge_method: passthrough\n^slices: {sources: []}\n", [("`slices` must be a list", "layer_range: [0, 16]")]
    ),
    "a slice without sources": Broken(
        "merge_method: passthrough\nslices:\n  - ^model: a\n    layer_range: [0, 2]\n  - {^sources: []}\n",
        [("a slice needs `sources`", "layer_range: [0, 16]"), ("`sources` must list at least one", "layer_range")],
    ),
    "layer ranges": Broken(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, ^layer_range: [2, 0]}]\n  - sources: [{model: a, ^layer_range: [0, 1.5]}]\n"
        "  - sources: [{model: a, ^layer_range: 0-2}]\n  - sources: [{model: a, ^layer_range: [0, 2, 4]}]\n"
        "  - sources: [{model: a, ^layer_range: [-1, 2]}]\n  - sources: [^{model: a}]\n",
        [
            ("`layer_range` must be two rising", "the layers 0 to 15"),
            ("a source of a slice needs", "the layers 0 to 15"),
        ],
    ),
    "slips in slices": Broken(
        "merge_method: slerp\nbase_model: b\nslices:\n"
        "  - sources: [{model: a, ^layer_rnage: [0, 2]}]\n    ^paramters: {t: 0.5}\n",
        [
            ("unknown key `layer_rnage`; did you mean `layer_range`?", "model, parameters, layer_range"),
            ("unknown key `paramters`; did you mean `parameters`?", "sources, base_model"),
        ],
    ),
    "slices of unequal length": Broken(
        "merge_method: linear\nslices:\n  - ^sources:\n"
        "      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}\n"
        "      - {model: b, layer_range: [0, 3], parameters: {weight: 1}}\n",
        [("the sources of a slice must have the same number of layers; here they take 0 to 2, 0 to 3", "0 to 15")],
    ),
    "parameters of slices": Broken(
        "merge_method: slerp\nbase_model: b\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 2]}]\n    parameters: {^t: 2x}\n"
        "  - ^sources: [{model: a, layer_range: [2, 3]}, {model: c, layer_range: [2, 3]}]\n    parameters: {t: 1}\n",
        [("`t` must be a finite number, not `2x`", "methods slerp"), ("`slerp` takes exactly 1", "methods slerp")],
    ),
    "modules": Broken(
        "merge_method: linear\nmodules: {text: {^models: []}, vision: {^models: []}}\n",
        [("`models` must be a list with at least one model", "list the models to merge")],
    ),
    "slips in modules": Broken(
        "merge_method: linear\nmodules:\n  text: {^modles: [{model: a}]}\n  vision: {^slces: [{model: a}]}\n"
        "  rest: {models: [{model: a}], ^parametrs: {weight: 1}}\n",
        [
            ("unknown key `modles`; did you mean `models`?", "models, slices, parameters"),
            ("unknown key `slces`; did you mean `slices`?", "models, slices, parameters"),
            ("unknown key `parametrs`; did you mean `parameters`?", "models, slices, parameters"),
        ],
    ),
    "what a module lists twice": Broken(
        "merge_method: passthrough\nmodules:\n  text:\n    models: [{model: a}]\n"
        "    ^slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        [("`models` and `slices` exclude each other", "ranges of layers under `slices`")],
    ),
    "a module that is none": Broken(
        "merge_method: linear\n^modules: [a]\n", [("`modules` must be a table of tables", "modules: {default:")]
    ),
    # -- keys, types and duplicates
    "slips in keys": Broken(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "^dtpye: float32\n^out_dtyp: x\n^aimm: {}\n",
        [
            ("unknown key `dtpye`; did you mean `dtype`?", "merge_method, base_model"),
            ("unknown key `out_dtyp`; did you mean `out_dtype`?", "merge_method, base_model"),
            ("unknown key `aimm`; did you mean `aim`?", "merge_method, base_model"),
        ],
    ),
    "keys that appear twice": Broken(
        "merge_method: linear\n^merge_method: slerp\nbase_model: b\nmodels: [{model: a, ^model: c}]\n"
        "parameters: {t: 0, ^t: 1}\n^dtype: float8\n",
        [
            ("the key `merge_method` appears twice", "once"),
            ("the key `model` appears twice", "once"),
            ("the key `t` appears twice", "once"),
            ("`dtype` must be one of float32, float16, bfloat16, not `float8`", "leave it out"),
        ],
    ),
    "dtypes": Broken(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n^dtype: bf16\n^out_dtype: int8\n",
        [
            ("`dtype` must be one of float32, float16, bfloat16, not `bf16`; did you mean `bfloat16`?", "leave it out"),
            ("`out_dtype` must be one of float32, float16, bfloat16, not `int8`", "leave it out"),
        ],
    ),
    "merges of nothing": Broken("merge_method: linear\n^<<: 5\n", [("`<<` merges tables only", "plain values")]),
    # -- texts of experts
    "texts that are wrong are not missing, too": Broken(
        "merge_method: regmean\nbase_model: b\nmodels:\n- {model: a, ^calibration: [x.jsonl]}\n"
        "- {model: c, ^calibration: x.safetensors}\n- {model: d, ^calibratoin: x.jsonl}\n",
        [
            ("`model.calibration` must be a file, `builtin`, or a Hub dataset id, not a list", "every key"),
            ("`x.safetensors` holds activations", "name a .jsonl or .txt file"),
            ("unknown key `calibratoin`; did you mean `calibration`?", "model, parameters, calibration"),
        ],
    ),
    "shared texts that are wrong are not missing, too": Broken(
        "merge_method: regmean\nbase_model: b\nmodels: [{model: a}]\nsolve: {^calibration: x.safetensors}\n",
        [("`x.safetensors` holds activations", "name a .jsonl or .txt file")],
    ),
    "a base that is missing where texts are measured": Broken(
        "^merge_method: regmean\nmodels: [{model: a, calibration: builtin}]\n",
        [("`regmean` needs a `base_model`", "name the model that the others were tuned from")],
    ),
    "texts of some experts": Broken(
        "merge_method: linear\nbase_model: b\nparameters: {weight: 1}\n"
        "models: [{model: a, calibration: builtin}, ^{model: c}]\n",
        [("telling what is kept of each expert needs texts of `c`", "or to none: the merge is the same without")],
    ),
    # -- aim and acm
    "aim without a base": Broken(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n^aim: {omega: 0.4}\n^acm: {}\n",
        [("`aim` needs a `base_model`", "`base_model` or `--base`"), ("`acm` needs", "`base_model` or `--base`")],
    ),
    "aim that is no table": Broken(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "^aim: 0.4\n^acm: [0.7]\n",
        [("`aim` must be a table, or `false`", "omega: 0.4"), ("`acm` must be a table, or `false`", "theta: 0.7")],
    ),
    "values of aim": Broken(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\naim:\n"
        "  ^omega: 40\n  ^scaling: sqr\n  exclude: [^3]\n  ^samples: 0\n  ^block_size: 8\n  ^seed: -1\n  ^pack: 1\n"
        "  ^tied: no\n  ^dtype: bf16\n  ^omgea: 1\n  ^calibration: [a]\n",
        [
            ("`aim.omega` must lie in [0, 1], not 40; did you mean 0.4?", "1 changes nothing"),
            (
                "`aim.scaling` must be one of identity, sqrt, square, rank, not `sqr`; did you mean `sqrt`?",
                "docs/recipe.md",
            ),
            ("`aim.exclude` must be a list of parts of tensor names", "docs/recipe.md"),
            ("`aim.samples` must be a whole number above 0, not `0`", "docs/recipe.md"),
            ("`aim.block_size` must be a whole number, 16 or more, not `8`", "docs/recipe.md"),
            ("`aim.seed` must be a whole number in [0, 2^32), not `-1`", "docs/recipe.md"),
            ("`aim.pack` must be true or false, not `1`", "docs/recipe.md"),
            ("`aim.tied` must be one of relax, keep, not `False`", "docs/recipe.md"),
            ("`aim.dtype` must be one of float32, float16, bfloat16, not `bf16`; did you mean", "docs/recipe.md"),
            ("unknown key `omgea`; did you mean `omega`?", "omega, scaling"),
            ("`aim.calibration` must be a file, `builtin`, or a Hub dataset id, not a list", "docs/recipe.md"),
        ],
    ),
    "omegas": Broken(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "aim: {omega: [^0.2, ^0.2, ^2, ^[0.1, 0.4]]}\n",
        [
            ("`aim.omega` has 0.2 twice", "docs/recipe.md"),
            ("`aim.omega` must lie in [0, 1], not 2", "1 changes nothing"),
            ("`aim.omega`: a gradient is `- value: [...]`", "docs/recipe.md"),
        ],
    ),
    "values of acm": Broken(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "acm: {^theta: [1, 2], ^normalise: layer, ^samples: many, ^normalize: samples}\n",
        [
            ("`acm.theta` must be a number", "docs/recipe.md"),
            ("`acm.normalise` must be one of samples, layers, not `layer`; did you mean `layers`?", "docs/recipe.md"),
            ("`acm.samples` must be a whole number above 0, not `many`", "docs/recipe.md"),
            ("unknown key `normalize`; did you mean `normalise`?", "theta, normalise"),
        ],
    ),
}


def problems(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read_recipe(parse(text, "folder/r.yml"))
    return caught.value


def told_places(problem: str) -> list[str]:
    """The places of a problem: the one that it begins with, and those that are told at its end."""
    first = re.match(r"folder/r\.yml:(\d+:\d+): ", problem)
    assert first is not None, problem
    further = re.search(r" \(and at ([\d:, ]+)\)$", problem)
    return [first[1], *(further[1].split(", ") if further else [])]


def test_there_are_enough_of_all_kinds() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_every_mistake_is_told_at_once_with_its_place_and_a_hint(name: str) -> None:
    broken = BROKEN[name]
    error = problems(broken.text)
    assert sorted(place for problem in error.problems for place in told_places(problem)) == sorted(broken.places)
    lines = [problem.partition(": ")[2] for problem in error.problems]
    for (start, hint), line, said in zip(broken.told, lines, error.hints, strict=True):
        assert line.startswith(start)
        assert hint in said


def test_on_the_command_line_they_are_errors_with_their_hints(place: Place) -> None:
    file = place.folder / "r.yml"
    broken = BROKEN["keys that appear twice"]
    file.write_text(broken.text)
    for command in ("merge", "plan"):
        done = place.run(command, file, place.out)
        place.refused(done, 2, *(f"{file}:{where}: " for where in broken.places), *(hint for _, hint in broken.told))


def test_models_and_texts_that_are_not_there_are_told_with_their_places(place: Place) -> None:
    (place.folder / "empty").mkdir()
    broken = Broken(
        "merge_method: task_arithmetic\n^base_model: ./ground\n^tokenizer_source: ./words\nmodels:\n"
        "  - {^model: ./no-folder, parameters: {weight: 1}}\n"
        "  - {^model: ./empty, parameters: {weight: 1}}\n"
        "  - {^model: ./a+./adapter, parameters: {weight: 1}}\n"
        "  - {model: first, parameters: {weight: 1}}\n"
        "aim: {^calibration: texts.txt}\n"
        "---\nname: first\nmerge_method: linear\nmodels: [{^model: ./nowhere, parameters: {weight: 1}}]\n",
        [],
    )
    file = place.folder / "r.yml"
    for text in (broken.text, broken.text.replace("linear", "tise")):  # with a mistake in the recipe, and without
        file.write_text(text)
        for command in ("merge", "plan"):
            done = place.run(command, file, place.out)
            lines = [line.removeprefix("error:").strip() for line in done.err.splitlines()]
            for where in broken.places:
                assert any(line.startswith(f"{file}:{where}: ") for line in lines), (where, done.err)
