"""Command-line flags as edits of the recipe's tree, so that a wrong flag is reported like a wrong line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from lowmem_aim.errors import LowmemAimError, RecipeError, UsageError, noted, printable, raise_all
from lowmem_aim.methods.method import Method
from lowmem_aim.methods.registry import find_method
from lowmem_aim.recipe.reader import read_aim
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.recipe.spelling import OF_PARAMETERS, in_one_spelling
from lowmem_aim.recipe.values import Values
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node, parse
from lowmem_aim.units import counted

# Flag -> key of the table.
AIM_FLAGS = {
    "omega": "omega",
    "scaling": "scaling",
    "exclude": "exclude",
    "control": "control",
    "control_seed": "control_seed",
    "calibration": "calibration",
    "samples": "samples",
    "block_size": "block_size",
    "calibration_seed": "seed",
    "pack": "pack",
    "tied": "tied",
    "calibration_dtype": "dtype",
}
_OF_AIM = ("omega", "scaling", "exclude", "control", "control_seed", "tied")  # and not of ACM too
_OF_TEXTS = ("samples", "block_size", "calibration_seed", "pack", "calibration_dtype")
ACM_FLAGS = {
    "theta": "theta",
    "normalise": "normalise",
    "calibration": "calibration",
    "samples": "samples",
    "calibration_dtype": "dtype",
}
RELAXATIONS = {"aim": ("aim",), "acm": ("acm",), "both": ("aim", "acm")}


def empty_recipe() -> Node:
    """The tree of a recipe without keys."""
    return Node({}, COMMAND_LINE)


def applied(tree: Node, flags: dict[str, Any], errors: list[LowmemAimError] | None = None) -> Node:
    """Return the tree with every given flag in it. Raises RecipeError for all flags that are wrong by themselves.

    With `errors`, that is added to them instead, and the tree has what is right.
    """
    wrong: list[LowmemAimError] = [] if errors is None else errors
    tree = in_one_spelling(tree)  # else a flag could stand beside the same key of another spelling
    for flag, key in (("method", "merge_method"), ("base", "base_model"), ("tokenizer_source", "tokenizer_source")):
        if flags.get(flag) is not None:
            tree = tree.with_item(key, _node(flags[flag], flag))
    if flags.get("tokenizer_source") is not None and (table := tree.get("tokenizer")) is not None:
        source = table.with_item("source", _node(flags["tokenizer_source"], "tokenizer_source"))
        tree = tree.with_item("tokenizer", source).with_item("tokenizer_source", Node(None, COMMAND_LINE))
    if flags.get("dtype") is not None:
        # Arithmetic is float32 whatever the recipe says; the flag sets the dtype of the output.
        tree = tree.with_item("out_dtype", _node(flags["dtype"], "dtype"))
    tree = _with_models(tree, flags, wrong)
    if flags.get("solve_calibration") is not None:
        table = tree.switched_on("solve") or empty_recipe()
        tree = tree.with_item(
            "solve", table.with_item("calibration", _node(flags["solve_calibration"], "solve_calibration"))
        )
    for assignment in flags.get("parameter", ()):
        with noted(wrong):
            tree = _with_assignment(tree, assignment)
    if (table := tree.switched_on("acm")) is not None:
        tree, flags = _with_acm(tree, table, flags)
    elif own := [flag for flag in ("theta", "normalise") if flags.get(flag) is not None]:
        wrong.append(RecipeError(f"--{own[0]} has no meaning without ACM", "add `--with acm` or `--with both`"))
    with noted(wrong):
        tree = _with_aim(tree, flags)
    if errors is None:
        raise_all(wrong)
    return tree


def relax_recipe(merged: str, flags: dict[str, Any], errors: list[LowmemAimError] | None = None) -> Node:
    """The recipe for AIM, ACM or both on a finished model, with the authors' defaults. Raises as `applied`.

    The model is the one expert of a passthrough merge, which is then relaxed against the base.
    """
    ways = RELAXATIONS[flags.get("relaxations") or "aim"]
    models = Node([Node({"model": Node(merged, COMMAND_LINE)}, COMMAND_LINE)], COMMAND_LINE)
    tree = empty_recipe().with_item("merge_method", Node("passthrough", COMMAND_LINE)).with_item("models", models)
    for way in ways:
        tree = tree.with_item(way, empty_recipe())
    if "aim" not in ways and (own := [flag for flag in _OF_AIM if flags.get(flag) not in (None, ())]):
        flag = own[0].replace("_", "-")
        error = RecipeError(f"--{flag} has no meaning without AIM", hint="`--with both` applies AIM and then ACM")
        if errors is None:
            raise error
        errors.append(error)
        flags = flags | dict.fromkeys(own)
    return applied(tree, flags, errors)


def _with_acm(tree: Node, table: Node, flags: dict[str, Any]) -> tuple[Node, dict[str, Any]]:
    """The tree with ACM's flags in it, and the flags that are left for AIM."""
    if not isinstance(table.value, dict):
        return tree, flags  # the recipe's reader reports it
    with_aim = tree.switched_on("aim") is not None or flags.get("omega") is not None
    for flag, key in ACM_FLAGS.items():
        value = flags.get(flag)
        # A file of activations is for AIM alone; ACM needs texts.
        if value is not None and not (with_aim and str(value).endswith(".safetensors")):
            table = table.with_item(key, _node(value, flag))
    return tree.with_item("acm", table), flags if with_aim else flags | dict.fromkeys(ACM_FLAGS)


