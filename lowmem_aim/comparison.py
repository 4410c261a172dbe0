"""ACM's measurement for a merge: what is compared, what comes of it, kept for a run that is interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from lowmem_aim.activation_cache import Calibration, prepare
from lowmem_aim.calibrate import rooms_for
from lowmem_aim.checkpoint import Checkpoint
from lowmem_aim.errors import ResumeError, UsageError
from lowmem_aim.events import Emit, Notice
from lowmem_aim.inputs import Inputs
from lowmem_aim.memory import Budget
from lowmem_aim.merged_weights import MergedWeights
from lowmem_aim.output import Workspace
from lowmem_aim.plan import Plan
from lowmem_aim.recipe import Acm, Aim
from lowmem_aim.relax.acm import EMBEDDING, HEAD, NORM, freezing
from lowmem_aim.relaxation import Consensus, Relaxation
from lowmem_aim.rooms import Rooms
from lowmem_aim.side_by_side import information_between
from lowmem_aim.skeleton import Skeleton, load_skeleton
from lowmem_aim.stage import Stage

LONGEST_TEXT = 512  # tokens; more are cut off
KIND = "acm"  # of the journal's row
WORK_BYTES = 96 << 20  # what counting pairs, parts of the heads and slices of merged weights take


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
        relaxation: Relaxation,  # what comes before ACM
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
            information = self._measure(plan, inputs, relaxation, device, budget, space, emit)
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
            _named(self.calibration.skeleton, information),
            texts=len(sequences),
            tokens=sum(map(len, sequences)),
        )

    def _measure(
        self,
        plan: Plan,
        inputs: Inputs,
        relaxation: Relaxation,
        device: torch.device,
        budget: Budget,
        space: Workspace,
        emit: Emit,
    ) -> dict[str, list[float]]:
        base, skeleton = inputs.base, self.calibration.skeleton
        assert base is not None
        assert skeleton is not None
        texts = list(self.calibration.sequences)
        # Hidden states of both models, and what of the one waits for the other; one block of weights at a time.
        # The merged weight that is being made is there beside the one that the block gets.
        largest = max((task.nbytes for task in plan.tasks if task.name not in inputs.outline.vocabulary), default=0)
        three = [*texts, *texts, *texts]
        rooms = rooms_for(skeleton, three, budget, device, space.private, beside=WORK_BYTES + largest)
        shares = [_share(rooms, 2), _share(rooms, 1)]
        merged_skeleton = load_skeleton(inputs.reference, skeleton.dtype)
        with MergedWeights(plan, inputs, relaxation, space.private) as merged:
            stages = [
                Stage(source, of, device, share, budget, space.private, emit)
                for source, of, share in ((base, skeleton, shares[0]), (merged, merged_skeleton, shares[1]))
            ]
            found = information_between(stages[0], stages[1], texts, emit, between=merged.forget)
            merged.check_unchanged()  # a change between reading and computing would count
        return found


def texts_of(acm: Acm) -> Aim:
    """The texts that ACM compares with, as AIM's table would ask for them."""
    return Aim(calibration=acm.calibration, samples=acm.samples, pack=False, block_size=LONGEST_TEXT, dtype=acm.dtype)


def _place(group: str) -> tuple[int, int]:
    """Where a group stands in the model."""
    return (1, int(group)) if group.isdecimal() else ({EMBEDDING: 0, NORM: 2, HEAD: 3}[group], 0)


def _share(rooms: Rooms, thirds: int) -> Rooms:
    """So much of the place for hidden states."""
    return replace(rooms, device_states=rooms.device_states * thirds // 3, ram_states=rooms.ram_states * thirds // 3)


def _stamp(inputs: Inputs) -> str:
    """Of the files that are compared, as they lie there."""
    stats = [
        (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for checkpoint in inputs.checkpoints
        for file in checkpoint.files
        for stat in [file.stat()]
    ]
    return xxhash.xxh3_128_hexdigest(repr(stats).encode("utf-8", "surrogatepass"))


def _named(skeleton: Skeleton | None, information: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> group, of those outside the layers."""
    assert skeleton is not None
    model, weights = skeleton.model, skeleton.weights
    embeddings = model.get_input_embeddings()
    paths = dict(model.named_modules())
    found = {f"{path}.": EMBEDDING for path, module in paths.items() if module is embeddings}
    inside = {id(part) for _, block in skeleton.blocks for part in block.modules()}
    decoder = skeleton.blocks[0][0].rsplit(".", 2)[0]
    norms = [
        path
        for path, module in paths.items()
        if path.startswith(decoder) and id(module) not in inside and "norm" in type(module).__name__.lower()
    ]
    found |= {f"{path}.": NORM for path in norms[-1:]}
    if HEAD in information:
        found[f"{skeleton.head}."] = HEAD
    return {
        weights.name(parameter): group
        for parameter, _ in model.named_parameters(remove_duplicate=False)
        for prefix, group in found.items()
        if parameter.startswith(prefix) and "." not in parameter[len(prefix) :]
    }
