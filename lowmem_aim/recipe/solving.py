"""The texts that a method which solves measures: the table `solve:`, and `calibration` beside each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.methods.method import Method
from lowmem_aim.recipe.recipe import ModelEntry, Setting, Slice, Solve, texts_of
from lowmem_aim.recipe.relaxations import plain_value
from lowmem_aim.recipe.values import Remark, Values
from lowmem_aim.recipe.words import BUILTIN, is_activations_file
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node
from lowmem_aim.units import counted

SOLVE_KEYS = ("calibration", "samples", "block_size", "seed", "pack", "dtype")
_OWN = "give each model texts such as it was tuned on, as `calibration: texts.jsonl` beside `model:`"
_WITHOUT = "`covariance` solves without texts"
_TELLING = "telling what is kept of each expert"


def own_texts(read: Values, item: Node, meant: Collection[str]) -> str:
    """The `calibration` of a model of the recipe; "" if it has none.

    `meant`: keys of it that are misspelled. In place of a wrong one, which is told, stands `builtin`: texts that are
    wrong are not told as missing, too.
    """
    node = item.get("calibration")
    if node is None or node.value is None:
        return BUILTIN if "calibration" in meant else ""
    return _texts(read, node, plain_value(read, "calibration", node, "model"))


def solve_of(
    read: Values,
    node: Node | None,
    method: Method | None,
    parameters: Mapping[str, Setting],
    slices: Sequence[Slice],
) -> Solve | None:
    """The table `solve:` of a recipe; None if no texts of experts are measured.

    Methods that solve need them; with any other method that has a base, they tell what the merge keeps of each expert.
    Problems are collected in `read`.
    """
    table = _table(read, node) if node is not None else Solve()
    experts = [expert for part in slices for expert in part.experts]
    given = node is not None or any(expert.calibration for expert in experts)
    if method is None or not slices:
        return None
    needed = texts_of(method, parameters, slices) != ""
    if not needed and not given:
        return None
    where = Node(None, slices[0].where)
    name = f"`{method.name}`" if needed else _TELLING
    if any(part.sliced or part.module for part in slices):
        text = f"{name} runs whole models, and this recipe takes layers or modules of them"
        read.problem(where, text, _WITHOUT if needed else "leave the texts of experts out")
    if not slices[0].base and method.base != "required":  # which is told already
        read.problem(where, f"{name} needs a `base_model`: deltas are what is measured", "name it as `base_model`")
    _check_texts(read, table, experts, name, needed=needed)
    return table


def _check_texts(read: Values, table: Solve, experts: Sequence[ModelEntry], name: str, *, needed: bool) -> None:
    """Check that all experts have texts; tell of those that have none of their own, or the same as others."""
    lacking = [expert for expert in experts if not expert.calibration]
    if lacking and not table.calibration:
        names = ", ".join(f"`{printable(expert.reference)}`" for expert in lacking)
        hint = "write `--expert FOLDER=texts.jsonl`" if lacking[0].where == COMMAND_LINE else _OWN
        hint += f"; {_WITHOUT}" if needed else ", or to none: the merge is the same without"
        read.problem(Node(None, lacking[0].where), f"{name} needs texts of {names}", hint)
    note = f": with texts that are nobody's own {name} is hardly more than an average" if needed else ""
    for expert in lacking if table.calibration else ():
        text = f"`{printable(expert.reference)}` has no texts of its own, and {name} takes the shared ones"
        read.notices.append(Remark(expert.where, text + note))
    for texts, count in Counter(expert.calibration for expert in experts if expert.calibration).items():
        if count > 1 and needed:
            text = f"{counted(count, 'expert')} have the same texts, `{printable(texts)}`"
            read.notices.append(Remark(experts[0].where, text + note))


def _table(read: Values, node: Node) -> Solve:
    if not isinstance(node.value, dict):
        read.problem(node, "`solve` must be a table", "such as `solve: {samples: 64}`")
        return Solve()
    read.check_keys(node, SOLVE_KEYS, {})
    values: dict[str, Any] = {
        key: plain_value(read, key, item, "solve")
        for key, item in node.value.items()
        if key in SOLVE_KEYS and item.value is not None
    }
    if "calibration" in values:
        values["calibration"] = _texts(read, node.value["calibration"], values["calibration"])
    return Solve(**{key: value for key, value in values.items() if value is not None})


def _texts(read: Values, node: Node, found: Any) -> str:
    """A name of texts; `builtin` if it was wrong (None), or is that of a file of activations, which is a problem."""
    if isinstance(found, str) and is_activations_file(found):
        text = f"`{printable(found)}` holds activations, and second moments are measured from texts"
        read.problem(node, text, "name a .jsonl or .txt file, `builtin`, or a dataset on the Hub")
        return BUILTIN
    return BUILTIN if found is None else str(found)
