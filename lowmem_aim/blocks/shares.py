"""Memory that running a model takes, and the division of a budget for it. All figures are bytes.

    fixed      what lies beside the blocks, and the work of one sequence in a block
    weights    a whole block's if they fit; otherwise some modules stay and the others are paged, one at a time
    states     hidden states, on the device, in RAM or in a file: they get what is left

A block's weights go before the hidden states: a paged module is read again for every sequence, a hidden state once a
block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_aim.blocks.means import CHUNK_NUMEL
from lowmem_aim.errors import LowmemAimError, printable, raise_all
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.system.memory import Budget, Kind, too_small
from lowmem_aim.units import shown

# What the allocator keeps back between two uses, and what small tensors add up to.
SLACK_BYTES = 32 << 20
# Smaller modules are never paged: they take next to nothing, and some are read by their parents without being called.
SMALLEST_PAGED = 1 << 16
UNLIMITED = 1 << 62
SHORTER = "shorter sequences (`--block-size`; of `evaluate`, `--max-length`) take less"


@dataclass(frozen=True)
class Needs:
    """Bytes that running one model on given sequences takes, in the dtype of its meta model."""

    block: int  # the weights of the largest block
    module: int  # the weights of the largest module in any block
    module_path: str
    read: int  # the largest tensor as stored, where reading takes memory of its own
    beside: int  # weights beside the blocks, and the statistics
    work: int  # what the longest sequence takes in a block, weights aside: an upper bound, as if nothing were freed
    states: int  # the hidden states of all sequences
    in_ram: int = 0  # what something else takes of RAM meanwhile, wherever the model runs

    @property
    def fixed(self) -> int:
        """Bytes needed on the compute device besides the weights of a block."""
        return self.work + self.beside + SLACK_BYTES

    @property
    def least(self) -> int:
        """Least bytes on the compute device: the fixed part and the largest module. If that is the host, add `read`."""
        return self.fixed + self.module

    def least_ram(self, on_host: bool) -> int:
        """Least bytes of RAM, besides the program itself; `on_host`: the model runs there too."""
        return self.in_ram + self.read + (self.least if on_host else SLACK_BYTES + self.module)

    @classmethod
    def of(cls, meta_model: MetaModel, sequences: Sequence[Sized]) -> Needs:
        """Work the needs out from the model's shapes and the lengths of the sequences."""
        blocks = [owners(path, block) for path, block in meta_model.blocks]
        sizes = [{path: size_of(module) for path, module in parts} for parts in blocks]
        largest = max((part for parts in sizes for part in parts.items()), key=lambda part: part[1], default=("", 0))
        longest = max((len(tokens) for tokens in sequences), default=0)
        hidden = _hidden_bytes(meta_model)
        return cls(
            block=max((sum(parts.values()) for parts in sizes), default=0),
            module=largest[1],
            module_path=largest[0],
            read=_read_bytes(meta_model),
            beside=_beside(meta_model) + _statistics(meta_model),
            work=max((_work(meta_model, parts, longest) for parts in blocks), default=0) + 4 * longest * hidden,
            states=sum(len(tokens) for tokens in sequences) * hidden,
        )


