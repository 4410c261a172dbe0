"""The experts' texts, and the models that run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem_aim.blocks.offload import Source
from lowmem_aim.errors import LowmemAimError, noted, raise_all
from lowmem_aim.events import Emit
from lowmem_aim.measuring.calibration import Measurement, measurement_of
from lowmem_aim.measuring.comparison import Merged
from lowmem_aim.measuring.texts import TextSettings
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.models.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertTexts:
    """An expert, and the texts that show what it is given."""

    source: Source  # of its weights
    meta_model: MetaModel  # its own: no two experts may share one
    sequences: Sequence[Tensor]  # each (tokens,) int64

    @classmethod
    def of(cls, measurement: Measurement) -> ExpertTexts:
        """Take what `read_texts` has found."""
        return cls(measurement.base, measurement.meta_model, measurement.sequences)

    @property
    def label(self) -> str:
        """The name of the expert's model in messages."""
        return self.meta_model.weights.checkpoint.label

    @property
    def tokens(self) -> int:
        """The number of tokens in all texts."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True, eq=False)
class MergedModel:
    """The model that the experts become: its weights on demand, each block's once its moments are there."""

    source: Merged
    meta_model: MetaModel


def read_texts(
    settings: TextSettings,
    calibrations: Sequence[str],  # of each expert: its own texts; "" where it has none
    experts: Sequence[Checkpoint],
    reader: Reader,
    emit: Emit,
) -> list[Measurement]:
    """Read and tokenise each expert's texts by its own tokenizer, those of `settings` where it has none of its own.

    Raises ModelError, NetworkError, UsageError: all problems of all experts.
    """
    found, errors = list[Measurement](), list[LowmemAimError]()
    for expert, calibration in zip(experts, calibrations, strict=True):
        with noted(errors):
            own = replace(settings, calibration=calibration) if calibration else settings
            found.append(measurement_of(own, expert, reader, emit))
    raise_all(errors)
    return found
