"""The contract of merge methods: a method is a script over row slices of one tensor.

A method is a generator function. It yields *folds* (measure rounds), each of which is given every slice of the tensor
once, in order, and is answered with the fold's result; it returns *combine*, which turns one slice of the inputs into
the same slice of the result:

    @merge_method("ties", ..., rounds=(0, 5))
    def ties(tensor: Subject, *, weight: Weights, density: Densities = (1.0,), ...) -> Script:
        cuts = yield from keep_largest(tensor, density)      # two or three folds
        def combine(rows: Rows) -> Tensor: ...
        return combine

Everything in a script is a pure function of tensors: no I/O, no device moves, no global state. The bytes of a result
must not depend on the slices that a tensor is cut into. Therefore:

- sums over elements go through `exact.ExactSums`;
- combine is row-local, and elementwise it uses only operations that IEEE 754 rounds correctly (+ - * / sqrt, compare,
  where). No `alpha=`, addcmul or lerp: torch fuses those on vectors and not on the last few elements of a slice;
- sums over models are written-out additions in model order; functions of scalars run on the host in float64.

Parameters are declared in the signature; their names and defaults are mergekit's (`lambda_` is its `lambda`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from lowmem_aim.errors import did_you_mean, printable
from lowmem_aim.methods.footprint import Footprint, by_default
from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # not imported for a name in signatures


@dataclass(frozen=True)
class Subject:
    """The facts about the tensor being merged that a method may use."""

    name: str
    shape: tuple[int, ...]
    numel: int
    experts: int  # K, the number of models in `Rows.experts`
    seed: int = 0  # of the random masks
    based: bool = True  # whether the result builds on the base; if not, `Rows` has none, or one for AIM alone
    input_dim: int = -1  # the dimension of the module's input channels; -2: embeddings (their tokens), GPT-2's linears
    linear: bool = False  # inside the layers, inputs are multiplied with it: a matrix, or a stack of them
    space: MatrixSpace | None = None  # for the matrices of methods that solve; None while nothing is merged
    # For methods that measure texts: the moments of its inputs, for each matrix and expert (None: no text reached it).
    moments: Sequence[Sequence[Moment | None]] | None = None


@dataclass(frozen=True)
class Rows:
    """The same rows of one tensor in all models. Compute with `base` and `experts`, and write to none of them.

    `stored_base` is empty if the method has no base, and must not be used then.
    """

    stored_base: Tensor  # (rows, columns), in the dtype of the file
    stored_experts: tuple[Tensor, ...]  # K x (rows, columns)
    start: int  # flat index of the first element in the whole tensor

    @property
    def base(self) -> Tensor:
        """The base's rows as float32, (rows, columns): a copy, unless they are stored in float32."""
        return self.stored_base.to(torch.float32)

    @property
    def experts(self) -> tuple[Tensor, ...]:
        """The experts' rows as float32, K x (rows, columns): copies, unless they are stored in float32."""
        return tuple(expert.to(torch.float32) for expert in self.stored_experts)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.stored_experts[0].shape[0]

    def halves(self) -> tuple[Rows, Rows]:
        """The upper and the lower half of the rows, of which there must be at least two."""
        middle = self.count // 2
        columns = self.stored_experts[0].shape[1]
        return (
            Rows(self.stored_base[:middle], tuple(e[:middle] for e in self.stored_experts), self.start),
            Rows(
                self.stored_base[middle:],
                tuple(e[middle:] for e in self.stored_experts),
                self.start + middle * columns,
            ),
        )


class Fold(Protocol):
    """One measure round over all slices of a tensor."""

    def part(self, rows: Rows) -> Any:
        """Measure one slice. A pure function, which may run for several slices at once."""
        ...

    def add(self, part: Any) -> None:
        """Take what `part` gave. Parts come in the order of the slices; a slice may come as several parts."""
        ...

    def finish(self) -> Any:
        """The result of the round, once every part has been added."""
        ...


Combine = Callable[[Rows], Tensor]  # -> (rows, columns) float32
Script = Generator[Fold, Any, Combine]


# --- parameters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerExpert:
    """The mark of a parameter with one value for each expert, within inclusive bounds."""

    low: float | None = None
    high: float | None = None
    words: tuple[str, ...] = ()  # that may stand in the place of a number


