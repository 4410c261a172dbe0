"""The changes of a base's tensors by a LoRA adapter: which tensor of the one belongs to which of the other.

PEFT names them `base_model.model.MODULE.lora_A.weight` (rank, in) and `lora_B.weight` (out, rank), `lora_embedding_A`
(rank, tokens) and `lora_embedding_B` (width, rank), `lora_B.bias`, and `lora_magnitude_vector` of a DoRA. Every other
tensor is a whole copy that takes the place of the base's: `modules_to_save`, biases, trained embeddings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.adapter import Adapter
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.matching import Names

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(A|B)\.weight|lora_B\.bias|lora_embedding_(A|B))")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_BESIDE = ("magnitude", "lora_B.bias")  # parts that may come with the others
# Components of names that PEFT's wrappers put in.
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
_UNKNOWN = re.compile(r"lora_|token_adapter|trainable_tokens|original_module")
# Modules of transformers' Conv1D, whose weights are stored (in, out), and the model types that have them.
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)")
_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Change:
    """The change of one tensor: stored + scaling * left right, whose rows or columns a DoRA scales."""

    stored: TensorInfo  # what is changed: the base's tensor, or the adapter's copy of it
    is_copy: bool  # `stored` is the adapter's
    a: TensorInfo | None = None  # (rank, in); None: nothing is added, or `b` is added as it is
    b: TensorInfo | None = None  # (out, rank), or a bias (out,)
    scaling: float = 0.0
    turned: bool = False  # the tensor is (in, out): its change is the transpose of `b a`
    magnitude: TensorInfo | None = None  # (out,), of a DoRA

    @property
    def rank(self) -> int:
        """The rank of the change; 0 for a mere copy."""
        return 0 if self.b is None else 1 if self.a is None else self.a.shape[0]

    @property
    def parts(self) -> list[TensorInfo]:
        """The adapter's tensors in it."""
        own = [self.stored] if self.is_copy else []
        return own + [part for part in (self.a, self.b, self.magnitude) if part is not None]


@dataclass
class _Problems:
    """The problems of an adapter's tensors: of each kind the first, and how many there are."""

    found: dict[str, list[str]] = field(default_factory=dict)  # kind -> names
    texts: dict[str, str] = field(default_factory=dict)  # kind -> what is wrong with the first

    def add(self, kind: str, name: str, text: str) -> None:
        self.found.setdefault(kind, []).append(name)
        self.texts.setdefault(kind, text)

    def check(self, label: str, hints: Mapping[str, str]) -> None:
        """Raise ModelError if there is any, a line for each kind."""
        lines = []
        for kind, names in self.found.items():
            more = f" (the same goes for {len(names) - 1} more)" if len(names) > 1 else ""
            lines.append(f"`{printable(label)}`: {self.texts[kind]}{more}")
        if lines:
            raise ModelError(lines, [hints[kind] for kind in self.found])


# A checkpoint -> transformers' name of a parameter -> the checkpoint's, where these differ.
Renamed = Callable[[Checkpoint], Mapping[str, str]]


def changes_of(adapter: Adapter, base: Checkpoint, renamed: Renamed) -> dict[str, Change]:
    """The changes by an adapter: tensor of the base -> its change. A tied head that the adapter stores is among them.

    Every tensor of the adapter has its place in a change; `renamed` is asked for names that the header does not show.
    Raises ModelError with all tensors that have no place, and with those that do not fit the config or the base, a line
    for each kind.
    """
    matched = _Matched(adapter, base, renamed)
    changes = dict(matched.changes())
    hints = dict(_HINTS)
    if adapter.config.base:
        called = printable(adapter.config.base, 100)
        hints |= dict.fromkeys(("unmatched", "shape"), f"is this its base? Its maker calls that `{called}`")
    matched.problems.check(adapter.label, hints)
    return changes


