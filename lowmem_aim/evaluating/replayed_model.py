"""A model of the harness that gives answers which were given before, to the same requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from lowmem_aim.evaluating.replay import digest_of


class ReplayedModel(LM):  # type: ignore[misc]
    """The answers of a model, by tasks: (number of the item, number of its request, digest of the item, answers)."""

    def __init__(self, answers: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self._left: dict[Any, tuple[str, Iterator[Any]]] = {
            (task, item, request): (digest, iter(given))
            for task, some in answers.items()
            for item, request, digest, given in some
        }

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding would give) of each continuation."""
        return [(float(value), bool(greedy)) for value, greedy in map(self._given, requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in nats."""
        return [float(self._given(request)) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model has written after each context."""
        return [str(self._given(request)) for request in requests]

    def _given(self, request: Any) -> Any:
        """The next answer to a request. Raises ValueError for one that was not asked, or of another item."""
        digest, answers = self._left.get((request.task_name, request.doc_id, request.idx), ("", iter(())))
        if digest != digest_of(request.doc):
            raise ValueError(f"item {request.doc_id} of {request.task_name} is not the one that the model has answered")
        return next(answers)
