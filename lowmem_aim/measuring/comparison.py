"""ACM's measurement for a merge: what is compared, what comes of it, kept for a run that is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from lowmem_aim.blocks.offload import Source
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Shares
from lowmem_aim.errors import ResumeError, UsageError
from lowmem_aim.events import Emit, Notice
from lowmem_aim.measuring.calibration import Calibration, prepare
from lowmem_aim.measuring.mean_activations import shares_for
from lowmem_aim.measuring.two_models import information_between
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.meta_model import MetaModel, load_meta_model
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Acm, Aim
from lowmem_aim.relaxing.acm import EMBEDDING, HEAD, NORM, freezing
from lowmem_aim.relaxing.relaxation import Consensus
from lowmem_aim.system.memory import Budget

LONGEST_TEXT = 512  # tokens; more are cut off
KIND = "acm"  # of the journal's row
WORK_BYTES = 96 << 20  # what counting pairs, parts of the heads and slices of merged weights take


class Merged(Source, contextlib.AbstractContextManager["Merged"], Protocol):
    """Where the merged model's weights come from."""

    def forget(self) -> None: ...


@dataclass(frozen=True)
class Comparison:
    """Checked and tokenised before any work."""

    acm: Acm
    calibration: Calibration  # of the base

    @classmethod
    def prepare(cls, acm: Acm, base: Checkpoint, device: torch.device, emit: Emit) -> Comparison:
        """Raises ModelError, NetworkError, UsageError."""
        calibration = prepare(texts_of(acm), base, emit)
        calibration.tell_if_slow(device, emit)
        if calibration.given:
            raise UsageError(
                "`acm.calibration` must be texts: ACM compares outputs, which an activations file does not hold"
            )
        return cls(acm, calibration)

    def digest(self) -> str:
        return self.calibration.digest()

    def consensus(
        self,
        plan: Plan,
        inputs: Inputs,
        merged: Callable[[Path], Merged],  # the merged model's weights; the folder takes what does not fit
        *,
        device: torch.device,
        budget: Budget,
        space: Workspace,
        emit: Emit,
    ) -> Consensus:
        """The coefficients of one output's groups: from its journal if an interrupted run had them, else measured."""
        stamp = _stamp(inputs)
        row: dict[str, Any] = space.journal.get(KIND) or {}
        information = row.get("information", {})
        if row.get("stamp") != stamp:
            information = self._measure(plan, inputs, merged, device, budget, space, emit)
            if row and row["information"] != information and space.journal.holds("group"):
                raise ResumeError(
                    "the models now differ by other amounts than when this merge began (ACM)",
                    hint="`--fresh` starts over",
                )
            space.journal.put(KIND, "", {"stamp": stamp, "information": information})
        else:
            emit(Notice("resuming: ACM's comparison is done"))
        information = {
            group: information[group] for group in sorted(information, key=_place)
        }  # the journal has its own
        frozen = freezing(information, self.acm.theta, self.acm.normalise)
        sequences = self.calibration.sequences
        return Consensus(
            information,
            frozen,
            _named(self.calibration.meta_model, information),
            texts=len(sequences),
            tokens=sum(map(len, sequences)),
        )

    def _measure(
        self,
        plan: Plan,
        inputs: Inputs,
        merged: Callable[[Path], Merged],
        device: torch.device,
        budget: Budget,
        space: Workspace,
        emit: Emit,
    ) -> dict[str, list[float]]:
        base, meta_model = inputs.base, self.calibration.meta_model
        assert base is not None
        assert meta_model is not None
        texts = list(self.calibration.sequences)
        # Hidden states of both models, and what of the one waits for the other; one block of weights at a time.
        # The merged weight that is being made is there beside the one that the block gets.
        largest = max((task.nbytes for task in plan.tasks if task.name not in inputs.roles.vocabulary), default=0)
        three = [*texts, *texts, *texts]
        shares = shares_for(meta_model, three, budget, device, space.private, beside=WORK_BYTES + largest)
        of_base, of_merged = _part(shares, 2), _part(shares, 1)
        merged_meta_model = load_meta_model(inputs.reference, meta_model.dtype)
        with merged(space.private) as weights:
            runners = [
                BlockRunner(source, of, device, share, budget, space.private, emit)
                for source, of, share in ((base, meta_model, of_base), (weights, merged_meta_model, of_merged))
            ]
            found = information_between(runners[0], runners[1], texts, emit, between=weights.forget)
            weights.check_unchanged()  # a change between reading and computing would count
        return found


def texts_of(acm: Acm) -> Aim:
    """The texts that ACM compares with, as AIM's table would ask for them."""
    return Aim(calibration=acm.calibration, samples=acm.samples, pack=False, block_size=LONGEST_TEXT, dtype=acm.dtype)


def _place(group: str) -> tuple[int, int]:
    """Where a group stands in the model."""
    return (1, int(group)) if group.isdecimal() else ({EMBEDDING: 0, NORM: 2, HEAD: 3}[group], 0)


def _part(shares: Shares, thirds: int) -> Shares:
    """So much of the place for hidden states."""
    return replace(shares, device_states=shares.device_states * thirds // 3, ram_states=shares.ram_states * thirds // 3)


def _stamp(inputs: Inputs) -> str:
    """Of the files that are compared, as they lie there."""
    stats = [
        (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for checkpoint in inputs.checkpoints
        for file in checkpoint.files
        for stat in [file.stat()]
    ]
    return xxhash.xxh3_128_hexdigest(repr(stats).encode("utf-8", "surrogatepass"))


def _named(meta_model: MetaModel | None, information: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> group, of those outside the layers."""
    assert meta_model is not None
    model, weights = meta_model.model, meta_model.weights
    embeddings = model.get_input_embeddings()
    paths = dict(model.named_modules())
    found = {f"{path}.": EMBEDDING for path, module in paths.items() if module is embeddings}
    inside = {id(part) for _, block in meta_model.blocks for part in block.modules()}
    decoder = meta_model.blocks[0][0].rsplit(".", 2)[0]
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
