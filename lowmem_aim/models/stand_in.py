"""Stand-ins for models that are not here: all that planning reads, without the weights.

They are for models on the Hugging Face Hub, and for stages of a recipe before they are made.

A stand-in is a folder that `Checkpoint.open` accepts as the model. Its small files are the model's; its shards have the
true sizes and headers, and zeros for weights. The zeros are holes and take no disk space, except on filesystems without
sparse files (FAT, exFAT; NTFS reserves the space): there a stand-in is as large as its model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from lowmem_aim.events import Emit
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG
from lowmem_aim.models.folder import ADAPTER, PICKLES, SINGLE, is_plain, shard_names
from lowmem_aim.models.headers import MAX_HEADER_BYTES
from lowmem_aim.models.hub import SMALL, WEIGHTS, Located, downloaded, hub_errors, local_model, repository_of
from lowmem_aim.system.files import disk_errors

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

# Bytes of a shard in the first request: nearly every header fits, and a second request would cost more than they do.
FIRST_BYTES = 100_000
CONNECTIONS = 4  # a model may have 160 shards; each request is mostly waiting


@dataclass(frozen=True)
class StandIn:
    """A model to plan with: the model itself, or a stand-in for it."""

    located: Located
    missing_bytes: int  # weights that a merge would have to download first


def stand_in(reference: str, folder: Path, emit: Emit, adapter: bool = False) -> StandIn:
    """Find a model, or an adapter, to plan with. From the Hub come only headers and small files, all of one commit.

    Models in folders here, or whole in the Hub library's cache, are used as they are. For others a stand-in is made in
    `folder`, which is new or empty. Raises ModelError, NetworkError or DiskError.
    """
    local = local_model(reference, adapter)
    if local is not None:
        return StandIn(local, 0)
    snapshot = downloaded(reference, [ADAPTER_CONFIG] if adapter else SMALL, emit)
    shards = {ADAPTER} if adapter else shard_names(snapshot)
    if all((snapshot / name).is_file() for name in shards):
        return StandIn(Located(snapshot, reference), 0)
    files = _files_of(reference, snapshot.name)
    # Where a model has both an index and a single file, a checkpoint prefers the latter.
    wanted = shards if adapter else {SINGLE, *shards}
    sizes = {name: files[name].size for name in sorted(wanted & set(files))}
    _copy_small_files(snapshot, folder)
    _name_pickles(files, folder)
    _fetch_headers(reference, snapshot.name, sizes, folder)
    missing = [f.size for f in files.values() if _is_missing(f, snapshot) and (not adapter or f.path == ADAPTER)]
    return StandIn(Located(folder, reference), sum(missing))


def _files_of(reference: str, commit: str) -> dict[str, RepoFile]:
    """All files of the model's repository, by path."""
    from huggingface_hub import HfApi, RepoFile

    repository, _ = repository_of(reference)
    with hub_errors(reference):
        entries = list(HfApi().list_repo_tree(repository, recursive=True, revision=commit))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_missing(file: RepoFile, snapshot: Path) -> bool:
    """Whether `file` holds weights that the cache lacks, for this commit and for any other."""
    blob = snapshot.parent.parent / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)
    return PurePath(file.path).match(WEIGHTS) and not (snapshot / file.path).is_file() and not blob.is_file()


def _copy_small_files(snapshot: Path, folder: Path) -> None:
    """Copy the small files: links would lead out of the folder, and a checkpoint refuses such links."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in snapshot.rglob("*"):
            if file.is_file() and any(file.match(pattern) for pattern in SMALL):
                copy = folder / file.relative_to(snapshot)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def _name_pickles(files: Mapping[str, RepoFile], folder: Path) -> None:
    """Put empty files in place of pickles: if the model has nothing else, the error can name them."""
    for path in files:
        if is_plain(path) and any(PurePath(path).match(pattern) for pattern in PICKLES):
            with disk_errors(folder / path):
                (folder / path).touch()


def _fetch_headers(reference: str, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Make a sparse file in `folder` for each shard, with its true header. `sizes` are bytes by file name."""
    from huggingface_hub import hf_hub_url

    repository, _ = repository_of(reference)

    def fetch(name: str) -> None:
        with hub_errors(reference):
            header = _header(hf_hub_url(repository, name, revision=commit), sizes[name])
        _write_sparse(folder / name, header, sizes[name])

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(fetch, sizes):  # raises what a thread raised, and starts no more of them
            pass


def stand_in_for_output(folder: Path, shards: Iterable[tuple[str, bytes, int]], files: Mapping[str, bytes]) -> None:
    """Make a stand-in, in a new `folder`, for a model that is yet to be made here.

    `shards`: name, header and bytes in all; `files`: the small files by name. Raises DiskError.
    """
    for name, content in files.items():
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    for name, header, size in shards:
        _write_sparse(folder / name, header, size)


def _write_sparse(file: Path, header: bytes, size: int) -> None:
    with disk_errors(file):
        file.write_bytes(header)
        os.truncate(file, size)


def _header(url: str, size: int) -> bytes:
    """The bytes of a safetensors file of `size` bytes that come before its weights; cut off if they cannot be right."""
    start = _first_bytes(url, min(size, FIRST_BYTES))
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= min(size, 8 + MAX_HEADER_BYTES):
        start = _first_bytes(url, end)
    return start[:end]


def _first_bytes(url: str, count: int) -> bytes:
    """The first `count` bytes of a file. A server without range requests sends all of it: reading stops at `count`."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if not count:
        return b""  # a range of no bytes cannot be asked for
    # With compression, the range would not count the file's own bytes.
    headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    start = bytearray()
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # else the library would retry after errors of our reading too, and fail
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            start += chunk
            if len(start) >= count:
                return bytes(start[:count])
    raise OSError(f"the Hub sent {len(start)} of {count} bytes")
