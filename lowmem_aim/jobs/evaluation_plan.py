"""The cost of scoring a model, found without that: requests are counted, and one block is run on a few of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.harness_settings import THINKING
from lowmem_aim.evaluating.models import to_evaluate, tokenizer_of
from lowmem_aim.evaluating.questions import Answer, Question, readings_of
from lowmem_aim.evaluating.tasks import WRITES, Asked, Loaded
from lowmem_aim.evaluating.writing_tasks import writing_tasks
from lowmem_aim.events import silent
from lowmem_aim.jobs.evaluate import Find, Forwards, opened_to_score
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import locate
from lowmem_aim.system.options import Options
from lowmem_aim.system.run import start

if TYPE_CHECKING:
    from lowmem_aim.evaluating.outlook import Outlook
    from lowmem_aim.evaluating.writing_outlook import WritingOutlook
    from lowmem_aim.models.meta_model import MetaModel


@dataclass(frozen=True)
class EvaluationPlan:
    """The cost of scoring one model on all tasks."""

    model: str  # of which the time was measured
    setup: float  # seconds before the model is run: it is opened, the items are loaded and turned into tokens
    likelihoods: Sequence[Outlook]  # for each kind of them
    writing: WritingOutlook | None

    @property
    def seconds(self) -> float | None:
        """Seconds without what the model writes; None: unknown."""
        each = [outlook.seconds for outlook in self.likelihoods]
        return None if None in each else self.setup + sum(seconds or 0.0 for seconds in each)

    @property
    def writing_seconds(self) -> float | None:
        """The most seconds in which the model writes; None: unknown."""
        return 0.0 if self.writing is None else self.writing.seconds

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**asdict(self), "seconds": self.seconds, "writing_seconds": self.writing_seconds}


def plan_evaluation(
    model: str, asked: Asked, forwards: Forwards, options: Options, unused: Path, find: Find = locate
) -> EvaluationPlan:
    """The cost of `evaluate` with the same arguments, as if nothing were known from earlier runs.

    `unused`: a path that nothing has; `find` gives the folder of a model. Raises the errors of `evaluate` before work.
    """
    begun = time.perf_counter()
    tasks.quiet()
    with opened_to_score(model, asked, unused, options, silent, find) as checkpoint:
        return _planned(checkpoint, asked, forwards, options, begun)


def _planned(
    checkpoint: Checkpoint, asked: Asked, forwards: Forwards, options: Options, begun: float
) -> EvaluationPlan:
    from lowmem_aim.evaluating.outlook import outlook_of
    from lowmem_aim.evaluating.rounds import in_rounds
    from lowmem_aim.evaluating.writing_outlook import writing_outlook

    run, loaded = start(options, silent), tasks.loaded(asked)
    meta_model, tokenizer = to_evaluate(checkpoint, forwards.dtype, options.use_cache), tokenizer_of(checkpoint)
    kinds, contexts = _asked(meta_model, tokenizer, loaded, asked, forwards)
    setup, outlooks = time.perf_counter() - begun, []
    for questions in kinds:
        readings = readings_of(questions, range(len(questions)))
        rounds = in_rounds(readings, set(range(len(readings))), meta_model, forwards.spill)
        outlooks.append(outlook_of(rounds, questions, set(range(len(questions))), checkpoint, meta_model, run))
    writes, batch = writing_tasks(loaded, asked), forwards.batch_size
    writing = writing_outlook(contexts, writes, batch, tokenizer, checkpoint, meta_model, run) if contexts else None
    return EvaluationPlan(checkpoint.label, setup, outlooks, writing)


def _asked(
    meta_model: MetaModel, tokenizer: Any, loaded: Loaded, asked: Asked, forwards: Forwards
) -> tuple[list[Sequence[Question]], list[str]]:
    """(the questions of each kind of log-likelihoods, the texts that the model is to continue)."""
    from lowmem_aim.evaluating.harness import requests_of
    from lowmem_aim.evaluating.language_model import AskedModel

    kinds = list[Sequence[Question]]()

    def collect(questions: Sequence[Question]) -> list[Answer]:
        kinds.append(questions)
        return [Answer(0.0, False)] * len(questions)

    template = {key: value for key, value in asked.settings.items() if key == THINKING}
    model = AskedModel(meta_model.model.config, tokenizer, collect, None, forwards.max_length, template)
    requests = requests_of(model, loaded, asked)
    contexts = [request.args[0] for request in requests.pop(WRITES, [])]
    for kind, some in requests.items():
        getattr(model, kind)(some)
    return kinds, contexts
