"""Two versions of a model side by side, block by block: how much their outputs have in common, text by text.

Each model is run as in `mean_activations`, by the recorder with its canary: what each block is called with is recorded;
then, block by block, one model's weights are loaded, every text goes through them, and they make way for the other
model's. The first model's outputs wait in the store for the second's. Each weight is read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_aim.blocks.calls import ForwardFailed, hidden_of, raised_here
from lowmem_aim.blocks.forwards import Broken
from lowmem_aim.blocks.head import OutputHead
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Advanced, Emit, PhaseEnded, PhaseStarted
from lowmem_aim.measuring.mutual_information import CHUNK, PairCounts
from lowmem_aim.measuring.steps import Steps, Take
from lowmem_aim.relaxing.acm import EMBEDDING, HEAD, NORM
from lowmem_aim.system.tensor_store import Stored

# Paths within a block of the module whose output is the MLP's; the first that exists counts.
MLPS = ("mlp.down_proj", "mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
_WITHOUT = "leave `acm:` out: a merge without it runs no model"
HEAD_ELEMENTS = 1 << 20  # of each head, in memory at a time
Information = dict[str, list[float]]  # group -> nats for each text


def information_between(
    base: BlockRunner,
    merged: BlockRunner,
    texts: Sequence[Tensor],
    emit: Emit,
    between: Callable[[], None],
    layers: Sequence[int],
) -> Information:
    """Mutual information of both models' outputs: of each layer's MLP, embedding, final norm and output head.

    `layers` has the base's layer for each layer of the merged model. Where they go back, the base is run again from
    its beginning; those that are left out are run and not compared. The result is in nats, by group, with a value for
    each text. `texts`: (tokens,) int64 each. `between` is called when a block's weights are no longer needed. Raises
    ModelError if the blocks cannot be run one by one, MemoryBudgetError, DiskError.
    """
    emit(PhaseStarted("compare", len(merged.blocks), "blocks"))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        try:
            sides = [stack.enter_context(Steps(runner, texts)) for runner in (base, merged)]
            found = _Pairs(sides, len(texts))
            information = {EMBEDDING: found.of(_embedded)}
            for index, ((path, _), of_base) in enumerate(zip(merged.blocks, layers, strict=True)):
                sides[0].come_to(of_base)
                information[str(index)] = found.of(_over_block)
                between()
                emit(Advanced(index + 1, path))
            sides[0].come_to(len(base.blocks))
            information[NORM] = found.of(Steps.finish)
            if _has_own_head(base) and _has_own_head(merged):
                information[HEAD] = _of_heads(sides, len(texts))
        except Broken as reason:
            raise ModelError(f"ACM: the blocks of this model cannot be run one by one: {reason}", _WITHOUT) from reason
        except ForwardFailed as reason:
            if isinstance(reason.__cause__, Exception) and raised_here(reason.__cause__):
                raise reason.__cause__ from None
            raise ModelError(f"ACM: transformers cannot run this model: {reason}", _WITHOUT) from reason
    emit(PhaseEnded("compare"))
    return information


@dataclass
class _Pairs:
    """Compares both models' outputs of one step: the base's are kept until the merged model's come."""

    sides: Sequence[Steps]
    texts: int
    slots: list[Stored] = field(default_factory=list)

    def of(self, run: Callable[[Steps, Take], None]) -> list[float]:
        """Mutual information, in nats, of what `run` gives for both models, for each text."""
        base, merged = self.sides
        self.slots = self.slots or [Stored() for _ in range(self.texts)]
        found = [0.0] * self.texts

        def keep(number: int, output: Tensor) -> None:
            base.runner.store.put(output.contiguous(), self.slots[number])

        def compare(number: int, output: Tensor) -> None:
            counts = PairCounts()
            _count(counts, base.runner.store.get(self.slots[number]), output)
            found[number] = counts.mutual_information()

        run(base, keep)
        run(merged, compare)
        return found


def _count(counts: PairCounts, x: Tensor, y: Tensor) -> None:
    try:
        counts.add(x, y)
    except ValueError as error:
        raise ModelError(f"ACM: {error} among the outputs that are compared", hint="are both models sound?") from error


def _embedded(steps: Steps, take: Take) -> None:
    """Record every text; `take` is given its embedding."""
    with _watching(steps.runner.model.get_input_embeddings()) as seen:
        steps.record(lambda number, state: take(number, seen[-1]))


def _over_block(steps: Steps, take: Take) -> None:
    """Run every text through the next block; `take` is given the output of the block's MLP."""
    path, block = steps.runner.blocks[steps.next]

    def passed(number: int, state: Tensor) -> None:
        if not seen:
            raise ModelError(f"ACM: `{printable(path)}` does not call its MLP", _WITHOUT)
        take(number, seen.pop())

    with _watching(_mlp_of(path, block)) as seen:
        steps.over_block(passed)


@contextlib.contextmanager
def _watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that holds the module's latest output."""
    seen: list[Tensor] = []

    def hook(part: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [hidden_of(output)]

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _mlp_of(path: str, block: nn.Module) -> nn.Module:
    parts: dict[str, nn.Module] = dict(block.named_modules())
    name = next((name for name in MLPS if name in parts), None)
    if name is None:
        raise ModelError(
            f"ACM: `{printable(path)}` has no MLP under a known name",
            hint=f"known names are {', '.join(MLPS)}",
        )
    return parts[name]


# --- the output head --------------------------------------------------------------------------------------------------


def _has_own_head(runner: BlockRunner) -> bool:
    """Whether the model has a head that is not its embedding, and the files hold it: a reward model's do not."""
    head = runner.meta_model.head
    return runner.meta_model.has_head and f"{head}.weight" not in runner.model.all_tied_weights_keys


def _of_heads(sides: Sequence[Steps], texts: int) -> list[float]:
    """Compare the heads some rows at a time: the logits of all texts would be as many as tokens times vocabulary."""
    store = sides[0].runner.store
    counts = [PairCounts(store) for _ in range(texts)]
    longest = max(store.get(state).shape[-2] for state in sides[0].so_far.states[:texts])
    heads = [OutputHead(side.runner) for side in sides]
    rows = min(head.rows for head in heads)
    step = max(1, min(CHUNK // longest, HEAD_ELEMENTS // max(head.columns for head in heads)))
    for start in range(0, rows, step):
        parts = [head.part(start, min(start + step, rows)) for head in heads]
        for number, counted in enumerate(counts):
            logits = [
                nn.functional.linear(side.runner.store.get(side.so_far.states[number]), *part)
                for side, part in zip(sides, parts, strict=True)
            ]
            _count(counted, *logits)
    return [counted.mutual_information() for counted in counts]
