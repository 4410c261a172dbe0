"""ACM's measurement within a merge: base and merged model are compared, and the result is kept for a resumed run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import xxhash
from torch import Tensor

from lowmem_aim.blocks.offload import Source
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.errors import ResumeError, UsageError
from lowmem_aim.events import Notice
from lowmem_aim.measuring.calibration import Measurement, measurement_of
from lowmem_aim.measuring.mean_activations import needs_of, shares_for
from lowmem_aim.measuring.texts import TextSettings
from lowmem_aim.measuring.two_models import information_between
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.meta_model import MetaModel, load_meta_model
from lowmem_aim.models.reader import Reader
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import Group, KeptComparison
from lowmem_aim.planning.modules import text_slices
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Acm
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.relaxing.acm import EMBEDDING, HEAD, NORM, freezing
from lowmem_aim.relaxing.relaxation import Consensus
from lowmem_aim.system.run import Run

LONGEST_TEXT = 512  # tokens; more are cut off
WORK_BYTES = 96 << 20  # what counting pairs and parts of the heads take


class Merged(Source, contextlib.AbstractContextManager["Merged"], Protocol):
    """A source of the merged model's weights."""

    def take(self, name: str, rows: Tensor) -> None:
        """Keep the next rows of a tensor, merged elsewhere, so that they are not made again. Raises DiskError."""
        ...

    def forget(self) -> None:
        """Drop whatever is kept of the weights so far: the next block has other ones."""
        ...


@dataclass(frozen=True)
class Making:
    """Bytes that making merged weights takes while they are compared."""

    ram: int
    vram: int = 0  # of a device's own memory


@dataclass(frozen=True)
class MergedOnDemand:
    """A merged model that is not on disk."""

    outline: Checkpoint  # its config and headers
    weights: Callable[[], contextlib.AbstractContextManager[Merged]]
    making: Making


@dataclass(frozen=True)
class Comparison:
    """A comparison of base and merged model for ACM; its texts are read and tokenised before any work."""

    acm: Acm
    measurement: Measurement  # of the base

    @classmethod
    def of(cls, acm: Acm, base: Checkpoint, reader: Reader, run: Run) -> Comparison:
        """Read and tokenise the texts. Raises ModelError, NetworkError, UsageError."""
        if is_activations_file(acm.calibration):
            raise UsageError(
                "`acm.calibration` must be texts: ACM compares outputs, which an activations file does not hold",
                hint="name a .jsonl or .txt file, or `builtin`",
            )
        measurement = measurement_of(texts_of(acm), base, reader, run.emit)
        measurement.warn_if_slow(run)
        return cls(acm, measurement)

    def digest(self) -> str:
        """xxh3-128 of the texts' tokens, the forward's dtype and the base's config."""
        return self.measurement.digest()

    def needs(self, plan: Plan, making: Making) -> Needs:
        """The needs of comparing the base with an output."""
        return needs_of_comparison(self.measurement.meta_model, self.measurement.sequences, plan, making)

    def consensus(
        self,
        plan: Plan,
        inputs: Inputs,
        merged: MergedOnDemand,
        run: Run,
        folder: Path,
        journal: Journal | None,
    ) -> Consensus:
        """The coefficients of one output's groups: kept in the output's journal by an interrupted run, or measured now.

        `folder` takes what does not fit in memory; without a journal nothing is kept. Raises ResumeError if the models
        differ by other amounts than when this merge began, and ModelError, MemoryBudgetError, DiskError.
        """
        before = journal.kept(KeptComparison) if journal else None
        if before is not None and is_of(before, inputs):
            run.emit(Notice("resuming: ACM's comparison is done"))
            measured = before.information
        else:
            measured = self._measure(plan, inputs, merged, run, folder)
            if journal:
                _keep(KeptComparison(_stamp(inputs), measured), before, journal)
        # In the order of the model: the journal's records have an order of their own.
        information = {group: measured[group] for group in sorted(measured, key=_place)}
        sequences = self.measurement.sequences
        return Consensus(
            information,
            freezing(information, self.acm.theta, self.acm.normalise),
            _named(self.measurement.meta_model, information),
            texts=len(sequences),
            tokens=sum(map(len, sequences)),
        )

    def _measure(
        self, plan: Plan, inputs: Inputs, merged: MergedOnDemand, run: Run, folder: Path
    ) -> dict[str, list[float]]:
        base, meta_model = self.measurement.base, self.measurement.meta_model
        texts = list(self.measurement.sequences)
        shares = shares_for(self.needs(plan, merged.making), run.budget, run.device, folder)
        merged_meta_model = load_meta_model(merged.outline, meta_model.dtype)
        parts = text_slices(plan.recipe, inputs)
        chosen = [layer for part in parts if part.base for layer in part.base.layers or ()]
        layers = chosen or range(len(meta_model.blocks))
        with merged.weights() as weights:
            base_runner, merged_runner = (
                BlockRunner(source, of, run.device, shares.part(thirds, 3), run.budget, folder, run.emit)
                for source, of, thirds in ((base, meta_model, 2), (weights, merged_meta_model, 1))
            )
            found = information_between(base_runner, merged_runner, texts, run.emit, weights.forget, layers)
            weights.check_unchanged()  # a change between reading and computing would count
        return found


