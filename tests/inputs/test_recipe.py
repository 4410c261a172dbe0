"""mergekit's YAML: what is read, and that everything wrong is found at once, with its line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.errors import RecipeError
from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe, readable_part
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe, Setting
from lowmem_aim.recipe.yaml_tree import load_tree, parse

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: math
    parameters: {weight: 0.5, density: [0.2, 0.8]}
  - model: code
    parameters:
      weight: 1e-1
      density:
        - filter: mlp
          value: 0.3
        - filter: "*"
          value: 0.6
parameters:
  normalize: true
  lambda: 1.5
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
aim: {omega: 0.2, calibration: texts.jsonl, samples: 8}
"""


def read(text: str) -> Recipe:
    return read_recipe(parse(text, "recipe.yml"))


def resolved(recipe: Recipe, tensor: str, t: float) -> dict[str, Any]:
    part = recipe.slices[0]
    return recipe.resolve(tensor, t, part, [tensor] * len(part.experts))


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return list(caught.value.problems)


def test_a_whole_recipe() -> None:
    recipe = read(GOOD)
    assert recipe.method.name == "ties"
    assert [model.reference for model in recipe.models] == ["math", "code"]  # the base is no expert
    assert recipe.dtype == "bfloat16"
    assert recipe.aim is not None
    assert (recipe.aim.omega, recipe.aim.samples, recipe.aim.block_size) == (Setting(0.2), 8, 512)
    found = resolved(recipe, "model.layers.1.mlp.up_proj.weight", 0.5)
    assert found == {
        "weight": (0.5, 0.1),
        "density": (0.5, 0.3),
        "normalize": True,
        "rescale": False,
        "lambda": 1.5,
        "int8_mask": False,
    }
    assert resolved(recipe, "model.norm.weight", 0.0)["density"] == (0.2, 0.6)


def test_precedence_is_model_then_top_level_then_default() -> None:
    text = """\
merge_method: ties
base_model: b
models:
  - {model: x, parameters: {density: [{filter: mlp, value: 0.1}]}}
  - {model: y}
parameters: {weight: 0.7, density: 0.4}
"""
    recipe = read(text)
    assert resolved(recipe, "a.mlp.weight", 0)["density"] == (0.1, 0.4)
    assert resolved(recipe, "a.attn.weight", 0)["density"] == (0.4, 0.4)  # no filter matched: it falls through
    assert resolved(recipe, "a.attn.weight", 0)["weight"] == (0.7, 0.7)
    assert resolved(recipe, "a.attn.weight", 0)["lambda"] == 1.0


@pytest.mark.parametrize(
    ("gradient", "t", "value"),
    [
        ("[0, 1]", 0.25, 0.25),
        ("[0, 1, 0]", 0.5, 1.0),
        ("[0, 1, 0]", 0.75, 0.5),
        ("[3]", 0.9, 3.0),
        ("[1, 2]", 1.0, 2.0),
    ],
)
def test_gradients_are_piecewise_linear(gradient: str, t: float, value: float) -> None:
    text = f"{{merge_method: slerp, base_model: b, models: [{{model: x}}], parameters: {{t: {gradient}}}}}"
    assert resolved(read(text), "x", t)["t"] == value


def test_a_filter_list_that_ends_without_a_match_is_an_error_of_that_tensor() -> None:
    recipe = read(
        "{merge_method: slerp, base_model: b, models: [{model: x}], parameters: {t: [{filter: q, value: 1}]}}"
    )
    with pytest.raises(RecipeError, match=r"`t` has no value for `lm_head\.weight`"):
        resolved(recipe, "lm_head.weight", 0)