@dataclass(frozen=True)
class Shares:
    """The parts of a budget that running a model may use, in bytes."""

    weights: int = UNLIMITED  # of a block, at a time
    device_states: int = UNLIMITED  # on a device with memory of its own
    ram_states: int = UNLIMITED
    ram_work: int = 0  # what one sequence in a block may take in RAM

    def part(self, number: int, of: int) -> Shares:
        """Copy the shares, with only `number` parts out of `of` of the memory for hidden states."""
        device, ram = (states * number // of for states in (self.device_states, self.ram_states))
        return replace(self, device_states=device, ram_states=ram)

    def spilled(self, states: int) -> int:
        """Bytes of hidden states that go to a file, if there are `states` bytes in all."""
        return max(0, states - self.device_states - self.ram_states)

    def suspend(self, states: int) -> bool:
        """Whether `states` bytes of hidden states fit in memory, where suspended forwards keep theirs."""
        return states <= (self.device_states or self.ram_states)


BOUNDLESS = Shares()


def share_out(budget: Budget, device: torch.device, needs: Needs) -> Shares:
    """Divide what is left of the budget. Raises MemoryBudgetError, with the figures, if not even one module fits."""
    ram, on_host = budget.ram_used(), budget.vram is None
    errors: list[LowmemAimError] = []
    if budget.ram - ram < (least := needs.least_ram(on_host)):
        errors.append(_refused("RAM", least, ram, budget.ram, needs))
    if budget.vram is not None:
        vram = budget.vram - budget.vram_left(device)
        if budget.vram - vram < needs.least:
            errors.append(_refused("VRAM", needs.least, vram, budget.vram, needs))
    raise_all(errors)
    if budget.vram is None:
        left = budget.ram - ram - needs.in_ram - needs.fixed - needs.read
        weights = min(needs.block, left)
        return Shares(weights, 0, left - weights, needs.work)
    on_device = budget.vram - vram - needs.fixed
    # Weights pass through RAM one by one.
    in_ram = budget.ram - ram - needs.in_ram - needs.read - SLACK_BYTES
    weights = min(needs.block, on_device)
    return Shares(weights, on_device - weights, in_ram - needs.module)


def _refused(kind: Kind, least: int, used: int, budget: int, needs: Needs) -> LowmemAimError:
    largest = f"(its largest module, `{printable(needs.module_path)}`, takes {shown(needs.module)})"
    what = f"running the model block by block {largest}"
    return too_small(what, kind, least, used, budget, SHORTER)


def paged(sizes: Mapping[str, int], room: int, stay: Set[str] = frozenset()) -> set[str]:
    """Names of the modules of a block to page: to load for one call at a time, so that `room` bytes are enough.

    Modules in `stay` are never paged, nor are small ones. Of the others the largest are kept first, since whatever is
    paged is read again for every sequence.
    """
    if sum(sizes.values()) <= room:
        return set()
    stay = stay | {name for name, size in sizes.items() if size < SMALLEST_PAGED}
    held = sum(size for name, size in sizes.items() if name in stay)
    order = sorted(sizes.keys() - stay, key=lambda name: (-sizes[name], name))
    away: list[str] = []
    for place, name in enumerate(order):
        others = away or order[place + 1 :]  # the largest of those that will be paged comes first
        coming = sizes[others[0]] if others else 0
        if held + sizes[name] + coming <= room:
            held += sizes[name]
        else:
            away.append(name)
    return set(away)


# --- sizes of a model -------------------------------------------------------------------------------------------------


def owners(path: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module of a block that has parameters of its own."""
    return [(name, part) for name, part in block.named_modules(prefix=path) if next(_own(part), None) is not None]


def size_of(module: nn.Module) -> int:
    """Bytes of a module's own parameters, without those of its submodules."""
    return sum(value.numel() * value.element_size() for value in _own(module))


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (value for value in module._parameters.values() if value is not None)


def _hidden_bytes(meta_model: MetaModel) -> int:
    """Bytes of one token's hidden state; Gemma 3n has several states side by side."""
    width = _setting(meta_model, "hidden_size") or meta_model.model.get_input_embeddings().weight.shape[-1]
    copies = max(_setting(meta_model, name) or 1 for name in ("altup_num_inputs", "hc_mult"))
    return int(width) * copies * meta_model.dtype.itemsize


def _setting(meta_model: MetaModel, name: str) -> int:
    """A number of the model's config; 0 if this architecture has none of that name (a Mamba has no heads)."""
    value = getattr(meta_model.model.config.get_text_config(), name, None)
    return value if isinstance(value, int) else 0


def _read_bytes(meta_model: MetaModel) -> int:
    """Bytes of the largest tensor as read, beside the weight made of it; 0 for mapped files, which take no RAM."""
    checkpoint = meta_model.weights.checkpoint
    outside = meta_model.vocabulary | meta_model.embeddings  # read by row, or not at all
    whole = max((checkpoint.whole_bytes(name) for name in checkpoint.tensors if name not in outside), default=0)
    return whole + checkpoint.footprint.tensor


def _statistics(meta_model: MetaModel) -> int:
    """Bytes of the float64 sums, and of the float32 means made of them, for every input channel (of every expert)."""
    channels = 0
    for _, block in meta_model.blocks:
        for value in block.parameters():
            experts = value.shape[0] if value.dim() == 3 else 1
            channels += experts * max(value.shape[-2:], default=0) if value.dim() else 0
    return channels * 12


def _beside(meta_model: MetaModel) -> int:
    """Bytes of what lies beside blocks and head and is loaded once; embeddings are read by row and do not count."""
    decoder = meta_model.decoder
    inside = {id(part) for _, block in meta_model.blocks for part in block.modules()}
    return sum(
        size_of(part)
        for path, part in meta_model.model.named_modules()
        if path.startswith(decoder)
        and id(part) not in inside
        and path != meta_model.head
        and not isinstance(part, nn.Embedding)
    )


def _work(meta_model: MetaModel, parts: Sequence[tuple[str, nn.Module]], tokens: int) -> int:
    """Bytes of all that a block's modules take in and give out for one sequence, as if nothing were freed."""
    size = meta_model.dtype.itemsize
    channels = sum(_channels(value) for _, part in parts for value in _own(part))
    scores = tokens * tokens * size  # a mask
    config: Any = meta_model.model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) == "eager":
        scores += _setting(meta_model, "num_attention_heads") * tokens * tokens * (size + 4)
    statistics = 2 * min(CHUNK_NUMEL, tokens * channels) * 8
    return tokens * channels * size + scores + statistics


def _channels(weight: Tensor) -> int:
    """Numbers per token that a module with this weight holds, in and out; a norm works in float32, some four times."""
    if weight.dim() < 2:
        return 4 * weight.numel() * 4 // weight.element_size()
    return weight.shape[-1] + weight.shape[-2]
