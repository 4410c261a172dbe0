"""A LoRA adapter on disk, as PEFT saves it: its config and the header of its one file, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG, AdapterConfig, adapter_config_of
from lowmem_aim.models.folder import ADAPTER, ADAPTER_PICKLE, check_links
from lowmem_aim.models.headers import TensorInfo, read_header
from lowmem_aim.system.files import input_errors, is_file, is_folder, real


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, its config and its header checked."""

    folder: Path
    label: str
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, label: str) -> Adapter:
        """Check the config and the header of the adapter in `folder`. Raises ModelError with every problem found."""
        shown = printable(str(folder))
        with input_errors(folder):
            if not is_folder(folder):
                raise ModelError(f"there is no adapter folder `{shown}`", "check the path")
            resolved = real(folder)
            check_links(resolved)
            if not is_file(resolved / ADAPTER_CONFIG):
                raise ModelError(
                    f"`{shown}` is no LoRA adapter: it has no {ADAPTER_CONFIG}",
                    hint="what follows the `+` is the folder of an adapter as PEFT saves it",
                )
            errors: list[LowmemAimError] = []
            with noted(errors):
                config = adapter_config_of(resolved)
            with noted(errors):
                tensors = read_header(_weights(resolved))
            raise_all(errors)
            return cls(resolved, label, config, tensors)

    @property
    def file(self) -> Path:
        """The file that holds the tensors."""
        return self.folder / ADAPTER


def _weights(folder: Path) -> Path:
    if is_file(folder / ADAPTER):
        return folder / ADAPTER
    shown = printable(str(folder))
    if is_file(folder / ADAPTER_PICKLE):
        hint = "pickle can run code and is never loaded; `lowmem-aim convert` makes safetensors of it"
        raise ModelError(f"`{shown}` has no {ADAPTER}, only pickle (`{ADAPTER_PICKLE}`)", hint)
    raise ModelError(f"`{shown}` has no {ADAPTER}", "is the download complete?")
