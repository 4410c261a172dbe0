"""The model as the harness asks it: texts in, log-likelihoods or texts out.

What a request means (which tokens are read, which are scored, what stands before an empty context) is the harness' own
code, so that scores are those of its HFLM. Only the numbers come from elsewhere: from `ask`, all requests at once. So
do texts that the model writes, from `write`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM

from lowmem_aim.evaluating.questions import Answer, Question

Ask = Callable[[Sequence[Question]], Sequence[Answer]]
Write = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], list[str]]
_AT_ONCE = 1 << 30  # windows of a text that the harness passes on together: all


class AskedModel(HFLM):  # type: ignore[misc]
    """An HFLM without a model: its questions are collected, and asked together."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        ask: Ask,
        write: Write | None = None,
        max_length: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` and `tokenizer` are transformers' own; `max_length`: tokens that are read at a time.

        `write` gives a text for each context and the settings of its generation; None: no task lets the model write.
        `template`: further values that the tokenizer's chat template is filled in with.
        """
        from torch import device

        model = SimpleNamespace(config=config, device=device("cpu"), name_or_path="")
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=_AT_ONCE)
        self.chat_template_args = dict(template or {})
        self._ask, self._write, self._questions = ask, write, list[Question]()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding would give) of each continuation."""
        found = self._asked(requests, super().loglikelihood)
        return [(answer.log_likelihood, answer.greedy) for (answer,) in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in nats: the sum over the windows that it is read in."""
        return [
            sum(answer.log_likelihood for answer in answers)
            for answers in self._asked(requests, super().loglikelihood_rolling)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context."""
        if self._write is None:
            raise NotImplementedError("this model is asked for log-likelihoods alone")
        return self._write([request.args for request in requests])

    def _asked(self, requests: Sequence[Any], as_tokens: Callable[..., Any]) -> list[Sequence[Answer]]:
        """The answers to each request's questions, which are collected one request at a time, as few bytes each."""
        self._questions, counts = [], []
        for request in requests:
            before = len(self._questions)
            as_tokens([request], disable_tqdm=True)
            counts.append(len(self._questions) - before)
        answers = self._ask(self._questions)
        ends = [0, *itertools.accumulate(counts)]
        return [answers[begin:end] for begin, end in itertools.pairwise(ends)]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Collect the questions; what is returned stands in for the answers until all are there."""
        self._questions += [Question.of(context, scored, self.max_length) for _, context, scored in requests]
        return [(0.0, False)] * len(requests)
