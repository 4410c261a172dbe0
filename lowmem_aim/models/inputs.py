"""The models of a recipe as one thing: base, experts, and the reference that the others are compared with.

Names, shapes, config and tokenizer come from the *reference*: the base, where the base is merged or owns the tokenizer;
else the first model (in `relax`, the model that is relaxed).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.output_tokenizer import OutputTokenizer
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.token_rows import TokenRows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Inputs:
    """The opened models of a recipe; `experts` are in its order."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    reference: Checkpoint
    roles: TensorRoles  # of the reference
    token_rows: TokenRows | None = None  # None: rows of the vocabulary simply match
    tokenizer: OutputTokenizer | None = None  # None: the reference's
    matched: bool = False  # it is known which rows of the vocabulary belong together
    dropped: frozenset[str] = field(default_factory=frozenset)  # tied heads that repeat their embedding
    carried: frozenset[str] = field(
        default_factory=frozenset
    )  # tensors that some model has no part of: the reference's
    opened: Mapping[str, Checkpoint] = field(default_factory=dict)  # by the recipe's references

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All models, the base first, if there is one; one that is an expert twice stands here twice."""
        first = (self.base, *self.experts) if self.base else self.experts
        return (*first, *(model for model in self.opened.values() if model not in first))

    @property
    def places(self) -> list[tuple[Path, ...]]:
        """The `place` of each model, each once; the first is the base's, if there is one."""
        return list(dict.fromkeys(checkpoint.place for checkpoint in self.checkpoints))

    @property
    def folders(self) -> list[Path]:
        """The folders of the models and their adapters, each once."""
        return list(dict.fromkeys(folder for place in self.places for folder in place))

    @property
    def others(self) -> list[Checkpoint]:
        """The models beside the reference, each once."""
        return [other for other in dict.fromkeys(self.checkpoints) if other is not self.reference]

    def with_model(self, model: Checkpoint, instead: Checkpoint) -> Inputs:
        """The same inputs with another reader in the place of a model."""

        def now(one: Checkpoint) -> Checkpoint:
            return instead if one is model else one

        opened = {reference: now(one) for reference, one in self.opened.items()}
        base = now(self.base) if self.base else None
        return replace(self, base=base, experts=tuple(map(now, self.experts)), opened=opened)

    def without(self, unlike: Set[Checkpoint]) -> Inputs:
        """The same inputs, for further checks, but for models that are refused already."""
        base = None if self.base in unlike else self.base
        experts = tuple(expert for expert in self.experts if expert not in unlike)
        opened = {reference: model for reference, model in self.opened.items() if model not in unlike}
        return replace(self, base=base, experts=experts, opened=opened)

    def replacing(self, views: Mapping[Checkpoint, Checkpoint], roles: TensorRoles) -> Inputs:
        """The same inputs, but for models that are seen in another way, and the roles that follow from it."""
        return replace(
            self,
            base=self.base and views.get(self.base, self.base),
            experts=tuple(views.get(expert, expert) for expert in self.experts),
            reference=views.get(self.reference, self.reference),
            roles=roles,
            opened={reference: views.get(model, model) for reference, model in self.opened.items()},
        )

    def row_map(self, checkpoint: Checkpoint, tensor: str) -> Tensor | None:
        """Which of a model's rows stands for each row of the output; None where rows simply match.

        (output rows,) int64; -1: the model has no such row.
        """
        rows = self.rows_of(tensor)
        return None if rows is None else rows.own.get(checkpoint.place)

    def rows_of(self, tensor: str) -> TokenRows | None:
        """The rows of an embedding or a head in the output; None for other tensors, and where rows simply match."""
        return self.token_rows if tensor in self.roles.vocabulary else None