_HINTS = {
    "foreign": "is this a LoRA adapter, as PEFT saves it?",
    "dtype": "an adapter's tensors are floats",
    "empty": "it was saved under DeepSpeed ZeRO-3, and its weights were not gathered: save it again",
    "unmatched": "is this the base that the adapter was trained on?",
    "twice": "is this the base that the adapter was trained on?",
    "half": "is the download complete?",
    "matrix": "adapters of convolutions and of stacked experts are not supported: merge it with PEFT",
    "rank": f"its {ADAPTER_CONFIG} does not belong to its tensors: download the adapter again",
    "shape": "is this the base that the adapter was trained on?",
    "magnitude": f"its {ADAPTER_CONFIG} does not belong to its tensors: download the adapter again",
}


class _Matched:
    """An adapter's tensors by the base's tensors that they change."""

    def __init__(self, adapter: Adapter, base: Checkpoint, renamed: Renamed) -> None:
        self.adapter, self.base, self._ask = adapter, base, renamed
        self.problems = _Problems()
        self._names = Names(base.tensors)
        self._copies: dict[str, TensorInfo] = {}  # tensor of the base -> the adapter's copy
        self._parts: dict[str, dict[str, TensorInfo]] = {}  # module -> part -> tensor
        self._taken: set[tuple[str, bool]] = set()  # tensors of the base that are matched, copies by themselves
        for info in adapter.tensors.values():
            self._sort(info)

    def _sort(self, info: TensorInfo) -> None:
        shown = f"`{printable(info.name)}`"
        name = info.name.removeprefix(_PREFIX)
        part = _PART.fullmatch(name)
        magnitude = _MAGNITUDE.fullmatch(name)
        if not info.dtype.is_floating_point:
            self.problems.add("dtype", info.name, f"{shown} is {info.dtype.name}")
        elif not info.numel:
            self.problems.add("empty", info.name, f"{shown} is empty")
        elif magnitude:
            self._parts.setdefault(magnitude["module"], {})["magnitude"] = info
        elif part:
            self._parts.setdefault(part["module"], {})[part["part"]] = info
        elif name == info.name or _UNKNOWN.search(name):
            self.problems.add("foreign", info.name, f"{shown} is no tensor of a LoRA adapter")
        else:
            self._copy(info, _WRAPPER.sub("", name))

    def _find(self, name: str) -> str:
        """The tensor of the base that an adapter calls by this name; "" if there is none."""
        return self._names.find(name) or self._renamed.get(name, "")

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        with contextlib.suppress(ModelError):  # no causal LM, say: then the header's names are all that is known
            return self._ask(self.base)
        return {}

    def _copy(self, info: TensorInfo, name: str) -> None:
        found = self._find(name) or self._tied_head(name)
        if not found:
            self._unmatched(info)
            return
        stored = self.base.tensors.get(found)
        if stored is not None and (stored.shape != info.shape or not stored.dtype.is_floating_point):
            self._unlike(info, stored)
        elif self._is_free(found, info, copied=True):
            self._copies[found] = info

    def _tied_head(self, name: str) -> str:
        """The name for a head that the base does not store, as it is its embedding; "" for another tensor."""
        return name if name.endswith(_HEADS) and not self._names.tail(name) else ""

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Yield (tensor of the base, its change)."""
        changed = set()
        for module, parts in self._parts.items():
            for name, change in self._of_module(module, parts):
                changed.add(name)
                yield name, change
        yield from ((name, Change(copy, True)) for name, copy in self._copies.items() if name not in changed)

    def _of_module(self, module: str, parts: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Change]]:
        first = next(iter(parts.values()))
        weight = self._find(f"{module}.weight")
        if len({part.startswith("lora_embedding") for part in parts if part not in _BESIDE}) > 1:
            shown = f"`{printable(first.name)}`"
            self.problems.add("foreign", first.name, f"{shown} and other tensors adapt its module in two ways")
        elif not weight:
            self._unmatched(first)
        elif self._is_free(weight, first):
            change = self._low_rank(module, parts, weight)
            if change is not None:
                yield weight, change
        if weight and (bias := parts.get("lora_B.bias")):
            yield from self._of_bias(module, weight, bias)

    def _low_rank(self, module: str, parts: Mapping[str, TensorInfo], weight: str) -> Change | None:
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        both = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (parts.get(part) for part in both)
        if a is None or b is None:
            what = " and ".join(f"`{part.removesuffix('.weight')}`" for part in both)
            self.problems.add("half", module, f"of {what} of `{printable(module)}` it lacks one, or both")
            return None
        stored, is_copy = self._stored(weight)
        if not len(a.shape) == len(b.shape) == len(stored.shape) == 2 or not stored.dtype.is_floating_point:
            shown = f"`{printable(module)}`"
            self.problems.add(
                "matrix", module, f"{shown} is no matrix of floats, but {stored.dtype.name} {[*stored.shape]}"
            )
            return None
        turned = is_embedding or self._is_turned(weight, stored.shape, (b.shape[0], a.shape[1]))
        change = Change(stored, is_copy, a, b, self.adapter.config.scaling_of(module), turned, parts.get("magnitude"))
        return change if self._fits(module, change, a, b) else None

    def _stored(self, name: str) -> tuple[TensorInfo, bool]:
        """(the tensor that is changed, whether it is the adapter's own copy)."""
        copy = self._copies.get(name)
        return (self.base.tensors[name], False) if copy is None else (copy, True)

    def _is_turned(self, weight: str, shape: tuple[int, ...], out_in: tuple[int, int]) -> bool:
        """Whether a weight is stored (in, out). A square one does not show it."""
        if out_in[0] != out_in[1]:
            return shape == (out_in[1], out_in[0])
        if self.base.config.get("model_type") in _CONV1D_TYPES:
            return _CONV1D.fullmatch(weight.removesuffix(".weight")) is not None
        return self.adapter.config.inputs_first

    def _fits(self, module: str, change: Change, a: TensorInfo, b: TensorInfo) -> bool:
        config, shown = self.adapter.config, f"`{printable(module)}`"
        (rank, width), (out, same_rank), expected = a.shape, b.shape, config.rank_of(module)
        made = (width, out) if change.turned else (out, width)
        magnitude = change.magnitude
        if not rank == same_rank == expected:
            text = f"the tensors of {shown} have the ranks {rank} and {same_rank}, and the config says {expected}"
            self.problems.add("rank", module, text)
        elif change.stored.shape != made:
            self._unlike(b, change.stored, f"makes {list(made)}")
        elif config.dora and (magnitude is None or magnitude.numel != out):
            text = f"{shown} has no `lora_magnitude_vector` that fits it, though the config says `use_dora`"
            self.problems.add("magnitude", module, text)
        elif magnitude is not None and not config.dora:
            text = f"{shown} has a `lora_magnitude_vector`, and the config does not say `use_dora`"
            self.problems.add("magnitude", module, text)
        else:
            return True
        return False

    def _of_bias(self, module: str, weight: str, bias: TensorInfo) -> Iterator[tuple[str, Change]]:
        name = f"{weight.removesuffix('.weight')}.bias"
        if name not in self.base.tensors:
            self._unmatched(bias)
            return
        stored, is_copy = self._stored(name)
        if stored.shape != bias.shape:
            self._unlike(bias, stored)
        else:
            yield name, Change(stored, is_copy, None, bias, self.adapter.config.scaling_of(module))

    def _is_free(self, found: str, info: TensorInfo, *, copied: bool = False) -> bool:
        """Note that a tensor of the base is matched; one that another name was matched to is a problem."""
        if (found, copied) in self._taken:
            text = f"`{printable(info.name)}` and another tensor both belong to `{printable(found)}` of the base"
            self.problems.add("twice", info.name, text)
            return False
        self._taken.add((found, copied))
        return True

    def _unmatched(self, info: TensorInfo) -> None:
        what = "its head is its embedding, or missing" if ".lm_head." in info.name else "there is no such module"
        text = f"`{printable(info.name)}` has no place in `{printable(self.base.label)}`: {what}"
        self.problems.add("unmatched", info.name, text)

    def _unlike(self, info: TensorInfo, stored: TensorInfo, what: str = "") -> None:
        what = what or f"is {info.dtype.name} {list(info.shape)}"
        there = f"{stored.dtype.name} {list(stored.shape)}"
        text = f"`{printable(info.name)}` {what}, but `{printable(stored.name)}` of the base is {there}"
        self.problems.add("shape", info.name, text)
