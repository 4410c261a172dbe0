"""The adapter_config.json of a LoRA adapter, as PEFT writes it: ranks, factors, and the variants that are refused."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.config import MAX_CONFIG_BYTES, load_json
from lowmem_aim.system.files import is_file

N = TypeVar("N")

ADAPTER_CONFIG = "adapter_config.json"
MAX_RANK = 1 << 16
MOST_PATTERNS = 10_000  # one for each module, at most
LONGEST_MODULE = 300  # characters of a path: the time of a match grows with their third power
# PEFT's, where the config says nothing.
_RANK, _ALPHA = 8, 8
# Keys that change what an adapter's tensors mean -> the name of the variant.
_REFUSED = {
    "layer_replication": "repeats layers of its base (`layer_replication`)",
    "target_parameters": "adapts parameters that are no module's (`target_parameters`)",
    "trainable_token_indices": "trains single tokens (`trainable_token_indices`)",
    "alora_invocation_tokens": "is an aLoRA (`alora_invocation_tokens`): it acts on some tokens only",
    "use_qalora": "is a QALoRA (`use_qalora`)",
    "megatron_config": "was made with Megatron (`megatron_config`)",
    "arrow_config": "is a router of other adapters (`arrow_config`)",
    "use_bdlora": "is a BD-LoRA (`use_bdlora`)",
    "kasa_config": "is a KaSA (`kasa_config`): it changes its base too",
    "monteclora_config": "is a Monteclora (`monteclora_config`)",
}
# Ways to begin a training that take something out of the base: what is stored belongs to what is left of it.
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga|mica", re.IGNORECASE)
_CONVERT = (
    "merge it with PEFT, or save it as a plain LoRA there: `save_pretrained(..., path_initial_model_for_weight_"
    "conversion=...)`"
)
_MERGE = "merge it into its base with PEFT, and name the result"
# A pattern is a regular expression in PEFT; these are the ones that cannot take long.
_PATTERN = re.compile(r"[\w.^$|()\[\]\\?*+-]{1,300}")
_SLOW = re.compile(r"\)[?*+]|\\\d|(?:[^?*+]*(?<!\()[?*+]){3}")


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks, factors and variant of an adapter, as its config gives them."""

    rank: int
    alpha: float
    stabilised: bool  # the factor is alpha / sqrt(rank), not alpha / rank
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dora: bool
    inputs_first: bool  # weights are stored (in, out)
    base: str  # what its maker called the base; "" if the config does not say

    def rank_of(self, module: str) -> int:
        """The rank of the two factors of a module's adapter."""
        return _first(self._ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The number that the product of a module's two factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = _first(self._alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], int]]:
        return _compiled(self.rank_pattern)

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        return _compiled(self.alpha_pattern)


def _compiled(patterns: Mapping[str, N]) -> list[tuple[re.Pattern[str], N]]:
    """The patterns as PEFT matches them: with the end of a module's path, from a `.` on."""
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]


def _first(patterns: Iterable[tuple[re.Pattern[str], N]], module: str, default: N) -> N:
    """The value of the first pattern that fits a module's path."""
    short = module[-LONGEST_MODULE:]
    return next((value for pattern, value in patterns if pattern.match(short)), default)


def adapter_config_of(folder: Path) -> AdapterConfig:
    """The config of the adapter in `folder`. Raises ModelError with everything that is wrong with it."""
    table = load_json(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    shown = printable(str(folder / ADAPTER_CONFIG))
    if not isinstance(table, dict):
        raise ModelError(f"`{shown}` is not a JSON object")
    refusals = list(_refusals(table))
    if refusals:
        lines = [f"the adapter `{printable(str(folder))}` {what}" for what, _ in refusals]
        raise ModelError(lines, [hint for _, hint in refusals])
    problems = [f"`{shown}`: {problem}" for problem in _wrong_values(table)]
    if problems:
        raise ModelError(problems, hint="download the adapter again")
    base = table.get("base_model_name_or_path")
    return AdapterConfig(
        rank=table.get("r", _RANK),
        alpha=table.get("lora_alpha", _ALPHA),
        stabilised=bool(table.get("use_rslora")),
        rank_pattern=table.get("rank_pattern") or {},
        alpha_pattern=table.get("alpha_pattern") or {},
        dora=bool(table.get("use_dora")),
        inputs_first=bool(table.get("fan_in_fan_out")),
        base=base if isinstance(base, str) else "",
    )


def refuse_as_model(folder: Path, weights: Collection[str]) -> None:
    """Raise ModelError if a folder holds an adapter, and none of the files that hold a model's `weights`."""
    if not is_file(folder / ADAPTER_CONFIG) or any(is_file(folder / name) for name in weights):
        return
    base = ""
    with contextlib.suppress(ModelError):
        table = load_json(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
        base = str(table.get("base_model_name_or_path") or "") if isinstance(table, dict) else ""
    named = printable(base, 200) or "base"
    shown = printable(str(folder))
    raise ModelError(
        f"`{shown}` is a LoRA adapter, not a whole model",
        hint=f"name it behind its base: `{named}+{printable(folder.name)}`",
    )


def _refusals(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (why the adapter cannot be added as W + s B A, what to do instead)."""
    kind = table.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"is no LoRA but `{printable(str(kind), 40)}` (`peft_type`)", _MERGE
    yield from ((what, _MERGE) for key, what in _REFUSED.items() if table.get(key) not in (None, False, [], {}))
    start = table.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        yield f"was begun as `{printable(start, 40)}` (`init_lora_weights`), which changes its base", _CONVERT


def _wrong_values(table: Mapping[str, Any]) -> Iterator[str]:
    if not _is_rank(table.get("r", _RANK)):
        yield f"`r` must be a whole number from 1 to {MAX_RANK}"
    if not _is_number(table.get("lora_alpha", _ALPHA)):
        yield "`lora_alpha` must be a number"
    for key, fits, what in (
        ("rank_pattern", _is_rank, f"whole numbers from 1 to {MAX_RANK}"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        patterns = table.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            yield f"`{key}` must be a table of {what}"
            continue
        if len(patterns) > MOST_PATTERNS:
            yield f"`{key}` has more than {MOST_PATTERNS} patterns"
            continue
        for pattern in patterns:
            if not _is_quick(pattern):
                yield f"`{key}` has the pattern `{printable(pattern, 60)}`, which is not supported"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression is valid, and without what could take very long to match."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return _PATTERN.fullmatch(pattern) is not None and _SLOW.search(pattern) is None
