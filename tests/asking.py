"""Questions for a language model as lm-evaluation-harness asks them, and its own HFLM's answers beside ours."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lowmem_aim.evaluating.answers import Answers
from lowmem_aim.evaluating.generation import Request, WritingModel
from lowmem_aim.evaluating.language_model import AskedModel
from lowmem_aim.evaluating.likelihoods import BlockwiseModel
from lowmem_aim.evaluating.models import to_evaluate, tokenizer_of
from lowmem_aim.events import Emit, silent
from lowmem_aim.models.opening import open_model
from lowmem_aim.output.workspace import workspace
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.system.run import start

SPILL = 10**9


def choices(count: int, seed: int = 0) -> list[Instance]:
    """Contexts of uneven lengths (an empty one, some longer than a model's) with up to four continuations each."""
    rng, found = random.Random(seed), list[Instance]()
    while len(found) < count:
        context = _text(rng, rng.choice((0, 3, 17, 40, 90, 150)))
        letters = rng.random() < 0.4
        for place in range(4):
            answer = " " + "ABCD"[place] if letters else _text(rng, rng.randint(2, 30))
            found.append(Instance("loglikelihood", {}, (context, answer), len(found)))
    return found[:count]


def endings(count: int, context: int = 60, choices: int = 4, seed: int = 2) -> list[Instance]:
    """Contexts of so many tokens with several endings each, of 2 to 15 tokens."""
    rng, found = random.Random(seed), list[Instance]()
    for _ in range(count):
        asked = _text(rng, context)
        found += [Instance("loglikelihood", {}, (asked, _text(rng, rng.randint(2, 15))), n) for n in range(choices)]
    return found


def texts(count: int, seed: int = 1) -> list[Instance]:
    """Texts to read whole: some shorter than a model's length, some several times as long."""
    rng = random.Random(seed)
    lengths = [1, 30, 128, 129, 300, *(rng.randint(2, 200) for _ in range(count))]
    return [Instance("loglikelihood_rolling", {}, (_text(rng, n),), place) for place, n in enumerate(lengths[:count])]


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase + "  ", k=length))


def harness(folder: Path, **changes: Any) -> HFLM:
    """The harness' own language model, float32 on the CPU, one text at a time."""
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, **changes)


def ours(
    folder: Path,
    work: Path,
    requests: dict[str, Sequence[Instance]],
    *,
    options: Options = DEFAULTS,
    spill: int = SPILL,
    max_length: int | None = None,
    emit: Emit = silent,
) -> dict[str, list[Any]]:
    """Our answers to requests, by their kind; what they leave to resume from is in the folder `work`."""
    with (
        open_model(folder, "model") as checkpoint,
        workspace(work) as space,
        Answers(work.with_suffix(".sqlite")) as known,
    ):
        meta_model = to_evaluate(checkpoint, "float32")
        model = BlockwiseModel(
            checkpoint,
            meta_model,
            start(options, emit),
            space,
            spill,
        )
        asked = AskedModel(
            meta_model.model.config, tokenizer_of(checkpoint), lambda q: model.answers(q, known), max_length=max_length
        )
        return {kind: getattr(asked, kind)(some) for kind, some in requests.items()}


def written(
    folder: Path,
    work: Path,
    requests: Sequence[Request],
    *,
    batch: int = 1,
    options: Options = DEFAULTS,
    emit: Emit = silent,
    thought: str | None = None,
) -> list[str]:
    """The texts that our model writes; what it leaves to resume from is in the folder `work`, and `work`.sqlite."""
    with (
        open_model(folder, "model") as checkpoint,
        workspace(work) as space,
        Answers(work.with_suffix(".sqlite")) as known,
    ):
        meta_model, tokenizer = to_evaluate(checkpoint, "float32"), tokenizer_of(checkpoint)
        run = start(options, emit)
        return WritingModel(checkpoint, meta_model, tokenizer, run, space, None, batch, 0, thought).texts(
            requests, known
        )


def compared(
    folder: Path,
    work: Path,
    requests: dict[str, Sequence[Instance]],
    *,
    max_length: int | None = None,
    emit: Emit = silent,
) -> float:
    """The largest relative difference between our log-likelihoods and HFLM's; greedy tokens must be the same."""
    found = ours(folder, work, requests, max_length=max_length, emit=emit)
    model, worst = harness(folder, max_length=max_length), 0.0
    for kind, some in requests.items():
        expected = getattr(model, kind)(some, disable_tqdm=True)
        if kind == "loglikelihood":
            assert [greedy for _, greedy in found[kind]] == [greedy for _, greedy in expected]
            pairs = [(a, b) for (a, _), (b, _) in zip(found[kind], expected, strict=True)]
        else:
            pairs = list(zip(found[kind], expected, strict=True))
        assert len(pairs) == len(some)
        worst = max(worst, *(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs))
    return worst


def logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """The logits of a model on one text, float64, (tokens, vocabulary): by transformers, whole in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].double()
