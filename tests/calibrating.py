"""What tests of calibration share: texts, a forward as someone else might have written it, equality of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from long_cases import others_long
from torch import Tensor

from lowmem_aim.jobs.calibrate import calibrate
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.relaxing.activations import Activations

TEXTS = tiny.sequences((23, 9, 40))  # uneven; two longer than every sliding window (8), one longer than the canary
# Of each way to call blocks one: plain, windows by layer, positions that are learnt, experts, experts in some layers.
BY_ARCHITECTURE = others_long(tiny.ARCHITECTURES, ("llama", "gemma3_text", "gpt2", "mixtral", "deepseek_v3"))


def activations_of(base: Path, texts: Path, out: Path) -> Path:
    """Measure the activations of `base` with the texts of a file, and save them in the file `out`; returns it."""
    return calibrate(str(base), Aim(calibration=str(texts)), out)


def same(a: Activations, b: Activations) -> bool:
    """Whether both have the same means of the same weights, bit for bit."""
    return a.means.keys() == b.means.keys() and all(torch.equal(a.means[name], b.means[name]) for name in a.means)


def llama_forward(between: Callable[[Tensor], Tensor], *, rounds: int = 1, tuples: bool = False) -> Any:
    """LlamaModel's forward as someone else might have written it, with `between` after each block.

    `rounds`: how often all blocks are called; `tuples`: whether a block returns its output in a tuple.
    """
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import BaseModelOutputWithPast

    def forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in [*self.layers] * rounds:
            output = layer(hidden_states=hidden, attention_mask=mask, position_embeddings=rotary)
            hidden = between(output[0] if tuples else output)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward
