"""`lowmem-aim demo FOLDER`: a small base and three experts, trained here, then merged with and without AIM.

folder.py      whose the demo's folder is, known before anything slow is imported
skills.py      questions and answers, generated; which of them are held out for the evaluation
settings.py    every number the training depends on, and the digest that says whether models can be reused
tokenizer.py   byte-level, one token a digit or letter
train.py       the base and the experts, in memory
models.py      the same as checkpoint folders: made whole or not at all, reused when the settings are the same
merges.py      recipes, and the command lines that a user would type
evaluate.py    exact-match accuracy of a checkpoint folder
report.py      the table, what its numbers show, a few answers, and the next commands
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowmem_aim.demo.folder import own


def run(folder: Path, echo: Callable[[str], None], program: str, *, only_models: bool = False) -> None:
    """Make the models in `folder` or reuse them, merge, compare, print; `only_models`: make quick ones, and no more.

    `program` starts `lowmem-aim` in the commands that are printed. Raises UsageError if `folder` holds anything that is
    not the demo's.
    """
    # Here and not above: everything below imports torch, and neither `lowmem-aim --help` nor a refusal may.
    own(folder)
    from lowmem_aim.demo.report import show, show_models
    from lowmem_aim.demo.settings import QUICK, Settings

    if only_models:
        show_models(folder, QUICK, echo, program)
    else:
        show(folder, Settings(), echo, program)
