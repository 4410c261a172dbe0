"""mergekit's YAML, read into a frozen Recipe. Every problem is found before any work, with its file, line and column.

The YAML comes as a tree (`yaml_tree`); command-line flags replace nodes of that tree (`from_flags`), so that a wrong
flag is reported like a wrong line. `read_recipe` then builds the Recipe from the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from lowmem_aim.errors import RecipeError, UsageError, did_you_mean, nearest, printable
from lowmem_aim.methods.method import Method
from lowmem_aim.methods.registry import METHODS, find_method, names
from lowmem_aim.recipe.parameters import settings_of
from lowmem_aim.recipe.parts import WAYS, Parts
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe, Slice
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.recipe.relaxations import acm_table, aim_table
from lowmem_aim.recipe.solving import solve_of
from lowmem_aim.recipe.spelling import in_one_spelling
from lowmem_aim.recipe.stages import in_order, stages_by_name
from lowmem_aim.recipe.tokenizers import chat_template_of, tokenizer_of
from lowmem_aim.recipe.values import Remark, Values, together
from lowmem_aim.recipe.words import DTYPES, SHORT_DTYPES
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node

TOP_KEYS = (
    "merge_method",
    "base_model",
    *WAYS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "aim",
    "acm",
    "solve",
)
# Keys of mergekit's that are refused rather than ignored -> why, and what to do.
UNSUPPORTED_KEYS = {
    "experts": ("a mixture of experts cannot be made", "`lowmem-aim methods` lists the ways to merge models"),
}
# What stands in the place of `models` and `merge_method`, and what stands beside it.
_OF_MIXTURES = "experts"
BESIDE_EXPERTS = ("gate_mode", "experts_per_token", "shared_experts")
_EXAMPLE = "a recipe starts with `merge_method: ...`; docs/recipe.md has examples"


class _Reader(Values):
    def __init__(self, root: Node, stages: Collection[str] = (), *, named: bool = False) -> None:
        super().__init__(stages)
        self.root = root
        self.named = named  # whether a `name` has a meaning
        self.by_flags = root.where == COMMAND_LINE
        self.meant: set[str] = set()  # keys that are there, but misspelled

    def recipe(self) -> Recipe | None:
        """The recipe; with `problems`, without the values that are wrong; None if no method or no model is left."""
        if not self._is_recipe():
            return None
        self.problems += [
            Remark(place, f"the key `{printable(key)}` appears twice", "write each key of a table once")
            for key, place in self.root.twice
        ]
        self.meant = self.check_keys(self.root, (*TOP_KEYS, *self._beside()), UNSUPPORTED_KEYS, ignoring=True)
        method = self._method()
        base = self._base(method)
        parameters = settings_of(self, self.root, method)
        parts = Parts(self, self.root, method, base, parameters, self.by_flags, self.meant)
        slices = () if self._is_mixture() else parts.slices()
        aim = self._aim(base)
        acm = self._acm(base, aim)
        self._check_bases(slices, base, [key for key, table in (("aim", aim), ("acm", acm)) if table])
        table = self.root.switched_on("solve")
        solve = solve_of(self, table, method, parameters, slices)
        dtype = self._dtype()
        listed = [entry.reference for part in slices for entry in part.entries]
        tokenizer = tokenizer_of(self, self.root, list(dict.fromkeys([*([base] if base else []), *listed])))
        chat_template = chat_template_of(self, self.root)
        if not any(part.experts for part in slices):
            return None
        return Recipe(
            method or METHODS["linear"],  # beside the problem of a wrong one, so that the models can be looked at
            base,
            slices,
            parameters,
            dtype,
            tokenizer,
            chat_template,
            aim,
            acm,
            self.root.where,
            tuple(together(self.notices)),
            tuple(dict.fromkeys(self.preferred)),
            self.sought,
            self.named_at,
            solve=solve,
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
        return (*(BESIDE_EXPERTS if self._is_mixture() else ()), *(["name"] if self.named else []))

    def _is_mixture(self) -> bool:
        """Whether the recipe asks for a mixture of experts: what else is missing follows from that."""
        return self.root.get(_OF_MIXTURES) is not None

    def _missing(self, key: str, text: str, hint: str, by_flags: str) -> None:
        """Note that a key is missing, unless it is there in another spelling, or follows from what is refused."""
        if key not in self.meant and not self._is_mixture():
            self.problem(self.root, text, by_flags if self.by_flags else hint)

    # -- keys

    def _method(self) -> Method | None:
        node = self.root.get("merge_method")
        if node is None:
            hint = "name a method, such as `merge_method: ties`; `lowmem-aim methods` lists them"
            flags = "add `--method`, such as `--method ties`; `lowmem-aim methods` lists them"
            self._missing("merge_method", "`merge_method` is missing", hint, flags)
            return None
        name = self.text(node, "merge_method", "name a method, such as `merge_method: ties`")
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

    # -- the rest

    def _dtype(self) -> str | None:
        chosen = None
        for key in ("dtype", "out_dtype"):  # out_dtype wins
            node = self.root.get(key)
            value = self.text(node, key, f"such as `{key}: bfloat16`, or leave it out to keep the models' own dtype")
            if node is not None and value is not None:
                if value not in DTYPES:
                    allowed, near = ", ".join(DTYPES), did_you_mean(value, DTYPES, SHORT_DTYPES)
                    text = (
                        f"`{'dtype' if node.by_flag else key}` must be one of {allowed}, not `{printable(value)}`{near}"
                    )
                    self.problem(node, text, "leave it out to keep the models' own dtype")
                chosen = value
        return chosen

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
            self.problem(node, f"`{key}` must be a table, or `false`", f"such as `{key}: {{{example}}}`")
            return None
        if self._has_no_base(base):
            hint = "name the model that the others were tuned from, as `base_model` or `--base`"
            self.problem(node, f"`{key}` needs a `base_model`: {needed}", hint)
        return node

    def _check_bases(self, slices: Sequence[Slice], base: str | None, relaxations: Sequence[str]) -> None:
        """Note every slice with another base than the recipe's, if the merge is to be relaxed towards that."""
        for part in slices if relaxations and base else ():
            if part.base and base and not same_reference(part.base.reference, base):
                text = f"`{relaxations[0]}` relaxes towards the recipe's `base_model`, and this slice has another"
                self.problem(Node(None, part.where), text, "leave out the slice's `base_model`, or the relaxation")

    def _has_no_base(self, base: str | None) -> bool:
        """Whether a base is missing, and nothing else told of it."""
        return base is None and self.root.get("base_model") is None and "base_model" not in self.meant


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
    if not root.others:
        reader = _Reader(in_one_spelling(root))
        recipe = reader.recipe()
        return recipe, reader.error()
    told = Values()
    stages = stages_by_name(root, told)
    readers = {
        document.where: _Reader(in_one_spelling(document), stages, named=True) for document in (*root.others, root)
    }
    recipes = {where: reader.recipe() for where, reader in readers.items()}
    told.problems += [problem for reader in readers.values() for problem in reader.problems]
    found = {name: recipe for name, document in stages.items() if (recipe := recipes[document.where])}
    last = recipes[root.where]
    order = in_order(found, stages, last if len(found) == len(root.others) else None, told)
    return replace(last, stages={name: found[name] for name in order}) if last else None, told.error()
