"""The trials of a search, in a file of optuna's in the sweep's folder: a line of JSON for each step.

    study.begin(choose) -> Trial           chosen by optuna's sampler, and written in one line
    study.tell(number, values)             what it has scored

Whoever opens a study holds the lock that all workers share, as long as it is used: two workers never begin the same
trial. A trial is begun with all that it has chosen in one line, and what a killed worker has written of a line is cut
off, so that no trial is ever there by half. No pickle is read: optuna's journals in files are JSON, and nothing else of
the folder is opened.

The sampler of a trial is seeded by the study's seed and the trial's number. So what a trial chooses depends on the
trials before it, and not on the worker that asks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lowmem_aim.errors import DiskError, ResumeError, UsageError
from lowmem_aim.jobs.differences import differences
from lowmem_aim.output.sweep_folder import SAMPLER, TRIALS
from lowmem_aim.recipe.search_space import Suggests
from lowmem_aim.system.faults import named
from lowmem_aim.system.files import disk_errors, is_there, open_regular, read_file, write_file

NAME, SETTINGS = "TPESampler", {"multivariate": True, "group": True, "constant_liar": True, "n_startup_trials": 10}
_STUDY = "search"
_REPEATS = "repeats"  # the attribute of a trial that chose what an earlier one had chosen: that one's number


def missing_optuna() -> Iterator[UsageError]:
    """Yield an error if optuna is not installed. Nothing is imported."""
    if importlib.util.find_spec("optuna") is None:
        yield UsageError("`sweep --search` needs optuna, which is not installed", "`pip install 'lowmem-aim[search]'`")


def sampler_facts(seed: int, objectives: Sequence[str]) -> dict[str, Any]:
    """The content of sampler.json: what suggests the trials of a search, and by what they are judged."""
    return {"name": NAME, "settings": SETTINGS, "seed": seed, "objectives": list(objectives)}


def agree_on_sampler(out: Path, facts: dict[str, Any]) -> bool:
    """Write sampler.json, or check that the one which is there says the same; return whether it is new.

    Raises ResumeError, DiskError.
    """
    file = out / SAMPLER
    if not is_there(file):
        write_file(file, json.dumps(facts, indent=2).encode() + b"\n")
        return True
    with disk_errors(file):
        text = read_file(file, follow=False)
    try:
        before = json.loads(text)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ResumeError(f"{named(file)} is damaged", "`--fresh` starts over")
    if changed := differences(before, facts):
        hint = "`--fresh` starts over; to go on with this one, give the same flags as before"
        raise ResumeError(["the search in this folder has another sampler:", *changed], hint)
    return False


@dataclass(frozen=True)
class Trial:
    """A trial as the study knows it."""

    number: int
    is_finished: bool
    repeats: int | None  # the number of the earlier trial that chose the same
    suggests: Suggests  # what it has chosen, again


class Study:
    """The trials in the folder of a sweep. Raises DiskError if their file is damaged, or cannot be read or written."""

    def __init__(self, out: Path, minimised: Sequence[bool], seed: int) -> None:
        """`minimised`: of each objective, whether less is better."""
        self._file, self._seed = out / TRIALS, seed
        self._directions = ["minimize" if less else "maximize" for less in minimised]
        _cut_off(self._file)
        with self._errors():
            self._kept = _opened(self._file, self._directions)

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        with self._errors():
            return [_trial(trial) for trial in self._kept.get_trials(deepcopy=False)]

    def begin(self, choose: Callable[[Suggests], int | None]) -> Trial:
        """Begin a trial. `choose` asks for values, and gives the number of the earlier trial that chose the same."""
        import optuna

        with self._errors():
            earlier = self._kept.get_trials(deepcopy=False)
            seed = xxhash.xxh3_64_intdigest(f"{self._seed}\0{len(earlier)}".encode()) % 2**32
            sampler = optuna.samplers.TPESampler(seed=seed, **SETTINGS)
            study = optuna.create_study(directions=self._directions, sampler=sampler)  # in memory
            study.add_trials(earlier)
            trial = study.ask()
        repeats = choose(trial)
        if repeats is not None:
            trial.set_user_attr(_REPEATS, repeats)
        with self._errors():
            begun = study.get_trials(deepcopy=False)[-1]
            self._kept.add_trial(begun)
            return _trial(begun)

    def tell(self, number: int, values: Sequence[float]) -> None:
        """Note what a trial has scored, and with it those that repeat it."""
        import optuna

        failed = any(math.isnan(value) for value in values)
        with self._errors():
            for trial in self.trials():
                if number in (trial.number, trial.repeats) and not trial.is_finished:
                    state = optuna.trial.TrialState.FAIL if failed else None
                    self._kept.tell(trial.number, None if failed else list(values), state=state)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with disk_errors(self._file), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of optuna's, about what is experimental there
                yield
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            hint = "`--fresh` starts over; the scores in `scores/` are whole"
            raise DiskError(f"{named(self._file)} is damaged: {type(error).__name__}: {error}", hint) from error


class _Held:
    """A lock that locks nothing, for optuna: whoever opens a study holds the workers' lock already."""

    def acquire(self) -> bool:
        """Nothing to wait for."""
        return True

    def release(self) -> None:
        """Nothing to give back."""


def _opened(file: Path, directions: Sequence[str]) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=_Held()))
    if any(study.study_name == _STUDY for study in storage.get_all_studies()):  # else each opening would add a line
        return optuna.load_study(storage=storage, study_name=_STUDY)
    return optuna.create_study(storage=storage, study_name=_STUDY, directions=directions)


def _trial(trial: Any) -> Trial:
    return Trial(trial.number, trial.state.is_finished(), trial.user_attrs.get(_REPEATS), trial)


def _cut_off(file: Path) -> None:
    """Cut off the line that a killed worker has written in part. Raises DiskError for what is no regular file."""
    with disk_errors(file), os.fdopen(open_regular(file, os.O_RDWR | os.O_CREAT, follow=False), "r+b") as stream:
        text = stream.read()
        if whole := text.rfind(b"\n") + 1 - len(text):
            stream.truncate(len(text) + whole)
            os.fsync(stream.fileno())