def test_british_and_american_spellings_are_the_same() -> None:
    def read(old: str, new: str, **flags: Any) -> Recipe:
        text = GOOD.replace(old, new).replace("  normalize: true\n", "")
        return read_recipe(applied(parse(text, "recipe.yml"), flags))

    top = "lambda: 1.5\n  normalise: false"
    assert read("lambda: 1.5", top).parameters["normalize"].value is False
    assert read("lambda: 1.5", top, parameter=("normalize=true",)).parameters["normalize"].value is True
    assert read("lambda: 1.5", top, parameter=("normalise=true",)).parameters["normalize"].value is True
    acm = "acm: {normalize: layers, calibration: builtin}\nmerge_method:"
    assert read("merge_method:", acm).acm == Acm(normalise="layers", calibration="builtin")
    assert read("merge_method:", acm, normalise="samples").acm == Acm(calibration="builtin")
    with pytest.raises(RecipeError, match="unknown parameter `normalise`"):
        read("lambda: 1.5", f"{top}\n  normalize: false")


def test_aliases_and_merge_keys_work() -> None:
    text = """\
merge_method: task_arithmetic
base_model: b
models:
  - {model: x, parameters: &p {weight: 0.5}}
  - {model: y, parameters: *p}
  - {model: z, parameters: {<<: *p}}
"""
    assert resolved(read(text), "w", 0)["weight"] == (0.5, 0.5, 0.5)


def test_all_problems_come_at_once_with_their_places() -> None:
    found = problems(
        """\
merge_method: ties
base_model: base
modelz: 3
models:
  - model: a
    parameters: {weight: x, density: 1.5, waight: 3, gama: 3}
  - modell: b
slices: [{}]
dtype: int7
tokenizer_source: 3
aim: {omega: 1.2, samples: 0, omga: 2}
"""
    )
    expected = [
        "recipe.yml:3:1: unknown key `modelz`; did you mean `models`?",
        "recipe.yml:6:18: `weight` must be a finite number, not `x`",
        "recipe.yml:6:29: `density` must lie in [0, 1], not 1.5",
        "recipe.yml:6:43: unknown parameter `waight`; did you mean `weight`?",
        "recipe.yml:7:5: unknown key `modell`; did you mean `model`?",
        "recipe.yml:8:1: `models` and `slices` exclude each other",
        "recipe.yml:9:1: `dtype` must be one of float32, float16, bfloat16, not `int7`",
        "recipe.yml:10:1: `tokenizer_source` must be text",
        "recipe.yml:11:31: unknown key `omga`; did you mean `omega`?",
        "recipe.yml:11:7: `aim.omega` must lie in [0, 1], not 1.2",
        "recipe.yml:11:19: `aim.samples` must be a whole number above 0, not `0`",
    ]
    assert sorted(found) == sorted(expected)
    places = [tuple(map(int, problem.split(":")[1:3])) for problem in found]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\nmerge_method: ties\n", "recipe.yml:2:1: the key `merge_method` appears twice"),
        ("a: [1, 2\nb: 3", "not valid YAML"),
        ("- 1\n- 2", "a recipe is a table"),
        ("", "recipe.yml:1:1: this recipe is empty"),
        ("dtype: float32", "`merge_method` is missing"),
        ("services: {web: {image: x}}\nversion: 3", "this is not a recipe: its keys are `services`, `version`"),
        ("merge_method: !!python/object/apply:os.system [ls]", "tag"),
        ("merge_method: [" * 500 + "]" * 500, "not valid YAML|too deep"),
        ("merge_method: tyes\nbase_model: b\nmodels: [{model: a}]", "did you mean `ties`"),
        ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]", "`ties` needs a `base_model`"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]", "recipe.yml:3:10: `a` needs a `weight`"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: b}]", "only the base is listed"),
        ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}]", "needs the parameter `t`"),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {t: 1}",
            "takes exactly 1 model",
        ),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\naim: {}", "`aim` needs a `base_model`"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "finite number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, x]}}]", "finite number"),
        ("merge_method: ties\nbase_model: b\nmodels: []", "at least one model"),
        (f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {'9' * 401}}}}}]", "finite number"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: 0, value: 1}]}}]",
            "recipe.yml:2:44: a filter of `weight` must be a part of tensor names",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: [q], value: 1}]}}]",
            "a filter of `weight` must be a part of tensor names",
        ),
        ("merge_method: linear\n<<: 5\n", "recipe.yml:2:1: `<<` merges tables only"),
        ("merge_method: 2024-01-01", "unknown merge_method `2024-01-01`"),
        ("merge_method: linear\nmodels: [{model: a}]\naim: {scaling: {a: 1}}", "not a table$"),
    ],
)
def test_each_mistake_has_its_message(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("merge_method: linear\nmodels: [{model: ä, parameters: {wieght: 1}}]", "2:34: unknown parameter `wieght`"),
        ("\ufeffmerge_method: tis", "1:1: unknown merge_method `tis`"),
        ("merge_method:\r\n  tis", "1:1: unknown merge_method `tis`"),
        ("merge_method: linear\nmodels:\n  - [a]", "3:5: a model is a table"),
        ("merge_method: linear\nmodels: a: b", "2:10: not valid YAML: mapping values are not allowed here"),
        ("merge_method: linear\nmodels: [a\x07]", "2:11: not valid YAML: the character '\\x07' is not allowed"),
        ("\x07", "1:1: not valid YAML: the character '\\x07' is not allowed"),
        ("merge_method: !!python/name:os.system x", "1:15: the YAML tag"),
        ("a: " + "[" * 60, "1:43: the recipe is too large or too deep"),
    ],
)
def test_a_place_is_a_line_and_a_column_in_characters(text: str, place: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert any(problem.startswith(f"recipe.yml:{place}") for problem in caught.value.problems), caught.value.problems


def test_the_same_mistake_twice_in_one_line_is_told_with_both_columns() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: x}}, {model: b, parameters: {weight: x}}]"
    assert problems(text) == ["recipe.yml:2:34: `weight` must be a finite number, not `x` (and at 2:71)"]


