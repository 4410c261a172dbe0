"""Tiny models that have learned texts by heart: what they write, and which answer they prefer, is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM

ENOUGH = 0.02  # nats a token
NOT_SCORED = -100  # the label, in transformers


def learned(folder: Path, answers: Mapping[str, str], length: int) -> Path:
    """Save a model to `folder` that continues each context by its answer, and ends there; returns the folder.

    Of a context, the last `length` bytes are read.
    """
    tiny.build("llama", folder, hidden_size=96, intermediate_size=192, num_hidden_layers=2)
    tokenizer = tiny.tokenizer()
    end = [tokenizer.eos_token_id]
    read = {context: tokenizer.encode(context)[-length:] for context in answers}
    written = {context: [*tokenizer.encode(answer), *end] for context, answer in answers.items()}
    rows = {tuple(read[context] + written[context]): len(read[context]) for context in answers}
    longest = max(map(len, rows))
    tokens = torch.tensor([list(row) + end * (longest - len(row)) for row in rows])
    labels = tokens.clone()
    for place, (row, start) in enumerate(rows.items()):
        labels[place, :start] = labels[place, len(row) :] = NOT_SCORED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        steps = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(600):
            loss = model(tokens, labels=labels).loss
            if loss.item() < ENOUGH:
                break
            loss.backward()
            steps.step()
            steps.zero_grad()
    assert loss.item() < ENOUGH, "not learned"
    model.save_pretrained(folder)
    return folder
