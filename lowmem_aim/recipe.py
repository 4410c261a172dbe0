"""mergekit's YAML -> a frozen Recipe. Every problem is found, and named with its file and line, before anything runs.

The YAML comes as a tree (`yaml_tree`); command-line flags replace nodes of that tree, so that a wrong flag is reported
like a wrong line. `read_recipe` then builds the Recipe from the tree.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem_aim.errors import RecipeError, UsageError, printable
from lowmem_aim.methods import METHODS, Method, Parameter, find_method
from lowmem_aim.methods.extensions import names
from lowmem_aim.relax.acm import NORMALISATIONS, Normalise
from lowmem_aim.relax.aim import SCALINGS
from lowmem_aim.yaml_tree import Node

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "aim",
    "acm",
)
ACM_KEYS = ("theta", "normalise", "calibration", "samples", "dtype")
AIM_KEYS = (
    "omega",
    "scaling",
    "exclude",
    "calibration",
    "samples",
    "block_size",
    "seed",
    "pack",
    "tied",
    "dtype",
)
# mergekit's, and why they are refused rather than ignored.
UNSUPPORTED_KEYS = {
    "slices": "only `models` is supported",
    "modules": "only `models` is supported",
    "tokenizer": "only `tokenizer_source: base` is supported",
    "chat_template": "the base's chat template is copied as it is",
}
DTYPES = ("float32", "float16", "bfloat16")
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes; what systems take
DEFAULT_OMEGA = 0.4  # the authors'; they recommend 0.2 to 0.6
_THETA = Parameter("acm.theta", per_expert=False, kind="number", default=0.7, low=0.0, high=100.0)
_OMEGA = Parameter("aim.omega", per_expert=False, kind="number", default=DEFAULT_OMEGA, low=0.0, high=1.0)


@dataclass(frozen=True)
class Setting:
    """A parameter's value as the recipe gives it: a scalar, a gradient over the layers, or filters on tensor names."""

    value: Any  # a scalar, a tuple of numbers, or a tuple of (filter, scalar or tuple of numbers)
    filtered: bool = False
    where: str = field(default="", compare=False)

    def at(self, tensor: str, t: float) -> Any:
        """The value for a tensor at depth t in [0, 1]; None if no filter matches."""
        if not self.filtered:
            return _on_gradient(self.value, t)
        for pattern, value in self.value:
            if pattern in ("", "*") or pattern in tensor:
                return _on_gradient(value, t)
        return None


def _on_gradient(value: Any, t: float) -> Any:
    """Piecewise linear through the values of a list, evenly spread over [0, 1]."""
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    left = min(int(place), max(len(value) - 2, 0))
    right = min(left + 1, len(value) - 1)
    return value[left] + (value[right] - value[left]) * (place - left)


@dataclass(frozen=True)
class ModelEntry:
    """One model of the recipe: a local folder or a Hub id with `@revision`."""

    reference: str
    parameters: Mapping[str, Setting]
    where: str


@dataclass(frozen=True)
class Aim:
    """The `aim:` key. `calibration` "" is the authors' Pile set."""

    omega: Setting | tuple[float, ...] = Setting(DEFAULT_OMEGA)  # several: an output for each
    scaling: str = "identity"
    exclude: tuple[str, ...] = ()  # parts of the names of weights that are not relaxed
    calibration: str = ""
    samples: int = 256
    block_size: int = 512
    seed: int = 42
    pack: bool = True
    tied: str = "relax"
    dtype: str = ""  # of the calibration's forward; "" is the checkpoint's

    def omega_at(self, tensor: str, t: float) -> float:
        """For a tensor at depth t in [0, 1]; the default where no filter matches."""
        assert isinstance(self.omega, Setting)
        value = self.omega.at(tensor, t)
        return DEFAULT_OMEGA if value is None else float(value)


@dataclass(frozen=True)
class Acm:
    """The `acm:` key. `calibration` "" is that of `aim`, or else the authors' Pile set."""

    theta: float = 0.7  # the authors' for most sizes; 1.2 for 14B
    normalise: Normalise = "samples"
    calibration: str = ""
    samples: int = 100
    dtype: str = ""  # of both forwards; "" is AIM's, or else the base's


