"""The data that tasks need, downloaded, so that they can be evaluated without a network."""

from __future__ import annotations

from dataclasses import replace

from lowmem_aim.errors import LowmemAimError, NetworkError, noted, raise_all
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.task_data import data_sets, fetched, fetched_punkt, is_offline, not_here
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, silent


def fetch(asked: Asked, emit: Emit = silent) -> None:
    """Download the data of the tasks that are asked for, and tell of each data set. No model is needed.

    Raises UsageError, and NetworkError for all data sets that did not come, or that are of no use without a network.
    """
    raise_all([*tasks.missing_harness(), *tasks.wrong_requests(asked)])
    tasks.quiet()
    if is_offline():
        raise NetworkError("nothing can be fetched: HF_HUB_OFFLINE, or HF_DATASETS_OFFLINE, is set", hint="unset it")
    asked = replace(asked, allow_execution=True)  # no program is run where nothing is scored
    found = tasks.found(asked)
    needed, errors = data_sets(found.entries), list[LowmemAimError]()
    emit(PhaseStarted("fetch", len(needed), "data sets"))
    for number, data in enumerate(needed, start=1):
        with noted(errors):
            emit(Notice(fetched(data)))
        emit(Advanced(number, data.place))
    with noted(errors):
        for text in fetched_punkt(found.entries):
            emit(Notice(text))
    raise_all(errors)
    emit(PhaseEnded("fetch"))
    tasks.loaded(asked, found)  # and with it whatever the code of the tasks fetches
    raise_all(
        [
            NetworkError(f"{name} is downloaded, but `datasets` loads it with a network alone", hint="stay online")
            for name in not_here(needed)
        ]
    )
