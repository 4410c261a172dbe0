"""mergekit's YAML, read into a frozen Recipe. Every problem is found before any work, with its file and line.

The YAML comes as a tree (`yaml_tree`); command-line flags replace nodes of that tree (`from_flags`), so that a wrong
flag is reported like a wrong line. `read_recipe` then builds the Recipe from the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lowmem_aim.errors import RecipeError, UsageError, did_you_mean, nearest, printable
from lowmem_aim.methods.method import Method
from lowmem_aim.methods.registry import METHODS, find_method, names
from lowmem_aim.recipe.recipe import Acm, Aim, ModelEntry, Recipe, Setting
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.recipe.relaxations import acm_table, aim_table
from lowmem_aim.recipe.values import Remark, Values, together
from lowmem_aim.recipe.words import DTYPES, SHORT_DTYPES
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node

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
_WHOLE = "list whole models under `models`, or merge this recipe with mergekit"
# Keys of mergekit's that are refused rather than ignored -> why, and what to do.
UNSUPPORTED_KEYS = {
    "slices": ("models are merged whole, not by ranges of layers", _WHOLE),
    "modules": ("models are merged whole, not by modules", _WHOLE),
    "experts": ("a mixture of experts cannot be made", "`lowmem-aim methods` lists the ways to merge models"),
    "tokenizer": ("only `tokenizer_source: base` is", "leave it out, or write `tokenizer_source: base`"),
    "chat_template": ("the base's chat template is copied as it is", "leave it out"),
}
# Those that stand in the place of `models`, and sometimes of `merge_method`; and what stands beside `experts`.
INSTEAD_OF_MODELS = ("slices", "modules", "experts")
BESIDE_EXPERTS = ("gate_mode", "experts_per_token", "shared_experts")
_EXAMPLE = "a recipe starts with `merge_method: ...`; docs/recipe.md has examples"


class _Reader(Values):
    def __init__(self, root: Node) -> None:
        super().__init__()
        self.root = root
        self.by_flags = root.where == COMMAND_LINE
        self.meant: set[str] = set()  # keys that are there, but misspelled
        self.all_read = True  # the list of models, with nothing missing
        self.misspelled = False  # the `parameters` of a model

    def recipe(self) -> Recipe | None:
        """The recipe; with `problems`, without the values that are wrong; None if no method or no model is left."""
        if not self._is_recipe():
            return None
        self.meant = self.check_keys(self.root, (*TOP_KEYS, *self._beside()), UNSUPPORTED_KEYS)
        method = self._method()
        base = self._base(method)
        models = self._models(method, base)
        parameters = self._parameters(self.root, method)
        aim = self._aim(base)
        acm = self._acm(base, aim)
        dtype = self._dtype()
        tokenizer_source = self._tokenizer_source(base)
        if method and self.all_read:
            self._check_counts(method, base, models)
            self._check_required(method, models, parameters)
        if not models:
            return None
        return Recipe(
            method or METHODS["linear"],  # beside the problem of a wrong one, so that the models can be looked at
            base,
            tuple(models),
            parameters,
            dtype,
            tokenizer_source,
            aim,
            acm,
            self.root.where,
            tuple(together(self.notices)),
            tuple(dict.fromkeys(self.preferred)),
            self.sought,
        )

    def _is_recipe(self) -> bool:
        """Whether anything of a recipe is there; if not, that is the one problem."""
        keys = self.root.value
        if not isinstance(keys, dict):
            self.problem(self.root, "a recipe is a table of keys", _EXAMPLE)
        elif self.by_flags and not keys:
            hint = "give a recipe (`recipe.yml out/`), or name `--method`, `--base`, and each model with `--expert`"
            self.problem(self.root, "there is neither a recipe nor a `--method`", hint)
        elif not keys:
            self.problem(self.root, "this recipe is empty", _EXAMPLE)
        elif not any(key in TOP_KEYS or key in UNSUPPORTED_KEYS or nearest(key, TOP_KEYS) for key in keys):
            listed = ", ".join(f"`{printable(key, 40)}`" for key in [*keys][:5])
            self.problem(self.root, f"this is not a recipe: its keys are {listed}", _EXAMPLE)
        return not self.problems

    def _beside(self) -> tuple[str, ...]:
        return BESIDE_EXPERTS if self.root.get("experts") else ()

    def _has_others(self) -> bool:
        """Whether the models are given in a way that is not supported: what else is missing follows from that."""
        return any(self.root.get(key) for key in INSTEAD_OF_MODELS)

    def _missing(self, key: str, text: str, hint: str, by_flags: str) -> None:
        """Note that a key is missing, unless it is there in another spelling, or follows from what is refused."""
        if key not in self.meant and not self._has_others():
            self.problem(self.root, text, by_flags if self.by_flags else hint)

    # -- keys

    def _method(self) -> Method | None:
        node = self.root.get("merge_method")
        if node is None:
            hint = "name a method, such as `merge_method: ties`; `lowmem-aim methods` lists them"
            flags = "add `--method`, such as `--method ties`; `lowmem-aim methods` lists them"
            self._missing("merge_method", "`merge_method` is missing", hint, flags)
            return None
        name = self.text(node, "merge_method")
        if name is None:
            return None
        try:
            method = find_method(name)
        except UsageError as error:
            self.problem(node, str(error), error.hint)
            return None
        if method is None:
            near = did_you_mean(name, names())
            self.problem(node, f"unknown merge_method `{printable(name)}`{near}", "`lowmem-aim methods` lists them all")
        return method

    def _base(self, method: Method | None) -> str | None:
        node = self.root.get("base_model")
        base = self.model(node, "base_model")
        if node is None and method and method.base == "required":
            hint = "name the model that the others were tuned from: `base_model: folder-or-id`"
            flags = "add `--base`, the model that the others were tuned from"
            self._missing("base_model", f"`{method.name}` needs a `base_model`", hint, flags)
        return base

    def _models(self, method: Method | None, base: str | None) -> list[ModelEntry]:
        node = self.root.get("models")
        if node is None or not isinstance(node.value, list) or not node.value:
            self.all_read = False
            self._no_models(node)
            return []
        entries = [entry for item in node.value if (entry := self._model(item, method))]
        self.all_read = len(entries) == len(node.value) and not self.misspelled
        if not method or base is None:
            return entries
        others = [entry for entry in entries if not same_reference(entry.reference, base)]
        if method.builds_on(base):  # the base is added in any case; listed or not, it is no expert
            return others
        if method.base == "averaged" and len(others) == len(entries):
            return [ModelEntry(base, {}, self.root.where), *entries]
        return entries

    def _no_models(self, node: Node | None) -> None:
        hint = "list the models to merge: `models: [{model: folder-or-id}, ...]`"
        if node is None:
            self._missing("models", "no models are listed", hint, "add `--expert` for each model to merge")
        else:
            self.problem(node, "`models` must be a list with at least one model", hint)

    def _model(self, item: Node, method: Method | None) -> ModelEntry | None:
        hint = "write each model as `- model: folder-or-id`"
        if not isinstance(item.value, dict):
            self.problem(item, "a model is a table: `- model: folder-or-id`", hint)
            return None
        meant = self.check_keys(item, ("model", "parameters"), {})
        self.misspelled |= "parameters" in meant
        reference = self.model(item.get("model"), "model")
        if item.get("model") is None and "model" not in meant:
            self.problem(item, "`model` is missing", hint)
        parameters = self._parameters(item, method)
        return ModelEntry(reference, parameters, item.where) if reference else None

    # -- parameters

    def _parameters(self, table: Node, method: Method | None) -> dict[str, Setting]:
        node = table.get("parameters")
        if node is None:
            return {}
        if not isinstance(node.value, dict):
            hint = "write `parameters: {weight: 1.0}`, or one parameter per line below it"
            self.problem(node, "`parameters` must be a table", hint)
            return {}
        if not method:  # no method: reported already; a name that no method has is wrong in any case
            self._check_names(node, {name for other in METHODS.values() for name in other.parameters})
            return {}
        at_model = table is not self.root
        settings: dict[str, Setting] = {}
        for name, value in node.value.items():
            if value.value is None:
                continue  # as if it were absent
            parameter = method.parameters.get(name)
            if parameter is None or (at_model and not parameter.per_expert):
                meant = self._unused_parameter(name, value, method, at_model)
                settings |= {meant: Setting(None)} if meant else {}
            else:  # after a problem the name is kept, so that it is not reported as missing too
                settings[name] = self.setting(value, parameter, _parameters_of(method)) or Setting(None)
        return settings

    def _unused_parameter(self, name: str, node: Node, method: Method, at_model: bool) -> str:
        """Tell of a parameter that is not used where it stands; returns the one that was meant, if it is misspelled."""
        known = {parameter for other in METHODS.values() for parameter in other.parameters}
        if name in method.parameters:
            text = f"`{name}` belongs to the whole merge, not to one model"
            self.problem(node, text, "move it to the top-level `parameters`")
        elif name in known:  # mergekit ignores these silently
            self.notices.append(Remark(node.where, f"`{name}` has no meaning for `{method.name}` and is ignored"))
        else:
            text = f"unknown parameter `{printable(name)}`{did_you_mean(name, method.parameters)}"
            self.problem(node, text, _parameters_of(method))
            return nearest(name, method.parameters)
        return ""

    def _check_names(self, table: Node, known: Collection[str]) -> None:
        """Check the parameters' names alone, not their values."""
        for name, node in table.value.items():
            if name not in known:
                text = f"unknown parameter `{printable(name)}`{did_you_mean(name, known)}"
                self.problem(node, text, "`lowmem-aim methods NAME` lists a method's parameters")

    def _check_counts(self, method: Method, base: str | None, models: Sequence[ModelEntry]) -> None:
        hint = "add `--expert` for each model to merge" if self.by_flags else "list each model to merge under `models`"
        if not models:
            self.problem(self.root, "there is no expert: only the base is listed", hint)
        elif len(models) < method.fewest or (method.most is not None and len(models) > method.most):
            exact = method.fewest == method.most
            fewest = f"{method.fewest} model{'s' * (method.fewest != 1)}"
            besides = " besides the base" if method.builds_on(base) else ""
            text = f"`{method.name}` takes {'exactly' if exact else 'at least'} {fewest}{besides}, not {len(models)}"
            self.problem(self.root, text, f"`lowmem-aim methods {method.name}` says what it merges")

    def _check_required(self, method: Method, models: Sequence[ModelEntry], top: Mapping[str, Setting]) -> None:
        for name, parameter in method.parameters.items():
            if not parameter.required or name in top:
                continue
            lacking = [model for model in models if name not in model.parameters]
            if not parameter.per_expert:
                text = f"`{method.name}` needs the parameter `{name}`"
                self.problem(self.root, text, f"add it to the top-level `parameters`, or as `-p {name}=...`")
                continue
            hint = f"give each model a `{name}` in its `parameters`, or one for all in the top-level `parameters`"
            if len(lacking) == len(models) > 1:
                text = f"`{method.name}` needs a `{name}` for each model"
                self.problem(self.root.get("models") or self.root, text, hint)
                continue
            for model in lacking:
                self.problem(Node(None, model.where), f"`{printable(model.reference)}` needs a `{name}`", hint)

    # -- the rest

    def _dtype(self) -> str | None:
        chosen = None
        for key in ("dtype", "out_dtype"):  # out_dtype wins
            node = self.root.get(key)
            value = self.text(node, key)
            if node is not None and value is not None:
                if value not in DTYPES:
                    allowed, near = ", ".join(DTYPES), did_you_mean(value, DTYPES, SHORT_DTYPES)
                    text = f"`{key}` must be one of {allowed}, not `{printable(value)}`{near}"
                    self.problem(node, text, "leave it out to keep the models' own dtype")
                chosen = value
        return chosen

    def _tokenizer_source(self, base: str | None) -> str | None:
        node = self.root.get("tokenizer_source")
        source = self.text(node, "tokenizer_source")
        if node is not None and source not in (None, "base"):
            text = f"`tokenizer_source: {printable(source or '')}` is not supported: only `base` is"
            self.problem(node, text, "write `tokenizer_source: base`, or leave it out to merge row by row")
        elif node is not None and source and self._has_no_base(base):
            self.problem(node, "`tokenizer_source: base` needs a `base_model`", "name the model that has the tokenizer")
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
        if self._has_no_base(base):
            hint = "name the model that the others were tuned from, as `base_model` or `--base`"
            self.problem(node, f"`{key}` needs a `base_model`: {needed}", hint)
        return node

    def _has_no_base(self, base: str | None) -> bool:
        """Whether a base is missing, and nothing else told of it."""
        return base is None and self.root.get("base_model") is None and "base_model" not in self.meant


def _parameters_of(method: Method) -> str:
    return f"`lowmem-aim methods {method.name}` lists its parameters and their ranges"


def read_aim(table: Node) -> Aim:
    """Build an Aim from an `aim:` table alone. Raises RecipeError with every problem at once."""
    read = Values()
    aim = aim_table(read, table)
    if error := read.error():
        raise error
    return aim


def read_recipe(root: Node) -> Recipe:
    """Build a Recipe from its tree. Raises RecipeError with every problem at once."""
    recipe, error = readable_part(root)
    if error or recipe is None:
        raise error or RecipeError(f"{root.where}: this is not a recipe")
    return recipe


def readable_part(root: Node) -> tuple[Recipe | None, RecipeError | None]:
    """(the recipe without what is wrong in it, every problem as one error).

    With an error, the recipe names models that can be looked for and opened, but is not fit for planning; it is None if
    the method or all models could not be read.
    """
    reader = _Reader(root)
    recipe = reader.recipe()
    return recipe, reader.error()
