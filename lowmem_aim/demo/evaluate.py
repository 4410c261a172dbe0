"""Exact-match accuracy of a checkpoint folder, skill by skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lowmem_aim.demo.skills import Example
from lowmem_aim.demo.train import IGNORED, as_batch

BATCH = 128


class CausalModel(Protocol):
    """The part of a model that the evaluation uses: its answer has `.logits`, (sequences, length, vocabulary)."""

    def __call__(self, *, input_ids: Tensor) -> Any: ...


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model and the tokenizer, loaded as any user of the checkpoint would load them."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def exact_matches(model: CausalModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> int:
    """The number of whole answers, their end included, that greedy decoding would get right.

    One pass over question and right answer is enough: greedy decoding writes the right answer if and only if each of
    its tokens is the likeliest one after the right tokens before it.
    """
    right = 0
    for start in range(0, len(examples), BATCH):
        tokens, labels = as_batch(examples[start : start + BATCH], tokenizer)
        guesses = model(input_ids=tokens).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        right += int(((guesses == wanted) | (wanted == IGNORED)).all(dim=1).sum())
    return right


def accuracies(folder: Path, questions: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Skill -> share of its questions that the model in `folder` answers exactly, in [0, 1]."""
    model, tokenizer = load(folder)
    return {skill: exact_matches(model, tokenizer, examples) / len(examples) for skill, examples in questions.items()}


@torch.inference_mode()
def answer(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The text that the model writes after `prompt`, greedily, up to its end token or 16 tokens."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))
