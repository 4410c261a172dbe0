"""The activations for a base: from a file, from the cache, or measured now and cached.

The cache is a folder of small files, $XDG_CACHE_HOME/lowmem_aim (~/.cache/lowmem_aim), one for each combination of base
files, tokens, dtype, device and versions: whatever the measurement's low bits may depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from lowmem_aim.errors import DiskError, LowmemAimError, ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.measuring.texts import token_sequences
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.tokenizer import load_tokenizer, tokenizer_errors
from lowmem_aim.output.journal import Journal
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.relaxing.activations import FORMAT, Activations
from lowmem_aim.system.files import cache_folder
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.tensors import digest

if TYPE_CHECKING:
    from lowmem_aim.models.meta_model import MetaModel


@dataclass(frozen=True)
class Calibration:
    """What is to be measured, checked and tokenised before any work; or the file that already holds it."""

    aim: Aim
    base: Checkpoint
    meta_model: MetaModel | None  # of the base, in the forward's dtype; None if nothing is to be measured
    sequences: Sequence[Tensor]  # each (tokens,) int64
    given: Activations | None

    def digest(self) -> str:
        """Of what is to be measured, or of what is given."""
        if self.given:
            facts: Any = [(name, digest(value)) for name, value in sorted(self.given.means.items())]
        else:
            config = sorted(self.base.config.items())
            facts = (self.aim.dtype, [sequence.tolist() for sequence in self.sequences], config)
        return xxhash.xxh3_128_hexdigest(repr(facts).encode())

    def activations(
        self, *, device: torch.device, budget: Budget, folder: Path, journal: Journal, use_cache: bool, emit: Emit
    ) -> Activations:
        """Load or measure; see `measure`. Raises ModelError."""
        if self.given:
            return self.given
        cached = self.cached(device)
        if use_cache and cached.is_file():
            try:
                found = Activations.load(cached)
            except LowmemAimError:
                emit(Notice(f"the cached activations `{cached}` are damaged and are measured again", "warning"))
            else:
                emit(Notice(f"activations measured before are reused: `{cached}`"))
                return found
        measured = self.measure(device=device, budget=budget, folder=folder, journal=journal, emit=emit)
        if use_cache:
            _keep(measured, cached, emit)
        return measured

    def cached(self, device: torch.device) -> Path:
        """Where the cache has them, if it has."""
        return cache_folder() / f"{self._key(str(device))}.safetensors"

    def measure(
        self, *, device: torch.device, budget: Budget, folder: Path, journal: Journal, emit: Emit
    ) -> Activations:
        """Measure now, whatever the cache holds, within `budget`.

        `folder` takes what does not fit it and, with a row in the journal, what an interrupted run goes on from.
        """
        from lowmem_aim.measuring.mean_activations import mean_activations
        from lowmem_aim.measuring.snapshots import Snapshots

        assert self.meta_model is not None
        self.tell_if_slow(device, emit)
        return mean_activations(
            self.base,
            self.meta_model,
            self.sequences,
            device=str(device),
            budget=budget,
            spill=folder,
            snapshots=Snapshots(folder, journal),
            emit=emit,
        )

    def tell_if_slow(self, device: torch.device, emit: Emit) -> None:
        if self.meta_model is not None and device.type == "cpu" and self._is_slow_here(self.meta_model.dtype):
            emit(
                Notice(
                    "this processor has no instructions for 16-bit floats: `--calibration-dtype float32` is several "
                    "times faster, for twice the memory of one block",
                    "warning",
                )
            )

    def weights(self, measured: Activations) -> dict[str, str]:
        """Tensor name -> xxh3-128 of its bytes, of all that the measuring depends on in the base's files."""
        assert self.meta_model is not None
        rows = {name: self.base.digest(name) for name in self.meta_model.embeddings if name in self.base.tensors}
        return {**measured.base_digests, **rows}

    @staticmethod
    def _is_slow_here(dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16) and "AVX512" not in torch.backends.cpu.get_cpu_capability()

    def _key(self, device: str) -> str:
        versions = (torch.__version__, metadata.version("transformers"), FORMAT)
        threads = (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()) if device == "cpu" else 0
        tokens = [sequence.tolist() for sequence in self.sequences]
        what = (self.base.fingerprint(), tokens, self.aim.dtype, device, threads, versions)
        return xxhash.xxh3_128_hexdigest(repr(what).encode())


def prepare(aim: Aim, base: Checkpoint, emit: Emit) -> Calibration:
    """Read and tokenise the texts, or load the activations file. Raises ModelError, NetworkError, UsageError.

    Blocks are no longer than the base's context.
    """
    if is_activations_file(aim.calibration):
        return Calibration(aim, base, None, (), Activations.load(Path(aim.calibration).expanduser()))
    from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where texts are to be read

    meta_model = load_meta_model(base, getattr(torch, aim.dtype) if aim.dtype else None)
    if not meta_model.blocks:
        raise ModelError(f"`{printable(base.label)}` is not built of a list of blocks: it cannot be calibrated")
    context = getattr(meta_model.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and 16 <= context < aim.block_size:
        emit(Notice(f"blocks of {context} tokens: that is all the context that `{printable(base.label)}` has"))
        aim = replace(aim, block_size=context)
    tokenizer = load_tokenizer(base)

    def encode(text: str) -> list[int]:
        what = f"the tokenizer of `{printable(base.label)}` fails at the calibration text"
        with tokenizer_errors(what, "is it the model's own?"):
            return list(tokenizer(text, verbose=False)["input_ids"])

    return Calibration(aim, base, meta_model, token_sequences(aim, encode, emit), None)


def _keep(measured: Activations, path: Path, emit: Emit) -> None:
    """A cache that cannot be written is a pity, not a failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        measured.save(path)
    except (OSError, DiskError) as error:
        emit(Notice(f"the activations could not be cached: {error}", "warning"))