def calibration_settings(flags: dict[str, Any]) -> Aim:
    """The settings that the calibration flags alone give. Raises RecipeError."""
    return read_aim(_aim_table(empty_recipe(), _given_aim(flags)))


def _node(value: Any, flag: str) -> Node:
    return Node(value, f"--{flag.replace('_', '-')}")


def _with_models(tree: Node, flags: dict[str, Any], wrong: list[LowmemAimError]) -> Node:
    experts: Sequence[str] = flags.get("expert", ())
    if experts:
        listed = [_expert(expert) for expert in experts]
        tree = tree.with_item("models", _node(listed, "expert"))
        if not flags.get("weight") and not _top_level(tree, "weight") and _takes_weight(tree):
            flags = flags | {"weight": ("1",)}
    for name in ("weight", "density"):
        tree = _with_values(tree, name, flags.get(name, ()), wrong)
    return tree


def _expert(text: str) -> Node:
    """A model as `--expert` names it: `FOLDER`, or `FOLDER=TEXTS` with texts of its own."""
    model, equals, texts = text.rpartition("=")
    if not equals or not model or not texts or os.path.lexists(os.path.expanduser(text)):
        return empty_recipe().with_item("model", _node(text, "expert"))
    return empty_recipe().with_item("model", _node(model, "expert")).with_item("calibration", _node(texts, "expert"))


def _takes_weight(tree: Node) -> bool:
    method = _method(tree)
    return method is not None and "weight" in method.parameters


def _method(tree: Node) -> Method | None:
    """The recipe's method; None for one that the reader will report as unknown."""
    node = tree.get("merge_method")
    try:
        return find_method(node.value) if node is not None and isinstance(node.value, str) else None
    except UsageError:
        return None


def _top_level(tree: Node, name: str) -> bool:
    parameters = tree.get("parameters")
    return parameters is not None and parameters.get(name) is not None


def _with_values(tree: Node, name: str, values: Sequence[str], wrong: list[LowmemAimError]) -> Node:
    """The tree with one value for all experts, or one for each in order; a base that is listed is no expert.

    Any other number of values is noted as wrong, and the first is taken for all.
    """
    models = tree.get("models")
    if values and models is None and (key := next((key for key in ("slices", "modules") if tree.get(key)), "")):
        text = f"--{name} is for recipes that list `models`, and this one has `{key}`"
        wrong.append(RecipeError(text, hint=f"give `{name}` in the recipe, or for all models as `-p {name}=...`"))
    if not values or models is None or not isinstance(models.value, list):
        return tree
    base = tree.get("base_model")
    method = _method(tree)
    counts_base = method is not None and method.base == "listed"
    is_expert = [counts_base or not _is_base(model, base) for model in models.value]
    if len(values) not in (1, sum(is_expert)):
        text = f"--{name}: {len(values)} values for {counted(sum(is_expert), 'expert')}"
        wrong.append(RecipeError(text, hint="give one value for all, or one for each"))
        values = values[:1]
    rest = list(values) * (sum(is_expert) if len(values) == 1 else 1)
    edited = [
        _with_parameter(m, name, rest.pop(0)) if expert else m
        for m, expert in zip(models.value, is_expert, strict=True)
    ]
    return tree.with_item("models", Node(edited, models.where))


