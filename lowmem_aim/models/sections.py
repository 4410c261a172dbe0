"""The sections of a model with several lists of layers, by the names that mergekit's `modules` has for them.

mergekit knows some architectures by name: their sections are the language part (`text_decoder`), each tower
(`vision_tower`), and what joins them (`multi_modal_projector`); or `encoder`, `decoder`, and what they share
(`shared`). Those that it does not know it divides by their tensors' names: each list of layers by its path, and all
that is in no list as `default`. Both divisions are made of every model here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from lowmem_aim.models.parameter_names import ParameterNames
from lowmem_aim.models.roles import TEXT, Section

PROJECTOR, SHARED, DEFAULT = "multi_modal_projector", "shared", "default"
_NAMES = {"visual": "vision_tower"}  # Qwen's name of its tower -> mergekit's
_JOINTS = ("projector", "merger", "connector", "aligner", "adaptor")  # in the name of what joins a tower to the text
_HALVES = ("encoder", "decoder")
_NUMBER = re.compile(r"\.(\d+)\.")

Named = Callable[[str], str]  # a parameter -> the name of its section


def divisions(
    model: Any, weights: ParameterNames, decoder: str, head: str, blocks: str
) -> tuple[tuple[Section, ...], ...]:
    """The ways to divide the model; none if its layers are one list, and all of it is one section.

    `decoder`: the path of the part that continues text; `blocks`: of its layers, if they are one list.
    """
    parameters: dict[str, str] = {}  # by the checkpoint's names, in the model's order
    for name in model.state_dict():
        for stored in weights.sources(name):
            parameters.setdefault(stored, name)  # a tied weight is where it stands first
    lists = {path for name in parameters.values() if (path := _list_of(name))}
    if len(lists) < 2:
        return ()

    def divided(named: Named) -> tuple[Section, ...]:
        groups: dict[str, dict[str, str]] = {}
        for stored, parameter in parameters.items():
            groups.setdefault(named(parameter), {})[stored] = parameter
        first = sorted(groups, key=lambda name: name not in (TEXT, SHARED, DEFAULT))
        return tuple(_section(name, groups[name], blocks, model) for name in first)

    by_part = _parts(model, decoder, head, lists)
    return (*([divided(by_part)] if by_part else []), divided(lambda name: _list_of(name) or DEFAULT))


def _list_of(parameter: str) -> str:
    """The path of the list that a parameter is in, by the first number in its name; "" if there is none."""
    found = _NUMBER.search(parameter)
    return parameter[: found.start()] if found else ""


def _parts(model: Any, decoder: str, head: str, lists: Iterable[str]) -> Named | None:
    """The name of the part that a parameter is in; None if the model has no parts."""
    if getattr(model.config, "is_encoder_decoder", False):
        return lambda name: next((step for step in name.split(".") if step.endswith(_HALVES)), SHARED)
    text = tuple(f"{path}." for path in (decoder, head) if path)
    towers = {_root(path, decoder) for path in lists if not f"{path}.".startswith(text) and not _is_joint(path)}
    if not decoder or not towers:
        return None

    def named(name: str) -> str:
        if name.startswith(text):
            return TEXT
        root = _root(name, decoder)
        return _NAMES.get(root, root) if root in towers and not _is_joint(name) else PROJECTOR

    return named


def _is_joint(name: str) -> bool:
    return any(joint in step for step in name.split(".") for joint in _JOINTS)


def _root(name: str, decoder: str) -> str:
    """The step of a name at which it parts from the path of the decoder."""
    steps, others = name.split("."), decoder.split(".")
    return next((step for step, other in zip(steps, others, strict=False) if step != other), steps[-1])


def _section(name: str, parameters: Mapping[str, str], blocks: str, model: Any) -> Section:
    """The section of these tensors: the checkpoint's names -> parameters, in the model's order."""
    lists = dict.fromkeys(path for parameter in parameters.values() if (path := _list_of(parameter)))
    chosen = blocks if blocks in lists else next(iter(lists), "")
    inside = {stored: parameter for stored, parameter in parameters.items() if _list_of(parameter) == chosen != ""}
    prefixes = {_prefix(stored, parameter) for stored, parameter in inside.items()}
    if not lists or name == PROJECTOR:
        return Section(name, "", frozenset(parameters))
    if len(prefixes) > 1 or (len(lists) > 1 and chosen != blocks):
        return Section(name, None, frozenset(parameters))
    order = list(parameters)
    end = max(order.index(stored) for stored in inside)
    outside = frozenset(parameters) - frozenset(inside)
    after = frozenset(stored for stored in outside if _is_after(parameters[stored], order.index(stored) > end))
    return Section(name, prefixes.pop(), outside - after, after, _table(model, chosen))


def _is_after(parameter: str, listed_after: bool) -> bool:
    """Whether a parameter outside the layers acts after them; the order in which models list their parts may differ."""
    return "post" in parameter or (listed_after and "embedding" not in parameter)


def _prefix(stored: str, parameter: str) -> str:
    """The beginning of a parameter's name in the checkpoint, up to the number of its layer."""
    found = _NUMBER.search(parameter)
    number = found[1] if found else ""
    return re.split(rf"(?:^|(?<=\.)){number}\.", stored, maxsplit=1)[0]


def _table(model: Any, path: str) -> str:
    """The key of the config that holds the settings of a part of the model; "" if they are the whole config."""
    while path and not isinstance(getattr(model.get_submodule(path), "config", None), PretrainedConfig):
        path = path.rpartition(".")[0]
    kind = type(model.get_submodule(path).config)
    tables = {key: value for key, value in vars(model.config).items() if isinstance(value, PretrainedConfig)}
    return next((key for key, value in tables.items() if type(value) is kind), "")