@dataclass(frozen=True)
class Recipe:
    """What to merge. `models` are the experts, and the base only where the method merges it as one of them."""

    method: Method
    base: str | None
    models: tuple[ModelEntry, ...]
    parameters: Mapping[str, Setting]
    dtype: str | None
    tokenizer_source: str | None
    aim: Aim | None
    acm: Acm | None
    where: str
    notices: tuple[str, ...] = field(default=(), compare=False)

    @property
    def builds_on_base(self) -> bool:
        return self.method.builds_on(self.base)

    def resolve(self, tensor: str, t: float) -> dict[str, Any]:
        """The method's parameters for one tensor at depth t: model > top level > default, by recipe name."""
        resolved: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            if parameter.per_expert:
                resolved[name] = tuple(self._lookup(parameter, tensor, t, model.parameters) for model in self.models)
            else:
                resolved[name] = self._lookup(parameter, tensor, t, {})
        return resolved

    def _lookup(self, parameter: Parameter, tensor: str, t: float, own: Mapping[str, Setting]) -> Any:
        where = self.where
        for settings in (own, self.parameters):
            setting = settings.get(parameter.name)
            where = setting.where if setting else where
            value = setting.at(tensor, t) if setting else None
            if value is not None:
                return float(value) if parameter.kind == "number" else value
        if parameter.required:
            raise RecipeError(
                f"{where}: `{parameter.name}` has no value for `{printable(tensor)}`",
                hint="end its list of filters with a plain `- value: ...`",
            )
        return parameter.default


def one_by_one(recipe: Recipe) -> dict[str, Recipe]:
    """Folder within the output -> the recipe of what goes there. "" is the output itself, if there is one omega."""
    if recipe.aim is None or isinstance(recipe.aim.omega, Setting):
        return {"": recipe}
    return {
        f"omega-{omega!r}".removesuffix(".0"): replace(recipe, aim=replace(recipe.aim, omega=Setting(omega)))
        for omega in recipe.aim.omega
    }