def test_a_key_that_appears_twice_is_told_beside_all_else() -> None:
    text = "merge_method: tis\nbase_model: b\nmodels:\n  - {model: a, model: c}\nmerge_method: tyes\ndtype: int7\n"
    assert [problem.partition("; ")[0] for problem in problems(text)] == [
        "recipe.yml:4:16: the key `model` appears twice",
        "recipe.yml:5:1: the key `merge_method` appears twice",
        "recipe.yml:5:1: unknown merge_method `tyes`",
        "recipe.yml:6:1: `dtype` must be one of float32, float16, bfloat16, not `int7`",
    ]
    aliased = "merge_method: linear\nmodels:\n  - &a {model: a, parameters: {weight: 1, weight: 2}}\n  - *a\n"
    assert problems(aliased) == ["recipe.yml:3:43: the key `weight` appears twice"]


def test_a_colon_in_the_name_of_the_file_is_no_place() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(parse("merge_method: 7\nmodels: []\ndtype: 7\n", "a:9:9"))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["a:9:9:1:1", "a:9:9:2:1", "a:9:9:3:1"]


@pytest.mark.parametrize("method", ["3", "[ties]", "{a: ties}", "true"])
def test_a_method_that_is_no_text_is_one_problem(method: str) -> None:
    (problem,) = problems(f"merge_method: {method}\nbase_model: b\nmodels: [{{model: a}}]\n")
    assert problem == "recipe.yml:1:1: `merge_method` must be text"


def test_an_alias_bomb_is_refused_fast() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="too large or too deep"):
        read("\n".join(lines))


