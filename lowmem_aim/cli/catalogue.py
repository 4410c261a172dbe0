"""The merge methods as `lowmem-aim methods` describes them: formula, parameters, passes, and a recipe to start from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import yaml

from lowmem_aim.errors import UsageError, did_you_mean, printable
from lowmem_aim.methods.method import Method, Parameter
from lowmem_aim.methods.registry import find_method, names

BASES = {
    "required": "on a base",
    "optional": "with or without a base",
    "listed": "a base counts only if it is one of them",
    "averaged": "a base counts as one of them",
}
# Values to start from, for parameters that have no default, or one that changes nothing.
_EXAMPLES: dict[str, Any] = {"weight": 0.5, "density": 0.5, "t": 0.4}


def all_methods() -> tuple[list[Method], list[str]]:
    """Every method by name, and the problems of methods of other packages that cannot be loaded."""
    found: list[Method] = []
    problems: list[str] = []
    for name in names():
        try:
            found.append(method_of(name))
        except UsageError as error:
            problems += error.problems
    return found, problems


def method_of(name: str) -> Method:
    """The method of that name. Raises UsageError if there is none."""
    method = find_method(name)
    if method is None:
        raise UsageError(
            f"unknown merge method `{printable(name)}`{did_you_mean(name, names())}", hint="see `lowmem-aim methods`"
        )
    return method


def facts(method: Method) -> dict[str, Any]:
    """All there is to say about a method, as JSON values."""
    return {
        "name": method.name,
        "formula": formula(method),
        "source": method.source,
        "base": method.base,
        "experts": {"fewest": method.fewest, "most": method.most},
        "passes": {"fewest": method.rounds[0] + 1, "most": method.rounds[1] + 1},
        "parameters": [_parameter(parameter) for parameter in method.parameters.values()],
        "package": method.package or None,
        "example": example(method),
    }


def formula(method: Method) -> str:
    """The first paragraph of the method's docstring, as one line."""
    first = (inspect.getdoc(method.script) or "").partition("\n\n")[0]
    return " ".join(first.split())


def _parameter(parameter: Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {"name": parameter.name, "each_model": parameter.per_expert, "kind": parameter.kind}
    found["required"] = parameter.required
    found["default"] = None if parameter.required else parameter.default
    if parameter.choices:
        found["choices"] = list(parameter.choices)
    if parameter.low is not None or parameter.high is not None:
        found["range"] = [parameter.low, parameter.high]
    return found


def example(method: Method) -> str:
    """A recipe, as YAML, that runs once its models are there."""
    own = {p.name: _EXAMPLES[p.name] for p in method.parameters.values() if p.per_expert and p.name in _EXAMPLES}
    top = {p.name: _EXAMPLES[p.name] for p in method.parameters.values() if not p.per_expert and p.required}
    experts = [f"./expert-{number}" for number in range(1, min(method.most or 2, 2) + 1)]
    table: dict[str, Any] = {"merge_method": method.name}
    if method.base in ("required", "optional"):
        table["base_model"] = "./base"
    table["models"] = [
        {"model": name}
        | ({"calibration": f"{name}.jsonl"} if method.texts else {})
        | ({"parameters": dict(own)} if own else {})
        for name in experts
    ]
    if top:
        table["parameters"] = top
    table["dtype"] = "bfloat16"
    return str(yaml.safe_dump(table, sort_keys=False))


# --- for people -------------------------------------------------------------------------------------------------------


def summary(methods: list[Method]) -> Iterator[str]:
    """Yield a few lines for each method."""
    for method in methods:
        yield f"{method.name}: {formula(method)}"
        yield f"    {method.source}; {_models(method)}; {_passes(method)}"
        yield f"    {_all_parameters(method)}"
    yield ""
    yield "lowmem-aim methods NAME: bounds, and a recipe to start from"


def _models(method: Method) -> str:
    least, most = method.fewest, method.most
    if least == most:
        count = f"{least} model{'s' * (least > 1)}"
    else:
        count = f"{least} models or more" if least > 1 else "any models"
    return f"{count}, {BASES[method.base]}"


def _passes(method: Method) -> str:
    least, most = (rounds + 1 for rounds in method.rounds)
    return f"{least} pass{'es' * (least > 1)}" if least == most else f"{least} to {most} passes"


def _all_parameters(method: Method) -> str:
    shown = [p.name if p.required else f"{p.name} ({_shown(p.default)})" for p in method.parameters.values()]
    return ", ".join(shown) or "no parameters"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def description(method: Method) -> Iterator[str]:
    """Yield all lines about one method."""
    yield f"{method.name}: {formula(method)}"
    yield ""
    yield f"source      {method.source}" + (f"; in the package {method.package}" if method.package else "")
    yield f"models      {_models(method)}"
    yield f"passes      {_passes(method)} over each tensor; one that fits the budget is read once"
    for number, parameter in enumerate(method.parameters.values()):
        yield f"{'' if number else 'parameters':12}{_described(parameter)}"
    yield ""
    yield from example(method).rstrip().splitlines()


def _described(parameter: Parameter) -> str:
    kinds = {"number": "a number", "switch": "true or false"}
    what = " or ".join(str(choice).lower() for choice in parameter.choices) or kinds[parameter.kind]
    if parameter.low is not None and parameter.high is not None:
        what += f" in [{parameter.low:g}, {parameter.high:g}]"
    elif parameter.low is not None:
        what += f", {parameter.low:g} or more"
    what += "".join(f", or `{word}`" for word in parameter.words)
    default = "required" if parameter.required else f"default {_shown(parameter.default)}"
    return f"{parameter.name}: {what}; {default}{'; for each model' * parameter.per_expert}"
