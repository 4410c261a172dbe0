"""Texts that a model writes, by the harness' own code, kept batch by batch.

Only what greedy decoding gives is kept: a text that is drawn at random is another one each time.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from lowmem_aim.evaluating.answers import Answers
from lowmem_aim.evaluating.whole_model import WholeModel, generation_config, loaded_whole, room_of
from lowmem_aim.events import Advanced, PhaseEnded, PhaseStarted
from lowmem_aim.measuring.mean_activations import allocations_as_budget_errors
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.records import KeptAnswers
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.system.memory import trim
from lowmem_aim.system.run import Run

OFFLOAD = "offload"  # of the staging folder: weights that loaders change and that do not fit the memory

Request = tuple[str, Mapping[str, Any]]  # a context, and how it is to be continued: the harness' `generation_kwargs`


@dataclass(frozen=True)
class WritingModel:
    """A model that continues texts, for one evaluation. It is loaded when there is something to write."""

    checkpoint: Checkpoint
    meta_model: MetaModel  # in the dtype in which it is to be loaded
    tokenizer: Any
    run: Run
    space: Workspace
    max_length: int | None  # tokens that are read and written together; None: as many as the model allows
    batch: int  # texts that are written at a time
    seed: int  # of texts that are drawn at random
    thought: str | int | None = None  # what thoughts end with, a text or a token: only what follows is an answer

    def texts(self, requests: Sequence[Request], known: Answers) -> list[str]:
        """The text that the model writes after each context; what is not `known` is written now, and kept there.

        Raises ModelError, MemoryBudgetError, DiskError.
        """
        facts = [generation_config(self.checkpoint), self.batch, *([] if self.thought is None else [self.thought])]
        base = json.dumps(facts, sort_keys=True)
        keys = [_key(base, request, number) for number, request in enumerate(requests)]
        times, found = Counter(keys), known.kept(keys)
        left = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        done = len(requests) - sum(times[key] for key in left)
        self.run.emit(PhaseStarted("evaluate", len(requests), "requests", done))
        for new in self._written(left):
            known.keep((key, text) for key, text in new.items() if _is_greedy(left[key]))
            found |= new
            done += sum(times[key] for key in new)
            self.space.journal.keep(KeptAnswers(done, len(requests)))
            self.run.emit(Advanced(done))
        gc.collect()  # the model: its modules and their hooks refer to each other
        trim()
        self.run.emit(PhaseEnded("evaluate"))
        return [str(found[key]) for key in keys]

    def _written(self, left: Mapping[str, Request]) -> Iterator[dict[str, str]]:
        """Yield texts by their keys, a batch at a time."""
        if not left:
            return
        with allocations_as_budget_errors(), self._loaded() as model:
            torch.manual_seed(self.seed)
            for some in _batches(left, self.batch):
                asked = [Instance("generate_until", {}, left[key], place) for place, key in enumerate(some)]
                yield dict(zip(some, model.generate_until(asked, disable_tqdm=True), strict=True))
            self.checkpoint.check_unchanged()

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[WholeModel]:
        device = torch.device(self.run.device)
        room, offload = room_of(self.run.budget, device), self.space.staging / OFFLOAD
        with loaded_whole(self.checkpoint, self.meta_model, room, offload) as model:
            yield WholeModel(model, self.tokenizer, device, self.batch, self.max_length, self.thought)


def _is_greedy(request: Request) -> bool:
    return not normalize_gen_kwargs(dict(request[1]))["do_sample"]


def _key(base: str, request: Request, number: int) -> str:
    """The request's name in a cache of answers, 32 hex digits; of a text that is drawn at random, its own number."""
    if not _is_greedy(request):
        return f"drawn {number}"
    context, settings = request
    facts = json.dumps(["write", base, context, _settings(settings)])
    return xxhash.xxh3_128_hexdigest(facts.encode("utf-8", "surrogatepass"))


def _settings(settings: Mapping[str, Any]) -> str:
    return json.dumps(normalize_gen_kwargs(dict(settings)), sort_keys=True, default=repr)


def _batches(left: Mapping[str, Request], size: int) -> Iterator[list[str]]:
    """Yield the keys of requests with the same settings, the longest contexts first: what does not fit fails early."""
    alike: dict[str, list[str]] = {}
    for key, (_, settings) in left.items():
        alike.setdefault(_settings(settings), []).append(key)
    for keys in alike.values():
        ordered = sorted(keys, key=lambda key: (-len(left[key][0]), left[key][0]))
        yield from (ordered[start : start + size] for start in range(0, len(ordered), size))
