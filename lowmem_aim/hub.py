"""Model references -> local folders: a folder here, or `id[@revision]` on the Hugging Face Hub.

Downloads go through huggingface_hub into its own cache (HF_HOME), honour HF_HUB_OFFLINE and HF_TOKEN, and fetch
safetensors, json and tokenizer data only: no pickle, no code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lowmem_aim.errors import ModelError, NetworkError, printable
from lowmem_aim.events import Emit, Notice

# Besides safetensors and json: sentencepiece models, BPE merges, word lists and chat templates, all plain data.
WANTED = [
    "*.safetensors",
    "*.json",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "README.md",
]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Located:
    folder: Path
    label: str  # how the outputs name the model: its folder's name, or its Hub id (with revision)


def locate(reference: str, emit: Emit) -> Located:
    """The folder of a model, downloaded first if it is on the Hub. Raises ModelError or NetworkError."""
    shown = printable(reference)
    # os.path answers False where Path's own would raise: a name that no system takes, an unknown user.
    folder = Path(os.path.expanduser(reference))
    if os.path.isdir(folder):
        return Located(folder, plain_name(folder.resolve()))
    if os.path.exists(folder):
        raise ModelError(f"`{shown}` is a file, not a model folder", hint="name the folder that holds config.json")
    if "+" in reference:
        raise ModelError(f"`{shown}`: LoRA adapters are not supported", hint="merge the adapter into its model first")
    # `experts/math` may be either; where there is a folder `experts`, it was meant to be in there.
    looks_local = reference.startswith((".", "~")) or os.path.isdir(folder.parent)
    # `..` in a revision would lead out of the Hub library's cache.
    if looks_local or ".." in reference or not _HUB_ID.fullmatch(reference):
        raise ModelError(f"there is no model folder `{shown}`", hint="check the path (Hub ids look like `owner/name`)")
    return Located(_downloaded(reference, emit), reference)


def plain_name(folder: Path) -> str:
    """A folder's name as cards, recipes and messages may hold it: no control characters, no markup of a card."""
    return printable(folder.name).replace("`", "'")


def _downloaded(reference: str, emit: Emit) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = printable(reference)
    repository, _, revision = reference.partition("@")
    emit(Notice(f"`{shown}` is no folder here: looking on the Hub"))
    hint = "give a local folder, or check the network and HF_HUB_OFFLINE"
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=WANTED))
    except GatedRepoError as error:
        raise ModelError(
            f"`{shown}` is gated on the Hub", hint="accept its licence there, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"`{shown}` has no such revision on the Hub", hint="check what follows the `@`") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # before its superclass RepositoryNotFoundError
        raise NetworkError(
            f"`{shown}` is neither a folder here nor downloaded, and the Hub is out of reach", hint
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder `{shown}` here and no such model on the Hub",
            hint="check the name; private ones need HF_TOKEN",
        ) from error
    except HFValidationError as error:
        raise ModelError(
            f"`{shown}` is neither a folder here nor a Hub id: {printable(str(error))}", hint="check the name"
        ) from error
    except (OSError, RuntimeError) as error:  # every HTTP and connection error of the library
        raise NetworkError(f"`{shown}` could not be downloaded: {printable(str(error))}", hint) from error
