"""A byte-level tokenizer for the demo's texts: any text round-trips, and each digit and letter is a token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<s>", "</s>", "<pad>"


def build_tokenizer(skills: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, three special tokens, and the skills' names such as `sort:` as one token each.

    The names are learned as BPE merges. The text after a name is split into characters: a sum or a reversal of chunks
    that depend on their neighbours would be far harder to learn.
    """
    tokenizer = Tokenizer(models.BPE())
    characters = pre_tokenizers.Split(Regex(r"[a-z]+:|[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [characters, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{skill}:" for skill in skills], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, padding_side="left"
    )
