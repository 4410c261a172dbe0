"""The demo's folder: whose it is, known before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from lowmem_aim.errors import UsageError

OWNER = ".lowmem-aim-demo"  # stands in every folder that the demo may write to and clear


def own(folder: Path) -> None:
    """Make `folder` the demo's. Raises UsageError if it holds anything that is not the demo's."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{folder}` is a file", hint="name a new folder for the demo")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / OWNER).exists():
        raise UsageError(f"`{folder}` is not empty and not the demo's", hint="name a new folder for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER).touch()
