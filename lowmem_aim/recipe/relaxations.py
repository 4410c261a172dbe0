"""The tables `aim:` and `acm:` of a recipe, read into Aim and Acm."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowmem_aim.errors import did_you_mean, printable
from lowmem_aim.methods.method import Parameter
from lowmem_aim.recipe.recipe import DEFAULT_OMEGA, Acm, Aim, Setting
from lowmem_aim.recipe.values import Remark, Values, no_name
from lowmem_aim.recipe.words import BUILTIN, CONTROLS, DTYPES, NORMALISATIONS, PERMUTED, SCALINGS, SHORT_DTYPES
from lowmem_aim.recipe.yaml_tree import Node

AIM_KEYS = (
    *("omega", "scaling", "exclude", "control", "control_seed", "calibration", "samples", "block_size", "seed"),
    *("pack", "tied", "dtype"),
)
ACM_KEYS = ("theta", "normalise", "calibration", "samples", "dtype")
_WORDS: dict[str, tuple[str, ...]] = {
    "scaling": SCALINGS,
    "control": CONTROLS,
    "tied": ("relax", "keep"),
    "dtype": DTYPES,
    "normalise": NORMALISATIONS,
}
_OMEGA = Parameter("aim.omega", per_expert=False, kind="number", default=DEFAULT_OMEGA, low=0.0, high=1.0)
_OMEGA_HINT = f"1 changes nothing, 0 freezes the most active channels; {DEFAULT_OMEGA} is the authors' choice"
_THETA = Parameter("acm.theta", per_expert=False, kind="number", default=0.7, low=0.0, high=100.0)


def aim_table(read: Values, node: Node) -> Aim:
    """Build an Aim from an `aim` table. Problems are collected in `read`, and keys with one keep their defaults."""
    read.check_keys(node, AIM_KEYS, {})
    keys = {key: item for key, item in node.value.items() if key in AIM_KEYS and item.value is not None}
    readers: dict[str, Callable[[Values, Node], Any]] = {"omega": _omega, "exclude": _exclude}
    checked: dict[str, Any] = {
        key: readers[key](read, item) if key in readers else plain_value(read, key, item) for key, item in keys.items()
    }
    if isinstance(checked.get("omega"), tuple):
        checked["omegas"] = checked.pop("omega")
    if "control_seed" in keys and _draws_nothing(keys.get("control")):
        _tell_idle_seed(read, keys["control_seed"])
        del checked["control_seed"]
    return Aim(**{key: value for key, value in checked.items() if value is not None})


def _draws_nothing(control: Node | None) -> bool:
    """Whether there is no control, or one that is not drawn; one that is misspelled may be meant to be."""
    return control is None or (control.value in CONTROLS and control.value != PERMUTED)


def _tell_idle_seed(read: Values, node: Node) -> None:
    """Tell of a `control_seed` that nothing is drawn with: a notice or, of a flag, a problem."""
    text = f"`aim.control_seed` has no meaning without `control: {PERMUTED}`, the only one that is drawn"
    if node.by_flag:
        read.problem(node, text, f"add `--control {PERMUTED}`, or leave it out")
    else:
        read.notices.append(Remark(node.where, text))


def acm_table(read: Values, node: Node, aim: Aim | None) -> Acm:
    """Build an Acm from an `acm` table; problems are collected as in `aim_table`.

    A missing `calibration` or `dtype` is that of `aim`, except that a file of activations is not taken.
    """
    read.check_keys(node, ACM_KEYS, {})
    checked = {
        key: _acm_value(read, key, item)
        for key, item in node.value.items()
        if key in ACM_KEYS and item.value is not None
    }
    acm = Acm(**{key: value for key, value in checked.items() if value is not None})
    if aim is None:
        return acm
    texts = "" if aim.calibration.endswith(".safetensors") else aim.calibration
    return replace(acm, calibration=acm.calibration or texts, dtype=acm.dtype or aim.dtype)


def _omega(read: Values, node: Node) -> Setting | tuple[float, ...] | None:
    """A number or filters as a Setting; several numbers, one for each output, as a tuple; None after a problem."""
    if not isinstance(node.value, list) or any(isinstance(item.value, dict) for item in node.value):
        return read.setting(node, _OMEGA, _OMEGA_HINT)
    values = [read.value(item, _OMEGA, _OMEGA_HINT) for item in node.value]
    if not values:
        read.problem(node, "`aim.omega` is an empty list")
    for value, item in zip(values, node.value, strict=True):
        if value is not None and not isinstance(value, int | float):
            read.problem(
                item, "`aim.omega`: a gradient is `- value: [...]`, as in a filter; a list gives several outputs"
            )
        elif value is not None and values.count(value) > 1:
            read.problem(item, f"`aim.omega` has {value:g} twice")
    right = all(isinstance(value, int | float) for value in values)
    return tuple(float(value) + 0.0 for value in values) if right else None  # -0.0 + 0.0 is 0.0: no folder `omega--0`


def _exclude(read: Values, node: Node) -> tuple[str, ...] | None:
    items = node.value if isinstance(node.value, list) else [node]
    wrong = [item for item in items if not isinstance(item.value, str) or not item.value]
    for item in wrong:
        read.problem(item, "`aim.exclude` must be a list of parts of tensor names, such as `[lm_head, norm]`")
    return None if wrong else tuple(item.value for item in items)


def _near(key: str, value: str) -> str:
    return did_you_mean(value, _WORDS.get(key, ()), SHORT_DTYPES if key == "dtype" else None)


def _acm_value(read: Values, key: str, node: Node) -> Any:
    """One value of the `acm` table, checked; None after a problem."""
    if key == "theta":
        if not isinstance(node.value, list):
            return read.value(node, _THETA)
        read.problem(node, "`acm.theta` must be a number: it is the same for all layers")
        return None
    return plain_value(read, key, node, "acm")


def plain_value(read: Values, key: str, node: Node, table: str = "aim") -> Any:
    """One value of the `aim` table, or of a key that another table shares with it, checked; None after a problem."""
    value = node.value
    whole = isinstance(value, int) and not isinstance(value, bool)
    correct = {
        **{name: (value in known, f"one of {', '.join(known)}") for name, known in _WORDS.items()},
        "calibration": (
            isinstance(value, str) and bool(value) and not no_name(value),
            "a file, `builtin`, or a Hub dataset id",
        ),
        "samples": (whole and value > 0, "a whole number above 0"),
        "block_size": (whole and value >= 16, "a whole number, 16 or more"),
        **dict.fromkeys(("seed", "control_seed"), (whole and 0 <= value < 1 << 32, "a whole number in [0, 2^32)")),
        "pack": (isinstance(value, bool), "true or false"),
    }
    right, what = correct[key]
    if not right:
        kinds: dict[type, str] = {list: "a list", dict: "a table"}
        shown = kinds.get(type(value)) or f"`{printable(str(value))}`"
        near = _near(key, value) if isinstance(value, str) else ""
        read.problem(node, f"`{table}.{key}` must be {what}, not {shown}{near}")
        return None
    if key != "calibration" or value == BUILTIN:
        return value
    path = read.placed(node, value, os.path.lexists)
    read.note_place(node, path)
    return path
