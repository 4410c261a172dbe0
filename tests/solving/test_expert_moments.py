"""Second moments, block by block and within any budget, are those of an ordinary forward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from long_cases import others_long
from moment_cases import TEXTS, expert_folders, measured
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowmem_aim.methods import moments as tiles
from lowmem_aim.solving import input_moments

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3")
BY_ARCHITECTURE = others_long(KINDS, KINDS[:4])


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a matrix, and several groups of rows."""
    monkeypatch.setattr(tiles, "TILE", 20)
    monkeypatch.setattr(input_moments, "ROWS", 16)
    monkeypatch.setattr(input_moments, "EXPERT_ROWS", 8)


def by_an_ordinary_forward(folder: Path, texts: list[Tensor]) -> dict[str, Tensor]:
    """Tensor -> X^T X of its inputs in float64, by hooks; of fused experts, of what the router chooses."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(partial(experts, name))
        elif isinstance(module, nn.Linear | Conv1D) or name.endswith("mlp.gate"):
            module.register_forward_pre_hook(partial(linear, name))
    with torch.no_grad():
        for tokens in texts:
            model(tokens[None], use_cache=False)
    found.pop("lm_head.weight")
    return found


def is_close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_they_are_those_of_an_ordinary_forward(architecture: str, tmp_path: Path) -> None:
    folders = expert_folders(architecture, tmp_path)
    found = measured(folders)
    for number, (folder, texts) in enumerate(zip(folders, TEXTS, strict=True)):
        expected = by_an_ordinary_forward(folder, texts)
        assert {name for (name, _), own in found.items() if own[number] is not None} == expected.keys()
        for name, matrix in expected.items():
            assert is_close(found[name, 0][number], matrix), name