def test_a_bomb_of_merge_keys_is_refused() -> None:
    lines = ["a0: &a0 {k: v}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="too large or too deep"):
        read("\n".join(lines))


def test_a_parameter_of_other_methods_is_ignored_with_a_notice_as_mergekit_does_silently() -> None:
    recipe = read("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]")
    assert recipe.notices == ("recipe.yml:2:45: `density` has no meaning for `linear` and is ignored",)


def test_a_base_that_linear_lists_is_a_model_like_others() -> None:
    recipe = read("{merge_method: linear, base_model: b, models: [{model: b}, {model: a}], parameters: {weight: 1}}")
    assert [model.reference for model in recipe.models] == ["b", "a"]


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    for name, content in (("binary.yml", b"\xff\xfe\x00"), ("long.yml", b"#" * 2_000_000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError):
            load_tree(tmp_path / name)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_tree(tmp_path / "missing.yml")


class TestFlags:
    def test_a_merge_needs_no_file(self) -> None:
        flags = {"method": "ties", "base": "b", "expert": ("x", "y"), "density": ("0.5",), "parameter": ("lambda=2",)}
        recipe = read_recipe(applied(empty_recipe(), flags))
        found = resolved(recipe, "w", 0)
        assert (found["weight"], found["density"], found["lambda"]) == ((1.0, 1.0), (0.5, 0.5), 2.0)
        assert recipe.aim is None

    def test_repeated_values_go_in_order_and_skip_the_base(self) -> None:
        tree = applied(parse(GOOD, "recipe.yml"), {"weight": ("0.1", "0.2")})
        assert resolved(read_recipe(tree), "w", 0)["weight"] == (0.1, 0.2)

    def test_a_wrong_number_of_values_is_an_error(self) -> None:
        with pytest.raises(RecipeError, match="3 values for 2 expert"):
            applied(parse(GOOD, "recipe.yml"), {"weight": ("1", "2", "3")})

    def test_flags_override_the_recipe(self) -> None:
        tree = applied(
            parse(GOOD, "recipe.yml"), {"omega": 0.9, "method": "dare_ties", "dtype": "float16", "base": "./base"}
        )
        recipe = read_recipe(tree)
        assert recipe.aim is not None
        assert (recipe.aim.omega, recipe.aim.calibration) == (Setting(0.9), "texts.jsonl")
        assert (recipe.method.name, recipe.dtype, recipe.base) == ("dare_ties", "float16", "./base")

    @pytest.mark.parametrize("listed", ["models", "slices", "modules"])
    def test_a_parameter_given_as_a_flag_counts_for_all_models(self, listed: str) -> None:
        """Values of models, slices and modules, which win over the recipe's own, do not win over the flag."""
        models = "models: [{model: x, parameters: {weight: 1, density: 0.5}}, {model: y, parameters: {weight: 2}}]"
        ranged = models.replace("models:", "sources:").replace("parameters", "layer_range: [0, 2], parameters")
        slices = f"slices: [{{{ranged}, parameters: {{density: 0.6}}}}]"
        modules = f"modules: {{all: {{{slices}, parameters: {{density: 0.7}}}}}}"
        text = {"models": models, "slices": slices, "modules": modules}[listed]
        tree = parse(f"merge_method: ties\nbase_model: b\n{text}\n", "recipe.yml")
        found = resolved(read_recipe(applied(tree, {"parameter": ("density=0.25",)})), "w", 0)
        assert (found["weight"], found["density"]) == ((1.0, 2.0), (0.25, 0.25))

    def test_a_wrong_flag_is_named(self) -> None:
        with pytest.raises(RecipeError, match=r"--omega: `aim.omega` must lie in \[0, 1\]"):
            read_recipe(applied(parse(GOOD, "recipe.yml"), {"omega": 1.5}))
        with pytest.raises(RecipeError, match=r"--density: `density` must lie in \[0, 1\]"):
            read_recipe(applied(parse(GOOD, "recipe.yml"), {"density": ("-1",)}))
        with pytest.raises(RecipeError, match="--dtype: `dtype` must be one of"):
            read_recipe(applied(parse(GOOD, "recipe.yml"), {"dtype": "fp16"}))
        with pytest.raises(RecipeError, match="NAME=VALUE"):
            applied(parse(GOOD, "recipe.yml"), {"parameter": ("lambda",)})

    def test_calibration_flags_need_aim(self) -> None:
        with pytest.raises(RecipeError, match=r"--calibration has no meaning without AIM"):
            applied(empty_recipe(), {"calibration": "builtin"})

    def test_flags_of_texts_need_texts(self) -> None:
        given = {"omega": 0.4, "calibration": "activations.safetensors"}
        with pytest.raises(RecipeError, match="--block-size has no meaning with a file of activations"):
            applied(empty_recipe(), {**given, "block_size": 64})
        assert applied(empty_recipe(), {**given, "block_size": 64, "calibration": "texts.jsonl"}).get("aim")
        assert applied(empty_recipe().with_item("acm", empty_recipe()), {**given, "samples": 9}).get("aim")


def test_bounds_on_one_side_are_named() -> None:
    text = "merge_method: nearswap\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: -1}\n"
    assert problems(text) == ["recipe.yml:4:14: `t` must be 0 or more, not -1"]


TWO = """merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 0.5}}
  - model: code
    parameters: {weight: 0.5}
"""
NULLS = ("", "~", "null", "#name")


MIXTURE = "base_model: b\ngate_mode: hidden\nexperts_per_token: 2\nexperts: [{source_model: a}]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "slices: [{sources: [{model: a, layer_range: [8, 0]}]}]\nmerge_method: passthrough\n",
            ["1:32: `layer_range`"],
        ),
        ("modules: {default: {}}\nmerge_method: linear\n", ["1:11: no models are listed"]),
        (MIXTURE, ["4:1: `experts` is not supported: a mixture of experts"]),
        ("merge_mthod: ties\nbaze_model: b\nmodel: []\n", ["1:1: unknown", "2:1: unknown", "3:1: unknown"]),
        ("merge_method: linear\nmodels: [{modle: a, parameters: {weight: 1}}]\n", ["2:11: unknown key `modle`"]),
        ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]\n", ["2:34: unknown parameter `wieght`"]),
        ("merge_method: slerp\nbase_model: b\nmodels: [a]\nparameters: {t: 1}\n", ["3:10: a model is a table"]),
        (
            "merge_method: ties\nbase_model: [b]\nmodels: []\naim: {}",
            ["2:1: `base_model` must be text", "3:1: `models`"],
        ),
    ],
)
def test_a_mistake_is_told_without_what_follows_from_it(text: str, told: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(told), found
    for problem, start in zip(found, told, strict=True):
        assert problem.startswith(f"recipe.yml:{start}")


def test_a_mistake_in_each_model_is_told_once_with_all_its_places() -> None:
    lines = "".join(f"  - {{model: {name}, parameters: {{weight: half, waight: 1}}}}\n" for name in "abc")
    assert problems(f"merge_method: linear\nmodels:\n{lines}") == [
        "recipe.yml:3:29: `weight` must be a finite number, not `half` (and at 4:29, 5:29)",
        "recipe.yml:3:43: unknown parameter `waight`; did you mean `weight`? (and at 4:43, 5:43)",
    ]
    without = lines.replace(", parameters: {weight: half, waight: 1}", "")
    assert problems(f"merge_method: linear\nmodels:\n{without}") == [
        "recipe.yml:2:1: `linear` needs a `weight` for each model"
    ]


def test_a_flag_that_is_wrong_for_all_experts_is_told_once() -> None:
    flags = {"method": "ties", "base": "b", "expert": ("a", "c"), "density": ("half",)}
    with pytest.raises(RecipeError) as caught:
        read_recipe(applied(empty_recipe(), flags))
    assert caught.value.problems == ("--density: `density` must be a finite number, not `half`",)


@pytest.mark.parametrize(
    ("value", "meant"), [(50, "0.5"), (20, "0.2"), (4, None), (100, "1"), (1.5, None), (101, None), (-5, None)]
)
def test_a_percentage_in_the_place_of_a_fraction_is_recognised(value: float, meant: str | None) -> None:
    found = problems(TWO.replace("{weight: 0.5}", f"{{weight: 0.5, density: {value}}}"))[0]
    assert (f"did you mean {meant}?" in found) if meant else ("did you mean" not in found)


def test_the_hint_of_a_recipes_problem_is_its_own() -> None:
    text = "merge_method: tis\nbase_model: b\nmodels: []\naim: {omega: 40}\n"
    with pytest.raises(RecipeError) as caught:
        read_recipe(parse(text, "recipe.yml"))
    hints = dict(zip(caught.value.problems, caught.value.hints, strict=True))
    assert "`lowmem-aim methods`" in hints["recipe.yml:1:1: unknown merge_method `tis`; did you mean `ties`?"]
    assert "models: [{model:" in hints["recipe.yml:3:1: `models` must be a list with at least one model"]
    assert "0 freezes" in hints["recipe.yml:4:7: `aim.omega` must lie in [0, 1], not 40; did you mean 0.4?"]
    assert caught.value.hint.splitlines() == list(caught.value.hints)


def test_what_is_right_in_a_recipe_is_read_beside_its_problems() -> None:
    recipe, error = readable_part(parse(TWO + "aim: {omega: 1.5, samples: 7}\ndtype: int7\n", "recipe.yml"))
    assert error is not None
    assert len(error.problems) == 2
    assert recipe is not None
    assert [model.reference for model in recipe.models] == [model.reference for model in read(TWO).models]
    assert recipe.aim == Aim(samples=7)
    assert readable_part(parse("merge_method: tis", "recipe.yml"))[0] is None


@pytest.mark.parametrize("null", NULLS)
def test_null_where_a_value_is_needed_is_a_missing_value(null: str) -> None:
    for line, missing in (
        ("merge_method: ties", "recipe.yml:1:1: `merge_method` is missing"),
        ("base_model: base", "recipe.yml:1:1: `ties` needs a `base_model`"),
        ("  - model: code", "recipe.yml:5:5: `model` is missing"),
    ):
        assert missing in problems(TWO.replace(line, line.partition(": ")[0] + f": {null}"))
    assert problems("merge_method: ties\nbase_model: base\nmodels: " + null) == [
        "recipe.yml:1:1: no models are listed",
    ]
    assert problems(TWO.replace("    parameters: {weight: 0.5}", f"    parameters:\n      weight: {null}")) == [
        "recipe.yml:5:5: `code` needs a `weight`"
    ]


@pytest.mark.parametrize("null", NULLS)
def test_null_where_a_value_may_be_absent_is_an_absent_key(null: str) -> None:
    more = "".join(f"{key}: {null}\n" for key in ("dtype", "tokenizer_source", "parameters", "aim", "acm", "slices"))
    found, plain = read(TWO + more), read(TWO)
    assert (found.aim, found.acm, found.dtype, found.parameters) == (None, None, None, {})
    assert found.models == plain.models
    if null != "#name":
        assert read(TWO + f"aim: {{omega: {null}, samples: 8}}").aim == Aim(samples=8)


def test_false_switches_a_table_off_and_anything_else_that_is_no_table_is_refused() -> None:
    assert read(TWO + "aim: false\nacm: false\n").aim is None
    for table in ("aim", "acm"):
        for wrong in ("true", "0", "[]", "yes please"):
            assert f"`{table}` must be a table, or `false`" in problems(TWO + f"{table}: {wrong}\n")[0]


class TestFlagsOnARecipe:
    """The command line changes what the recipe says, and nothing else."""

    def given(self, text: str, **flags: Any) -> Recipe:
        return read_recipe(applied(parse(text, "recipe.yml"), flags))

    def test_aim_that_is_switched_off_stays_off(self) -> None:
        for off in ("aim: false", "aim: ~", ""):
            assert self.given(TWO + off).aim is None
            assert self.given(TWO + off + "\nacm: false").acm is None
        found = self.given(TWO + "aim: false", omega="0.2")
        assert found.aim is not None
        assert found.aim.omega == Setting(0.2)

    def test_what_is_no_table_is_refused_with_flags_too(self) -> None:
        with pytest.raises(RecipeError, match="`aim` must be a table"):
            self.given(TWO + "aim: true", omega="0.2")
        with pytest.raises(RecipeError, match="`aim` must be a table"):
            self.given(TWO + "aim: true")
