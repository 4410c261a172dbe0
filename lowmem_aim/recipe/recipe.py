"""A recipe as frozen dataclasses: mergekit's YAML, read and checked by `reader`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import RecipeError, printable
from lowmem_aim.recipe.references import parsed
from lowmem_aim.recipe.words import PERMUTED, SOLVED, SOURCES, UNION, Normalise, RowSource

if TYPE_CHECKING:
    from lowmem_aim.methods.method import Method, Parameter, Texts

DEFAULT_OMEGA = 0.4  # the authors'; they recommend 0.2 to 0.6


@dataclass(frozen=True)
class Setting:
    """A parameter's value as the recipe gives it: a scalar, a gradient over the layers, or filters on tensor names."""

    value: Any  # a scalar, a gradient as a tuple of scalars, or a tuple of (filter, scalar or gradient)
    filtered: bool = False
    where: str = field(default="", compare=False)

    def at(self, tensor: str, t: float) -> Any:
        """The value for a tensor at depth `t` in [0, 1]; None if no filter matches."""
        if not self.filtered:
            return _on_gradient(self.value, t)
        for pattern, value in self.value:
            if pattern in ("", "*") or pattern in tensor:
                return _on_gradient(value, t)
        return None


def _on_gradient(value: Any, t: float) -> Any:
    """The value at `t` of the piecewise linear curve through a tuple, spread evenly over [0, 1]; a scalar unchanged.

    Of truth values and words, between which nothing lies, the one before `t`.
    """
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    if any(isinstance(one, bool | str) for one in value):
        return value[int(place)]
    left = min(int(place), max(len(value) - 2, 0))
    right = min(left + 1, len(value) - 1)
    return value[left] + (value[right] - value[left]) * (place - left)


def texts_of(method: Method, parameters: Mapping[str, Setting], slices: Sequence[Slice]) -> Texts:
    """The texts that a merge is solved from: those of its method, or of weights that are `solved`."""
    tables = [parameters, *(part.parameters for part in slices)]
    tables += [expert.parameters for part in slices for expert in part.experts]
    weights = [table["weight"] for table in tables if "weight" in table]
    return method.texts or ("experts" if any(map(_is_solved, weights)) else "")


def _is_solved(weight: Setting) -> bool:
    """Whether a weight is `solved`, for any tensor."""
    found = [value for _, value in weight.value] if weight.filtered else [weight.value]
    return any(SOLVED in value if isinstance(value, tuple) else value == SOLVED for value in found)


@dataclass(frozen=True)
class ModelEntry:
    """One model of the recipe: a folder or a Hub id, perhaps with an adapter (see `references`)."""

    reference: str
    parameters: Mapping[str, Setting]
    where: str
    layers: range | None = None  # those that a slice takes of it; None: all
    calibration: str = ""  # texts of its own, for methods that measure them


