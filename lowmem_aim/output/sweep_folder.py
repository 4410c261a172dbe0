"""The folder of a sweep: recipes, merged models, scores and the report, and what a killed sweep resumes from.

OUT/recipes/NAME.yml    the recipe of each point
OUT/models/NAME/        merged models: those that are being scored, and those that are kept
OUT/experts/NAME.json   scores of the experts
OUT/scores/NAME.json    scores of the points
OUT/report/             the comparison of all
OUT/adds-most.yml       recommended recipes
OUT/loses-least.yml
OUT/search.jsonl        trials of a search, as optuna keeps them
OUT/sampler.json        what suggests them: name, settings, seed
OUT/.lowmem_aim/        journal, locks and log of the sweep
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, UsageError, printable
from lowmem_aim.models.config import CONFIG
from lowmem_aim.output.folder import PRIVATE, check_private, check_writable, existing_folder
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import PROGRESS, SweepSize, SweptPoint
from lowmem_aim.output.requests import only_new_requests
from lowmem_aim.system.files import disk_errors, is_folder, sync_folder, write_file
from lowmem_aim.system.lock import is_held, locked, locked_error

RECIPES, MODELS, EXPERTS, SCORES, REPORT = "recipes", "models", "experts", "scores", "report"
ADDS_MOST, LOSES_LEAST = "adds-most", "loses-least"  # the recommended recipes
TRIALS, SAMPLER = "search.jsonl", "sampler.json"
_FOLDERS = (RECIPES, MODELS, EXPERTS, SCORES)
_LOCK = ".lock"


@dataclass
class SweepFolder:
    """The folder of a sweep while a run holds it, or has a part in it."""

    out: Path
    journal: Journal

    @property
    def private(self) -> Path:
        """The folder of journal, lock and log."""
        return self.out / PRIVATE

    @property
    def models(self) -> Path:
        """The folder of merged models."""
        return self.out / MODELS

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.out / REPORT

    def scores_of(self, name: str) -> Path:
        """The file with the scores of a point."""
        return self.out / SCORES / f"{name}.json"

    def scores_of_expert(self, name: str) -> Path:
        """The file with the scores of an expert."""
        return self.out / EXPERTS / f"{name}.json"

    def lock_of(self, name: str) -> Path:
        """The file that a process locks while it makes a point, or scores an expert, or changes what all share."""
        return lock_in(self.out, name)

    def note(self, name: str, recipe: str) -> None:
        """Keep a point and its recipe. Raises DiskError."""
        write_file(self.out / RECIPES / f"{name}.yml", recipe.encode())
        self.journal.keep(SweptPoint(name, recipe), name)

    def noted(self) -> dict[str, str]:
        """The points that this and earlier runs have noted: name -> recipe. Raises DiskError."""
        return {point.name: point.recipe for point in self.journal.all_kept(SweptPoint)}

    def remove_model(self, name: str) -> None:
        """Remove a merged model, config.json first: what a kill leaves of it is no model. Raises DiskError."""
        folder = self.models / name
        with disk_errors(folder):
            (folder / CONFIG).unlink(missing_ok=True)
            if os.path.lexists(folder):
                shutil.rmtree(folder)

    def remove_report(self) -> None:
        """Remove the report and the recommended recipes, to be written anew. Raises DiskError."""
        with disk_errors(self.out):
            if is_folder(self.report):
                shutil.rmtree(self.report)
            for name in (ADDS_MOST, LOSES_LEAST):
                (self.out / f"{name}.yml").unlink(missing_ok=True)


def is_scored(out: Path, name: str) -> bool:
    """Whether the scores of a point are there."""
    return (out / SCORES / f"{name}.json").is_file()


def has_scores_of_expert(out: Path, name: str) -> bool:
    """Whether the scores of an expert are there."""
    return (out / EXPERTS / f"{name}.json").is_file()


def trial_name(number: int) -> str:
    """The name of the point of a search's trial."""
    return f"trial-{number:04}"


def scored_trials(out: Path) -> int:
    """The number of trials of a search whose scores are there."""
    names = (file.stem.removeprefix("trial-") for file in (out / SCORES).glob("trial-*.json"))
    return sum(name.isdecimal() for name in names)


def lock_in(out: Path, name: str) -> Path:
    """The same as `lock_of`, for a process that does not hold the folder."""
    return out / PRIVATE / f"{name}{_LOCK}"


