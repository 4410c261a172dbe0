"""Forwards of tiny models with a picture among the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT = (72, 101, 108, 108, 111)  # token ids, before and after the picture


def with_picture(model: Any) -> dict[str, Tensor]:
    """The arguments of a forward of a vision-language model: a random picture between two words.

    The config's id of the picture's token must be one of the vocabulary. Raises whatever a model does that takes
    pictures in another form.
    """
    vision = model.config.vision_config
    if hasattr(vision, "temporal_patch_size"):  # Qwen: patches in a row, and how many of them there are each way
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        picture = {"pixel_values": torch.randn(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        pictures = (1, 1) if vision.model_type.startswith("idefics3") else (1,)  # (texts, pictures of each) or (texts,)
        picture = {"pixel_values": torch.randn(*pictures, 3, size, size)}
        if vision.model_type == "pixtral":
            picture["image_sizes"] = torch.tensor([[size, size]])
    features = model.get_image_features(**picture)
    parts = getattr(features, "pooler_output", features)
    count = sum(part.numel() // part.shape[-1] for part in parts)
    tokens = torch.tensor([[*TEXT, *[model.config.image_token_id] * count, *TEXT]])
    if hasattr(vision, "temporal_patch_size") or model.config.model_type == "gemma3":
        picture["mm_token_type_ids"] = (tokens == model.config.image_token_id).int()
    return {"input_ids": tokens, **picture}
