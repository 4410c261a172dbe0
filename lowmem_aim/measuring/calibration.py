"""The activations of a base: from a file, from the cache, or measured now and cached.

The cache is a folder of small files, $XDG_CACHE_HOME/lowmem_aim (~/.cache/lowmem_aim), one for each combination of base
files, tokens, dtype, device and versions: everything that the measurement's low bits may depend on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from lowmem_aim.errors import DiskError, LowmemAimError, ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.measuring.texts import TextSettings, token_sequences
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.untied import as_tied
from lowmem_aim.output.journal import Journal
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.relaxing.activations import FORMAT, Activations
from lowmem_aim.system.files import cache_folder
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.run import Run
from lowmem_aim.system.tensors import digest, dtype_named

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_aim.models.meta_model import MetaModel

COUNTING = 2  # which inputs count, and how; part of the cached files' names


@dataclass(frozen=True)
class GivenActivations:
    """Activations of a base that a file holds already; they are checked before any work."""

    aim: Aim
    base: Checkpoint
    activations: Activations

    def digest(self) -> str:
        """xxh3-128 of the statistics, as 32 hex digits."""
        facts = [(name, digest(value)) for name, value in sorted(self.activations.means.items())]
        return xxhash.xxh3_128_hexdigest(repr(facts).encode())


@dataclass(frozen=True)
class Measurement:
    """A measurement of a base's activations; the texts are tokenised, and the model is checked, before any work."""

    settings: TextSettings
    base: Checkpoint
    meta_model: MetaModel  # of the base, in the forward's dtype
    sequences: Sequence[Tensor]  # each (tokens,) int64

    def digest(self) -> str:
        """xxh3-128 of what is to be measured: the texts' tokens, the forward's dtype and the base's config."""
        config = sorted(self.base.config.items())
        facts = (self.settings.dtype, [sequence.tolist() for sequence in self.sequences], config)
        return xxhash.xxh3_128_hexdigest(repr(facts).encode())

    def activations(self, run: Run, folder: Path, journal: Journal | None, *, use_cache: bool) -> Activations:
        """Load the activations from the cache, or measure and cache them; without `use_cache`, always measure.

        Raises the errors of `measure`.
        """
        cached = self.cached(run.device)
        if use_cache and os.path.isfile(cached):
            try:
                found = Activations.load(cached)
            except LowmemAimError:
                run.emit(Notice(f"the cached activations `{cached}` are damaged and are measured again", "warning"))
            else:
                run.emit(Notice(f"reusing the activations measured before: `{cached}`"))
                return replace(found, tied=self.meta_model.tied)  # in another merge its head may be its own
        measured = self.measure(run, folder, journal)
        if use_cache:
            _keep(measured, cached, run.emit)
        return measured

    def cached(self, device: torch.device) -> Path:
        """The file in the cache that these activations have, or would have, for a device."""
        return cache_folder() / f"{self._key(str(device))}.safetensors"

    def measure(self, run: Run, folder: Path, journal: Journal | None) -> Activations:
        """Measure now, within the budget, whatever the cache holds.

        `folder` takes hidden states that do not fit the budget, and, if there is a journal, snapshots: with their
        records in it, they are what an interrupted run resumes from. Raises ModelError, MemoryBudgetError, DiskError.
        """
        from lowmem_aim.measuring.mean_activations import mean_activations
        from lowmem_aim.measuring.snapshots import Snapshots

        self.warn_if_slow(run)
        return mean_activations(
            self.base,
            self.meta_model,
            self.sequences,
            device=str(run.device),
            budget=run.budget,
            spill=folder,
            snapshots=Snapshots(folder, journal) if journal else None,
            emit=run.emit,
        )

    def warn_if_slow(self, run: Run) -> None:
        """Emit a notice if this processor is slow at the forward's dtype."""
        if run.device.type == "cpu" and self._is_slow_here():
            run.emit(
                Notice(
                    "this processor has no instructions for 16-bit floats: `--calibration-dtype float32` is several "
                    "times faster, for twice the memory of one block",
                    "warning",
                )
            )

    def tell_unseen(self, measured: Activations, emit: Emit) -> None:
        """Emit a notice of the weights, if any, that AIM leaves as merged because their inputs were not seen."""
        from lowmem_aim.measuring.by_weight import tell_unseen

        tell_unseen(self.meta_model, measured.means, emit)

    def weights(self, measured: Activations) -> dict[str, str]:
        """Tensor name -> xxh3-128 of its bytes, for all tensors of the base that the measurement depends on."""
        rows = {name: self.base.digest(name) for name in self.meta_model.embeddings if name in self.base.tensors}
        return {**measured.base_digests, **rows}

    def _is_slow_here(self) -> bool:
        narrow = self.meta_model.dtype in (torch.bfloat16, torch.float16)
        return narrow and "AVX512" not in torch.backends.cpu.get_cpu_capability()

    def _key(self, device: str) -> str:
        versions = (torch.__version__, metadata.version("transformers"), FORMAT, COUNTING)
        threads = (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()) if device == "cpu" else 0
        tokens = [sequence.tolist() for sequence in self.sequences]
        what = (self.base.fingerprint(), tokens, self.settings.dtype, device, threads, versions)
        return xxhash.xxh3_128_hexdigest(repr(what).encode())


