"""The harness' index of its own tasks, made from the few folders that matter: of all 14,000 files it takes seconds.

A folder matters if one of its files holds the name of a task that is asked for, or of one that belongs to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def index_of(names: Iterable[str], folders: list[str]) -> Any:
    """The harness' index in which these tasks are found, and all below them; the user's `folders` come first."""
    from lm_eval.tasks import TaskManager, manager

    own, wanted = Path(manager.__file__).parent, set(names)
    texts = {file: file.read_bytes() for file in sorted(own.glob("*/**/*.yaml"))}
    while True:
        found = [str(own / name) for name in _holding(wanted, texts, own)]
        index = TaskManager(include_path=[*found, *folders], include_defaults=False)
        below = {part for name in wanted for part in _parts(index.task_index.get(name))}
        if below <= wanted:
            break
        wanted |= below
    parts = [TaskManager(include_path=folder, include_defaults=False).task_index for folder in found]
    defined = Counter(name for part in parts for name in part)
    if all(name in index.task_index and defined[name] <= 1 for name in wanted):
        return index
    return TaskManager(include_path=folders or None)  # unknown, or in several folders: the harness says which counts


def _holding(names: Iterable[str], texts: dict[Path, bytes], own: Path) -> list[str]:
    """The folders in `own` with a file that holds one of these names as a word."""
    words = b"|".join(re.escape(name.encode()) for name in sorted(names))
    pattern = re.compile(rb"(?<![\w.-])(?:" + words + rb")(?![\w.-])")
    return sorted({file.relative_to(own).parts[0] for file, text in texts.items() if pattern.search(text)})


def _parts(entry: Any) -> Iterator[str]:
    """Yield the names of the tasks of a group or tag, as its file or theirs list them."""
    if entry is None:
        return
    yield from entry.tags if entry.kind.name == "TAG" else ()
    yield from _named(entry.cfg.get("task")) if entry.kind.name == "GROUP" else ()


def _named(listed: Any) -> Iterator[str]:
    for part in listed if isinstance(listed, list) else [listed]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            yield from _named(part.get("task"))
