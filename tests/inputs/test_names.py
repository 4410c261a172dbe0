"""Models whose tensors have other names than the base's, or other forms, are merged as if they had the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from beside import pictured, text_model
from conftest import Run
from merge_cases import digests, tensors_in
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.correspondence import Piece
from lowmem_aim.models.renamed import RenamedCheckpoint


def merge(run: Run, out: Path, base: Path, *experts: Path, code: int = 0, more: tuple[object, ...] = ()) -> Any:
    command = ("merge", out, "--method", "task_arithmetic", "--base", base, "--weight", 0.5, *more)
    done = run(*command, *(part for expert in experts for part in ("--expert", expert)))
    assert done.code == code, done.err
    return done


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama", lambda name: name.removeprefix("model.")),
        ("llama", lambda name: f"module.{name}"),
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        ("gpt_neox", lambda name: name.removeprefix("gpt_neox.")),
    ],
)
def test_a_prefix_makes_no_difference(architecture: str, change: Any, tmp_path: Path, run: Run) -> None:
    base = tiny.build(architecture, tmp_path / "base")
    expert = tiny.perturbed(base, tmp_path / "expert")
    merge(run, tmp_path / "out", base, expert)
    tiny.rename(expert, change)
    done = merge(run, tmp_path / "renamed", base, expert)
    assert "under other names" in done.err
    assert digests(tmp_path / "renamed")["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("stacked", ["expert", "base"])
def test_experts_stacked_or_apart_are_the_same(architecture: str, stacked: str, tmp_path: Path, run: Run) -> None:
    base = tiny.build(architecture, tmp_path / "base")
    expert = tiny.perturbed(base, tmp_path / "expert")
    merge(run, tmp_path / "out", base, expert)
    stack(tmp_path / stacked)
    done = merge(run, tmp_path / "other", base, expert, more=("--ram", "1GB"))
    assert "in another form" in done.err
    if stacked == "base":
        stack(tmp_path / "out")
    plain, found = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "other")
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def stack(folder: Path) -> None:
    """Rewrite a model as transformers holds it: the experts of each layer as one tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    assert any("gate_up_proj" in name for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_text_model_merges_with_the_language_part_of_a_vision_language_model(
    kind: str, tmp_path: Path, run: Run
) -> None:
    base, text = pictured(kind, tmp_path / "pictures"), text_model(kind, tmp_path / "text")
    done = merge(run, tmp_path / "out", base, text)
    found, start, expert = tensors_in(tmp_path / "out"), tensors_in(base), tensors_in(text)
    assert found.keys() == start.keys()
    moved = 0
    for name, value in found.items():
        own = name.removeprefix("language_model.")
        if own in expert:
            expected = (start[name].double() + expert[own].double()) / 2
            assert (value.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), name
            moved += 1
        else:
            assert torch.equal(value, start[name]), name
    assert moved == len(expert)
    assert "a model has no such part" in done.err
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["llava"])
def test_the_language_part_of_a_vision_language_model_merges_into_a_text_model(
    kind: str, tmp_path: Path, run: Run
) -> None:
    pictures, text = pictured(kind, tmp_path / "pictures"), text_model(kind, tmp_path / "text")
    merge(run, tmp_path / "out", text, pictures)
    found, start, expert = tensors_in(tmp_path / "out"), tensors_in(text), tensors_in(pictures)
    for name, value in found.items():
        expected = (start[name].double() + expert[f"language_model.{name}"].double()) / 2
        assert (value.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), name


def test_names_that_nobody_knows_are_told_in_one_line(llama: Path, tmp_path: Path, run: Run) -> None:
    expert = tiny.perturbed(llama / "base", tmp_path / "odd")
    tiny.rename(expert, lambda name: f"net.{name.replace('layers', 'stages')}")
    done = merge(run, tmp_path / "out", llama / "base", expert, code=3)
    [told] = [line for line in done.err.splitlines() if "odd" in line]
    assert "none of the 30 tensors of `odd` is known in `base`: all are named `net.*`" in told


def test_pieces_are_read_as_one_tensor(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "base")
    with Checkpoint.open(base) as model:
        up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
        stored = load_file(base / "model.safetensors")
        wanted = torch.cat([stored[up][8:], stored[down][:8]])
        pieces = (Piece(up, 8, 40), Piece(down, 0, 8))
        renamed = RenamedCheckpoint(model, {up: pieces}, model)
        assert torch.equal(renamed.tensor(up), wanted)
        for start, stop in ((0, 48), (0, 40), (39, 41), (40, 48), (47, 48), (5, 5)):
            assert torch.equal(renamed.rows(up, start, stop), wanted[start:stop])
        assert down not in renamed.tensors
