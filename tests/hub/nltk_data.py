"""nltk's data as its server has them: an index, and a tiny `punkt_tab`, made here, that knows no abbreviation."""

from __future__ import annotations

import hashlib
import io
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nltk
import pytest

INDEX, PACKAGE = "/nltk/index.xml", "/nltk/punkt_tab.zip"
FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def nltk_files() -> dict[str, bytes]:
    """What the server has, by its paths; the index names the package by `SITE`, see `asked_for_nltk_data`."""
    stream, length = io.BytesIO(), 0
    with zipfile.ZipFile(stream, "w") as archive:
        for name in FILES:
            text = "" if name.endswith(".tab") else "etc\n"
            archive.writestr(f"punkt_tab/english/{name}", text)
            length += len(text)
    content = stream.getvalue()
    package = (
        f'<package id="punkt_tab" name="made" subdir="tokenizers" unzip="1" size="{len(content)}" '
        f'unzipped_size="{length}" checksum="{hashlib.md5(content).hexdigest()}" '
        f'sha256_checksum="{hashlib.sha256(content).hexdigest()}" url="http://site{PACKAGE}"/>'
    )
    index = f"<nltk_data><packages>{package}</packages><collections></collections></nltk_data>"
    return {INDEX: index.encode(), PACKAGE: content}


@contextmanager
def asked_for_nltk_data(address: str, folder: Path) -> Iterator[None]:
    """Have nltk in this process ask the server at `address`, and know no data but those in `folder`.

    nltk's own guard lets nothing be fetched from the machine itself, and is left out.
    """

    def urlopen(url: str, **settings: float) -> object:
        return urllib.request.urlopen(url.replace("http://site", address), **settings)

    folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])
        patch.setattr(nltk.downloader, "urlopen", urlopen)
        patch.setattr(nltk.downloader._downloader, "_url", address + INDEX)
        patch.setattr(nltk.downloader._downloader, "_download_dir", str(folder))
        yield
