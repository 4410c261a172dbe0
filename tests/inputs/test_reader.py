"""Models' small files are read by a child process: within limits, and nothing outside of the model's folder."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from conftest import Place, Run
from long_cases import others_long

from lowmem_aim.errors import ModelError
from lowmem_aim.models import reader_process
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.vetted import leads_out

IN_OPEN = 0x20


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Path], Callable[[], bool]]]:
    """Watch a file: the function that is given back says whether anybody, in any process, has opened it since."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptors: list[int] = []

    def watch(file: Path) -> Callable[[], bool]:
        descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert descriptor >= 0
        assert libc.inotify_add_watch(descriptor, os.fsencode(file), IN_OPEN) >= 0
        descriptors.append(descriptor)

        def was_opened() -> bool:
            try:
                return bool(os.read(descriptor, 4096))
            except BlockingIOError:
                return False

        return was_opened

    yield watch
    for descriptor in descriptors:
        os.close(descriptor)


def outside(place: Place) -> Path:
    """A tokenizer that belongs to nobody here, next to the models' folders."""
    folder = place.folder / "private"
    folder.mkdir()
    file = folder / "tokenizer.4.0.0.json"
    file.write_bytes((place.folder / "base/tokenizer.json").read_bytes())
    return file


def edit_tokenizer_config(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestPathsOutOfTheFolder:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("fast_tokenizer_files", ["../private/tokenizer.4.0.0.json"]),
            ("vocab_file", "{outside}"),
            ("spm_file", "~/tokenizer.model"),
            ("deep", {"list": [{"merges_file": "a/../../private/tokenizer.4.0.0.json"}]}),
        ],
    )
    def test_are_refused_by_name_and_not_opened(
        self, place: Place, texts: Path, opened: Callable[[Path], Callable[[], bool]], key: str, value: Any
    ) -> None:
        secret = outside(place)
        shown = json.loads(json.dumps(value).replace("{outside}", str(secret)))
        edit_tokenizer_config(place.folder / "base", **{key: shown})
        was_opened = opened(secret)
        for more in ((), ("--tokenizer-source", "base"), ("--omega", 0.4, "--calibration", texts)):
            place.refused(place.merge(*more), 3, f"`{key}", "leads out of the model folder")
        assert not was_opened()
        secret.read_bytes()
        assert was_opened()  # else the watch would prove nothing

    def test_in_a_config_are_not_followed(
        self, place: Place, texts: Path, opened: Callable[[Path], Callable[[], bool]]
    ) -> None:
        secret = place.folder / "config.4.0.0.json"
        secret.write_bytes((place.folder / "base/config.json").read_bytes())
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, configuration_files=["../config.4.0.0.json"], _name_or_path="/x/y")
        tiny.edit_config(place.folder / "math", rope_theta=7.0)  # so that transformers reads both
        was_opened = opened(secret)
        done = place.merge("--omega", 0.4, "--calibration", texts)
        assert done.code == 0, done.err
        assert not was_opened()

    def test_what_another_machine_left_is_left_out(self, place: Place, texts: Path) -> None:
        left = {"name_or_path": "/home/me/llama", "special_tokens_map_file": "/root/.cache/special_tokens_map.json"}
        edit_tokenizer_config(place.folder / "base", **left)
        done = place.merge("--omega", 0.4, "--calibration", texts)
        assert done.code == 0, done.err

    def test_tokens_and_templates_are_no_paths(self, place: Place) -> None:
        edit_tokenizer_config(
            place.folder / "base", chat_template="/../{{ x }}", sep_token="/..", extra={"pattern": "/"}
        )
        assert place.merge().code == 0

    @pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "C:\\x", "..\\x", "~/x", "\\\\host\\x"])
    def test_are_known_on_every_system(self, path: str) -> None:
        assert leads_out(path)
        assert not leads_out(path.replace("..", "b").lstrip("/~\\").replace("C:\\", "c"))


def model_with(**config: Any) -> Checkpoint:
    return Checkpoint(Path(), "model", config, {})


