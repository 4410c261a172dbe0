"""The scores of a model on tasks of lm-evaluation-harness, from its questions to a scores.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lowmem_aim.errors import LowmemAimError, UsageError, joined, noted, printable, raise_all
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.answers import FOLDER, Answers
from lowmem_aim.evaluating.code_scoring import require_processes
from lowmem_aim.evaluating.harness_settings import THINKING, THOUGHT
from lowmem_aim.evaluating.models import require_chat_template, to_evaluate, tokenizer_of
from lowmem_aim.evaluating.origin import digest_of_model, origin_of
from lowmem_aim.evaluating.replay import scored_apart
from lowmem_aim.evaluating.scores import Scores, write_scores
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.evaluating.unsafe_tasks import unsafe_names
from lowmem_aim.evaluating.writing_tasks import costs, too_long, writing_tasks
from lowmem_aim.events import Emit, Notice, Planned, silent
from lowmem_aim.jobs.identity import identity_on
from lowmem_aim.jobs.new_file import check_absent, check_new_file
from lowmem_aim.jobs.resume import agree, differing_weights
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import Located, locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.vetted import tokenizer_files
from lowmem_aim.output.folder import ANSWERS
from lowmem_aim.output.provenance import versions
from lowmem_aim.output.workspace import Workspace, workspace
from lowmem_aim.system.confinement import cannot_confine
from lowmem_aim.system.files import cache_folder, partial_folder, real
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import DEFAULTS, Options, wrong_options
from lowmem_aim.system.run import Run, start
from lowmem_aim.system.tensors import dtype_name
from lowmem_aim.view.feed import AnyFeed, reported

if TYPE_CHECKING:
    from lowmem_aim.models.meta_model import MetaModel

SPILL_BYTES = 10_000_000_000
Find = Callable[[str, Emit, bool], Located]


@dataclass(frozen=True)
class Forwards:
    """The way in which the model is run."""

    dtype: str | None = None  # None: as the model is stored
    max_length: int | None = None  # tokens that are read at a time; None: as many as the model allows
    spill: int = SPILL_BYTES  # bytes on disk for hidden states, and for snapshots of them
    batch_size: int = 1  # texts that the model writes at a time


def evaluate(
    model: str,
    asked: Asked,
    output: Path,
    forwards: Forwards | None = None,
    options: Options = DEFAULTS,
    emit: Emit = silent,
) -> Path:
    """Score a model on the tasks that are asked for, and write the scores to the new file `output`; return `output`.

    Until the file is there, what a killed run resumes from lies in the folder `output`.partial. Raises UsageError,
    ModelError, DiskError, MemoryBudgetError, LockedError, ResumeError, NetworkError.
    """
    with reported("evaluate", output, emit, options.command) as feed:
        score(model, asked, output, forwards or Forwards(), options, feed)
    return output


def score(
    model: str, asked: Asked, output: Path, forwards: Forwards, options: Options, feed: AnyFeed, name: str = ""
) -> None:
    """Do the work of `evaluate` within a run; `name`: what the scores call the model, in place of its own name."""
    with opened_to_score(model, asked, output, options, feed) as checkpoint:
        _evaluated(checkpoint, asked, output, forwards, options, feed, name)


def check(
    model: str,
    asked: Asked,
    loaded: Loaded,
    output: Path,
    forwards: Forwards,
    options: Options,
    find: Find = locate,
) -> str:
    """Raise what `score` would raise before work, as far as it is known without a run's folder; return the label."""
    with opened_to_score(model, asked, output, options, silent, find) as checkpoint:
        meta_model = to_evaluate(checkpoint, forwards.dtype, options.use_cache)
        run = start(options, silent)
        _check_running(loaded, run)
        _check_writing(checkpoint, meta_model, tokenizer_of(checkpoint), loaded, asked, forwards, run)
        return checkpoint.label


