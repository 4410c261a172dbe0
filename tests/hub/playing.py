"""The Hub played for a test: served in this process, whose libraries then ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub.server import Handler, Hub, Server


@contextmanager
def playing(hub: Hub) -> Iterator[str]:
    """Play the Hub, which holds what `hub` says, until the end of the block; yields its address."""
    handler = type("Playing", (Handler,), {"hub": hub})
    site, cdn = Server("hub", handler), Server("cdn", handler)
    hub.cdn = cdn.address
    try:
        yield site.address
    finally:
        for server in (site, cdn):
            server.stop()


@contextmanager
def asked(address: str, cache: Path) -> Iterator[None]:
    """Have this process ask the Hub at `address`, and keep what it downloads in `cache`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", not address)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        yield
    close_session()


@contextmanager
def asked_for_data_sets(address: str, cache: Path) -> Iterator[None]:
    """Have this process ask the Hub at `address` ("": none, it is offline), for data sets too, kept in `cache`."""
    from datasets import config

    with asked(address, cache), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_HUB_OFFLINE", not address)
        patch.setattr(config, "HF_ENDPOINT", address)
        patch.setattr(config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(config, "DOWNLOADED_DATASETS_PATH", str(cache / "datasets" / "downloads"))
        yield
