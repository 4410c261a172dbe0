"""mergekit's YAML, read into a frozen Recipe. Every problem is found before any work, with its file and line.

The YAML comes as a tree (`yaml_tree`); command-line flags replace nodes of that tree (`from_flags`), so that a wrong
flag is reported like a wrong line. `read_recipe` then builds the Recipe from the tree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from lowmem_aim.errors import RecipeError, UsageError, did_you_mean, printable
from lowmem_aim.methods.method import Method
from lowmem_aim.methods.registry import METHODS, find_method, names
from lowmem_aim.recipe.recipe import Acm, Aim, ModelEntry, Recipe, Setting, same_reference
from lowmem_aim.recipe.relaxations import acm_table, aim_table
from lowmem_aim.recipe.values import Values
from lowmem_aim.recipe.words import DTYPES
from lowmem_aim.recipe.yaml_tree import Node

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
# Keys of mergekit's that are refused rather than ignored, with the reason.
UNSUPPORTED_KEYS = {
    "slices": "only `models` is supported",
    "modules": "only `models` is supported",
    "tokenizer": "only `tokenizer_source: base` is supported",
    "chat_template": "the base's chat template is copied as it is",
}


class _Reader(Values):
    def __init__(self, root: Node) -> None:
        super().__init__()
        self.root = root

    def recipe(self) -> Recipe:
        if not isinstance(self.root.value, dict):
            raise RecipeError(f"{self.root.where}: a recipe is a table of keys, starting with `merge_method: ...`")
        self.check_keys(self.root, TOP_KEYS, UNSUPPORTED_KEYS)
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
        return Recipe(
            method,
            base,
            tuple(models),
            parameters,
            dtype,
            tokenizer_source,
            aim,
            acm,
            self.root.where,
            tuple(dict.fromkeys(self.notices)),
            tuple(dict.fromkeys(self.preferred)),
            self.sought,
        )

    # -- keys

    def _method(self) -> Method | None:
        node = self.root.get("merge_method")
        if node is None:
            self.problem(self.root, "`merge_method` is missing")
            return None
        name = self.text(node, "merge_method")
        if name is None:
            return None
        try:
            method = find_method(name)
        except UsageError as error:
            self.problem(node, str(error))
            return None
        if method is None:
            self.problem(node, f"unknown merge_method `{printable(name)}`{did_you_mean(name, names())}")
        return method

    def _base(self, method: Method | None) -> str | None:
        base = self.model(self.root.get("base_model"), "base_model")
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
        if method.builds_on(base):  # the base is added in any case; listed or not, it is no expert
            return others
        if method.base == "averaged" and len(others) == len(entries):
            return [ModelEntry(base, {}, self.root.where), *entries]
        return entries

    def _model(self, item: Node, method: Method | None) -> ModelEntry | None:
        if not isinstance(item.value, dict):
            self.problem(item, "a model is a table: `- model: folder-or-id`")
            return None
        self.check_keys(item, ("model", "parameters"), {})
        reference = self.model(item.get("model"), "model")
        if item.get("model") is None:
            self.problem(item, "`model` is missing")
        parameters = self._parameters(item, method)
        return ModelEntry(reference, parameters, item.where) if reference else None

    # -- parameters

    def _parameters(self, table: Node, method: Method | None) -> dict[str, Setting]:
        node = table.get("parameters")
        if node is None:
            return {}
        if not isinstance(node.value, dict):
            self.problem(node, "`parameters` must be a table")
            return {}
        if not method:  # no method: reported already; a name that no method has is wrong in any case
            self._check_names(node, {name for other in METHODS.values() for name in other.parameters})
            return {}
        at_model = table is not self.root
        settings = {}
        for name, value in node.value.items():
            if value.value is None:
                continue  # as if it were absent
            parameter = method.parameters.get(name)
            if parameter is None or (at_model and not parameter.per_expert):
                self._unused_parameter(name, value, method, at_model)
            else:  # after a problem the name is kept, so that it is not reported as missing too
                settings[name] = self.setting(value, parameter) or Setting(None)
        return settings

    def _unused_parameter(self, name: str, node: Node, method: Method, at_model: bool) -> None:
        known = {parameter for other in METHODS.values() for parameter in other.parameters}
        if name in method.parameters:
            self.problem(node, f"`{name}` belongs to the whole merge: move it to the top-level `parameters`")
        elif name in known:  # mergekit ignores these silently
            self.notices.append(f"{node.where}: `{name}` has no meaning for `{method.name}` and is ignored")
        else:
            self.problem(node, f"unknown parameter `{printable(name)}`{did_you_mean(name, method.parameters)}")

    def _check_names(self, table: Node, known: Collection[str]) -> None:
        """Check the parameters' names alone, not their values."""
        for name, node in table.value.items():
            if name not in known:
                self.problem(node, f"unknown parameter `{printable(name)}`{did_you_mean(name, known)}")

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
            value = self.text(node, key)
            if node is not None and value is not None:
                if value not in DTYPES:
                    allowed, near = ", ".join(DTYPES), did_you_mean(value, DTYPES)
                    self.problem(node, f"`{key}` must be one of {allowed}, not `{printable(value)}`{near}")
                chosen = value
        return chosen

    def _tokenizer_source(self, base: str | None) -> str | None:
        node = self.root.get("tokenizer_source")
        source = self.text(node, "tokenizer_source")
        if node is not None and source not in (None, "base"):
            self.problem(node, f"`tokenizer_source: {printable(source or '')}` is not supported: only `base` is")
        elif node is not None and source and base is None:
            self.problem(node, "`tokenizer_source: base` needs a `base_model`")
        return source

    def _aim(self, base: str | None) -> Aim | None:
        node = self._table("aim", "omega: 0.4", base, "its activations are what the merge is relaxed by")
        return aim_table(self, node) if node else None

    def _acm(self, base: str | None, aim: Aim | None) -> Acm | None:
        node = self._table("acm", "theta: 0.7", base, "its outputs are what the merge is compared with")
        return acm_table(self, node, aim) if node else None

    def _table(self, key: str, example: str, base: str | None, needed: str) -> Node | None:
        """A relaxation's table; None if the recipe has none, or has something else in its place."""
        node = self.root.switched_on(key)
        if node is None:
            return None
        if not isinstance(node.value, dict):
            self.problem(node, f"`{key}` must be a table, or `false`, such as `{key}: {{{example}}}`")
            return None
        if base is None:
            self.problem(node, f"`{key}` needs a `base_model`: {needed}")
        return node


def _line_of(problem: str) -> int:
    """The line number at the start of a problem; 0 for flags, which have none and so come first."""
    match = re.match(r".*?:(\d+): ", problem)
    return int(match[1]) if match else 0


def read_aim(table: Node) -> Aim:
    """Build an Aim from an `aim:` table alone. Raises RecipeError with every problem at once."""
    read = Values()
    aim = aim_table(read, table)
    if read.problems:
        raise RecipeError(read.problems)
    return aim


def read_recipe(root: Node) -> Recipe:
    """Build a Recipe from its tree. Raises RecipeError with every problem at once."""
    return _Reader(root).recipe()