def check_sweep_folder(out: Path) -> None:
    """Raise UsageError if `out` is a file, or holds anything but a sweep of this tool's own files and folders.

    Raises DiskError if it cannot be written.
    """
    shown = printable(str(out))
    with disk_errors(out):
        if os.path.lexists(out) and not is_folder(out):
            raise UsageError(f"the output `{shown}` is a file", hint="name a new folder")
        check_private(out)
        held = {entry.name for entry in out.iterdir()} if is_folder(out) else set()
        if held and (PRIVATE not in held or CONFIG in held or any((out / PRIVATE).glob("sha256.txt"))):
            what = "a merged model" if CONFIG in held else f"`{printable(min(held - {PRIVATE}, default=PRIVATE))}`"
            raise UsageError(f"the output folder `{shown}` holds {what}, and no sweep", hint="name a new folder")
        if strange := [f"`{printable(str(path))}` is no {kind} of a sweep's own" for path, kind in _strange(out)]:
            raise UsageError(strange, hint="remove it, or name a new folder: links and pipes are not followed")
    check_writable(existing_folder(out))


def _strange(out: Path) -> Iterator[tuple[Path, str]]:
    """Yield links, pipes and the like that stand in the place of a sweep's own, and what belongs there."""
    for name in (*_FOLDERS, REPORT):
        if _is_other(out / name, stat.S_IFDIR):
            yield out / name, "folder"
    for model in sorted((out / MODELS).glob("*")):
        if model.is_symlink():
            yield model, "folder"
    own = (out / name for name in (f"{ADDS_MOST}.yml", f"{LOSES_LEAST}.yml", TRIALS, SAMPLER))
    listed = (
        path for place in (f"{RECIPES}/*.yml", f"{EXPERTS}/*.json", f"{SCORES}/*.json") for path in out.glob(place)
    )
    for file in (*own, *sorted(listed)):
        if _is_other(file, stat.S_IFREG):
            yield file, "file"


def _is_other(path: Path, kind: int) -> bool:
    """Whether anything but this kind of file lies there; what another worker has just removed is nothing."""
    try:
        return stat.S_IFMT(path.lstat().st_mode) != kind
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def sweep_folder(out: Path, *, fresh: bool = False) -> Iterator[SweepFolder]:
    """Make the folder of a sweep if need be, and hold it against other runs during this block.

    `fresh` discards what earlier sweeps have left there. Of a run that ends without having kept anything, nothing is
    left. Raises DiskError, LockedError, UsageError.
    """
    check_sweep_folder(out)
    private = out / PRIVATE
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    with disk_errors(out):
        private.mkdir(parents=True, exist_ok=True)
        for folder in (private, *made):
            sync_folder(folder.parent)
    with locked(private / "lock"), only_new_requests(private), _nothing_left_of_nothing(out, made):
        if fresh:
            _discard(out)
        with disk_errors(out):
            for name in _FOLDERS:
                (out / name).mkdir(exist_ok=True)
        with Journal(private) as journal:
            yield SweepFolder(out, journal)


@contextlib.contextmanager
def shared_sweep_folder(out: Path) -> Iterator[SweepFolder]:
    """Have a part in the sweep of another run that holds `out`, or has held it; see `has_begun`. Raises DiskError.

    Whoever uses the journal or changes what all share must hold a lock for that moment.
    """
    check_private(out)
    with Journal(out / PRIVATE) as journal:
        yield SweepFolder(out, journal)


def has_begun(out: Path) -> bool:
    """Whether the run that holds `out`, or has held it, has agreed on what the sweep is. Raises DiskError."""
    if not is_folder(out / PRIVATE):
        return False
    with Journal(out / PRIVATE, read_only=True) as journal:
        return journal.holds(SweepSize)


@contextlib.contextmanager
def _nothing_left_of_nothing(out: Path, made: Sequence[Path]) -> Iterator[None]:
    """Remove what a sweep has made at the end of the block, the folders `made` too, unless a run can build on it."""
    try:
        yield
    finally:
        with contextlib.suppress(LowmemAimError), Journal(out / PRIVATE, read_only=True) as journal:
            if not journal.holds(*PROGRESS):
                _discard(out)
                shutil.rmtree(out / PRIVATE, ignore_errors=True)
                for folder in made:
                    with contextlib.suppress(OSError):  # something else is in it
                        folder.rmdir()


def _discard(out: Path) -> None:
    """Remove all that sweeps have made in `out`, but for the locks and the log.

    Raises LockedError if a process is at work there that has only a part in the sweep.
    """
    held = [lock for lock in (out / PRIVATE).glob(f"*{_LOCK}") if is_held(lock)]
    if held:
        raise locked_error(held[0], None)
    with disk_errors(out):
        for name in (*_FOLDERS, REPORT):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (f"{ADDS_MOST}.yml", f"{LOSES_LEAST}.yml", TRIALS, SAMPLER):
            (out / name).unlink(missing_ok=True)
        Journal.remove(out / PRIVATE)
