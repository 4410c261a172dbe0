"""`lowmem-aim demo FOLDER`: a small base and three experts, trained here, then merged with and without AIM.

skills.py      questions and answers, generated; which of them are held out for the evaluation
settings.py    every number the training depends on, and the digest that says whether models can be reused
tokenizer.py   byte-level, one token a digit or letter
train.py       the base and the experts, in memory
models.py      the same as checkpoint folders: made whole or not at all, reused when the settings are the same
merges.py      recipes, and the command lines that a user would type
evaluate.py    exact-match accuracy of a checkpoint folder
report.py      the table, a few answers, and the commands to repeat
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def run(folder: Path, echo: Callable[[str], None]) -> None:
    """Make the models in `folder` or reuse them, merge, compare, print.

    Raises UsageError if `folder` holds anything that is not the demo's.
    """
    # Here and not above: everything below imports torch, and `lowmem-aim --help` must not.
    from lowmem_aim.demo.report import show
    from lowmem_aim.demo.settings import Settings

    show(folder, Settings(), echo)