class _Reader:
    """Builds the Recipe and collects what is wrong with it."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.problems: list[str] = []
        self.notices: list[str] = []

    def problem(self, node: Node, text: str) -> None:
        self.problems.append(f"{node.where}: {text}")

    def recipe(self) -> Recipe:
        if not isinstance(self.root.value, dict):
            raise RecipeError(f"{self.root.where}: a recipe is a table of keys, starting with `merge_method: ...`")
        self._check_keys(self.root, TOP_KEYS, UNSUPPORTED_KEYS)
        method = self._method()
        base = self._base(method)
        models = self._models(method, base)
        parameters = self._parameters(self.root, method)
        aim = self._aim(base)
        acm = self._acm(base, aim)
        dtype = self._dtype()
        tokenizer_source = self._tokenizer_source(base)
        if method:
            self._check_counts(method, base, models)
            self._check_required(method, models, parameters)
        if self.problems or not method:
            raise RecipeError(sorted(self.problems, key=_line_of))
        where, notices = self.root.where, tuple(dict.fromkeys(self.notices))
        return Recipe(method, base, tuple(models), parameters, dtype, tokenizer_source, aim, acm, where, notices)

    # -- keys

    def _check_keys(self, table: Node, known: Sequence[str], unsupported: Mapping[str, str]) -> None:
        for key, node in table.value.items():
            if key in unsupported:
                self.problem(node, f"`{key}` is not supported: {unsupported[key]}")
            elif key not in known:
                self.problem(node, f"unknown key `{printable(key)}`{did_you_mean(key, known)}")

    def _text(self, node: Node | None, what: str) -> str | None:
        if node is None or node.value is None:
            return None
        value = node.value
        if isinstance(value, dict) and set(value) == {"path"}:  # mergekit's long form of a model reference
            value = value["path"].value
        if not isinstance(value, str) or not value.strip():
            self.problem(node, f"`{what}` must be a text")
            return None
        if wrong := _no_name(value.strip()):
            self.problem(node, f"`{what}`: `{printable(value)}` {wrong}")
            return None
        return value.strip()

    def _method(self) -> Method | None:
        node = self.root.get("merge_method")
        if node is None:
            self.problem(self.root, "`merge_method` is missing")
            return None
        name = self._text(node, "merge_method") or ""
        try:
            method = find_method(name)
        except UsageError as error:
            self.problem(node, str(error))
            return None
        if method is None:
            self.problem(node, f"unknown merge_method `{printable(name)}`{did_you_mean(name, names())}")
        return method

    def _base(self, method: Method | None) -> str | None:
        base = self._text(self.root.get("base_model"), "base_model")
        if base is None and method and method.base == "required":
            self.problem(self.root, f"`{method.name}` needs a `base_model`")
        return base

    def _models(self, method: Method | None, base: str | None) -> list[ModelEntry]:
        node = self.root.get("models")
        if node is None or not isinstance(node.value, list) or not node.value:
            self.problem(node or self.root, "`models` must be a list with at least one model")
            return []
        entries = [entry for item in node.value if (entry := self._model(item, method))]
        if not method or base is None:
            return entries
        others = [entry for entry in entries if not same_reference(entry.reference, base)]
        if method.builds_on(base):  # it is added by itself; listed or not, it is no expert
            return others
        if method.base == "averaged" and len(others) == len(entries):
            return [ModelEntry(base, {}, self.root.where), *entries]
        return entries

    def _model(self, item: Node, method: Method | None) -> ModelEntry | None:
        if not isinstance(item.value, dict):
            self.problem(item, "a model is a table: `- model: folder-or-id`")
            return None
        self._check_keys(item, ("model", "parameters"), {})
        reference = self._text(item.get("model"), "model")
        if item.get("model") is None:
            self.problem(item, "`model` is missing")
        parameters = self._parameters(item, method)
        return ModelEntry(reference, parameters, item.where) if reference else None

    # -- parameters

    def _parameters(self, table: Node, method: Method | None) -> dict[str, Setting]:
        node = table.get("parameters")
        if node is None or node.value is None or not method:
            return {}
        if not isinstance(node.value, dict):
            self.problem(node, "`parameters` must be a table")
            return {}
        at_model = table is not self.root
        settings = {}
        for name, value in node.value.items():
            parameter = method.parameters.get(name)
            if parameter is None or (at_model and not parameter.per_expert):
                self._unused_parameter(name, value, method, at_model)
            else:  # after a problem: present all the same, so that it is not called missing as well
                settings[name] = self._setting(value, parameter) or Setting(None)
        return settings

    def _unused_parameter(self, name: str, node: Node, method: Method, at_model: bool) -> None:
        known = {parameter for other in METHODS.values() for parameter in other.parameters}
        if name in method.parameters:
            self.problem(node, f"`{name}` belongs to the whole merge: move it to the top-level `parameters`")
        elif name in known:  # mergekit ignores these silently
            self.notices.append(f"{node.where}: `{name}` has no meaning for `{method.name}` and is ignored")
        else:
            self.problem(node, f"unknown parameter `{printable(name)}`{did_you_mean(name, method.parameters)}")

    def _setting(self, node: Node, parameter: Parameter) -> Setting | None:
        filtered = isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value)
        if not filtered:
            value = self._value(node, parameter)
            return None if value is None else Setting(value)
        rules = []
        for item in node.value:
            rule = item if isinstance(item.value, dict) else item.with_item("value", item)
            self._check_keys(rule, ("filter", "value"), {})
            pattern, value_node = rule.get("filter"), rule.get("value")
            if value_node is None:
                self.problem(rule, f"a filter of `{parameter.name}` needs a `value`")
                continue
            if pattern is not None and not (isinstance(pattern.value, str) and pattern.value):
                self.problem(pattern, f"a filter of `{parameter.name}` must be a part of tensor names, or `*`")
                continue
            rules.append((pattern.value if pattern else "", self._value(value_node, parameter)))
        return Setting(tuple(rules), filtered=True, where=node.where)

    def _value(self, node: Node, parameter: Parameter) -> Any:
        """A scalar or a gradient, checked; None after a problem."""
        if isinstance(node.value, list):
            values = [self._value(item, parameter) for item in node.value]
            if parameter.kind != "number" or not values or not all(isinstance(v, int | float) for v in values):
                self.problem(node, f"`{parameter.name}` cannot be this list")
                return None
            return tuple(values)
        value = _number(node.value) if parameter.kind == "number" else node.value
        wrong = parameter.problem(value)
        if wrong:
            self.problem(node, wrong)
            return None
        return value

    def _check_counts(self, method: Method, base: str | None, models: Sequence[ModelEntry]) -> None:
        if not models and self.root.get("models") is not None and not self.problems:
            self.problem(self.root, "there is no expert: only the base is listed")
        elif len(models) < method.fewest or (method.most is not None and len(models) > method.most):
            wanted = f"exactly {method.most}" if method.fewest == method.most else f"at least {method.fewest}"
            besides = " besides the base" if method.builds_on(base) else ""
            self.problem(self.root, f"`{method.name}` takes {wanted} model(s){besides}, not {len(models)}")

    def _check_required(self, method: Method, models: Sequence[ModelEntry], top: Mapping[str, Setting]) -> None:
        for name, parameter in method.parameters.items():
            if not parameter.required or name in top:
                continue
            if parameter.per_expert:
                lacking = [model for model in models if name not in model.parameters]
                self.problems += [f"{m.where}: `{printable(m.reference)}` needs a `{name}`" for m in lacking]
            else:
                self.problem(self.root, f"`{method.name}` needs the parameter `{name}`")

    # -- the rest

    def _dtype(self) -> str | None:
        chosen = None
        for key in ("dtype", "out_dtype"):  # out_dtype wins
            node = self.root.get(key)
            value = self._text(node, key)
            if node is not None and value is not None:
                if value not in DTYPES:
                    self.problem(node, f"`{key}` must be one of {', '.join(DTYPES)}, not `{printable(value)}`")
                chosen = value
        return chosen

    def _tokenizer_source(self, base: str | None) -> str | None:
        node = self.root.get("tokenizer_source")
        source = self._text(node, "tokenizer_source")
        if node is not None and source not in (None, "base"):
            self.problem(node, f"`tokenizer_source: {printable(source or '')}` is not supported: only `base` is")
        elif node is not None and source and base is None:
            self.problem(node, "`tokenizer_source: base` needs a `base_model`")
        return source

    def _aim(self, base: str | None) -> Aim | None:
        node = self.root.get("aim")
        if node is None:
            return None
        if not isinstance(node.value, dict):
            self.problem(node, "`aim` must be a table, such as `aim: {omega: 0.4}`")
            return None
        if base is None:
            self.problem(node, "`aim` needs a `base_model`: its activations are what the merge is relaxed by")
        return self.aim_table(node)

    def aim_table(self, node: Node) -> Aim:
        """The values of an `aim` table; problems are collected, and their keys left at the defaults."""
        self._check_keys(node, AIM_KEYS, {})
        keys = {key: item for key, item in node.value.items() if key in AIM_KEYS}
        readers: dict[str, Callable[[Node], Any]] = {"omega": self._omega, "exclude": self._exclude}
        checked: dict[str, Any] = {
            key: readers[key](item) if key in readers else self._aim_value(key, item) for key, item in keys.items()
        }
        return Aim(**{key: value for key, value in checked.items() if value is not None})

    def _omega(self, node: Node) -> Setting | tuple[float, ...] | None:
        """A number, filters, or several numbers: an output for each; None after a problem."""
        if not isinstance(node.value, list) or any(isinstance(item.value, dict) for item in node.value):
            return self._setting(node, _OMEGA)
        values = [self._value(item, _OMEGA) for item in node.value]
        if not values:
            self.problem(node, "`aim.omega` is an empty list")
        for value, item in zip(values, node.value, strict=True):
            if value is not None and not isinstance(value, int | float):
                self.problem(
                    item, "`aim.omega`: a gradient is `- value: [...]`, as in a filter; a list is several merges"
                )
            elif values.count(value) > 1:
                self.problem(item, f"`aim.omega` has {value:g} twice")
        right = all(isinstance(value, int | float) for value in values)
        return tuple(float(value) + 0.0 for value in values) if right else None  # -0.0 would have a folder of its own

    def _exclude(self, node: Node) -> tuple[str, ...] | None:
        items = node.value if isinstance(node.value, list) else [node]
        wrong = [item for item in items if not isinstance(item.value, str) or not item.value]
        for item in wrong:
            self.problem(item, "`aim.exclude` must be parts of tensor names, such as `[lm_head, norm]`")
        return None if wrong else tuple(item.value for item in items)

    def _acm(self, base: str | None, aim: Aim | None) -> Acm | None:
        node = self.root.get("acm")
        if node is None:
            return None
        if not isinstance(node.value, dict):
            self.problem(node, "`acm` must be a table, such as `acm: {theta: 0.7}`")
            return None
        if base is None:
            self.problem(node, "`acm` needs a `base_model`: its outputs are what the merge is compared with")
        self._check_keys(node, ACM_KEYS, {})
        checked = {key: self._acm_value(key, item) for key, item in node.value.items() if key in ACM_KEYS}
        acm = Acm(**{key: value for key, value in checked.items() if value is not None})
        if aim is None:
            return acm
        texts = "" if aim.calibration.endswith(".safetensors") else aim.calibration
        return replace(acm, calibration=acm.calibration or texts, dtype=acm.dtype or aim.dtype)

    def _acm_value(self, key: str, node: Node) -> Any:
        """One value of the `acm` table, checked; None after a problem."""
        if key == "theta":
            if not isinstance(node.value, list):
                return self._value(node, _THETA)
            self.problem(node, "`acm.theta` must be a number: it is the same for all layers")
            return None
        if key == "normalise":
            if node.value in NORMALISATIONS:
                return node.value
            self.problem(node, f"`acm.normalise` must be one of {', '.join(NORMALISATIONS)}")
            return None
        return self._aim_value(key, node, "acm")

    def _aim_value(self, key: str, node: Node, table: str = "aim") -> Any:
        """One value of the `aim` table, or one that `acm` has too, checked; None after a problem."""
        value = node.value
        whole = isinstance(value, int) and not isinstance(value, bool)
        correct = {
            "scaling": (value in SCALINGS, f"one of {', '.join(SCALINGS)}"),
            "calibration": (
                isinstance(value, str) and bool(value) and not _no_name(value),
                "a file, `builtin`, or a Hub dataset id",
            ),
            "samples": (whole and value > 0, "a whole number above 0"),
            "block_size": (whole and value >= 16, "a whole number, 16 or more"),
            "seed": (whole and 0 <= value < 1 << 32, "a whole number in [0, 2^32)"),
            "pack": (isinstance(value, bool), "true or false"),
            "tied": (value in ("relax", "keep"), "`relax` or `keep`"),
            "dtype": (value in DTYPES, f"one of {', '.join(DTYPES)}"),
        }
        right, what = correct[key]
        if not right:
            shown = "a list" if isinstance(value, list) else f"`{printable(str(value))}`"
            self.problem(node, f"`{table}.{key}` must be {what}, not {shown}")
            return None
        return value


def _no_name(text: str) -> str:
    """Why a text can be no path and no Hub id; empty if it can."""
    try:
        parts = text.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return "is not Unicode"
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in parts):
        return "is too long for a path"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return "is of a user who is not known here"
    return ""


def _line_of(problem: str) -> int:
    """The line number at the head of a problem; flags, which have none, come first."""
    match = re.match(r".*?:(\d+): ", problem)
    return int(match[1]) if match else 0


def read_aim(table: Node) -> Aim:
    """The `aim:` table alone -> Aim. Raises RecipeError with every problem at once."""
    reader = _Reader(table)
    aim = reader.aim_table(table)
    if reader.problems:
        raise RecipeError(reader.problems)
    return aim


def same_reference(a: str, b: str) -> bool:
    """Whether two references mean one model, however written: `./base/`, `base`, `/models/base` or a link to it."""
    paths = [os.path.realpath(os.path.expanduser(reference)) for reference in (a, b)]
    return paths[0] == paths[1]


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def read_recipe(root: Node) -> Recipe:
    """Tree -> Recipe. Raises RecipeError with every problem at once."""
    return _Reader(root).recipe()
