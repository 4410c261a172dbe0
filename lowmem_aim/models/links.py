"""Links in a model folder: which of them may be followed.

A link out of the folder could have any file of the user's copied into an output. Followed are, for a shard of weights,
those to a file with a valid safetensors header (people keep weights on another disk); for any other file only those
into the blobs of a Hub cache, which old versions of `hf download --local-dir` made. No shard is ever copied as a file.
"""

from __future__ import annotations

import re
from pathlib import Path

from lowmem_aim.errors import ModelError
from lowmem_aim.models.headers import read_header

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")  # a repository's folder in a Hub cache
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")  # a file that several repositories of the cache may have


def is_inside(folder: Path, file: Path) -> bool:
    """Whether `file`, links followed, lies in `folder` or in the blobs of a Hub cache. `folder` has no links in it."""
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    return folder in target.parents or _is_blob(target)


def _is_blob(target: Path) -> bool:
    """Whether a path without links is models--OWNER--NAME/blobs/ETAG of a Hub cache, or blobs/HA/HASH, its shared ones.

    What `hf download` leaves in a snapshot are links to the former, which, since version 2 of the library, may in turn
    be links to the latter.
    """
    above = target.parents
    if len(above) < 3:
        return False
    if above[0].name == "blobs":
        return bool(_REPOSITORY.fullmatch(above[1].name))
    shared = bool(_SHARED_BLOB.fullmatch(target.name)) and above[0].name == target.name[:2]
    return shared and above[1].name == "blobs"


def leads_to_weights(file: Path) -> bool:
    """Whether `file`, links followed, is a regular file with a valid safetensors header."""
    try:
        read_header(file, packed=True)
    except ModelError:
        return False
    return True
