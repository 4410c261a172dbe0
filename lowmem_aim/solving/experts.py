"""The experts of a merge whose method measures texts: read and checked before any work, and measured during it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash

from lowmem_aim.blocks.shares import Needs
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.measuring.calibration import Measurement
from lowmem_aim.measuring.comparison import Merged
from lowmem_aim.measuring.mean_activations import shares_for
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.meta_model import load_meta_model
from lowmem_aim.models.token_rows import TokenRows
from lowmem_aim.solving.expert_moments import ExpertMoments
from lowmem_aim.solving.kept_states import KeptStates
from lowmem_aim.solving.needs import matrices_bytes, needs_of_moments
from lowmem_aim.solving.texts import ExpertTexts, MergedModel
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.run import Run


@dataclass(frozen=True)
class Experts:
    """The experts that are run on their texts, block by block."""

    measurements: Sequence[Measurement]  # of each expert, in the recipe's order: its texts, and its model
    outline: Checkpoint | None  # the merged model's config and headers, where its blocks are run, too

    def digest(self) -> str:
        """xxh3-128 of what is to be measured: each expert's tokens, config and dtype."""
        found = [measurement.digest() for measurement in self.measurements]
        return xxhash.xxh3_128_hexdigest(repr(found).encode())

    @property
    def sequences(self) -> list[torch.Tensor]:
        """The sequences of all experts, each (tokens,) int64."""
        return [tokens for one in self.measurements for tokens in one.sequences]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first expert's forwards."""
        return self.measurements[0].meta_model.dtype

    def needs(self) -> Needs:
        """The needs of running the experts, in bytes, without those of their moments."""
        models = [(one.meta_model, one.sequences) for one in self.measurements]
        if self.outline is None:
            return needs_of_moments(models)
        return needs_of_moments([*models, (self.measurements[0].meta_model, [])])

    def moments_bytes(self) -> int:
        """Bytes of the moments of the largest block, of all experts."""
        return matrices_bytes([one.meta_model for one in self.measurements])

    def check_alike(self, inputs: Inputs) -> None:
        """Raise ModelError if the merged model is run on their tokens, and has other ids for these than an expert."""
        rows = inputs.token_rows
        if self.outline is None or rows is None:
            return
        merged = rows.ids_of(inputs.reference.place)  # which has the ids of the model whose vocabulary it has
        unlike = [one.base.label for one in self.measurements if not _alike(one, rows, merged)]
        if unlike:
            listed = ", ".join(f"`{printable(label)}`" for label in unlike)
            raise ModelError(
                f"the merged model is run on the tokens of all experts, and has other ids for those of {listed}",
                hint="`merge_method: regmean` runs each expert on its own tokens",
            )

    @contextlib.contextmanager
    def moments(
        self,
        run: Run,
        space: MatrixSpace,
        *,
        ram: int,
        vram: int,
        folder: Path,
        kept: KeptStates | None,
        merged: Merged,
    ) -> Iterator[ExpertMoments]:
        """The moments, block by block. `ram` and `vram` are bytes for running the models, beside what is in use now.

        `folder` takes hidden states that do not fit, `kept` has snapshots of them; `merged` has the merged model's
        weights on demand. Raises MemoryBudgetError, DiskError.
        """
        used = 0 if run.budget.vram is None else run.budget.vram - run.budget.vram_left(run.device)
        budget = Budget(run.budget.ram_used() + ram, None if run.budget.vram is None else used + vram)
        model = MergedModel(merged, load_meta_model(self.outline, self.dtype)) if self.outline else None
        with ExpertMoments(
            [ExpertTexts.of(one) for one in self.measurements],
            space,
            run.device,
            shares=shares_for(self.needs(), budget, run.device, folder),
            budget=replace(budget, ram=run.budget.ram),
            spill=folder,
            kept=kept,
            merged=model,
            emit=run.emit,
        ) as moments:
            yield moments


def _alike(expert: Measurement, rows: TokenRows, merged: torch.Tensor) -> bool:
    """Whether the tokens of an expert's texts have the same ids in the merged model; `merged`: of each row."""
    own = rows.ids_of(expert.base.place)
    same = own[own == merged]
    return bool(torch.isin(torch.cat(list(expert.sequences)), same).all())
