"""The texts that a method which solves measures: the table `solve:`, and `calibration` beside each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.methods.method import Method
from lowmem_aim.recipe.recipe import ModelEntry, Slice, Solve
from lowmem_aim.recipe.relaxations import plain_value
from lowmem_aim.recipe.values import Remark, Values
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node

SOLVE_KEYS = ("calibration", "samples", "block_size", "seed", "pack", "dtype")
_OWN = "give each model texts such as it was tuned on, as `calibration: texts.jsonl` beside `model:`"
_WITHOUT = "`covariance` solves without texts"


def own_texts(read: Values, item: Node) -> str:
    """The `calibration` of a model of the recipe: "" if it has none, or a wrong one, which is told."""
    node = item.get("calibration")
    if node is None or node.value is None:
        return ""
    return str(_texts(read, node, plain_value(read, "calibration", node, "model")) or "")


def solve_of(
    read: Values, node: Node | None, method: Method | None, slices: Sequence[Slice], *, by_flags: bool, acm: bool
) -> Solve | None:
    """The table `solve:` of a recipe; None if the method measures no texts.

    Problems are collected in `read`: texts without a meaning, or that are missing.
    """
    table = _table(read, node) if node is not None else Solve()
    experts = [expert for part in slices for expert in part.experts]
    if method is None:
        return None
    if not method.texts:
        _tell_idle(read, node, method, experts)
        return None
    if any(part.sliced or part.module for part in slices):
        text = f"`{method.name}` runs whole models, and this recipe takes layers or modules of them"
        read.problem(Node(None, slices[0].where), text, _WITHOUT)
    if acm:
        text = f"`acm` compares a merged model before it is made, and `{method.name}` makes it block by block"
        read.problem(Node(None, slices[0].where if slices else ""), text, f"leave `acm` out; {_WITHOUT}")
    lacking = [expert for expert in experts if not expert.calibration]
    if lacking and not table.calibration:
        where = Node(None, lacking[0].where)
        names = ", ".join(f"`{printable(expert.reference)}`" for expert in lacking)
        flags = "write `--expert FOLDER=texts.jsonl`" if by_flags else _OWN
        read.problem(where, f"`{method.name}` needs texts of {names}", f"{flags}; {_WITHOUT}")
    for expert in lacking if table.calibration else ():
        text = f"`{printable(expert.reference)}` has no texts of its own, and `{method.name}` takes those of `solve`"
        note = "with texts that are nobody's own it is hardly more than an average"
        read.notices.append(Remark(expert.where, f"{text}: {note}"))
    return table


def texts_of(solve: Solve, expert: ModelEntry) -> Solve:
    """The settings by which the texts of one expert are read: its own, or the shared ones."""
    return replace(solve, calibration=expert.calibration or solve.calibration)


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


def _texts(read: Values, node: Node, found: Any) -> Any:
    """A name of texts; a file of activations is a problem, and gives None."""
    if isinstance(found, str) and is_activations_file(found):
        text = f"`{printable(found)}` holds activations, and second moments are measured from texts"
        read.problem(node, text, "name a .jsonl or .txt file, `builtin`, or a dataset on the Hub")
        return None
    return found


def _tell_idle(read: Values, node: Node | None, method: Method, experts: Sequence[ModelEntry]) -> None:
    """Tell of texts that the method does not measure: a notice or, of a flag, a problem."""
    places = [node.where] if node is not None else []
    places += [expert.where for expert in experts if expert.calibration]
    for where in places[:1]:
        text = f"texts of experts have no meaning for `{method.name}`, which measures none"
        if where == COMMAND_LINE or (node is not None and _by_flag(node)):
            read.problem(Node(None, where), text, "leave them out, or choose `regmean`")
        else:
            read.notices.append(Remark(where, text))


def _by_flag(node: Node) -> bool:
    texts = node.get("calibration")
    return texts is not None and texts.by_flag