def _evaluated(
    checkpoint: Checkpoint,
    asked: Asked,
    output: Path,
    forwards: Forwards,
    options: Options,
    feed: AnyFeed,
    name: str,
) -> None:
    tasks.quiet()
    run = start(options, feed)
    for text in tasks.better(asked):
        run.emit(Notice(text))
    meta_model = to_evaluate(checkpoint, forwards.dtype, options.use_cache)
    tokenizer = tokenizer_of(checkpoint)
    if asked.chat_template:
        require_chat_template(checkpoint, tokenizer)
    loaded = tasks.loaded(asked)
    _check_running(loaded, run)
    _check_writing(checkpoint, meta_model, tokenizer, loaded, asked, forwards, run)
    digest = digest_of_model(checkpoint, run.emit)
    with workspace(partial_folder(output), fresh=options.fresh) as space:
        _agreed(space, checkpoint, asked, forwards, digest, run)
        feed.record_in([space.private])
        run.emit(_planned(asked, meta_model, run))
        key = _key(digest, checkpoint, meta_model, forwards)
        file = cache_folder() / FOLDER / f"{key}.sqlite" if options.use_cache else space.private / ANSWERS
        with Answers(file) as known:
            scores = _scores(checkpoint, meta_model, tokenizer, loaded, asked, forwards, known, space, run)
        check_absent(output)  # again: another run may have made the file meanwhile
        found = scores_of(checkpoint, digest, scores, asked, forwards)
        write_scores(output, replace(found, name=name or found.name))
        space.spent = True


