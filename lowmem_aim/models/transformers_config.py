"""A model's config as transformers' class for its model type reads it, from a vetted copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from lowmem_aim.errors import LowmemAimError, ModelError, printable
from lowmem_aim.models.vetted import vetted_folder
from lowmem_aim.system.memory import is_allocation_failure


def config_of_transformers(config: Mapping[str, Any], label: str) -> Any:
    """The config as transformers' class for its model type; `label` names the model. Raises ModelError."""
    kind, shown = printable(str(config.get("model_type"))), printable(label)
    try:
        with vetted_folder(config) as folder:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except LowmemAimError:
        raise
    except Exception as error:
        if is_allocation_failure(error):
            raise
        known = config.get("model_type") in CONFIG_MAPPING
        if config.get("auto_map"):
            raise ModelError(
                f"`{shown}` (model type `{kind}`) works only with Python code from its own folder "
                "(`auto_map`), which is never executed here",
                hint="only model types that transformers itself knows can be merged",
            ) from error
        raise ModelError(
            f"transformers does not accept the config of `{shown}` (model type `{kind}`): {short(error)}",
            hint="" if known else "a newer transformers may know this model type",
        ) from error


def short(error: Exception) -> str:
    """Say in one line what an error says: transformers gives the name of a validator first, and then the reason."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 400)
