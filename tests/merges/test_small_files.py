"""The files that an output takes from its reference: all that loaders read, no code, nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Place
from safetensors.torch import save_file

from lowmem_aim.errors import ModelError
from lowmem_aim.events import Event, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.known_files import READ_BY_LOADERS, fits
from lowmem_aim.output import copied
from lowmem_aim.output.copied import copied_files
from lowmem_aim.output.folder import PRIVATE, SUMS
from lowmem_aim.output.verify import verify

TEXT = "{}"
# As their makers publish them, beside what every model has.
LAYOUTS: dict[str, dict[str, str]] = {
    "gemma 3": {
        "preprocessor_config.json": TEXT,
        "processor_config.json": TEXT,
        "video_preprocessor_config.json": TEXT,
    },
    "several chat templates": {"additional_chat_templates/tool_use.jinja": "x", "chat_template.jinja": "y"},
    "mistral": {"tekken.json": TEXT, "tokenizer.model.v3": "x"},
    "qwen 1, kimi": {"qwen.tiktoken": "IQ== 0", "tiktoken.model": "IQ== 0"},
    "whisper": {"normalizer.json": TEXT, "feature_extractor_config.json": TEXT},
    "licences": {"LICENSE": "x", "License.txt": "x", "NOTICE": "x", "USE_POLICY.md": "x"},
    "sentence-transformers": {
        "modules.json": json.dumps(
            [
                {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
            ]
        ),
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "sentence_bert_config.json": TEXT,
        "config_sentence_transformers.json": TEXT,
    },
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_in(out: Path) -> set[str]:
    names = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    return {name for name in names if not name.startswith(PRIVATE)}


def warnings_of(folder: Path) -> tuple[dict[str, bytes], str]:
    told: list[str] = []

    def emit(event: Event) -> None:
        assert isinstance(event, Notice)
        told.append(event.text)

    with Checkpoint.open(folder) as checkpoint:
        return copied_files(checkpoint, emit), "\n".join(told)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return tiny.perturbed(llama / "base", tmp_path / "model", scale=0.0)


def test_what_loaders_read_is_in_the_output_and_verified(place: Place) -> None:
    files = {name: text for layout in LAYOUTS.values() for name, text in layout.items()}
    put(place.folder / "base", files)
    done = place.merge()
    assert done.code == 0, done.err
    assert "not copied" not in done.err
    assert {name: (place.out / name).read_text() for name in files} == files
    assert verify(place.out, f"{PRIVATE}/{SUMS}") == len(files_in(place.out)) + 1
    (place.out / "1_Pooling" / "config.json").write_text("{")
    (place.out / "1_Pooling" / "model.safetensors").write_text("{}")
    wrong = place.run("verify", place.out)
    assert wrong.code == 8
    assert "`1_Pooling/config.json` is not what was written" in wrong.err
    assert "`1_Pooling/model.safetensors` does not belong to this output, and a loader would read it" in wrong.err


def test_texts_that_were_edited_are_not_blamed_on_the_disk(place: Place) -> None:
    assert place.merge().code == 0
    for name, added in {"README.md": "My words.", "mergekit_config.yml": "# mine", "config.json": " "}.items():
        with (place.out / name).open("a") as file:
            file.write(added)
    wrong = place.run("verify", place.out, "--json")
    assert wrong.code == 8
    ended = json.loads(wrong.out.splitlines()[-1])
    assert len(ended["problems"]) == 3
    assert all("has been edited since the merge" in problem for problem in ended["problems"])
    assert ended["hints"] == [ended["hint"]] * 3
    assert "an edit of yours" in ended["hint"]
    (shard,) = place.out.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    (place.out / "README.md").write_bytes(b"\xff")  # no text
    found = dict(
        zip(
            *(
                json.loads(place.run("verify", place.out, "--json").out.splitlines()[-1])[key]
                for key in ("problems", "hints")
            ),
            strict=True,
        )
    )
    assert "an edit of yours" not in found[f"`{shard.name}` is not what was written"]
    assert "an edit of yours" not in found["`README.md` is not what was written"]


def test_a_processor_of_the_base_is_one_of_the_output(place: Place) -> None:
    from transformers import AutoProcessor, Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

    words = {"boi_token": "<s>", "image_token": "</s>", "eoi_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, extra_special_tokens=words)
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = Gemma3Processor(images, tokenizer, chat_template="{{ messages }}", image_seq_length=4)
    processor.save_pretrained(place.folder / "base")
    assert place.merge().code == 0
    found = AutoProcessor.from_pretrained(place.out, local_files_only=True)
    assert type(found) is Gemma3Processor
    assert found.image_processor.size == images.size
    assert found.chat_template == "{{ messages }}"


@pytest.mark.parametrize("killed_after", range(3))
def test_folders_in_an_output_survive_a_kill_in_the_finish(
    killed_after: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place.folder / "base", LAYOUTS["sentence-transformers"] | LAYOUTS["several chat templates"])
    rename, left = os.replace, [killed_after]

    def renaming(source: Any, target: Any) -> None:
        if Path(target).parent == place.out and Path(source).is_dir():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("lowmem_aim.output.workspace.os.replace", renaming)
    code = place.merge().code
    assert code == (130 if killed_after < 2 else 0)
    monkeypatch.undo()
    assert not killed_after < 2 or not (place.out / "config.json").exists()
    assert place.merge().code == 0
    assert {"1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"} <= files_in(place.out)
    assert place.run("verify", place.out).code == 0


def test_what_is_left_behind_and_may_be_missed_is_told_in_plan_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copied, "LARGEST_FILE", 50_000)
    base = place.folder / "base"
    put(base, {"modeling_x.py": "raise", "LICENSE.py": "", "voices.dat": "x", "tekken.json": " " * 50_001 + "{}"})
    put(base, {"voices/a.dat": "x", "README.md": "x", ".hidden.json": "x", "trainer_state.json": "{}", "old.bin": "x"})
    foreseen = place.run("plan", "--method", "ties", "--base", base, "--expert", place.folder / "math", place.out)
    done = place.merge()
    assert done.code == foreseen.code == 0
    for told in (done.err, foreseen.err):
        assert (
            "not copied from the reference: `LICENSE.py` (code), `modeling_x.py` (code), "
            "`tekken.json` (more than 50.0 kB), `voices.dat`, `voices/`\n"
        ) in told
    assert files_in(place.out) - files_in(base) == {"lowmem_aim.json", "mergekit_config.yml"}
    gone = {"modeling_x.py", "LICENSE.py", "voices.dat", "tekken.json", ".hidden.json", "trainer_state.json"}
    assert files_in(base) - files_in(place.out) == {*gone, "voices/a.dat", "old.bin"}


def test_files_that_are_too_large_together_are_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(model, {"z.tiktoken": "x" * 3000})
    size = sum(len(content) for content in warnings_of(model)[0].values())
    monkeypatch.setattr(copied, "LARGEST_SUM", size - 1)
    files, told = warnings_of(model)
    assert "z.tiktoken" not in files
    assert "`z.tiktoken` (more than" in told
    assert "together with the others" in told


@pytest.mark.parametrize(
    "name",
    [
        b"LICENSE\xff",
        b"LICENSE\n.txt",
        b"NOTICE:a\\b",
        b"LICENSE" + b"x" * 240,
        b"additional_chat_templates/\xff.jinja",
    ],
)
def test_a_name_that_the_list_of_digests_cannot_hold_is_left_behind(name: bytes, place: Place) -> None:
    file = place.folder / "base" / os.fsdecode(name)
    try:
        put(place.folder / "base", {os.fsdecode(name): "x"})
    except OSError:
        pytest.skip("this filesystem has no such names")
    done = place.merge()
    assert done.code == 0, done.err
    assert "its name is too long, or has characters" in done.err
    assert file.name not in {found.name for found in place.out.rglob("*")}
    assert place.run("verify", place.out).code == 0


@pytest.mark.parametrize("name", ["NOTICE", "x.tiktoken", "1_Pooling/config.json", "additional_chat_templates/a.jinja"])
def test_nothing_from_outside_the_model_is_copied(name: str, model: Path, tmp_path: Path) -> None:
    put(model, LAYOUTS["sentence-transformers"] | {name: "x"})
    (tmp_path / "secret").write_text("{}")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "secret")
    if name.endswith((".jinja", ".tiktoken")):
        with pytest.raises(ModelError, match="is a link that leads out of its model folder"):
            warnings_of(model)
    else:
        files, told = warnings_of(model)
        assert name not in files
        assert f"`{name}` (a link that leads out of the folder)" in told


@pytest.mark.parametrize("folder", ["1_Pooling", "additional_chat_templates"])
def test_a_folder_that_is_a_link_out_of_the_model_is_not_entered(folder: str, model: Path, tmp_path: Path) -> None:
    put(model, LAYOUTS["sentence-transformers"])
    put(tmp_path / "elsewhere", {"config.json": "{}", "a.jinja": "x"})
    if (model / folder).is_dir():
        (model / folder / "config.json").unlink()
        (model / folder).rmdir()
    (model / folder).symlink_to(tmp_path / "elsewhere")
    if folder == "additional_chat_templates":
        with pytest.raises(ModelError, match="is a link that leads out of its model folder"):
            warnings_of(model)
    else:
        files, told = warnings_of(model)
        assert not any(name.startswith(folder) for name in files)
        assert f"`{folder}/` (a link that leads out of the folder)" in told


@pytest.mark.parametrize("path", ["..", "../math", "/etc", "a/b", ".lowmem_aim", "model.safetensors", 7, "a\0b"])
def test_modules_json_names_folders_beside_it_alone(path: Any, model: Path) -> None:
    (model / "modules.json").write_text(json.dumps([{"idx": 0, "path": path}]))
    with pytest.raises(ModelError, match=r"modules\.json` names the folder .*: not a plain name"):
        warnings_of(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "tekken.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff", ""])
def test_json_must_parse(name: str, text: str, model: Path) -> None:
    put(model, LAYOUTS["sentence-transformers"])
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match="is not valid JSON"):
        warnings_of(model)


def test_a_vocabulary_of_half_a_million_values_is_read(model: Path) -> None:
    merges = [[f"a{number}", f"b{number}"] for number in range(130_000)]
    (model / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
    assert "tokenizer.json" in warnings_of(model)[0]


def test_keys_that_run_code_are_dropped_from_every_json(model: Path) -> None:
    put(model, LAYOUTS["sentence-transformers"])
    names = ("preprocessor_config.json", "Processor_Config.JSON", "1_Pooling/config.json")
    for name in names:
        (model / name).write_text('{"auto_map": {"AutoProcessor": "x.X"}, "a": 1}')
    files, told = warnings_of(model)
    for name in names:
        assert json.loads(files[name]) == {"a": 1}
        assert f"the output's {name} has no `auto_map`" in told


def test_a_layer_of_sentence_transformers_is_the_references_and_told(model: Path) -> None:
    put(model, {"modules.json": '[{"path": "2_Dense"}]', "2_Dense/config.json": "{}", "2_Dense/pytorch_model.bin": "x"})
    save_file({"linear.weight": torch.ones(2, 2)}, model / "2_Dense" / "model.safetensors")
    files, told = warnings_of(model)
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= files.keys()
    assert "`2_Dense/model.safetensors` is the reference's" in told
    assert "2_Dense/pytorch_model.bin" not in files


def test_the_list_has_every_vocabulary_that_transformers_saves() -> None:
    folder = Path(str(find_spec("transformers").origin)).parent  # type: ignore[union-attr]
    sources = [file.read_text(encoding="utf-8") for file in folder.rglob("tokenization_*.py")]
    tables = [table for text in sources for table in re.findall(r"VOCAB_FILES_NAMES = (\{.*?\})", text, re.DOTALL)]
    names = {name for table in tables for name in re.findall(r': *"([^"]+)"', table)}
    assert {"tokenizer.json", "vocab.json", "spiece.model"} <= names
    assert {name for name in names if not fits(name, READ_BY_LOADERS)} == set()