def write_many_tokens(folder: Path) -> None:
    """A tokenizer that takes a second, and 300 MB, to read."""
    tokens = {f"token{number}": number for number in range(1_500_000)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": tokens}}))


class TestLimits:
    @pytest.mark.parametrize(
        "config",
        others_long(
            [
                {"model_type": "mpt", "n_layers": 10**7, "d_model": 8, "n_heads": 1},
                {"model_type": "bart", "decoder_layers": 10**7, "d_model": 16, "decoder_attention_heads": 2},
            ],
            [{"model_type": "mpt", "n_layers": 10**7, "d_model": 8, "n_heads": 1}],
        ),
    )
    def test_a_config_that_builds_without_end_is_refused_whatever_its_key(
        self, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, own_reader: None
    ) -> None:
        monkeypatch.setattr(reader_process, "MEMORY_BYTES", 100_000_000)
        monkeypatch.setattr(reader_process, "SECONDS", 50)
        with Reader(use_cache=False) as reader, pytest.raises(ModelError, match=r"takes more than 100\.0 MB of memory"):
            reader.roles(model_with(**config))

    def test_a_child_that_is_late_is_ended_and_the_next_question_answered(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, own_reader: None
    ) -> None:
        write_many_tokens(place.folder / "math")
        with Reader(use_cache=False) as reader:
            monkeypatch.setattr(reader_process, "SECONDS", 0)
            with pytest.raises(ModelError, match="takes more than 0 seconds"):
                reader.vocabulary(Checkpoint.open(place.folder / "math"))
            monkeypatch.setattr(reader_process, "SECONDS", 60)
            assert len(reader.vocabulary(Checkpoint.open(place.folder / "base"))) == 259

    def test_a_child_that_is_killed_is_told_as_that_and_the_next_question_answered(
        self, place: Place, own_reader: None
    ) -> None:
        with Reader(use_cache=False) as reader:
            reader.vocabulary(Checkpoint.open(place.folder / "base"))
            assert reader._process is not None
            reader._process.process.kill()
            tiny.edit_config(place.folder / "math", vocab_size=265)
            with pytest.raises(ModelError, match="reading its tokenizer was stopped") as caught:
                reader.vocabulary(Checkpoint.open(place.folder / "math"))
            assert "same command again" in caught.value.hint
            assert len(reader.vocabulary(Checkpoint.open(place.folder / "math"))) == 259

    def test_nothing_that_a_killed_child_has_written_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_reader: None
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        child = reader_process.ReaderProcess.start()
        scratch = Path(psutil.Process(child.process.pid).environ()["TMPDIR"])
        (scratch / "half a config").write_text("x")
        child.end()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the system has no alarms")
    def test_a_child_whose_parent_was_killed_does_not_work_for_ever(self) -> None:
        code = (
            "import sys, time\n"
            "from lowmem_aim.models import reader_program\n"
            "reader_program.ANSWERS['settings'] = (lambda: None, lambda question: time.sleep(60))\n"
            "sys.argv = ['', '1000000000', '1']\n"
            "reader_program.main()"
        )
        done = subprocess.run([sys.executable, "-c", code], input='{"question": "settings"}\n', text=True, timeout=50)
        assert done.returncode == -signal.SIGALRM

    @pytest.mark.long
    def test_memory_is_watched_where_the_system_cannot_limit_it(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, own_reader: None
    ) -> None:
        write_many_tokens(place.folder / "math")
        with Reader(use_cache=False) as reader:
            monkeypatch.setattr(reader_process, "is_limited", lambda: False)
            assert len(reader.vocabulary(Checkpoint.open(place.folder / "base"))) == 259
            monkeypatch.setattr(reader_process, "MEMORY_BYTES", 30_000_000)
            with pytest.raises(ModelError, match=r"takes more than 30\.0 MB of memory"):
                reader.vocabulary(Checkpoint.open(place.folder / "math"))


def test_what_a_library_prints_is_no_answer() -> None:
    code = (
        "import sys, lowmem_aim.models.reader_program as program\n"
        "program.ANSWERS['noisy'] = (lambda: print('importing'), lambda question: print('noise') or 7)\n"
        "sys.argv = ['', '1000000000', '60']\n"
        "program.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input='{"question": "noisy"}\n', capture_output=True, text=True, timeout=60)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{}, {"answer": 7}]
    assert "noise" in done.stderr


def test_answers_are_cached_by_what_they_depend_on(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.edit_config(place.folder / "math", rope_theta=7.0)
    command = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math")
    assert run("merge", place.folder / "first", *command).code == 0
    monkeypatch.setattr(reader_process.ReaderProcess, "start", None)
    assert run("merge", place.folder / "second", *command).code == 0
    monkeypatch.undo()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"answer": {}, "digest": "x"}'])
def test_a_damaged_answer_in_the_cache_is_asked_for_again(place: Place, own_cache: Path, damage: bytes) -> None:
    command = ("--method", "linear", "--expert", place.folder / "math")
    assert place.run("merge", place.folder / "first", *command).code == 0
    kept = list((own_cache / "lowmem_aim/outlines").iterdir())
    assert kept
    for file in kept:
        file.write_bytes(damage)
    assert (
        place.run("merge", place.folder / "second", "--method", "linear", "--expert", place.folder / "math").code == 0
    )


def test_a_merge_that_runs_no_model_never_loads_transformers(place: Place, own_cache: Path) -> None:
    """Not even where nothing is cached, and tokens are matched."""
    code = (
        "import sys, lowmem_aim\n"
        f"base, math, out = {str(place.folder / 'base')!r}, {str(place.folder / 'math')!r}, {str(place.out)!r}\n"
        "models = [{'model': math, 'parameters': {'weight': 1}}]\n"
        "recipe = {'merge_method': 'linear', 'tokenizer_source': 'base', 'base_model': base, 'models': models}\n"
        "lowmem_aim.merge(recipe, out)\n"
        "print(sorted({'transformers', 'tokenizers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
    assert (place.out / "config.json").is_file()


def test_an_index_of_very_many_absent_shards_is_one_error(place: Place) -> None:
    folder = place.folder / "math"
    (folder / "model.safetensors").unlink()
    names = {f"t{number}": f"model-{number}.safetensors" for number in range(20_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    done = place.merge()
    place.refused(done, 3, "'model-0.safetensors', which is missing, as are 19999 others")
    assert len(done.err) < 2000


def test_a_vocabulary_that_is_a_link_out_of_the_folder_is_not_read(
    place: Place, opened: Callable[[Path], Callable[[], bool]]
) -> None:
    secret = place.folder / "private.bpe"
    secret.write_text("#version: 0.2\n")
    (place.folder / "math/vocab.bpe").symlink_to(secret)
    was_opened = opened(secret)
    place.refused(place.merge("--tokenizer-source", "base"), 3, "vocab.bpe` is a link that leads out")
    assert not was_opened()