Calibration = GivenActivations | Measurement


def calibration_of(aim: Aim, base: Checkpoint, reader: Reader, emit: Emit) -> Calibration:
    """Load the activations file that the recipe names, or prepare a measurement with the recipe's texts.

    Raises ModelError, NetworkError, UsageError.
    """
    if is_activations_file(aim.calibration):
        found = Activations.load(Path(aim.calibration).expanduser())
        return GivenActivations(aim, base, replace(found, tied={}) if as_tied(base) else found)
    return measurement_of(TextSettings.of(aim), base, reader, emit)


def measurement_of(settings: TextSettings, base: Checkpoint, reader: Reader, emit: Emit) -> Measurement:
    """Read and tokenise the texts, in blocks no longer than the base's context.

    Raises ModelError, NetworkError, UsageError.
    """
    from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where texts are to be read

    reader.roles(base)  # under limits: that model cannot fill the memory of this process, which builds it now
    meta_model = load_meta_model(base, dtype_named(settings.dtype) if settings.dtype else None)
    meta_model.require_blocks()
    context = getattr(meta_model.model.config.get_text_config(), "max_position_embeddings", None)
    asked = settings.block_size
    if isinstance(context, int) and 16 <= context < asked:
        settings = replace(settings, block_size=context)
    sequences = token_sequences(settings, partial(reader.encode, base), emit)
    if settings.block_size < asked and max(map(len, sequences)) == context:  # no matter to texts that are shorter
        emit(Notice(f"the sequences have at most {context} tokens: `{printable(base.label)}` allows no more"))
    _check_ids(base, meta_model, sequences)
    return Measurement(settings, base, meta_model, sequences)


def _check_ids(base: Checkpoint, meta_model: MetaModel, sequences: Sequence[Tensor]) -> None:
    """Raise ModelError if the tokenizer gives ids that the base has no embedding for."""
    rows = getattr(meta_model.model.get_input_embeddings(), "num_embeddings", None)
    highest = max(int(sequence.max()) for sequence in sequences)
    if isinstance(rows, int) and highest >= rows:
        raise ModelError(
            f"`{printable(base.label)}`: its tokenizer gives a calibration text the id {highest}, "
            f"but its embedding has {rows} rows",
            hint="does the tokenizer belong to this model?",
        )


def _keep(measured: Activations, path: Path, emit: Emit) -> None:
    """Cache the activations; a cache that cannot be written costs a notice, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        measured.save(path)
    except (OSError, DiskError) as error:
        emit(Notice(f"the activations could not be cached: {error}", "warning"))
