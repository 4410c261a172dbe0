"""`--set KEY=VALUE`: what reaches the harness and the model, and what is refused, all at once and before work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import asking
import pytest
import tiny
from transformers import AutoTokenizer

from lowmem_aim.errors import DiskError, UsageError
from lowmem_aim.evaluating import generation
from lowmem_aim.evaluating.generation import Request, WritingModel
from lowmem_aim.evaluating.harness_settings import INSTEAD, KNOWN, parsed, wrong_settings
from lowmem_aim.evaluating.language_model import AskedModel
from lowmem_aim.evaluating.scores import read_scores

WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""
CHOOSES = """
include: writes.yaml
task: chooses
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: ["a", "b"]
generation_kwargs: null
metric_list: [{metric: acc}]
"""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no thoughts>{% endif %}"
)
GOOD = ["gen_kwargs.do_sample=true", "gen_kwargs.temperature=0.7", 'gen_kwargs.until=["\\n", stop]']


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model`, which has a chat template, and the tasks `writes` and `chooses`."""
    folder = tmp_path_factory.mktemp("settings")
    tiny.build("llama", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    (folder / "items.jsonl").write_text("".join(json.dumps({"q": f"say {n}", "a": str(n)}) + "\n" for n in range(3)))
    (folder / "writes.yaml").write_text(WRITES.replace("FOLDER", str(folder)))
    (folder / "chooses.yaml").write_text(CHOOSES)
    return folder


class Writer:
    """A stand-in for a model that writes: it keeps what it is asked to write."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.thought: Any = None

    def texts(self, model: WritingModel, requests: Sequence[Request], known: Any) -> list[str]:
        self.requests, self.thought = list(requests), model.thought
        return ["0"] * len(requests)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    asked = Writer()
    monkeypatch.setattr(WritingModel, "texts", lambda model, requests, known: asked.texts(model, requests, known))
    return asked


def evaluated(place: Path, out: Path, run: Any, *more: str, settings: Sequence[str] = (), task: str = "writes") -> Any:
    words = [word for text in settings for word in ("--set", text)]
    return run(
        "evaluate", place / "model", "--tasks", task, "--include-path", place, "-o", out, "--no-cache", *more, *words
    )


def test_settings_of_how_the_model_writes_reach_it(place: Path, tmp_path: Path, run: Any, writer: Writer) -> None:
    out = tmp_path / "scores.json"
    more = ["gen_kwargs.max_gen_toks=9", "think_end_token=</think>"]
    done = evaluated(place, out, run, settings=[*GOOD, *more])
    assert done.code == 0, done.err
    expected = {"until": ["\n", "stop"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.7}
    assert [settings for _, settings in writer.requests] == [expected] * 3
    assert writer.thought == "</think>"
    assert "3 texts, 27 tokens at most" in done.err
    kept = read_scores(out).settings["settings"]
    assert kept == {f"gen_kwargs.{key}": value for key, value in expected.items()} | {"think_end_token": "</think>"}


def test_settings_of_prompts_change_them(place: Path, tmp_path: Path, run: Any, writer: Writer) -> None:
    contexts = {}
    for number, settings in enumerate(
        ([], ["system_instruction=Answer: yes"], ["fewshot_as_multiturn=false"], ["enable_thinking=false"])
    ):
        done = evaluated(
            place, tmp_path / f"{number}.json", run, "--chat-template", "--num-fewshot", "1", settings=settings
        )
        assert done.code == 0, done.err
        contexts[number] = writer.requests[0][0]
    assert contexts[0].count("<user>") == 2
    assert contexts[1] == "<system>Answer: yes" + contexts[0]
    assert contexts[2].count("<user>") == 1
    assert contexts[3] == contexts[0] + "<no thoughts>"


def test_other_settings_are_another_run(place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, own = tmp_path / "scores.json", generation._batches

    def stopped(*asked: Any) -> Iterator[list[str]]:
        yield next(own(*asked))
        raise DiskError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_batches", stopped)
        assert evaluated(place, out, run).code == DiskError.exit_code
    other = evaluated(place, out, run, settings=["gen_kwargs.max_gen_toks=2"])
    assert (other.code, "--fresh" in other.err) == (7, True), other.err
    assert evaluated(place, out, run).code == 0


def test_thoughts_are_cut_off_and_kept_apart(place: Path, tmp_path: Path) -> None:
    requests: list[Request] = [("one two", {"until": [], "max_gen_toks": 12})]
    (whole,) = asking.written(place / "model", tmp_path / "work", requests)
    end = whole[3]
    assert asking.written(place / "model", tmp_path / "work", requests, thought=end) == [whole.split(end)[-1].lstrip()]


def test_all_wrong_settings_are_told_before_work(place: Path, tmp_path: Path, run: Any) -> None:
    wrong = ["num_fewshot=3", "sistem_instruction=x", "gen_kwargs.top_p=high", "fewshot_as_multiturn=false"]
    refused = evaluated(place, tmp_path / "out.json", run, settings=wrong)
    assert refused.code == 2
    for part in ("use `--num-fewshot`", "did you mean `system_instruction`", "a number from 0 to 1, not `high`"):
        assert part in refused.err, refused.err
    assert "add `--chat-template`" in refused.err
    unused = evaluated(place, tmp_path / "out.json", run, settings=["gen_kwargs.max_gen_toks=2"], task="chooses")
    assert (unused.code, "no task lets the model write" in unused.err) == (2, True), unused.err
    thinking = ["enable_thinking=true", "think_end_token=x"]
    refused = evaluated(place, tmp_path / "out.json", run, "--chat-template", settings=thinking, task="chooses,writes")
    assert (refused.code, "`chooses` would score" in refused.err) == (2, True), refused.err
    for text in ("temperature", "=3"):
        refused = evaluated(place, tmp_path / "out.json", run, settings=[text])
        assert (refused.code, "has no key and value" in refused.err) == (2, True), refused.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (GOOD, True),
        (GOOD[:1], False),  # tasks set a temperature of 0
        (GOOD[1:], False),  # and greedy decoding
        (["gen_kwargs.do_sample=false"], True),
        (["gen_kwargs.temperature=0"], True),
        (["gen_kwargs.top_k=3"], False),
        (["gen_kwargs.max_gen_toks=0"], False),
        (["gen_kwargs.max_gen_toks=true"], False),
        (["gen_kwargs.temperature=.nan", "gen_kwargs.do_sample=true"], False),
        (["gen_kwargs.until=3"], True),
        (["gen_kwargs.until=[3]"], False),
        (["gen_kwargs.until="], False),  # it would stop every text before its first token
        (["system_instruction=Say: yes"], True),
        (["enable_thinking=true"], False),
        (["enable_thinking=true", "think_end_token=151668"], True),
    ],
)
def test_a_value_is_right_or_refused(texts: list[str], right: bool) -> None:
    assert (not list(wrong_settings(parsed(texts), chat_template=True))) is right


def test_every_key_is_documented_or_says_what_to_use_instead() -> None:
    assert not KNOWN.keys() & INSTEAD.keys()
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert all(f"`{key}`" in page or f"`.{key.partition('.')[2]}`" in page for key in KNOWN)
    told = list(wrong_settings(dict.fromkeys(INSTEAD, 1), chat_template=True))
    assert [error.hint for error in told] == list(INSTEAD.values())
    with pytest.raises(UsageError, match="given twice"):
        parsed(["gen_kwargs.top_k=1", "gen_kwargs.top_k=2"])


def test_a_chat_template_is_filled_in_as_the_harness_does(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = asking.harness(place / "model", enable_thinking=False)
    ours = AskedModel(model.config, tokenizer, lambda questions: [], template={"enable_thinking": False})
    history = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(history) == model.apply_chat_template(history)
