"""The tensors of a block by the checkpoint's names, and the moments of their matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowmem_aim.blocks.observer import Operand
from lowmem_aim.methods.moments import Moment
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.solving.input_moments import Matrix

Found = dict[str, list[Moment | None]]  # tensor -> the moment of each of its matrices


def blocks_by_tensor(meta_model: MetaModel) -> dict[str, int]:
    """Tensor -> the one block that it belongs to, for every tensor that is in exactly one."""
    owners: dict[str, set[int]] = {}
    for index, (path, block) in enumerate(meta_model.blocks):
        for parameter, _ in block.named_parameters(prefix=path):
            for name in meta_model.weights.sources(parameter):
                owners.setdefault(name, set()).add(index)
    return {name: min(blocks) for name, blocks in owners.items() if len(blocks) == 1}


def matrices_in(meta_model: MetaModel, name: str) -> int:
    """The number of matrices in a tensor: those of a stack (experts, out, in), or one."""
    shape = meta_model.weights.checkpoint.tensors[name].shape
    return shape[0] if len(shape) == 3 else 1


def moments_by_tensor(meta_model: MetaModel, weights: Mapping[str, Operand], moments: Mapping[Matrix, Moment]) -> Found:
    """Return the moments of each tensor's matrices, None for those that were given nothing.

    `weights`: the parameters with moments. Tensors that are made into parameters in a way that is not understood, or
    whose matrices are given different things by several parameters, are left out.
    """
    found: dict[str, list[list[Moment | None]]] = {}
    for parameter, weight in weights.items():
        # Which matrix of the parameter a tensor's matrices are: a statistic of the inputs that is their number.
        numbers = torch.arange(weight.matrices).view(-1, *[1] * (len(weight.shape) - 1)).expand(weight.shape)
        for name, part in meta_model.weights.scatter(parameter, numbers):
            own = part[:, 0, 0] if part.dim() == 3 else part[:1, 0]
            if len(own) == matrices_in(meta_model, name):  # else experts one after another in a matrix
                found.setdefault(name, []).append([moments.get((parameter, number)) for number in own.tolist()])
    return {name: ways[0] for name, ways in found.items() if all(same_moments(way, ways[0]) for way in ways)}


def same_moments(some: list[Moment | None], others: list[Moment | None]) -> bool:
    """Whether two lists hold the very same moments."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
