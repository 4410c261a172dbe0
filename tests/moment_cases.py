"""Experts with texts of their own, and the second moments that were measured of them as whole matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.models.meta_model import load_meta_model
from lowmem_aim.solving.expert_moments import ExpertMoments
from lowmem_aim.solving.texts import ExpertTexts, MergedModel
from lowmem_aim.system.tensor_store import TensorStore

CPU = torch.device("cpu")
RIDGE = 1e-2
TEXTS = [tiny.sequences((23, 9, 40), seed=3), tiny.sequences((31, 50), seed=4)]  # of two experts
Matrices = dict[tuple[str, int], list[Tensor | None]]  # tensor and matrix in it -> of each expert


def expert_folders(architecture: str, folder: Path, **changes: Any) -> list[Path]:
    """Two experts of a tiny model, in new folders."""
    base = tiny.build(architecture, folder / "base", **changes)
    return [tiny.perturbed(base, folder / f"expert{seed}", scale=0.05, seed=seed) for seed in (1, 2)]


@contextlib.contextmanager
def moments_of(
    folders: Sequence[Path],
    texts: Sequence[Sequence[Tensor]] = TEXTS,
    store: TensorStore | None = None,
    *,
    plus_plus: bool = False,
    **options: Any,
) -> Iterator[ExpertMoments]:
    """The moments of these experts, not yet begun; with `plus_plus` on the states of the merged model, by `Solved`."""
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint.open(folder)) for folder in folders]
        experts = [
            ExpertTexts(checkpoint, load_meta_model(checkpoint), own)
            for checkpoint, own in zip(checkpoints, texts, strict=True)
        ]
        if plus_plus:
            source = Solved(checkpoints)
            options["merged"] = MergedModel(source, load_meta_model(checkpoints[0]))
        store = store or stack.enter_context(TensorStore(CPU, device_bytes=0, ram_bytes=1 << 30, folder=None))
        moments = stack.enter_context(ExpertMoments(experts, MatrixSpace(store, CPU), CPU, **options))
        if plus_plus:
            source.moments = moments
        yield moments


def names_in(folder: Path, block: int, moments: ExpertMoments) -> list[str]:
    """The tensors of a block with two or three dimensions."""
    with Checkpoint.open(folder) as checkpoint:
        infos = checkpoint.tensors
    return [name for name in sorted(infos) if moments.block_of(name) == block and len(infos[name].shape) > 1]


def measured(
    folders: Sequence[Path],
    blocks: Sequence[int] = range(tiny.LAYERS),
    *,
    each: Callable[[ExpertMoments, int], None] = lambda moments, block: None,
    **options: Any,
) -> Matrices:
    """The moments of some blocks as whole matrices; `each` is called after each block."""
    found: Matrices = {}
    with moments_of(folders, **options) as moments:
        for block in blocks:
            moments.come_to(block)
            for name in names_in(folders[0], block, moments):
                for number, own in enumerate(moments.of([name] * len(folders))):
                    found[name, number] = [None if moment is None else whole(moment) for moment in own]
            each(moments, block)
    return found


def by_an_ordinary_forward(folder: Path, texts: list[Tensor]) -> dict[str, Tensor]:
    """Tensor -> X^T X of its inputs in float64, by hooks; of fused experts, of what the router chooses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad(), seen(model) as found:
        for tokens in texts:
            model(tokens[None], use_cache=False)
    found.pop("lm_head.weight", None)
    return found


@contextlib.contextmanager
def seen(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield what grows to tensor -> X^T X of its inputs in float64, by hooks, while the model or parts of it run."""
    # Mixtral's names in files are not those of its modules.
    old = model.config.model_type == "mixtral"
    gate_proj, down_proj, up_proj = ("w1", "w2", "w3") if old else ("gate_proj", "down_proj", "up_proj")
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        name = f"{name.replace('mlp', 'block_sparse_moe') if old else name}.weight"
        found[name] = found.get(name, torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)) + rows.T @ rows

    def linear(name: str, module: Any, args: Any) -> None:
        add(name, args[0])

    def experts(name: str, module: Any, args: Any) -> None:
        hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in chosen.unique().tolist():
            rows = hidden[(chosen == expert).any(-1)]
            gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            add(f"{name}.{expert}.{gate_proj}", rows)
            add(f"{name}.{expert}.{up_proj}", rows)
            add(f"{name}.{expert}.{down_proj}", module.act_fn(gate) * up)

    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            handles.append(module.register_forward_pre_hook(partial(experts, name)))
        elif isinstance(module, nn.Linear | Conv1D) or name.endswith("mlp.gate"):
            handles.append(module.register_forward_pre_hook(partial(linear, name)))
    yield found
    for handle in handles:
        handle.remove()


def whole(moment: Moment) -> Tensor:
    """The matrix that a moment is."""
    found = torch.zeros(moment.size, moment.size)
    for row, column in moment.places():
        tile = moment.get((row, column))
        if tile is not None:
            found[moment.span(row), moment.span(column)] = tile
            found[moment.span(column), moment.span(row)] = tile.T
    return found


def same(some: Matrices, others: Matrices) -> bool:
    """Whether both hold the same matrices, bit for bit."""

    def alike(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))

    return some.keys() == others.keys() and all(
        alike(a, b) for key in some for a, b in zip(some[key], others[key], strict=True)
    )


# --- RegMean++ in a few lines ----------------------------------------------------------------------------------------


def solved(weights: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """(sum Wi Gi) (sum Gi + ridge)^-1 of weights (out, in) and moments (in, in)."""
    wide = [gram.double() for gram in grams]
    total = torch.stack(wide).sum(0)
    total += RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    target = sum(weight.double() @ gram for weight, gram in zip(weights, wide, strict=True))
    return torch.linalg.solve(total, target, left=False).float()  # type: ignore[arg-type]


class Solved:
    """The merged model's weights: linears of the blocks solved, everything else the average. Has what `Merged` asks."""

    def __init__(self, experts: Sequence[Checkpoint]) -> None:
        self.experts = experts
        self.moments: ExpertMoments | None = None  # set once it is there
        self.forgotten = 0

    def tensor(self, name: str) -> Tensor:
        weights = [expert.tensor(name).float() for expert in self.experts]
        if self.moments is None or self.moments.block_of(name) is None or weights[0].dim() < 2:
            return torch.stack(weights).mean(0)
        (grams,) = self.moments.of([name] * len(weights))
        return solved(weights, [whole(gram) for gram in grams if gram is not None])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        value = self.tensor(name)
        return value.reshape(matrix_shape(value.shape))[start:stop]

    def expect(self, names: Iterable[str]) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    def forget(self) -> None:
        self.forgotten += 1

    def __enter__(self) -> Solved:
        return self

    def __exit__(self, *_: object) -> None:
        pass
