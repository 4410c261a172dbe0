"""The memory that measuring second moments takes. All figures are bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_aim.blocks.shares import Needs
from lowmem_aim.measuring.mean_activations import needs_of
from lowmem_aim.methods.moments import FLOAT, moment_bytes
from lowmem_aim.models.meta_model import MetaModel, inputs_come_first
from lowmem_aim.solving.input_moments import rows_at_once

# Linears of these names in one module are given the same inputs, in every model that transformers has.
ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
Texts = Sequence[Sized]  # of one expert: the tokens of each


def needs_of_moments(models: Sequence[tuple[MetaModel, Texts]], beside: int = 0) -> Needs:
    """Return the needs of running the texts of all experts side by side, one block of one expert at a time.

    A merged model that is run beside them is one more, without texts. The moments themselves are not in it, see
    `matrices_bytes`. `beside`: the bytes that something else takes meanwhile. Raises ModelError for a model without a
    list of blocks.
    """
    own = [needs_of(meta_model, texts) for meta_model, texts in models]
    largest = max(own, key=lambda needs: needs.module)
    return Needs(
        block=max(needs.block for needs in own),
        module=largest.module,
        module_path=largest.module_path,
        read=max(needs.read for needs in own),
        # What lies beside the blocks is there for all models; rows wait for one expert at a time.
        beside=beside + sum(needs.beside for needs in own) + max(waiting_bytes(*model) for model in models),
        work=max(needs.work for needs in own),
        states=sum(needs.states for needs in own),
    )


def matrices_bytes(meta_models: Sequence[MetaModel]) -> int:
    """Bytes of the moments of the largest block, of all experts."""
    return sum(
        max(sum(count * moment_bytes(channels) for count, channels in inputs_of(block)) for _, block in model.blocks)
        for model in meta_models
    )


def inputs_of(block: nn.Module) -> Iterator[tuple[int, int]]:
    """(matrices, input channels) of each parameter of a block, once for those that are certain to be given the same.

    Where shapes do not tell which dimension has the inputs, this is the larger one.
    """
    for path, module in block.named_modules():
        for key, value in module._parameters.items():
            if value is None or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d):
                continue
            if value.dim() == 3:
                yield value.shape[0], value.shape[1 if inputs_come_first(module) else 2]
            elif value.dim() == 2 and key == "weight" and not _is_twin(block, path):
                yield 1, value.shape[0 if isinstance(module, Conv1D) else 1]


def _is_twin(block: nn.Module, path: str) -> bool:
    """Whether an earlier linear beside this one is given the same inputs."""
    parent, _, name = path.rpartition(".")
    first = next((names[0] for names in ALIKE if name in names[1:]), None)
    parts = dict(block.get_submodule(parent).named_children())
    here, there = parts.get(name), parts.get(first or "")
    if not isinstance(here, nn.Linear) or not isinstance(there, nn.Linear):
        return False
    return here.in_features == there.in_features


def waiting_bytes(meta_model: MetaModel, texts: Texts) -> int:
    """Bytes of the rows that wait to be added, and of those that are being added, in the block where they are most."""
    tokens, longest = sum(map(len, texts)), max(map(len, texts), default=0)
    used = getattr(meta_model.model.config.get_text_config(), "num_experts_per_tok", None)

    def of(block: nn.Module) -> int:
        rows = adding = 0
        for count, channels in inputs_of(block):
            at_once = rows_at_once(count)
            routed = min(count, used if isinstance(used, int) else count)  # rows of each token
            rows += channels * (min(count * at_once, routed * tokens) + routed * longest)
            adding = max(adding, min(at_once, tokens) * channels * FLOAT)
        return rows * meta_model.dtype.itemsize + adding

    return max((of(block) for _, block in meta_model.blocks), default=0)
