"""The roles of a checkpoint's tensors, as far as merging needs them: tied, vocabulary, buffer, not needed, (in, out).

The roles come from transformers' model; see `models.reader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import lt
from typing import Any

TEXT = "text_decoder"  # the section of a vision-language model that continues text


@dataclass(frozen=True)
class Section:
    """A section of a model that a recipe's `modules` can name, by the checkpoint's names of its tensors."""

    name: str
    layers: str | None  # what the names of all tensors in its layers begin with; "" without layers, None: no one list
    before: frozenset[str] = frozenset()  # its tensors outside its layers
    after: frozenset[str] = frozenset()  # those of them that come after its layers
    table: str = ""  # of the config, which has its settings; "": the whole config

    def holds(self, tensor: str) -> bool:
        """Whether a tensor is part of the section."""
        return bool(self.layers and tensor.startswith(self.layers)) or tensor in self.before or tensor in self.after


@dataclass(frozen=True)
class TensorRoles:
    """The tensors that have a special role, by the checkpoint's names.

    A tensor that the file lacks (a tied head) has transformers' name.
    """

    tied: dict[str, str]  # output head's weight -> embedding's weight that it shares, if the config ties them
    vocabulary: frozenset[str]  # one row a token: embeddings, head weight, head bias
    buffers: frozenset[str]  # state that is no parameter, today's or an older model's
    inputs_first: frozenset[str]  # weights (in, out), not (out, in): embeddings, GPT-2's linears, some fused experts
    layers: str = ""  # what the names of all tensors of the layers begin with, if the layers are one list
    after_layers: frozenset[str] = frozenset()  # tensors that come after the layers: the final norm, the head
    head: frozenset[str] = frozenset()  # the output head's weight and bias
    optional: frozenset[str] = frozenset()  # the model loads without them: it has no place for them, or makes its own
    divisions: tuple[tuple[Section, ...], ...] = ()  # ways to divide a model with several lists: see `models.sections`

    @property
    def text(self) -> Section | None:
        """The section that continues text, of a model that has others."""
        return next((section for sections in self.divisions for section in sections if section.name == TEXT), None)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> TensorRoles:
        """The roles in a table that `table` gave."""
        sets = {name: frozenset(table[name]) for name in _SETS}
        divisions = tuple(tuple(map(_section, sections)) for sections in table["divisions"])
        return cls(tied=dict(table["tied"]), layers=table["layers"], divisions=divisions, **sets)

    def table(self) -> dict[str, Any]:
        """The roles as JSON has them."""
        return {
            "tied": self.tied,
            "layers": self.layers,
            "divisions": [[_as_json(section) for section in sections] for sections in self.divisions],
            **{name: sorted(getattr(self, name)) for name in _SETS},
        }


def _section(table: Mapping[str, Any]) -> Section:
    return Section(**{**table, "before": frozenset(table["before"]), "after": frozenset(table["after"])})


def _as_json(section: Section) -> dict[str, Any]:
    return {**asdict(section), "before": sorted(section.before), "after": sorted(section.after)}


_SETS = ("vocabulary", "buffers", "inputs_first", "after_layers", "head", "optional")
NO_ROLES = TensorRoles({}, frozenset(), frozenset(), frozenset())


def is_linear(tensor: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a layer is a matrix that inputs are multiplied with, or a stack of them, by name and shape.

    It is no bias of stacked experts, no convolution, no embedding, and no state such as a Mamba's `A_log`. A matrix may
    have one output, as the gate of a shared expert has; stacks of vectors are no linears.
    """
    module, _, own = tensor.rpartition(".")
    least = (1, 2) if len(shape) == 2 else (1, 2, 2)
    if len(shape) not in (2, 3) or any(map(lt, shape, least)) or "bias" in own or "embed" in module:
        return False
    return "weight" in own or "proj" in own
