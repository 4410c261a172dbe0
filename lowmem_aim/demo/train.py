"""The base and its experts, trained in memory. The same settings, machine and versions give the same weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowmem_aim.demo.settings import Settings, Training
from lowmem_aim.demo.skills import SKILLS, Example, mixture
from lowmem_aim.demo.tokenizer import END

Echo = Callable[[str], None]
IGNORED = -100  # the label that cross entropy leaves out
LAST_RATE = 0.05  # of the peak: the cosine ends here, and the last steps still count
SECONDS_BETWEEN_LINES = 15.0


@contextlib.contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Seed torch's generator and fix its number of threads during the block; afterwards both are as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with random weights, in the sizes of `settings`."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.inner,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def expert_shares(skill: str, settings: Settings) -> dict[str, float]:
    """The share of each skill in an expert's texts: mostly `skill`, and the rest as the base had it."""
    kept = settings.kept_mixture / len(SKILLS)
    return {name: kept + (1 - settings.kept_mixture) * (name == skill) for name in SKILLS}


def as_batch(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Tokens and labels of some examples, both (examples, longest).

    Only the answer and its end are labels: questions are random.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([example.answer + END for example in examples], add_special_tokens=False)["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))
    tokens = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    labels = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in pairs]
    # Padded on the right: causal attention never looks there, so no mask is needed.
    return (
        pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def _rate(step: int, plan: Training) -> float:
    """The learning rate at a step: a linear warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
    return plan.peak_rate * min(1.0, (step + 1) / plan.warmup) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    shares: Mapping[str, float],
    plan: Training,
    random: Random,
    report: Echo,
) -> None:
    """Train `model` in place on texts drawn by `shares`."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    reported = time.monotonic()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, plan)
        tokens, labels = as_batch(mixture(shares, plan.batch, random), tokenizer)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            report(f"step {step + 1} of {plan.steps}, loss {loss.item():.3f}")
    model.eval()