def _is_base(model: Node, base: Node | None) -> bool:
    reference = model.get("model")
    found = [Values().model(node, "model") for node in (reference, base)]  # the reader tells of what is wrong
    return found[0] is not None and found[1] is not None and same_reference(found[0], found[1])


def _with_parameter(table: Node, name: str, text: str) -> Node:
    parameters = table.get("parameters") or empty_recipe()
    return table.with_item("parameters", parameters.with_item(name, Node(_scalar(text), f"--{name}")))


def _with_assignment(tree: Node, assignment: str) -> Node:
    """The tree with the parameter of a text such as `lambda=0.5`, for all models. Raises RecipeError otherwise."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise RecipeError(f"--parameter: `{printable(assignment)}` is not NAME=VALUE", "such as `-p lambda=0.5`")
    name, where = OF_PARAMETERS.get(name, name), f"--parameter {printable(name)}"
    for key in ("models", "slices", "modules"):
        if (listed := tree.get(key)) is not None:
            tree = tree.with_item(key, _without_own(listed, name))
    parameters = tree.get("parameters") or empty_recipe()
    return tree.with_item("parameters", parameters.with_item(name, Node(_scalar(text), where)))


def _without_own(node: Node, name: str) -> Node:
    """The models, slices or modules of a recipe, none with a value of its own for a parameter: it would win."""
    if isinstance(node.value, list):
        return replace(node, value=[_without_own(item, name) for item in node.value])
    if not isinstance(node.value, dict):
        return node
    inner = {key: _without_own(value, name) for key, value in node.value.items() if key != "parameters"}
    if (own := node.value.get("parameters")) is not None:
        inner["parameters"] = own if own.get(name) is None else own.with_item(name, Node(None, own.where))
    return replace(node, value=inner)


def _scalar(text: str) -> Any:
    """A flag's value as YAML reads it: a number, true or false, or a text."""
    try:
        tree = parse(text, COMMAND_LINE)
    except (RecipeError, yaml.YAMLError):
        return text
    return text if isinstance(tree.value, list | dict) or tree.others else tree.value


def _omegas(given: Any) -> Any:
    """The omega of a flag such as `0.4`, or a list of several that commas separate."""
    if given is None:
        return None
    values = [_scalar(part.strip()) for part in str(given).split(",")]
    return values if len(values) > 1 else values[0]


def _with_aim(tree: Node, flags: dict[str, Any]) -> Node:
    """The tree with AIM's flags in it. Raises RecipeError for flags that have no meaning without AIM.

    Calibration flags alone do not ask for AIM: that takes an `aim:` key or `--omega`.
    """
    aim, given = tree.switched_on("aim"), _given_aim(flags)
    if aim is None and "omega" not in given:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise RecipeError(f"--{flag} has no meaning without AIM", hint="add `--omega 0.4`, or `aim:` to the recipe")
        return tree
    if aim is not None and not isinstance(aim.value, dict):
        return tree  # the recipe's reader reports it
    table = _aim_table(empty_recipe() if aim is None else aim, given)
    texts = table.get("calibration")
    idle = [flag for flag in _OF_TEXTS if flag in given]
    measured = texts is not None and isinstance(texts.value, str) and is_activations_file(texts.value)
    if idle and measured and tree.switched_on("acm") is None:
        flag = idle[0].replace("_", "-")
        text = f"--{flag} has no meaning with a file of activations, which are measured already"
        raise RecipeError(text, hint="leave it out, or calibrate on texts")
    return tree.with_item("aim", table)


def _given_aim(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of AIM and of calibration that are given, with their values."""
    flags = flags | {"omega": _omegas(flags.get("omega")), "exclude": list(flags.get("exclude", ())) or None}
    return {flag: flags[flag] for flag in AIM_FLAGS if flags.get(flag) is not None}


def _aim_table(table: Node, given: dict[str, Any]) -> Node:
    """An `aim:` table with the given flags in it."""
    for flag, value in given.items():
        items = [_node(item, flag) for item in value] if isinstance(value, list) else value
        table = table.with_item(AIM_FLAGS[flag], _node(items, flag))
    return table