def needs_of_comparison(meta_model: MetaModel, texts: Sequence[Sized], plan: Plan, making: Making) -> Needs:
    """The needs of running base and merged model side by side over the texts."""
    # A merged weight takes memory twice: while it is being made, and in its block.
    largest = max((task.nbytes for task in plan.tasks if not task.vocabulary), default=0)
    # Three sets of states: both models' hidden states, and the base's outputs that wait for the merged model's.
    needs = needs_of(meta_model, [*texts, *texts, *texts], beside=WORK_BYTES + making.vram)
    return replace(needs, in_ram=largest + making.ram)


def texts_of(acm: Acm) -> TextSettings:
    """The texts that ACM compares with, as the settings that `measurement_of` reads."""
    return TextSettings(acm.calibration, acm.samples, LONGEST_TEXT, pack=False, dtype=acm.dtype)


def _place(group: str) -> tuple[int, int]:
    """The sort key of a group: its place in the model."""
    return (1, int(group)) if group.isdecimal() else ({EMBEDDING: 0, NORM: 2, HEAD: 3}[group], 0)


def _keep(found: KeptComparison, before: KeptComparison | None, journal: Journal) -> None:
    """Keep a comparison in the place of an earlier run's. Raises ResumeError if tensors were merged by another one."""
    if before and before.information != found.information and journal.holds(Group):
        raise ResumeError(
            "ACM's comparison of the models no longer gives the result it gave when this merge began",
            hint="`--fresh` starts over",
        )
    journal.keep(found)


def is_of(kept: KeptComparison, inputs: Inputs) -> bool:
    """Whether a comparison was made of these very files, as they lie there now."""
    return kept.stamp == _stamp(inputs)


def _stamp(inputs: Inputs) -> str:
    """xxh3-128 of the names, sizes, times and inodes of the files that are compared."""
    stats = [
        (name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for checkpoint in inputs.checkpoints
        for name, stat in checkpoint.stats().items()
    ]
    return xxhash.xxh3_128_hexdigest(repr(stats).encode("utf-8", "surrogatepass"))


def _named(meta_model: MetaModel, information: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> group, for the tensors outside the layers."""
    model, weights = meta_model.model, meta_model.weights
    embeddings = model.get_input_embeddings()
    paths = dict(model.named_modules())
    found = {f"{path}.": EMBEDDING for path, module in paths.items() if module is embeddings}
    inside = {id(part) for _, block in meta_model.blocks for part in block.modules()}
    decoder = meta_model.decoder
    norms = [
        path
        for path, module in paths.items()
        if path.startswith(decoder) and id(module) not in inside and "norm" in type(module).__name__.lower()
    ]
    found |= {f"{path}.": NORM for path in norms[-1:]}
    if HEAD in information:
        found[f"{meta_model.head}."] = HEAD
    return {
        weights.name(parameter): group
        for parameter, _ in model.named_parameters(remove_duplicate=False)
        for prefix, group in found.items()
        if parameter.startswith(prefix) and "." not in parameter[len(prefix) :]
    }