@dataclass(frozen=True)
class Module:
    """An entry of a recipe's `modules`: a section of the model, and the parameters for all of its slices."""

    name: str
    parameters: Mapping[str, Setting]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Slice:
    """Layers of the output, or of a module of it, that are made of the same models.

    Where `models` are listed, there is one slice, with all layers.
    """

    experts: tuple[ModelEntry, ...]
    base: ModelEntry | None
    parameters: Mapping[str, Setting]
    where: str
    module: Module | None = None  # None: the recipe has no `modules`

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """The base, if there is one, and the experts."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def sliced(self) -> bool:
        """Whether the recipe says which layers of the models are taken."""
        return any(model.layers is not None for model in self.experts)


@dataclass(frozen=True)
class Aim:
    """The `aim:` key (AIM: arXiv 2502.02421). An empty `calibration` means the authors' Pile set."""

    omega: Setting = Setting(DEFAULT_OMEGA)
    omegas: tuple[float, ...] = ()  # several: an output for each, see `one_by_one`; `omega` then says nothing
    scaling: str = "identity"
    control: str = ""  # one of CONTROLS, in place of AIM's factors; "": AIM itself
    control_seed: int = 0  # of `permuted`
    exclude: tuple[str, ...] = ()  # parts of the names of weights that are not relaxed
    calibration: str = ""
    samples: int = 256
    block_size: int = 512
    seed: int = 42
    pack: bool = True
    tied: str = "relax"
    dtype: str = ""  # of the calibration's forward; "": the checkpoint's

    @property
    def title(self) -> str:
        """The name of what relaxes the merge: `AIM`, or `AIM control (uniform)`."""
        return f"AIM control ({self.control})" if self.control else "AIM"

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the table that say something, with their values: those of portable recipes and identities."""
        idle = () if self.control == PERMUTED else ("control_seed",)
        return {key: value for key, value in vars(self).items() if value not in ("", ()) and key not in idle}

    def omega_at(self, tensor: str, t: float) -> float:
        """The omega for a tensor at depth `t` in [0, 1]; the default if no filter matches."""
        value = self.omega.at(tensor, t)
        return DEFAULT_OMEGA if value is None else float(value)


@dataclass(frozen=True)
class Acm:
    """The `acm:` key (ACM: arXiv 2505.14009).

    An empty `calibration` means that of `aim`, or without one the authors' Pile set.
    """

    theta: float = 0.7  # the authors' for most sizes; 1.2 for 14B
    normalise: Normalise = "samples"
    calibration: str = ""
    samples: int = 100
    dtype: str = ""  # of both forwards; "": that of AIM, or without one the base's


@dataclass(frozen=True)
class Solve:
    """The `solve:` key: the texts that experts are run on, where they have none of their own, and how they are read."""

    calibration: str = ""  # "": each expert has its own
    samples: int = 64  # of each expert
    block_size: int = 512
    seed: int = 42
    pack: bool = False
    dtype: str = ""  # of the forwards; "": the checkpoints'

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the table that say something, with their values."""
        return {key: value for key, value in vars(self).items() if value != ""}


