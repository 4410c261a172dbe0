"""Data that tasks need from elsewhere: whether they are on this machine, and how they come here.

Items come from the Hub, by the library `datasets`. IFEval splits sentences by `punkt_tab`, which comes from nltk.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_aim.errors import NetworkError, printable
from lowmem_aim.units import counted

PUNKT = "punkt_tab"
_SHOWN = 4  # configurations of one repository that an error names
_ELSEWHERE = ("hf://", "http://", "https://")


@dataclass(frozen=True)
class DataSet:
    """A data set of the Hub, as a task's file names it."""

    path: str  # `owner/name`, or a format such as `json` with files that lie elsewhere
    name: str | None  # of a configuration
    settings: Mapping[str, Any] = field(default_factory=dict)  # of datasets.load_dataset

    @property
    def place(self) -> str:
        """The name that users know the data set by."""
        files = self.settings.get("data_files")
        return self.path if "/" in self.path else next(_elsewhere(files), self.path)

    def load(self) -> Any:
        """All splits, downloaded first if need be. Raises whatever the library does."""
        import datasets

        return datasets.load_dataset(self.path, self.name, **self.settings)


def data_sets(entries: Sequence[Any]) -> list[DataSet]:
    """The data sets of the Hub that tasks name, each once; `entries` are the harness' own of these tasks.

    What a task's code loads in a way of its own is not seen.
    """
    found: dict[str, DataSet] = {}
    for entry in entries:
        table = entry.cfg or {}
        path, settings = table.get("dataset_path"), dict(table.get("dataset_kwargs") or {})
        settings.pop("trust_remote_code", None)  # the harness leaves it out, too
        if path and "custom_dataset" not in table and _is_elsewhere(str(path), settings):
            data = DataSet(str(path), table.get("dataset_name"), settings)
            found.setdefault(json.dumps([data.path, data.name, settings], sort_keys=True, default=repr), data)
    return list(found.values())


def _is_elsewhere(path: str, settings: Mapping[str, Any]) -> bool:
    """Whether a data set is on the Hub, or its files are anywhere but on this machine."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    if path in FORMATS:
        return any(_elsewhere(settings.get("data_files")))
    return path.startswith("hf://") or not (Path(path).is_absolute() or path.count("/") > 1 or Path(path).is_dir())


def _elsewhere(files: Any) -> Iterator[str]:
    """Yield the addresses among the files of a data set."""
    if isinstance(files, str):
        yield from [files] if files.startswith(_ELSEWHERE) else []
    elif isinstance(files, Mapping | list | tuple):
        for some in files.values() if isinstance(files, Mapping) else files:
            yield from _elsewhere(some)


def is_offline() -> bool:
    """Whether the user has told the Hub's libraries to ask no network (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)."""
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the Hub's libraries from asking the network in this block."""
    from datasets import config
    from huggingface_hub import HfFileSystem, constants

    HfFileSystem.clear_instance_cache()  # what it has listed with a network, another process will not know
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def missing(entries: Sequence[Any], hint: str) -> Iterator[NetworkError]:
    """Yield an error for each repository, and for nltk's data, that tasks need and that is not on this machine."""
    for name in not_here(data_sets(entries)):
        yield NetworkError(f"the data set {name} is not on this machine", hint)
    yield from missing_punkt(entries, hint)


def not_here(needed: Sequence[DataSet]) -> Iterator[str]:
    """Yield the names of data sets that cannot be loaded without a network, one for each repository."""
    places: dict[str, list[str]] = {}
    for data in needed:
        if not _is_here(data):
            places.setdefault(data.place, []).append(data.name or "")
    yield from (label(place, names) for place, names in places.items())


def _is_here(data: DataSet) -> bool:
    try:
        with _offline():
            data.load()
    except Exception:  # whatever the library raises: it says in many ways that it would need the network
        return False
    return True


def label(place: str, names: Sequence[str]) -> str:
    """A repository and its configurations, for people."""
    names = [printable(name) for name in names if name]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"`{printable(place)}`" + (f" ({', '.join(names[:_SHOWN])}{more})" if names else "")


def missing_punkt(entries: Sequence[Any], hint: str) -> Iterator[NetworkError]:
    """Yield an error if a task splits sentences by nltk's data, and these are not on this machine.

    Such a task asks for the data when it is loaded, and goes on without it until it scores the first answer.
    """
    if (name := _splits_sentences(entries)) and not _has_punkt():
        yield NetworkError(f"nltk's `{PUNKT}`, which the task `{printable(name)}` needs, is not on this machine", hint)


def _splits_sentences(entries: Sequence[Any]) -> str:
    """The first task that splits sentences by nltk's data; "" if there is none."""
    names = (entry.name for entry in entries if "ifeval" in str((entry.cfg or {}).get("process_results", "")))
    return str(next(names, ""))


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find(f"tokenizers/{PUNKT}")
    except LookupError:
        return False
    return True


def fetched(data: DataSet) -> str:
    """Download a data set; return what came, for people. Raises NetworkError."""
    named = label(data.place, [data.name or ""])
    try:
        splits = data.load()
    except Exception as error:  # whatever the library raises
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"the data set {named} cannot be fetched: {printable(said, 500)}",
            hint="check the network; a data set that is private or gated needs HF_TOKEN",
        ) from error
    parts = splits.items() if isinstance(splits, Mapping) else [("", splits)]
    return f"{named}: " + ", ".join(f"{counted(len(rows), 'item')} {split}".strip() for split, rows in parts)


def fetched_punkt(entries: Sequence[Any]) -> Iterator[str]:
    """Download nltk's data if a task needs them; yield what came, for people. Raises NetworkError."""
    if not _splits_sentences(entries):
        return
    if not _has_punkt():
        import nltk

        with contextlib.redirect_stdout(io.StringIO()):
            try:
                nltk.download(PUNKT, quiet=True, raise_on_error=True)
            except (OSError, ValueError) as error:
                raise NetworkError(
                    f"nltk's `{PUNKT}` cannot be fetched: {printable(str(error), 500)}", hint="check the network"
                ) from error
    yield f"nltk's `{PUNKT}`"
