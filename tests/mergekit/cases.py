"""What is merged by both tools: every method, its parameters at and off their defaults, one to four experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from comparing import TOLERANCE

WEIGHTS = (0.7, 0.5, 0.3, 0.4)
DENSITIES = (0.4, 0.6, 0.8, 0.5)
# The share of elements beside a threshold that mergekit has from float32 divergences and rounded quantiles.
ARCEE_SHARE = 5e-4


@dataclass(frozen=True)
class Case:
    """One recipe. `own` are parameters of each expert, cut to as many as there are."""

    method: str
    experts: int
    top: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    base: bool = True
    listed: bool = False  # the base is one of the models
    random: bool = False  # the tools draw other masks: only what is expected of them is the same
    may_differ: float = 0.0  # share of all elements
    tolerance: float = TOLERANCE

    @property
    def name(self) -> str:
        settings = {**self.top, **{key: "each" for key in self.own if key != "weight"}}
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        where = "" if self.base else " without base"
        return f"{self.method} {self.experts}{where} {shown}".rstrip()

    def recipe(self, models: Path, dtype: str) -> str:
        """The YAML that both tools read."""
        entries: list[dict[str, Any]] = [{"model": str(models / "base")}] if self.listed else []
        for i in range(self.experts):
            parameters = {key: values[i] for key, values in self.own.items()}
            entry: dict[str, Any] = {"model": str(models / f"expert-{i}")}
            entries.append(entry | ({"parameters": parameters} if parameters else {}))
        table: dict[str, Any] = {"merge_method": self.method, "models": entries, "dtype": dtype}
        if self.base:
            table["base_model"] = str(models / "base")
        if self.top:
            table["parameters"] = dict(self.top)
        return yaml.safe_dump(table)


def cases() -> list[Case]:
    return [*_whole_weights(), *_between_two(), *_task_vectors(), *_by_size(), *_at_random()]


def defaults() -> list[Case]:
    """One of each method, for the further architectures: the first off the defaults if there is one."""
    chosen: dict[str, Case] = {}
    for case in cases():
        if case.method not in chosen or (case.top and not chosen[case.method].top):
            chosen[case.method] = case
    return list(chosen.values())


def _weighted(*others: str) -> dict[str, Sequence[Any]]:
    return {"weight": WEIGHTS} | ({"density": DENSITIES} if "density" in others else {})


def _whole_weights() -> Iterator[Case]:
    for count in (1, 2, 4):
        yield Case("linear", count, own=_weighted(), base=False)
    yield Case("linear", 3, {"normalize": False}, _weighted(), base=False)
    yield Case("passthrough", 1, base=False)
    yield Case("passthrough", 1, {"scale": 0.7}, base=False)
    for count in (2, 3, 4):
        yield Case("multislerp", count, own=_weighted(), base=False)
    yield Case("multislerp", 3, own=_weighted())
    yield Case("multislerp", 3, {"normalize_weights": False}, _weighted())
    yield Case("karcher", 2, base=False, tolerance=1e-5)  # its own `tol`
    yield Case("karcher", 4, {"max_iter": 20, "tol": 1e-9}, base=False)
    for count in (2, 3, 4):
        yield Case("model_stock", count)
    yield Case("model_stock", 3, {"filter_wise": True})


def _between_two() -> Iterator[Case]:
    for t in (0.0, 0.3, 1.0):
        yield Case("slerp", 1, {"t": t}, listed=True)
    for t in (0.001, 0.01, 0.3):
        yield Case("nearswap", 1, {"t": t}, listed=True)
    yield Case("arcee_fusion", 1, listed=True, may_differ=ARCEE_SHARE)
    for base in (True, False):
        yield Case("nuslerp", 2, own=_weighted(), base=base)
        yield Case("nuslerp", 2, {"nuslerp_flatten": False}, _weighted(), base=base)
        yield Case("nuslerp", 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, _weighted(), base=base)


def _task_vectors() -> Iterator[Case]:
    for count in (1, 2, 4):
        yield Case("task_arithmetic", count, own=_weighted())
    yield Case("task_arithmetic", 3, {"normalize": True, "lambda": 0.8}, _weighted())
    for count in (1, 2, 4):
        yield Case("ram", count)
        yield Case("ramplus_tl", count)
    yield Case("ram", 3, {"epsilon": 0.005})
    yield Case("ramplus_tl", 3, {"epsilon": 0.005, "r": 0.3, "alpha": 0.1})


def _by_size() -> Iterator[Case]:
    for count in (1, 2, 4):
        yield Case("ties", count, own=_weighted("density"))
    yield Case("ties", 3, own=_weighted())
    yield Case("ties", 3, {"normalize": False, "rescale": True, "lambda": 0.8}, _weighted("density"))
    yield Case("ties", 3, {"int8_mask": True}, _weighted("density"))
    # Of these no tensor keeps an element by int(density n) alone: ties keeps one, and all others give the base.
    yield Case("ties", 2, own={"weight": WEIGHTS, "density": (1e-9, 0.0)})
    yield Case("breadcrumbs", 2, own={"weight": WEIGHTS, "density": (0.0, 0.5)}, top={"gamma": 0.0})
    yield Case("sce", 3, {"select_topk": 0.0})
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        for count in (1, 3):
            yield Case(method, count, {"gamma": 0.05}, _weighted("density"))
        yield Case(method, 2, {"gamma": 0.1, "normalize": True, "rescale": True, "lambda": 0.7}, _weighted("density"))
    for count in (1, 2, 4):
        yield Case("sce", count)
    yield Case("sce", 3, {"select_topk": 0.3})


def _at_random() -> Iterator[Case]:
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        more = {"epsilon": 0.1} if method.startswith("della") else {}
        yield Case(method, 1, {"rescale": False, **more}, _weighted("density"), random=True)
        yield Case(method, 3, more, _weighted("density"), random=True)
        yield Case(method, 4, {"normalize": True, "lambda": 0.8, **more}, _weighted("density"), random=True)
