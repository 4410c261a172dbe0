"""The new file that a job writes, checked before work: its name, its folder, and that nothing is there."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.output.folder import check_output, check_writable
from lowmem_aim.system.files import partial_folder


def check_new_file(output: Path, suffix: str, usual: str) -> None:
    """Check that `output` is a new file that can be written. Raises UsageError, DiskError.

    `usual`: the name that is proposed if `output` has none.
    """
    if output.suffix != suffix:
        named = output.with_suffix(suffix) if output.name else output / usual
        raise UsageError(
            f"the output `{printable(str(output))}` must end in {suffix}", f"name it `{printable(str(named))}`"
        )
    check_absent(output)
    folder = output.absolute().parent
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder `{printable(str(folder))}`", "make that folder first")
    check_writable(folder)
    check_output(partial_folder(output), [])


def check_absent(output: Path) -> None:
    """Raise UsageError if there is anything at `output`."""
    if not os.path.lexists(output):
        return
    hint = "name a new file, or remove that one"
    if os.path.lexists(unfinished := partial_folder(output)):
        hint += f"; `{printable(str(unfinished))}` is left over from an interrupted run"
    raise UsageError(f"`{printable(str(output))}` exists already", hint=hint)
