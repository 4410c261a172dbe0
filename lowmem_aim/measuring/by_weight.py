"""Statistics by the checkpoint's names, made of what was counted by the model's; what could not be seen is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from lowmem_aim.blocks.observer import scaled_weights
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.errors import printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.tensors import dtype_name
from lowmem_aim.units import counted

if TYPE_CHECKING:
    from torch import Tensor


def gathered(runner: BlockRunner, sequences: Sequence[Tensor], emit: Emit) -> Activations:
    """Return what was counted, under the checkpoint's names; emit a notice of experts that no token reached."""
    sums = _sums_by_name(runner)
    # A module that is never called is an expert that no token reaches, or one that text does not need: Jamba's
    # `dt_proj` is used without being called, BART's cross-attention has no encoder here, a vision tower no picture.
    sums = {name: one for name, one in sums.items() if one.calls.any() or _is_expert(name)}
    means = {name: one.mean() for name, one in sums.items()}
    unreached = {name: missing for name, one in sums.items() if (missing := one.unreached())}
    if unreached:
        what = f"no token of the calibration text reaches {sum(unreached.values())} weights of experts"
        emit(Notice(f"{what}; they stay as merged (more text reaches more experts)", "warning"))
    return Activations(
        means=means,
        tied=runner.meta_model.tied,
        base_digests=runner.weights.digests,
        tokens_digest=_tokens_digest(sequences),
        sequences=len(sequences),
        tokens=sum(len(tokens) for tokens in sequences),
        dtype=dtype_name(runner.meta_model.dtype),
        unreached_experts=unreached,
    )


@dataclass
class _Sum:
    """The means that were counted for one tensor of the checkpoint, in the shape of its statistic."""

    total: Tensor
    calls: Tensor

    def add(self, total: Tensor, calls: Tensor) -> None:
        """Add what another module has counted that shares the tensor: each call counts alike."""
        self.total, self.calls = self.total + total, self.calls + calls

    def mean(self) -> Tensor:
        """The mean over all calls, float32; zero without a call."""
        return (self.total / self.calls.clamp(min=1)).float()  # divided in float64, and rounded once

    def unreached(self) -> int:
        """The number of experts without a call; 1 for a single weight without one."""
        missing = self.calls == 0
        return int(missing.flatten(1).any(1).sum()) if missing.dim() == 3 else int(missing.any())


def _sums_by_name(runner: BlockRunner) -> dict[str, _Sum]:
    """Checkpoint name -> what was counted for it, by whichever modules use it (Zamba's blocks share theirs)."""
    meta_model = runner.meta_model
    sums: dict[str, _Sum] = {}
    for parameter, tally in runner.means.tallies.items():
        if parameter != f"{meta_model.head}.weight":
            totals = meta_model.weights.scatter(parameter, tally.sums())
            calls = dict(meta_model.weights.scatter(parameter, tally.counts()))
        elif meta_model.has_head:
            # By its own name: a tied head may be absent from the file, or stand there twice.
            name = meta_model.weights.name(parameter)
            totals, calls = iter([(name, tally.sums())]), {name: tally.counts()}
        else:
            continue
        for name, total in totals:
            if name in sums:
                sums[name].add(total, calls[name])
            else:
                sums[name] = _Sum(total, calls[name])
    return sums


def _is_expert(name: str) -> bool:
    return "expert" in name


def unseen(meta_model: MetaModel, means: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the checkpoint that AIM would relax if their inputs had been seen, and leaves as merged."""
    heads = meta_model.weights.sources(f"{meta_model.head}.weight")  # a tied one is its embedding in the file
    return sorted(scaled_weights(meta_model) - means.keys() - set(heads))


def tell_unseen(meta_model: MetaModel, means: Mapping[str, Tensor], emit: Emit) -> None:
    """Emit a notice of the weights that AIM leaves as merged, with their number, if there are any."""
    names = unseen(meta_model, means)
    if names:
        emit(Notice(left_as_merged(names, "their inputs are not seen when the model reads text"), "warning"))


def outside_decoder(meta_model: MetaModel) -> list[str]:
    """Tensors that AIM would relax but for their place: text reaches no vision tower, and no reward model's score."""
    model, weights = meta_model.model, meta_model.weights
    inside, head = f"{meta_model.decoder}.", f"{meta_model.head}."
    # What is beside the base model (a head and its transformation) is called after it. Llama 4 has no base model.
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    reached = {
        name
        for parameter, _ in model.named_parameters(remove_duplicate=False)
        if inside == "." or parameter.startswith((inside, head)) or not parameter.startswith(base)
        for name in weights.sources(parameter)
    }
    return sorted(scaled_weights(meta_model) - reached)


def left_as_merged(names: Sequence[str], why: str) -> str:
    """A sentence about tensors that AIM does not relax, with their number."""
    return f"AIM leaves {counted(len(names), 'weight')} such as `{printable(names[0])}` as merged: {why}"


def _tokens_digest(sequences: Sequence[Tensor]) -> str:
    state = xxhash.xxh3_128()
    for tokens in sequences:
        state.update(len(tokens).to_bytes(8, "little"))  # the same tokens, cut elsewhere, are other sequences
        state.update(tokens.cpu().contiguous().numpy().tobytes())
    return str(state.hexdigest())
