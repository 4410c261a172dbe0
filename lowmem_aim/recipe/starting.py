"""The text of a recipe to start from: commented, with values for the given method and number of experts.

The values are defaults of the methods where there are any. `weight`, `density` and `t` have none that merges anything:
theirs are common starting points, and the comments beside them say which way to turn them.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lowmem_aim.recipe.recipe import DEFAULT_OMEGA
from lowmem_aim.recipe.words import BUILTIN

if TYPE_CHECKING:
    from lowmem_aim.methods.method import Method, Parameter  # torch

WIDTH = 100  # columns of a comment
MANY = 4  # experts, whose changes hit the same elements often
_PLAIN = re.compile(r"[\w./~][\w./~@+-]*")
_BASES = {
    "required": "the model that the merge builds on: most often the one that the experts were tuned from",
    "optional": "the experts' changes to it are merged; without this line, their whole weights are",
    "listed": "not merged itself: the reference for `aim` and `tokenizer_source`; list it below to merge it",
    "averaged": "counts as one of the models",
}


@dataclass(frozen=True)
class Start:
    """The models and the method that a recipe starts from.

    `omega` is AIM's, None for no AIM; `by_text`: tokens are matched by their text.
    """

    method: Method
    base: str | None
    experts: Sequence[str]
    omega: float | None = None
    by_text: bool = False

    @property
    def tokenizer(self) -> str:
        """The tokenizer source of a recipe that matches tokens: without a base, no model's tokens count more."""
        return "union" if self.base is None else "base"

    def table(self) -> dict[str, Any]:
        """The recipe as a mapping."""
        own, whole = starting_values(self.method, len(self.experts))
        models = [{"model": expert} | ({"parameters": own} if own else {}) for expert in self.experts]
        table: dict[str, Any] = {"merge_method": self.method.name, "base_model": self.base, "models": models}
        table |= {"parameters": whole or None, "tokenizer_source": self.tokenizer if self.by_text else None}
        table["solve"] = {"calibration": BUILTIN} if self.method.texts else None
        table["aim"] = None if self.omega is None else {"omega": self.omega, "calibration": BUILTIN}
        return {key: value for key, value in table.items() if value is not None}

    def text(self) -> str:
        """The recipe as commented YAML; it says what `table` says."""
        return "\n".join([*self._head(), *self._models(), *self._parameters(), *self._rest()]) + "\n"

    def _head(self) -> Iterator[str]:
        yield f"# `lowmem-aim methods {self.method.name}` shows the formula and the bounds of every parameter."
        yield f"merge_method: {self.method.name}"
        if self.base is not None:
            yield ""
            yield from _comment(_BASES[self.method.base])
            yield f"base_model: {_scalar(self.base)}"

    def _models(self) -> Iterator[str]:
        own, _ = starting_values(self.method, len(self.experts))
        yield ""
        for name in own:
            yield from _comment(f"{name}: {why(self.method, name)}")
        yield "models:"
        for expert in self.experts:
            yield f"  - model: {_scalar(expert)}"
            if own:
                yield f"    parameters: {{{', '.join(f'{name}: {_scalar(value)}' for name, value in own.items())}}}"

    def _parameters(self) -> Iterator[str]:
        """The parameters of the whole merge: those that have a value, and the defaults of others as comments."""
        own, whole = starting_values(self.method, len(self.experts))
        yield from ("",) * bool(whole)
        for name in whole:
            yield from _comment(f"{name}: {why(self.method, name)}")
        if whole:
            yield "parameters:"
            yield from (f"  {name}: {_scalar(value)}" for name, value in whole.items())
        defaults = {p.name: p.default for p in self.method.parameters.values() if _is_worth_a_line(p, own, whole)}
        if defaults:
            yield ""
            yield "# more parameters, with their defaults"
            yield from ("# parameters:",) * (not whole)
            yield from (f"#   {name}: {_scalar(value)}" for name, value in defaults.items())

    def _rest(self) -> Iterator[str]:
        yield ""
        first = "the base" if self.base is not None else "the first model"
        yield from _comment(f"what the output is stored in; without this line, each tensor as in {first}")
        yield "# dtype: bfloat16"
        yield ""
        if self.by_text:
            yield from _comment("the models' vocabularies differ: tokens are matched by their text")
        else:
            yield from _comment("for models whose tokens differ: match tokens by their text")
        yield f"{'' if self.by_text else '# '}tokenizer_source: {self.tokenizer}"
        if self.base is None:
            return
        yield from self._texts() if self.method.texts else ()
        yield ""
        off = "" if self.omega is not None else "# "
        yield from _comment(
            "AIM: the more active an input channel of the base, the less of the merge it keeps. omega 1 changes "
            "nothing, 0 keeps the most active channels as they are in the base; its authors advise 0.2 to 0.6. "
            "calibration: `builtin` is a small text that comes with the program; your own texts, in a .jsonl or .txt "
            "file, are better"
        )
        yield f"{off}aim:"
        yield f"{off}  omega: {_scalar(DEFAULT_OMEGA if self.omega is None else self.omega)}"
        yield f"{off}  calibration: {BUILTIN}"

    def _texts(self) -> Iterator[str]:
        yield ""
        yield from _comment(
            "the experts' texts. Give each model some 64 such as it was tuned on, prompts with their answers, as "
            "`calibration: texts.jsonl` beside `model:`; with the general ones that come with the program, the result "
            "is hardly more than an average"
        )
        yield "solve:"
        yield f"  calibration: {BUILTIN}"