@dataclass(frozen=True)
class Within:
    """The mark of a number with inclusive bounds."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class OneOf:
    """The mark of a parameter that takes one of these values."""

    values: tuple[bool | str, ...]


Weights = Annotated[tuple[float, ...], PerExpert()]
Scales = Annotated[tuple[float, ...], PerExpert()]
Densities = Annotated[tuple[float, ...], PerExpert(0.0, 1.0)]
# mergekit's rule (|D|_1 / |kept|_1), none, or the DARE paper's 1/density.
Rescale = Annotated[bool | str, OneOf((False, True, "density"))]

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """One parameter as recipes have it; `default` is REQUIRED if there is none."""

    name: str
    per_expert: bool
    kind: Literal["number", "switch", "choice"]
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[bool | str, ...] = ()
    words: tuple[str, ...] = ()  # that may stand in the place of a number

    @property
    def required(self) -> bool:
        """Whether a recipe must give a value."""
        return self.default is REQUIRED

    def problem(self, value: Any) -> str:
        """The text of what is wrong with `value` for this parameter; empty if nothing is."""
        if self.kind == "switch":
            wrong = f"`{self.name}` must be true or false, not `{printable(str(value), 40)}`"
            return "" if isinstance(value, bool) else wrong
        if self.kind == "choice":
            allowed = [str(choice).lower() for choice in self.choices]
            wrong = f"`{self.name}` must be one of {', '.join(allowed)}, not `{printable(str(value), 40)}`"
            wrong += did_you_mean(str(value), allowed)
            return "" if value in self.choices else wrong
        if value in self.words:
            return ""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            words = "".join(f", or `{word}`" for word in self.words)
            return f"`{self.name}` must be a finite number{words}, not `{printable(str(value), 40)}`"
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            return f"`{self.name}` must {self._range()}, not {value:g}{self._as_percent(value)}"
        return ""

    def _as_percent(self, value: float) -> str:
        """A suggestion for a percentage in the place of a fraction."""
        return f"; did you mean {value / 100:g}?" if (self.low, self.high) == (0, 1) and 10 <= value <= 100 else ""

    def _range(self) -> str:
        if self.high is None:
            return f"be {self.low:g} or more"
        return f"be {self.high:g} or less" if self.low is None else f"lie in [{self.low:g}, {self.high:g}]"


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    name = name.removesuffix("_")
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    for mark in marks:
        if isinstance(mark, PerExpert):
            value = default if default is REQUIRED else default[0]
            return Parameter(name, True, "number", value, mark.low, mark.high, words=mark.words)
        if isinstance(mark, Within):
            return Parameter(name, False, "number", default, mark.low, mark.high)
        if isinstance(mark, OneOf):
            return Parameter(name, False, "choice", default, choices=mark.values)
    return Parameter(name, False, "switch" if hint is bool else "number", default)


# --- methods ------------------------------------------------------------------------------------------------------

# The part that a recipe's `base_model` has in a method:
# required: the result builds on it; it is no expert.
# optional: the same where there is one; without, the method takes the models' whole weights.
# listed: it is merged only where it is listed among the models; elsewhere it is the reference that AIM needs.
# averaged: it is one more of the models.
BaseUse = Literal["required", "optional", "listed", "averaged"]
# The texts whose inputs of every linear a method is given the moments of:
# experts: each expert's own, run through the expert; merged: the same, each block given what the merged blocks make.
Texts = Literal["", "experts", "merged"]
# Gives what is wrong with a tensor or its parameters, or an empty text; called before any work.
Check = Callable[[Subject, Mapping[str, Any]], str]
# Gives the memory that merging a tensor takes; the switch says whether the compiled loops run.
Takes = Callable[[Subject, Mapping[str, Any], bool], Footprint]


@dataclass(frozen=True)
class Method:
    """A merge method, with all that recipes and plans need of it."""

    name: str
    script: Callable[..., Script]
    base: BaseUse
    fewest: int
    most: int | None
    source: str
    parameters: Mapping[str, Parameter]
    compiled: bool  # all of it has compiled loops, which are fastest on larger slices than torch
    takes: Takes | None  # the memory that it takes; None: not declared
    whole_rows: bool  # a 1-D tensor counts as one row, and comes in one slice
    rounds: tuple[int, int]  # folds that it yields, at least and at most, depending on parameters and tensor
    check: Check
    rows_of_linears: int  # that slices of linears inside the layers have; 0: any number
    texts: Texts  # that it measures
    package: str = ""  # the other package that brings it, with its version

    def builds_on(self, base: str | None) -> bool:
        """Whether the result is the recipe's base and something added to it."""
        return self.base == "required" or (self.base == "optional" and base is not None)

    def start(self, tensor: Subject, parameters: Mapping[str, Any]) -> Script:
        """Start the script for one tensor.

        `parameters` are by recipe name; those of the experts are tuples with one value for each.
        """
        keywords = {name + "_" * (name == "lambda"): value for name, value in parameters.items()}
        return self.script(tensor, **keywords)

    def footprint(self, tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
        """The memory that merging one tensor takes at most; `loops`: compiled loops run. Parameters as in `start`."""
        if self.takes is None:
            return by_default(tensor.shape, tensor.experts, self.rounds[1])
        return self.takes(tensor, parameters, loops)


METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    base: BaseUse = "required",
    fewest: int = 1,
    most: int | None = None,
    source: str,
    compiled: bool = False,
    takes: Takes | None = None,
    whole_rows: bool = False,
    rounds: tuple[int, int] = (0, 0),
    check: Check = lambda tensor, parameters: "",
    rows_of_linears: int = 0,
    texts: Texts = "",
) -> Callable[[Callable[..., Script]], Callable[..., Script]]:
    """Register a script under its recipe name. Raises ValueError if another script has the name.

    `fewest` and `most` count the experts; the other arguments are as in Method. The first paragraph of the script's
    docstring is its formula, which `lowmem-aim methods` prints.
    """

    def register(script: Callable[..., Script]) -> Callable[..., Script]:
        if name in METHODS:
            raise ValueError(f"there is a merge method `{name}` already, of {METHODS[name].script.__module__}")
        hints = get_type_hints(script, include_extras=True)
        declared = [p for p in inspect.signature(script).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [_parameter(p.name, hints[p.name], p.default) for p in declared]
        table = {p.name: p for p in parameters}
        METHODS[name] = Method(
            name,
            script,
            base,
            fewest,
            most,
            source,
            table,
            compiled,
            takes,
            whole_rows,
            rounds,
            check,
            rows_of_linears,
            texts,
        )
        return script

    return register


class Rounds:
    """The rounds of a script over one tensor, driven by the code that has the slices.

        rounds = Rounds(method.start(subject, parameters))
        for fold in rounds:
            ...                         # give `fold` the parts of every slice, in order
        merged = rounds.combine(rows)

    `combine` is set once the loop has ended.
    """

    combine: Combine

    def __init__(self, script: Script) -> None:
        self._script = script

    def __iter__(self) -> Iterator[Fold]:
        """The folds, one after another. Give each all of its parts before asking for the next."""
        try:
            fold = next(self._script)
            while True:
                yield fold
                fold = self._script.send(fold.finish())
        except StopIteration as ended:
            self.combine = ended.value
