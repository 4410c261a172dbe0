"""The models of a recipe: whole under `models`, by ranges of layers under `slices`, or either in each of `modules`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lowmem_aim.errors import printable
from lowmem_aim.methods.method import Method
from lowmem_aim.recipe.parameters import settings_of
from lowmem_aim.recipe.recipe import ModelEntry, Module, Setting, Slice
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.recipe.solving import own_texts
from lowmem_aim.recipe.values import Remark, Values
from lowmem_aim.recipe.yaml_tree import Node

WAYS = ("models", "slices", "modules")  # to list the models
_MODEL_HINT = "write each model as `- model: folder-or-id`"
_SLICE_HINT = "write each slice as `- sources: [{model: folder-or-id, layer_range: [0, 16]}, ...]`"


@dataclass
class Parts:
    """A reader of the slices of a recipe. Problems are collected in `read`."""

    read: Values
    root: Node
    method: Method | None
    base: str | None
    given: Mapping[str, Setting]  # the top-level parameters
    by_flags: bool  # the recipe comes from the command line
    meant: Collection[str] = ()  # keys that are there, but misspelled
    complete: bool = True  # nothing is missing of what is listed
    module: Module | None = None  # that is being read

    def slices(self) -> tuple[Slice, ...]:
        """The recipe's slices, those of all its modules one after another, without what is wrong in them."""
        given = self._ways(self.root)
        if given[:1] == ["modules"]:
            return self._modules(self.root.value["modules"])
        return self._slices(self.root, given[:1] == ["slices"])

    def _ways(self, table: Node) -> list[str]:
        """The keys under which the recipe, or a module of it, lists its models; that there are several is told."""
        given = [key for key in WAYS if (node := table.get(key)) and node.value]
        if len(given) > 1:
            self.complete = False
            text = f"{' and '.join(f'`{key}`' for key in given)} exclude each other"
            hint = "list whole models under `models`, or ranges of layers under `slices`"
            self.read.problem(table.value[given[1]], text, hint)
        return given

    def _modules(self, node: Node) -> tuple[Slice, ...]:
        """The slices of all modules."""
        tables = node.value
        if not isinstance(tables, dict) or not all(isinstance(item.value, dict) for item in tables.values()):
            self.complete = False
            self.read.problem(
                node, "`modules` must be a table of tables", "such as `modules: {default: {models: ...}}`"
            )
            return ()
        found: list[Slice] = []
        complete = True  # each module is checked, whatever is wrong with the others
        for name, table in tables.items():
            self.meant = self.read.check_keys(table, ("models", "slices", "parameters"), {}, ignoring=True)
            self.complete = not self.meant
            self.module = Module(name, settings_of(self.read, table, self.method), table.where)
            found += self._slices(table, self._ways(table)[:1] == ["slices"])
            complete &= self.complete
        self.module, self.complete = None, complete
        return tuple(found)

    def _slices(self, table: Node, sliced: bool) -> tuple[Slice, ...]:
        """The slices of the recipe, or of the module that is being read."""
        if not sliced:
            entries = self._entries(table.get("models"), table)
            return (self._slice(entries, None, {}, table),) if entries is not None else ()
        listed = table.value["slices"]
        if not isinstance(listed.value, list) or not listed.value:
            self.complete = False
            self.read.problem(listed, "`slices` must be a list with at least one slice", _SLICE_HINT)
            return ()
        found = [part for node in listed.value if (part := self._sliced(node))]
        self.complete &= len(found) == len(listed.value)
        return tuple(found)

    def _sliced(self, node: Node) -> Slice | None:
        """One of `slices`; None after a problem with all of it."""
        sources = node.get("sources")
        if not isinstance(node.value, dict) or sources is None or not isinstance(sources.value, list):
            self.read.problem(node, "a slice needs `sources`, the models whose layers it takes", _SLICE_HINT)
            return None
        keys = ("sources", "base_model", "parameters", "residual_weight")
        self.read.check_keys(node, keys, {}, ignoring=True)
        if (unused := node.get("residual_weight")) is not None:
            self.read.notices.append(Remark(unused.where, "`residual_weight` has no effect, as in mergekit"))
        base = self.read.model(node.get("base_model"), "base_model")
        entries = [entry for item in sources.value if (entry := self._model(item, sliced=True))]
        if len(entries) < len(sources.value) or not entries:
            self.complete = False
            if not sources.value:
                self.read.problem(sources, "`sources` must list at least one model", _SLICE_HINT)
        if len({len(entry.layers) for entry in entries if entry.layers is not None}) > 1:
            told = ", ".join(f"{entry.layers.start} to {entry.layers.stop}" for entry in entries if entry.layers)
            text = f"the sources of a slice must have the same number of layers; here they take {told}"
            self.read.problem(node, text, "`layer_range: [0, 16]` takes the layers 0 to 15")
        return self._slice(entries, base, settings_of(self.read, node, self.method), node) if entries else None

    def _slice(
        self,
        entries: Sequence[ModelEntry],
        own_base: str | None,
        parameters: Mapping[str, Setting],
        node: Node,
    ) -> Slice:
        """A slice of these models, some of which may be the base; checked if all of the recipe could be read."""
        base = own_base or self.base
        experts, of_base = list(entries), None
        if base is not None and self.method is not None:
            listed = [entry for entry in entries if same_reference(entry.reference, base)]
            layers = next((entry.layers for entry in (*listed, *entries)), None)
            of_base = ModelEntry(base, {}, node.where, layers)
            if self.method.builds_on(base):  # the base is added in any case; listed or not, it is no expert
                experts = [entry for entry in entries if entry not in listed]
            elif self.method.base == "averaged" and not listed:
                experts = [of_base, *entries]
        part = Slice(tuple(experts), of_base, parameters, node.where, self.module)
        if self.complete and self.method:
            self._check_count(part, self.method, node)
            self._check_required(part, self.method, node)
        return part

    def _entries(self, node: Node | None, table: Node) -> list[ModelEntry] | None:
        """The entries of `models`; None if there are none, which is told."""
        if node is None or not isinstance(node.value, list) or not node.value:
            self.complete = False
            hint = "list the models to merge: `models: [{model: folder-or-id}, ...]`"
            if node is not None:
                self.read.problem(node, "`models` must be a list with at least one model", hint)
            elif not {"models", "slices"} & set(self.meant):
                hint = "add `--expert` for each model to merge" if self.by_flags else hint
                self.read.problem(table, "no models are listed", hint)
            return None
        entries = [entry for item in node.value if (entry := self._model(item))]
        self.complete &= len(entries) == len(node.value)
        return entries

    def _model(self, item: Node, *, sliced: bool = False) -> ModelEntry | None:
        if not isinstance(item.value, dict):
            self.read.problem(item, "a model is a table: `- model: folder-or-id`", _MODEL_HINT)
            return None
        keys = ("model", "parameters", *(["layer_range"] if sliced else []), "calibration")
        meant = self.read.check_keys(item, keys, {}, ignoring=True)
        self.complete &= "parameters" not in meant
        reference = self.read.model(item.get("model"), "model")
        if item.get("model") is None and "model" not in meant:
            self.read.problem(item, "`model` is missing", _MODEL_HINT)
        parameters = settings_of(self.read, item, self.method, of_model=True)
        layers = self._layers(item, meant) if sliced else None
        self.complete &= layers is not None or not sliced  # the model is looked for all the same
        texts = own_texts(self.read, item, meant)
        return ModelEntry(reference, parameters, item.where, layers, texts) if reference else None

    def _layers(self, item: Node, meant: Collection[str]) -> range | None:
        """The layers that a source takes; None after a problem."""
        node = item.get("layer_range")
        hint = "such as `layer_range: [0, 16]`, which takes the layers 0 to 15"
        if node is None:
            if "layer_range" not in meant:
                self.read.problem(item, "a source of a slice needs a `layer_range`", hint)
            return None
        ends = [end.value for end in node.value] if isinstance(node.value, list) else []
        whole = [int(end) for end in ends if type(end) is int or (type(end) is float and end.is_integer())]
        none = whole == [0, 0] and self.module is not None  # all that a module without layers has
        if len(ends) != 2 or len(whole) != 2 or not (none or 0 <= whole[0] < whole[1]):
            self.read.problem(node, "`layer_range` must be two rising whole numbers: the first layer and the end", hint)
            return None
        return range(*whole)

    # -- checks

    def _check_count(self, part: Slice, method: Method, node: Node) -> None:
        count = len(part.experts)
        hint = "add `--expert` for each model to merge" if self.by_flags else "list each model to merge"
        if not count:
            self.read.problem(node, "there is no expert: only the base is listed", hint)
        elif count < method.fewest or (method.most is not None and count > method.most):
            exact = method.fewest == method.most
            fewest = f"{method.fewest} model{'s' * (method.fewest != 1)}"
            besides = " besides the base" if part.base and method.builds_on(part.base.reference) else ""
            whole = " in each slice" if node.get("sources") else " in each module" if self.module else ""
            text = f"`{method.name}` takes {'exactly' if exact else 'at least'} {fewest}{besides}{whole}, not {count}"
            self.read.problem(node, text, f"`lowmem-aim methods {method.name}` says what it merges")

    def _check_required(self, part: Slice, method: Method, node: Node) -> None:
        outer = {*self.given, *(self.module.parameters if self.module else ())}
        for name, parameter in method.parameters.items():
            if not parameter.required or name in part.parameters or name in outer:
                continue
            lacking = [model for model in part.experts if name not in model.parameters]
            if not parameter.per_expert:
                text = f"`{method.name}` needs the parameter `{name}`"
                self.read.problem(self.root, text, f"add it to the top-level `parameters`, or as `-p {name}=...`")
                continue
            hint = f"give each model a `{name}` in its `parameters`, or one for all in the top-level `parameters`"
            if len(lacking) == len(part.experts) > 1:
                text = f"`{method.name}` needs a `{name}` for each model"
                self.read.problem(node.get("sources") or node.get("models") or node, text, hint)
                continue
            for model in lacking:
                self.read.problem(Node(None, model.where), f"`{printable(model.reference)}` needs a `{name}`", hint)
