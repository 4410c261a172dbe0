"""References to models: `path_or_id[@revision]`, with `+adapter[@revision]` for a LoRA adapter that is added to it.

mergekit's long form, `{model: {path, revision}, lora: {path, revision}, override_architecture}`, becomes the same text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A model, and the adapter that is added to it, each a folder or `owner/name[@revision]` on the Hub."""

    model: str
    adapter: str = ""  # "": none

    @property
    def parts(self) -> tuple[str, ...]:
        """The model's own reference, and the adapter's if there is one."""
        return (self.model, self.adapter) if self.adapter else (self.model,)

    def __str__(self) -> str:
        return "+".join(self.parts)


def parsed(text: str, is_folder: Callable[[str], bool] | None = None) -> Reference:
    """The parts of a reference. A folder whose name holds `+` wins over a model and an adapter of such names.

    `is_folder` says whether there is a folder of that name (default: as seen from the current folder). Of several `+`,
    the one between a folder and the rest counts, else the first. Both parts are without outer spaces, and one of them
    may be empty (`base+`): no model has such a name.
    """
    is_folder = is_folder or _is_folder
    if "+" not in text or is_folder(text):
        return Reference(text)
    places = [place for place, letter in enumerate(text) if letter == "+"]
    cuts = [(text[:place].strip(), text[place + 1 :].strip()) for place in places]
    known = [cut for cut in cuts if is_folder(cut[0])] or [cut for cut in cuts if is_folder(cut[1])]
    model, adapter = (known or cuts)[0]
    return Reference(model, adapter) if model and adapter else Reference(text)


def _is_folder(text: str) -> bool:
    return os.path.isdir(os.path.expanduser(text))


def same_reference(a: str, b: str) -> bool:
    """Whether two references mean one model, however written: `./base/`, `base`, `/models/base` or a link to it."""
    first, second = ([os.path.realpath(os.path.expanduser(part)) for part in parsed(text).parts] for text in (a, b))
    return first == second