def _scores(
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    tokenizer: Any,
    loaded: Loaded,
    asked: Asked,
    forwards: Forwards,
    known: Answers,
    space: Workspace,
    run: Run,
) -> Any:
    from lowmem_aim.evaluating.generation import WritingModel
    from lowmem_aim.evaluating.harness import scored
    from lowmem_aim.evaluating.language_model import AskedModel
    from lowmem_aim.evaluating.likelihoods import BlockwiseModel

    blockwise = BlockwiseModel(checkpoint, meta_model, run, space, forwards.spill)
    length, thought = forwards.max_length, asked.settings.get(THOUGHT)
    writing = WritingModel(
        checkpoint, meta_model, tokenizer, run, space, length, forwards.batch_size, asked.seed, thought
    )
    ask, write = partial(blockwise.answers, known=known), partial(writing.texts, known=known)
    template = {key: value for key, value in asked.settings.items() if key == THINKING}
    model = AskedModel(meta_model.model.config, tokenizer, ask, write, length, template)
    apart = unsafe_names(loaded.names, loaded.tasks)
    scores = scored(model, loaded, asked, apart)
    if apart:
        run.emit(Notice(f"what the model has written is run: {_listed(apart)}"))
        scores |= scored_apart(apart, loaded, asked)
    return {name: scores[name] for name in loaded.names}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{printable(name)}`" for name in names)


def _check_writing(
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    tokenizer: Any,
    loaded: Loaded,
    asked: Asked,
    forwards: Forwards,
    run: Run,
) -> None:
    """Say what the tasks cost that let the model write. Raises ModelError, UsageError if it cannot."""
    from lm_eval.models.utils import resolve_max_length

    from lowmem_aim.evaluating.whole_model import cannot_write, generation_config, room_of

    writes = writing_tasks(loaded, asked)
    if not writes:
        return
    length = forwards.max_length or resolve_max_length(meta_model.model.config, tokenizer)
    errors: list[LowmemAimError] = [*cannot_write(checkpoint), *too_long(writes, length)]
    with noted(errors):
        generation_config(checkpoint)
    raise_all(errors)
    room = sum(room_of(run.budget, torch.device(run.device)).values())
    weights = checkpoint.numel * meta_model.dtype.itemsize
    run.emit(Notice(costs(writes, checkpoint.nbytes, weights, room, forwards.batch_size)))


def _check_running(loaded: Loaded, run: Run) -> None:
    """Say what the programs that the model writes can do here. Raises UsageError if they cannot be run."""
    if not unsafe_names(loaded.names, loaded.tasks):
        return
    for what, why in (("use the network", require_processes()), ("read and change your files", cannot_confine())):
        if why:
            run.emit(Notice(f"programs that the model writes can {what} here: {why}", "warning"))


def scores_of(checkpoint: Checkpoint, digest: str, scores: Any, asked: Asked, forwards: Forwards) -> Scores:
    """The content of scores.json: the model, its origin and its scores."""
    origin = {"parent": None} | origin_of(checkpoint)
    return Scores(
        name=checkpoint.label,
        model=str(checkpoint.folder),
        digest=digest,
        scores=scores,
        versions=versions() | {"lm-eval": tasks.version()},
        settings={
            "seed": asked.seed,
            "limit": asked.limit,
            "num_fewshot": asked.num_fewshot,
            "chat_template": asked.chat_template,
            "settings": {**asked.settings, **({"max_length": forwards.max_length} if forwards.max_length else {})},
        },
        **origin,
    )


# --- before work ------------------------------------------------------------------------------------------------------


@contextmanager
def opened_to_score(
    model: str, asked: Asked, output: Path, options: Options, emit: Emit, find: Find = locate
) -> Iterator[Checkpoint]:
    """Open the model once all that can be checked without torch is right. Raises every error that there is.

    `find` gives the folder of a model, or of an adapter.
    """
    errors: list[LowmemAimError] = []
    with noted(errors):
        if problems := list(wrong_options(options)):
            raise UsageError(problems, hint="docs/python.md has the options")
    with noted(errors):
        check_new_file(output, ".json", "scores.json")
    errors += [*tasks.missing_harness(), *tasks.wrong_requests(asked)]
    with noted(errors), Reader(options.use_cache) as reader:
        checkpoint = opened(model, lambda part, is_adapter: find(part, emit, is_adapter), options.read, reader)
        try:
            if set(map(real, checkpoint.place)) & set(real(output).parents):
                raise UsageError(
                    f"the output `{printable(str(output))}` lies inside the model", "name a file elsewhere"
                )
            if not errors:
                for notice in checkpoint.oddities:
                    emit(notice)
                yield checkpoint
                return
        finally:
            checkpoint.close()
    raise joined(errors)


def _agreed(space: Workspace, checkpoint: Checkpoint, asked: Asked, forwards: Forwards, digest: str, run: Run) -> None:
    """Record what this run is, or check that the interrupted one was the same. Raises ResumeError."""
    what = {**asdict(asked), "folders": [str(folder) for folder in asked.folders]}
    job = {"tasks": what, "model": digest, "dtype": forwards.dtype, "max_length": forwards.max_length}
    reread = partial(differing_weights, checkpoint, space.journal)
    identity = identity_on(job, checkpoint, run.device)
    agree(space.journal, identity, reread, accept_environment=run.options.accept_environment, emit=run.emit)


def _planned(asked: Asked, meta_model: MetaModel, run: Run) -> Planned:
    title = ", ".join(asked.names)
    layers = {str(number): 1 for number in range(len(meta_model.blocks))}
    ram, vram = run.budget.ram, run.budget.vram
    return Planned(title, ("evaluate",), str(run.device), torch.get_num_threads(), ram, vram, layers=layers)


def _key(digest: str, checkpoint: Checkpoint, meta_model: MetaModel, forwards: Forwards) -> str:
    """The name of the file with the answers of a model: all that they follow from. 32 hex digits."""
    files = sorted((name, xxhash.xxh3_128_hexdigest(content)) for name, content in tokenizer_files(checkpoint).items())
    facts = (digest, sorted(checkpoint.config.items()), files, dtype_name(meta_model.dtype), forwards.max_length)
    return xxhash.xxh3_128_hexdigest(repr((*facts, tasks.version(), versions())).encode("utf-8", "surrogatepass"))