@dataclass(frozen=True)
class TokenRow:
    """The source of a token's row in the models that lack the token; with `force`, in all of them."""

    source: RowSource = "usual"  # usual: as for tokens that the recipe does not name
    model: str = ""  # whose row it is, as the recipe names it
    token: str | None = None  # of the model, for `model_token`: the token or its id
    token_id: int | None = None
    force: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Tokenizer:
    """The output's tokenizer: `tokenizer_source` or `tokenizer` of the recipe."""

    source: str = UNION  # `union`, `base`, or a model
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None  # rows
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. The base is among the experts of a slice only if the method merges it like an expert."""

    method: Method
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Setting]
    dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None  # `auto`, a name, or a template's text
    aim: Aim | None
    acm: Acm | None
    where: str
    notices: tuple[str, ...] = field(default=(), compare=False)
    preferred: tuple[str, ...] = field(default=(), compare=False)  # paths that are here, and could be Hub ids
    # Paths that were found nowhere (they may be Hub ids) -> the folders that were looked in.
    sought: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    named_at: Mapping[str, str] = field(default_factory=dict, compare=False)  # model or file -> `file:line:column`
    # By name, in the order in which they are made: what the recipe, and those further back, take for models.
    stages: Mapping[str, Recipe] = field(default_factory=dict)
    solve: Solve | None = None  # None: the method measures no texts

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that the recipe names, in its order; none if it has no `modules`."""
        found = {part.module.name: part.module for part in self.slices if part.module}
        return tuple(found.values())

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The experts of all slices; one that is in several stands here several times."""
        return tuple(expert for part in self.slices for expert in part.experts)

    @property
    def references(self) -> list[str]:
        """The references of all models, each once; the base's is the first."""
        bases = [part.base.reference for part in self.slices if part.base]
        found = [*([self.base] if self.base else []), *bases, *(model.reference for model in self.models)]
        return list(dict.fromkeys(found))

    @property
    def in_order(self) -> dict[str, Recipe]:
        """Every merge in the order in which they are made: the named stages, and last the output, whose name is ""."""
        return {**self.stages, "": self}

    @property
    def named(self) -> list[str]:
        """Every model that is named, each once, without its adapter; the tokenizer's is the last."""
        found = [*self.references, *([self.tokenizer_model] if self.tokenizer_model else [])]
        return list(dict.fromkeys(parsed(reference).model for reference in found))

    @property
    def adapters(self) -> list[str]:
        """Every adapter that is named, each once."""
        return list(dict.fromkeys(adapter for name in self.references if (adapter := parsed(name).adapter)))

    @property
    def texts(self) -> Texts:
        """The texts that the merge is solved from: those of the method, or of weights that are `solved`."""
        return texts_of(self.method, self.parameters, self.slices)

    @property
    def sliced(self) -> bool:
        """Whether the recipe says of any slice which layers of the models are taken."""
        return any(part.sliced for part in self.slices)

    @property
    def builds_on_base(self) -> bool:
        """Whether the result is the base and something added to it."""
        return self.method.builds_on(self.base)

    @property
    def reference(self) -> str:
        """The model whose names, shapes, config and tokenizer the output has.

        That is the base where it is merged or owns the tokenizer, else the first model.
        """
        listed = [model.reference for model in self.models]
        merges_base = self.builds_on_base or self.base in listed or self.tokenizer is not None
        return self.base if self.base and merges_base else listed[0]

    @property
    def tokenizer_model(self) -> str:
        """The model whose tokenizer the output has; empty if that is the base's, or one of several."""
        return "" if self.tokenizer is None or self.tokenizer.source in SOURCES else self.tokenizer.source

    @property
    def relaxed(self) -> bool:
        """Whether AIM or ACM changes the merge."""
        return self.aim is not None or self.acm is not None

    @property
    def title(self) -> str:
        """The method's name and its relaxations: `ties + AIM + ACM`."""
        return " + ".join([self.method.name, *self.relaxations])

    @property
    def relaxations(self) -> list[str]:
        """The titles of what changes the merge: AIM or its control, and ACM."""
        return [*([self.aim.title] if self.aim else []), *(["ACM"] if self.acm else [])]

    def at(self, name: str) -> str:
        """The beginning of a message about a model or a file: `file:line:column: `; empty if a flag names it."""
        return f"{self.named_at[name]}: " if name in self.named_at else ""

    def looked(self, path: str) -> str:
        """The end of a message about a path that was found nowhere: ` (looked in ...)`; empty for a whole path."""
        places = " and ".join(f"`{printable(place, 4096)}`" for place in self.sought.get(path, ()))
        return f" (looked in {places})" if places else ""

    def resolve(self, tensor: str, t: float, part: Slice, own_names: Sequence[str]) -> dict[str, Any]:
        """The method's parameters for one tensor of a slice at depth `t` in [0, 1], by recipe name.

        Of model, slice, module and top level the first that has a value for it counts, else the default. A parameter
        of the experts is a tuple with one value for each; its filters see the tensor's name in that expert, one of
        `own_names`. Raises RecipeError if a required one has none.
        """
        resolved: dict[str, Any] = {}
        outer = (part.parameters, part.module.parameters if part.module else {}, self.parameters)
        for name, parameter in self.method.parameters.items():
            if parameter.per_expert:
                resolved[name] = tuple(
                    self._lookup(parameter, own_name, t, (expert.parameters, *outer))
                    for expert, own_name in zip(part.experts, own_names, strict=True)
                )
            else:
                resolved[name] = self._lookup(parameter, tensor, t, outer)
        return resolved

    def _lookup(self, parameter: Parameter, tensor: str, t: float, tables: Sequence[Mapping[str, Setting]]) -> Any:
        where = self.where
        for settings in tables:
            setting = settings.get(parameter.name)
            where = setting.where if setting else where
            value = setting.at(tensor, t) if setting else None
            if value is not None:
                return float(value) if parameter.kind == "number" and not isinstance(value, str) else value
        if parameter.required:
            raise RecipeError(
                f"{where}: `{parameter.name}` has no value for `{printable(tensor)}`",
                hint="end its list of filters with a plain `- value: ...`",
            )
        return parameter.default


def one_by_one(recipe: Recipe) -> dict[str, Recipe]:
    """Split a recipe into one for each omega: folder within the output -> its recipe.

    With a single omega the folder is "", the output itself.
    """
    if recipe.aim is None or not recipe.aim.omegas:
        return {"": recipe}
    return {
        f"omega-{omega!r}".removesuffix(".0"): replace(recipe, aim=replace(recipe.aim, omega=Setting(omega), omegas=()))
        for omega in recipe.aim.omegas
    }
