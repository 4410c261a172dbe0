"""For programs of many merges, or that fork: models' small files are read in this process, not by a child for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem_aim.models import reader_program
from lowmem_aim.models.reader_process import ReaderProcess, answer_or_raise


class _Here:
    """What a `ReaderProcess` is to its reader."""

    def ask(self, question: Mapping[str, Any]) -> Any:
        # As a child's line: JSON has no numbers for keys.
        return answer_or_raise(json.loads(json.dumps(reader_program.answer(question))))

    def end(self) -> None:
        pass


def read_here() -> None:
    """From now on; the libraries are imported at once, so that forks have them."""
    reader_program.import_transformers()
    ReaderProcess.start = _Here  # type: ignore[assignment]
