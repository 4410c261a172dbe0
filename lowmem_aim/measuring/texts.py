"""Calibration texts, from a file, from the package or from the Hub, as token sequences.

Texts are stripped, encoded with the tokenizer's own special tokens, joined, and cut into blocks, the remainder dropped;
with `pack: false`, each text is a sequence of its own, its tokens beyond block_size dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.errors import ModelError, NetworkError, UsageError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import BUILTIN, PILE, is_here
from lowmem_aim.system.files import input_errors, read_file
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_TOKENS = 16
_FORMS = 'a line of .jsonl is {"text": "..."}; in .txt, blank lines separate the texts'
AT_ONCE = 64  # texts of a dataset that are read ahead, to find those that are short enough


@dataclass(frozen=True)
class TextSettings:
    """The texts that are run through a model, and how they become sequences: what several tables of recipes say."""

    calibration: str  # a file, a dataset or `builtin`; "": the AIM authors' Pile set
    samples: int  # texts at most
    block_size: int  # tokens of a sequence at most
    pack: bool  # whether texts are joined, and cut into blocks
    dtype: str  # of the forward; "": the checkpoint's
    seed: int = 42  # of the order of a dataset

    @classmethod
    def of(cls, aim: Aim) -> TextSettings:
        """Return what the `aim:` table says of its texts."""
        return cls(aim.calibration, aim.samples, aim.block_size, aim.pack, aim.dtype, aim.seed)


Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> token ids of each


def token_sequences(settings: TextSettings, encode: Encode, emit: Emit) -> list[Tensor]:  # each (tokens,) int64
    """Return the sequences to run, each (tokens,) int64.

    Raises ModelError for a file that is missing, malformed or too short, NetworkError, UsageError.
    """
    encoded = [tokens for tokens in encode(_texts(settings, encode)) if tokens]
    if settings.pack:
        joined = [token for tokens in encoded for token in tokens]
        blocks = [joined[i : i + settings.block_size] for i in range(0, len(joined), settings.block_size)]
        if len(blocks) > 1 and len(blocks[-1]) < settings.block_size:
            blocks.pop()
    else:
        blocks = [tokens[: settings.block_size] for tokens in encoded]
    count = sum(map(len, blocks))
    source = printable(settings.calibration or PILE)
    if count < FEWEST_TOKENS:
        tokens = f"{count} token{'s' * (count != 1)}"
        raise ModelError(
            f"the calibration text `{source}` has only {tokens}; at least {FEWEST_TOKENS} are needed",
            hint=f"give more text; `{BUILTIN}` in its place takes the small set that comes with this tool",
        )
    if settings.pack and count < settings.block_size:
        emit(Notice(f"the calibration text `{source}` fills less than one block: {count} tokens in all", "warning"))
    return [torch.tensor(block, dtype=torch.int64) for block in blocks]


def _texts(settings: TextSettings, encode: Encode) -> list[str]:
    """Return at most `samples` texts, stripped, none of them empty."""
    calibration = settings.calibration or PILE
    path = Path(calibration).expanduser()
    if calibration == BUILTIN:
        lines = resources.files("lowmem_aim").joinpath("data", "calibration.jsonl").read_text(encoding="utf-8")
        found = _from_jsonl(lines, BUILTIN)
    elif is_here(calibration):
        found = _from_file(path)
    else:
        found = _from_hub(calibration, settings, encode)
    texts = (text.strip() for text in found)
    return [text for _, text in zip(range(settings.samples), filter(None, texts), strict=False)]


def _from_file(path: Path) -> Iterator[str]:
    shown = printable(str(path))
    if os.path.isdir(path):
        raise ModelError(f"the calibration text `{shown}` is a folder", hint="name a .jsonl or .txt file in it")
    if os.path.lexists(path) and path.suffix not in (".jsonl", ".txt"):
        raise UsageError(f"`{shown}`: a calibration file ends in .jsonl, .txt or .safetensors", _FORMS)
    try:
        with input_errors(path):
            content = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"the calibration file `{shown}` is not UTF-8 text", "save it as UTF-8") from error
    return _from_jsonl(content, shown) if path.suffix == ".jsonl" else _paragraphs(content)


def _paragraphs(content: str) -> Iterator[str]:
    paragraph: list[str] = []
    for line in [*content.splitlines(), ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def _from_jsonl(content: str, shown: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ModelError(f"{shown}:{number}: not a JSON object with a text under `text`", _FORMS)
        yield text


def _is_reached(dataset: str) -> bool:
    """Whether the Hub answers. Asked once, because the library retries for half a minute and writes to the terminal."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(dataset, timeout=10)
    except HfHubHTTPError:  # an answer: loading the set will say what is wrong
        return True
    except Exception:  # whatever the network layer raises
        return False
    return True


@contextlib.contextmanager
def _from_its_cache() -> Iterator[None]:
    """Hold the Hub's libraries offline, so that they use what they have downloaded before."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _from_hub(dataset: str, settings: TextSettings, encode: Encode) -> Iterator[str]:
    """Yield the texts of a Hub dataset in the AIM authors' order: shuffled by `seed`, too long ones skipped."""
    shown = printable(dataset)
    hint = "pass your own text file, or the small set of this tool: `file.jsonl|file.txt|builtin`"
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError:
        raise UsageError(
            f"the calibration dataset `{shown}` is on the Hub, which needs `pip install 'lowmem-aim[data]'`", hint
        ) from None
    reached = _is_reached(dataset)
    try:
        with contextlib.nullcontext() if reached else _from_its_cache():
            splits = get_dataset_split_names(dataset)
            split = next(name for name in ("validation", "test", "train", *splits) if name in splits)
            rows = load_dataset(dataset, split=split).shuffle(seed=settings.seed)
    except Exception as error:  # the library raises whatever its readers and its network layer do
        why = printable(str(error)) if reached else "the Hub cannot be reached, and nothing of it is in the cache"
        raise NetworkError(f"the calibration dataset `{shown}` cannot be loaded: {why}", hint) from error
    if "text" not in rows.column_names:
        raise ModelError(f"the calibration dataset `{shown}` has no column `text`", hint)
    texts = (row["text"].strip() for row in rows)
    while batch := list(islice(texts, AT_ONCE)):
        yield from (
            text for text, tokens in zip(batch, encode(batch), strict=True) if len(tokens) <= settings.block_size
        )
