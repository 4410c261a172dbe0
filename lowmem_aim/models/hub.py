"""The local folder of a model or an adapter: a folder here, or `id[@revision]` on the Hugging Face Hub.

Downloads go through huggingface_hub into its own cache (HF_HOME), honour HF_HUB_OFFLINE and HF_TOKEN, and fetch
safetensors, json and tokenizer data only: no pickle, no code.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowmem_aim.errors import ModelError, NetworkError, NoSuchModel, nearest, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG
from lowmem_aim.models.folder import ADAPTER
from lowmem_aim.models.known_files import LEGAL, READ_BY_LOADERS
from lowmem_aim.system.files import input_errors, is_folder, real

# All plain data: pickles and code are never asked for.
WANTED = ["*.safetensors", "*.json", "*.jinja", "README.md", *LEGAL]
WANTED += [pattern for pattern in READ_BY_LOADERS if not pattern.endswith((".json", ".jinja"))]
WANTED_OF_ADAPTERS = [ADAPTER, ADAPTER_CONFIG]
WEIGHTS = "*.safetensors"
SMALL = [pattern for pattern in WANTED if pattern != WEIGHTS]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Located:
    """A model, or an adapter, that is on this machine."""

    folder: Path
    label: str  # how the outputs name the model: its folder's name, or its Hub id (with revision)


def locate(reference: str, emit: Emit, adapter: bool = False) -> Located:
    """The folder of a model or an adapter, downloaded first if it is on the Hub. Raises ModelError or NetworkError."""
    wanted = WANTED_OF_ADAPTERS if adapter else WANTED
    return local_model(reference, adapter) or Located(downloaded(reference, wanted, emit), reference)


def local_model(reference: str, adapter: bool = False) -> Located | None:
    """The model, or the adapter, in a local folder; None if `reference` must be a Hub id.

    Raises ModelError if it can be neither.
    """
    shown = printable(reference)
    what, holds = ("adapter", ADAPTER_CONFIG) if adapter else ("model", "config.json")
    # os.path leaves a name as it is where Path's methods would raise: for an unknown user.
    folder = Path(os.path.expanduser(reference))
    with input_errors(folder):
        if is_folder(folder):
            return Located(folder, plain_name(real(folder)))
        is_other = os.path.exists(folder)
    if is_other:
        raise ModelError(f"`{shown}` is a file, not {_a(what)} folder", hint=f"name the folder that holds {holds}")
    # `experts/math` may be a path or a Hub id; if there is a folder `experts`, it is meant as a path.
    looks_local = reference.startswith((".", "~")) or os.path.isdir(folder.parent)
    # `..` in a revision would lead out of the Hub library's cache.
    if looks_local or ".." in reference or not _HUB_ID.fullmatch(reference):
        beside = sorted(os.listdir(folder.parent)) if os.path.isdir(folder.parent) else []
        near = nearest(folder.name, beside)
        meant = f"; did you mean `{printable(os.path.join(os.path.dirname(reference), near))}`?" if near else ""
        raise NoSuchModel(
            f"there is no {what} folder `{shown}`{meant}", hint="check the path; ids on the Hub look like `owner/name`"
        )
    return None


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def plain_name(folder: Path) -> str:
    """A folder's name as cards, recipes and messages may hold it: no control characters, no backticks."""
    return printable(folder.name).replace("`", "'")


def repository_of(reference: str) -> tuple[str, str | None]:
    """(repository, revision) of a Hub id; the revision is None if the id has none."""
    repository, _, revision = reference.partition("@")
    return repository, revision or None


def downloaded(reference: str, patterns: list[str], emit: Emit) -> Path:
    """Download the files of a Hub model that match `patterns`; returns their folder in the library's cache.

    The folder is the model's snapshot, named by its commit. If the Hub is out of reach, it is a snapshot that is there
    already. Raises ModelError or NetworkError.
    """
    from huggingface_hub import snapshot_download

    emit(Notice(f"`{printable(reference)}` is not a local folder: looking on the Hub"))
    repository, revision = repository_of(reference)
    with hub_errors(reference):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def keep_downloads_in(folder: str) -> None:
    """Keep models from the Hub in `folder`, in this process and its children, as if HF_HUB_CACHE named it."""
    path = os.environ["HF_HUB_CACHE"] = os.path.abspath(os.path.expanduser(folder))
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:  # the library has read it already
        constants.__dict__["HF_HUB_CACHE"] = path


@contextmanager
def hub_errors(reference: str) -> Iterator[None]:
    """Turn what the Hub's library raises in the block into ModelError or NetworkError with the model's name."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # what the HTTP library raises; it is no OSError
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = printable(reference)
    hint = "give a local folder, or check the network and HF_HUB_OFFLINE"
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"`{shown}` is gated on the Hub", hint="accept its licence there, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"`{shown}` has no such revision on the Hub", hint="check what follows the `@`") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # before its superclass RepositoryNotFoundError
        raise NetworkError(
            f"`{shown}` is neither a folder here nor downloaded, and the Hub cannot be reached", hint
        ) from error
    except RepositoryNotFoundError as error:
        raise NoSuchModel(
            f"there is no folder `{shown}` here and no such model on the Hub",
            hint="check the name; private models need HF_TOKEN",
        ) from error
    except HFValidationError as error:
        raise ModelError(
            f"`{shown}` is neither a folder here nor a Hub id: {printable(str(error))}", hint="check the name"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:  # every HTTP and connection error of the library
        raise NetworkError(f"`{shown}` could not be downloaded: {printable(str(error))}", hint) from error