def starting_values(method: Method, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values to start from for `count` experts: (of each expert, of the whole merge), by the parameters' names."""
    chosen: dict[str, Any] = {"weight": float(f"{1 / count:.3g}"), "density": 0.5 if count < MANY else 0.3}
    chosen["t"] = 0.0001 if method.name == "nearswap" else 0.5
    values = {p.name: chosen.get(p.name, _some_value(p) if p.required else None) for p in method.parameters.values()}
    own = {name: v for name, v in values.items() if v is not None and method.parameters[name].per_expert}
    return own, {name: v for name, v in values.items() if v is not None and name not in own}


def _some_value(parameter: Parameter) -> Any:
    """A value for a parameter of another package that has no default: the middle of its range, or the first choice."""
    if parameter.kind == "switch":
        return False
    if parameter.choices:
        return parameter.choices[0]
    low = 0.0 if parameter.low is None else parameter.low
    return (low + (low + 2.0 if parameter.high is None else parameter.high)) / 2


def why(method: Method, name: str) -> str:
    """Why a parameter starts at its value, and which way to turn it."""
    if name == "weight":
        return _why_weight(method)
    if name == "density":
        which = "the largest" if method.name.startswith(("ties", "breadcrumbs")) else "drawn at random"
        share = f"the share of each expert's changes that is kept, {which}"
        return f"{share}; the smaller it is, the less the experts interfere"
    if name == "t" and method.name == "nearswap":
        return "where base and expert differ by less than this, in units of the weights, the expert's value is taken"
    if name == "t":
        return "0 is the base, 1 the expert; this starts half-way"
    return "it has no default: choose any value in its range"


def _why_weight(method: Method) -> str:
    if method.name == "nuslerp":
        return "the second weight's share of the sum is the place between the two models; equal weights: half-way"
    if method.rows_of_linears:
        return "how much each expert counts where they disagree: only the ratios of the weights matter"
    normalised = [method.parameters[name] for name in ("normalize", "normalize_weights") if name in method.parameters]
    if normalised and normalised[0].default:
        return "the result is divided by the sum of the weights, so only their ratios count"
    return (
        "the changes are added up, and not divided by the sum of the weights. Weights that sum to 1 keep the merge "
        "about as far from the base as an expert is; larger ones go further"
    )


def _is_worth_a_line(parameter: Parameter, *given: Mapping[str, Any]) -> bool:
    # int8_mask is accepted for mergekit's sake and has no effect.
    return not parameter.required and parameter.name != "int8_mask" and all(parameter.name not in g for g in given)


def _comment(text: str) -> Iterator[str]:
    yield from (f"# {line}" for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))


def _scalar(value: Any) -> str:
    """A value as YAML has it on one line; a text is quoted if it could be read as something else."""
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) is not None and isinstance(yaml.safe_load(value), str)
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.10f}".rstrip("0").rstrip(".") if value and abs(value) < 1e-4 else repr(value)
    return json.dumps(value)
