"""Log-likelihoods block by block: the harness' own, within any budget, whatever the rounds, killed and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import asking
import pytest
import tiny
from calibrating import llama_forward
from long_cases import others_long
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from lowmem_aim.blocks.past import no_past
from lowmem_aim.errors import MemoryBudgetError, ModelError
from lowmem_aim.evaluating.pace import Pace
from lowmem_aim.evaluating.questions import Question, readings_of
from lowmem_aim.events import Advanced, Emit, Event, Notice, PhaseStarted, Worked
from lowmem_aim.measuring import recorded
from lowmem_aim.system.interrupts import Interrupted
from lowmem_aim.system.options import Options

KINDS = ("loglikelihood", "loglikelihood_rolling")
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "gpt_neox", "mixtral", "gemma2", "cohere2", "gpt2", "qwen2", "opt")
REQUESTS = dict(zip(KINDS, (asking.choices(60), asking.texts(6)), strict=True))
MANY = dict(zip(KINDS, (asking.choices(2000), asking.texts(60)), strict=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("architecture", others_long(ARCHITECTURES, ("llama", "gemma2", "gpt_neox", "mixtral")))
def test_log_likelihoods_are_the_harness_own(architecture: str, tmp_path: Path) -> None:
    folder = tiny.build(architecture, tmp_path / "model")
    assert asking.compared(folder, tmp_path / "work", REQUESTS) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_thousand_requests_get_the_harness_own_answers(architecture: str, tmp_path: Path) -> None:
    folder = tiny.build(architecture, tmp_path / "model")
    assert asking.compared(folder, tmp_path / "work", MANY) < 1e-4


def test_a_length_that_is_given_cuts_contexts_and_windows(llama: Path, tmp_path: Path) -> None:
    assert asking.compared(llama, tmp_path / "work", REQUESTS, max_length=33) < 1e-5


def test_rounds_and_budgets_change_no_answer(llama: Path, tmp_path: Path) -> None:
    whole = asking.ours(llama, tmp_path / "whole", REQUESTS)
    seen: list[Event] = []
    in_rounds = asking.ours(llama, tmp_path / "rounds", REQUESTS, spill=60_000, emit=seen.append)
    assert in_rounds == whole
    blocks = [event for event in seen if isinstance(event, Advanced)]
    assert len(blocks) > 4 * tiny.LAYERS
    least = _least(llama, tmp_path / "refused")
    assert asking.ours(llama, tmp_path / "small", REQUESTS, options=Options(ram=least)) == whole


def _least(folder: Path, work: Path) -> int:
    """The smallest budget in which the questions are answered, as the refusal of a smaller one gives it."""
    with pytest.raises(MemoryBudgetError) as refused:
        asking.ours(folder, work, REQUESTS, options=Options(ram=1_000_000))
    return refused.value.enough + 8_000_000  # what the tests themselves take meanwhile


def test_a_run_that_is_stopped_goes_on_where_it_was_and_gives_the_same(llama: Path, tmp_path: Path) -> None:
    whole = asking.ours(llama, tmp_path / "whole", REQUESTS)
    for place in (1, 5, 10):
        work = tmp_path / f"stopped-{place}"
        with pytest.raises(Interrupted):
            asking.ours(llama, work, REQUESTS, spill=60_000, emit=_stopping(place))
        seen: list[Event] = []
        assert asking.ours(llama, work, REQUESTS, spill=60_000, emit=seen.append) == whole
        begun = next(event.done for event in seen if isinstance(event, PhaseStarted))
        assert (begun > 0) == (place > tiny.LAYERS)  # a round was finished: its answers were kept
        resumed = [event.text for event in seen if isinstance(event, Notice) and event.text.startswith("resuming")]
        assert resumed == [f"resuming: {place % tiny.LAYERS}/{tiny.LAYERS} blocks are evaluated"]


def _stopping(blocks: int) -> Emit:
    left = [blocks]

    def emit(event: Event) -> None:
        if isinstance(event, Advanced):
            left[0] -= 1
        if not left[0] and isinstance(event, Worked):
            raise Interrupted

    return emit


def test_what_is_known_is_not_asked_again(llama: Path, tmp_path: Path) -> None:
    first = asking.ours(llama, tmp_path / "work", REQUESTS)
    seen: list[Event] = []
    assert asking.ours(llama, tmp_path / "work", REQUESTS, emit=seen.append) == first
    assert not any(isinstance(event, Worked) for event in seen)
    assert all(event.done == event.total for event in seen if isinstance(event, PhaseStarted))


def test_a_model_that_gives_no_numbers_is_an_error(llama: Path, tmp_path: Path) -> None:
    broken = tiny.perturbed(llama, tmp_path / "broken", scale=float("inf"))
    with pytest.raises(ModelError, match="cannot be scored"):
        asking.ours(broken, tmp_path / "work", REQUESTS)


def test_a_model_whose_blocks_cannot_be_run_one_by_one_is_scored_all_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Event] = []
    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden.mul_(1.25)))
    assert asking.compared(llama, tmp_path / "work", REQUESTS, emit=seen.append) < 1e-5
    assert any(isinstance(event, Notice) and "hidden state" in event.text for event in seen)


# --- requests that are run together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", others_long(("llama", "gemma3_text", "mamba"), ("llama", "mamba")))
def test_what_requests_begin_with_alike_is_run_once(architecture: str, tmp_path: Path) -> None:
    folder = tiny.build(architecture, tmp_path / "model")
    seen: list[Event] = []
    assert asking.compared(folder, tmp_path / "work", {KINDS[0]: asking.endings(10)}, emit=seen.append) < 1e-5
    told = [event.text for event in seen if isinstance(event, Notice) and event.level == "warning"]
    calls = [event for event in seen if isinstance(event, Worked) and event.stage == "compute" and event.item]
    if architecture == "mamba":  # more than keys and values go from token to token
        assert told == [
            "this model passes on more than keys and values: what requests begin with alike is read for each"
        ]
    else:
        assert not told
        # A beginning and its endings each, one request alone to compare, and the canary twice.
        assert len(calls) <= (10 + 10 + 3) * tiny.LAYERS


def test_what_it_takes_is_told_before_work(llama: Path, tmp_path: Path) -> None:
    requests, seen = asking.endings(10), list[Event]()
    asking.ours(llama, tmp_path / "work", {KINDS[0]: requests[:8]})
    asking.ours(llama, tmp_path / "work", {KINDS[0]: requests}, spill=60_000, emit=seen.append)
    place = next(place for place, event in enumerate(seen) if isinstance(event, Notice))
    assert not any(isinstance(event, Worked) for event in seen[:place])
    told = seen[place]
    assert isinstance(told, Notice)
    numbers = [int(number) for number in re.findall(r"\d+", told.text.split(" round")[0])]
    asked, known, texts, tokens, computed, rounds = numbers
    assert (asked, known, texts) == (40, 8, 32)
    assert 32 * 60 < tokens < 32 * 75
    assert 8 * (60 + 4 * 2) < computed < tokens / 2
    assert rounds == sum(isinstance(event, Advanced) for event in seen) / tiny.LAYERS > 1
    assert "read from disk" in told.text
    assert re.search(r"; about \d+:\d\d \(an estimate\)$", told.text)


def test_the_time_is_estimated_by_the_work_of_all_rounds() -> None:
    pace = Pace(weights=7.0, token=0.5, head=0.25)
    assert pace.seconds(tokens=10, texts=4, rounds=3) == 3 * 7.0 + 10 * 0.5 + 4 * 0.25


@pytest.mark.parametrize("architecture", others_long(ARCHITECTURES, ("gemma2", "mixtral")))
def test_one_block_and_a_part_of_the_head_are_run_to_estimate_the_time(architecture: str, tmp_path: Path) -> None:
    folder, seen = tiny.build(architecture, tmp_path / "model"), list[Event]()
    asking.ours(folder, tmp_path / "work", REQUESTS, emit=seen.append)
    told = [event.text for event in seen if isinstance(event, Notice) and "log-likelihoods" in event.text]
    assert [text.endswith("(an estimate)") for text in told] == [True, True]


def test_a_model_that_is_run_in_another_way_gets_no_estimate(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Event] = []
    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden * 1.25))
    asking.ours(llama, tmp_path / "work", {KINDS[0]: REQUESTS[KINDS[0]][:4]}, emit=seen.append)
    told = next(event.text for event in seen if isinstance(event, Notice))
    assert "log-likelihoods" in told
    assert "estimate" not in told


def test_a_model_that_cannot_run_requests_together_runs_them_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {KINDS[0]: asking.endings(10)}
    model = AutoModelForCausalLM.from_pretrained(llama)
    monkeypatch.setattr(recorded, "copies", lambda cache, rows: no_past(model))  # what came before is lost
    seen: list[Event] = []
    with pytest.raises(Interrupted):
        asking.ours(llama, tmp_path / "work", requests, emit=_stopping(2))
    assert asking.compared(llama, tmp_path / "work", requests, emit=seen.append) < 1e-5
    told = [event.text for event in seen if isinstance(event, Notice)]
    assert [text[:9] for text in told] == ["log-likel", "resuming:"]  # it did not try again


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_that_read_the_same_share_a_forward() -> None:
    questions = [Question.of([1, 2, 3], [answer], 10) for answer in (4, 5, 6)]
    questions.append(Question.of([1, 2], [3, 9], 10))
    (reading,) = readings_of(questions, range(4))
    assert (list(reading.tokens), reading.questions) == ([1, 2, 3], [0, 1, 2, 3])


def test_a_continuation_longer_than_the_model_reads_is_an_error() -> None:
    with pytest.raises(ModelError, match="cannot be scored"):
        Question.of([1], [1, 2, 3], 2)
