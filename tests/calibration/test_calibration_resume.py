"""A calibration that was stopped goes on at its block, with the same numbers; what it goes on from is checked."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import BY_ARCHITECTURE, TEXTS, same
from conftest import Run
from merge_cases import digests, recipe
from safetensors.torch import load_file, save_file
from stopping import Stopped
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from lowmem_aim.blocks import shares as shares
from lowmem_aim.blocks.observer import Watch
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.errors import DiskError, ModelError, ResumeError
from lowmem_aim.events import Advanced, Event, Notice, PhaseStarted, Worked
from lowmem_aim.jobs.merge import merge
from lowmem_aim.measuring import snapshots
from lowmem_aim.measuring.mean_activations import mean_activations
from lowmem_aim.measuring.snapshots import Snapshots
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import load_meta_model
from lowmem_aim.output import folder, journal
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.workspace import workspace
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system import interrupts, memory
from lowmem_aim.system.interrupts import Interrupted
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.options import Options
from lowmem_aim.view.status import status_of


@pytest.fixture(autouse=True)
def each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot after every block."""
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)


def stopping_after(blocks: int, seen: list[Event] | None = None) -> Callable[[Event], None]:
    """An Emit that stops calibration when block number `blocks` is finished and could have been kept."""

    def emit(event: Event) -> None:
        if seen is not None:
            seen.append(event)
        if isinstance(event, Advanced) and event.done > blocks:
            raise Stopped

    return emit


def measured(folder: Path, work: Path | None = None, emit: Any = None, **options: Any) -> Activations:
    with Checkpoint.open(folder) as base:
        if work is None:
            return mean_activations(base, load_meta_model(base), TEXTS)
        work.mkdir(exist_ok=True)
        with Journal(work) as journal:
            kept = Snapshots(work, journal)
            return mean_activations(
                base,
                load_meta_model(base),
                TEXTS,
                snapshots=kept,
                spill=work,
                emit=emit or (lambda event: None),
                **options,
            )


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every block that is loaded."""
    blocks: list[int] = []
    loaded = BlockRunner.loaded

    def noted(runner: BlockRunner, index: int) -> Any:
        blocks.append(index)
        return loaded(runner, index)

    monkeypatch.setattr(BlockRunner, "loaded", noted)
    return blocks


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_stopped_at_any_block_it_goes_on_there_with_the_same_numbers(
    architecture: str, tmp_path: Path, driven: list[int]
) -> None:
    folder = tiny.build(architecture, tmp_path / "model")
    expected = measured(folder)
    for blocks in range(1, tiny.LAYERS):
        work = tmp_path / f"work-{blocks}"
        with pytest.raises(Stopped):
            measured(folder, work, stopping_after(blocks))
        driven.clear()
        seen: list[Event] = []
        found = measured(folder, work, stopping_after(tiny.LAYERS, seen))
        assert driven == list(range(blocks, tiny.LAYERS))
        assert Notice(f"resuming: {blocks}/{tiny.LAYERS} blocks are calibrated") in seen
        assert same(found, expected)
        assert found.base_digests == expected.base_digests
        assert found.unreached_experts == expected.unreached_experts


class TestAStop:
    """A run that a signal stops keeps every text that has passed its block, in the middle of a block too."""

    ALL = tiny.LAYERS * (len(TEXTS) + 1)  # with the canary's copy

    @pytest.fixture(autouse=True)
    def no_other_snapshots(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(snapshots, "SECONDS", 3600.0)
        with interrupts.work():
            yield
        interrupts._State.received = 0

    def goes_on_at(self, number: int, folder: Path, work: Path) -> None:
        interrupts._State.received = 0
        seen: list[Event] = []
        assert same(measured(folder, work, seen.append), measured(folder))
        assert len([event for event in seen if isinstance(event, Worked) and event.done is not None]) == (
            self.ALL - number
        )

    @pytest.mark.parametrize("number", [1, len(TEXTS), len(TEXTS) + 1, len(TEXTS) + 2, ALL])
    def test_between_two_texts(self, number: int, llama: Path, tmp_path: Path) -> None:
        left = [number]

        def emit(event: Event) -> None:
            if isinstance(event, Worked) and event.done is not None:
                left[0] -= 1
                if not left[0]:
                    raise Interrupted

        with pytest.raises(Interrupted):
            measured(llama / "base", tmp_path / "work", emit)
        self.goes_on_at(number, llama / "base", tmp_path / "work")

    @pytest.mark.parametrize("number", [1, len(TEXTS) + 1, len(TEXTS) + 2])
    def test_while_a_text_is_put_away(
        self, number: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left, commit = [number], Watch.commit

        def signalled(watch: Watch) -> None:
            if interrupts._State.put_off:
                left[0] -= 1
                if not left[0]:
                    interrupts._handle(signal.SIGINT, None)
            commit(watch)

        with monkeypatch.context() as patch:
            patch.setattr(Watch, "commit", signalled)
            with pytest.raises(Interrupted):
                measured(llama / "base", tmp_path / "work")
        self.goes_on_at(number, llama / "base", tmp_path / "work")

    def test_in_the_middle_of_a_text_redoes_that_text(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left, forward = [2 * len(TEXTS)], LlamaDecoderLayer.forward

        def stopped(layer: Any, *arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Interrupted
            return forward(layer, *arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", stopped)
            with pytest.raises(Interrupted):
                measured(llama / "base", tmp_path / "work")
        # Each block has also run the canary itself.
        self.goes_on_at(2 * len(TEXTS) - 2, llama / "base", tmp_path / "work")


def test_it_goes_on_in_a_smaller_budget(tmp_path: Path, driven: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that lay in RAM are put into a file, and the other way round."""
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    folder = tiny.build("qwen2", tmp_path / "model")
    expected = measured(folder)
    with Checkpoint.open(folder) as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    tight = Budget(needs.work + needs.beside + shares.SLACK_BYTES + needs.block)
    for first, second in ((None, tight), (tight, None)):
        work = tmp_path / f"work-{first is None}"
        with pytest.raises(Stopped):
            measured(folder, work, stopping_after(2), budget=first)
        driven.clear()
        assert same(measured(folder, work, budget=second), expected)
        assert driven == [2]


def test_a_gap_that_is_long_enough_lies_between_two_snapshots(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SECONDS", 3600.0)
    with pytest.raises(Stopped):
        measured(llama / "base", tmp_path / "work", stopping_after(2))
    assert not list((tmp_path / "work").glob(folder.SNAPSHOTS))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "row"])
def test_a_damaged_snapshot_counts_as_none(damage: str, llama: Path, tmp_path: Path, driven: list[int]) -> None:
    expected = measured(llama / "base")
    work = tmp_path / "work"
    with pytest.raises(Stopped):
        measured(llama / "base", work, stopping_after(2))
    (file,) = work.glob(folder.SNAPSHOTS)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        with contextlib.closing(sqlite3.connect(work / journal.NAME)) as connection, connection:
            connection.execute("UPDATE entries SET value = replace(value, 'float32', 'float64')")
    driven.clear()
    assert same(measured(llama / "base", work), expected)
    assert driven == [0, 1, 2]


def test_the_last_snapshot_stays_until_the_next_is_whole(
    llama: Path, tmp_path: Path, driven: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    work = tmp_path / "work"
    with pytest.raises(Stopped):
        measured(llama / "base", work, stopping_after(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match="no space is left"):
            measured(llama / "base", work)
    driven.clear()
    assert same(measured(llama / "base", work), measured(llama / "base"))
    assert driven[:2] == [1, 2]
    assert [file.name for file in work.glob(folder.SNAPSHOTS)] == ["calibration-3-0.bin"]


def test_blocks_that_share_more_than_plain_tensors_start_again_and_say_so(
    llama: Path, tmp_path: Path, driven: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaDecoderLayer.forward

    def sharing(block: Any, hidden_states: Tensor, notes: Any = None, **kwargs: Any) -> Any:
        return forward(block, hidden_states, **kwargs)

    def calling(model: Any, *args: Any, **kwargs: Any) -> Any:
        return whole(model, *args, notes=[], **kwargs)

    whole = LlamaModel.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", sharing)
    monkeypatch.setattr(LlamaModel, "forward", calling)
    seen: list[Event] = []
    with pytest.raises(Stopped):
        measured(llama / "base", tmp_path / "work", stopping_after(2, seen))
    assert any(isinstance(event, Notice) and "share more than plain tensors" in event.text for event in seen)
    driven.clear()
    measured(llama / "base", tmp_path / "work")
    assert driven == [0, 1, 2]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_merge_goes_on_in_the_midst_of_calibration(
    llama: Path, texts: Path, tmp_path: Path, driven: list[int]
) -> None:
    job = recipe(llama, "linear", omega=0.3, calibration=str(texts))
    options = Options(use_cache=False)
    merge(job, tmp_path / "whole", options)
    out = tmp_path / "out"
    for blocks in (1, 2):
        with pytest.raises(Stopped):
            merge(job, out, options, stopping_after(blocks))
        assert status_of(out).lines()[-1] == f"{blocks}/{tiny.LAYERS} blocks are calibrated"
    driven.clear()
    merge(job, out, options)
    assert driven == [2]
    assert digests(out) == digests(tmp_path / "whole")
    assert not list((out / folder.PRIVATE).glob(folder.SNAPSHOTS))


def test_other_threads_are_refused_only_in_the_midst_of_calibration(llama: Path, texts: Path, tmp_path: Path) -> None:
    job, out = recipe(llama, "linear", omega=0.3, calibration=str(texts)), tmp_path / "out"
    one, two = (Options(use_cache=False, threads=threads) for threads in (1, 2))
    before = torch.get_num_threads()
    try:
        with pytest.raises(Stopped):
            merge(job, out, one, stopping_after(2))
        with pytest.raises(ResumeError, match="threads of calibration: 1 then, 2 now"):
            merge(job, out, two)
        with pytest.raises(Stopped):  # after calibration
            merge(job, out, replace(two, accept_environment=True), stopping_after_merged())
        merge(job, out, one)
    finally:
        torch.set_num_threads(before)
    assert "threads of calibration 2" in (out / "README.md").read_text()


def stopping_after_merged() -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "finish":
            raise Stopped

    return emit


def test_a_base_of_another_time_is_read_again(llama: Path, texts: Path, tmp_path: Path, driven: list[int]) -> None:
    for name in ("base", "math", "code", "chat"):
        shutil.copytree(llama / name, tmp_path / name)
    job = recipe(tmp_path, "linear", omega=0.3, calibration=str(texts))
    options, out = Options(use_cache=False), tmp_path / "out"
    with pytest.raises(Stopped):
        merge(job, out, options, stopping_after(2))
    weights = tmp_path / "base" / "model.safetensors"
    content = load_file(weights)
    os.utime(weights)
    driven.clear()
    with pytest.raises(Stopped):
        merge(job, out, options, stopping_after(2))
    assert driven == [2]
    changed = {name: value + (name == "model.layers.0.mlp.up_proj.weight") for name, value in content.items()}
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"no longer has the same `model\.layers\.0\.mlp\.up_proj\.weight`"):
        merge(job, out, options)


class TestCalibrateCommand:
    def test_it_goes_on_and_leaves_one_file(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, driven: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("calibrate", llama / "base", "--calibration", texts, "--quiet", "-o")
        assert run(*command, tmp_path / "whole.safetensors").code == 0
        made = tmp_path / "made.safetensors"
        self.stopped(command, made, run, monkeypatch)
        partial = tmp_path / "made.safetensors.partial"
        assert run("status", partial).out.splitlines()[-1] == f"2/{tiny.LAYERS} blocks are calibrated"
        driven.clear()
        assert run(*command, made).code == 0
        assert driven == [2]
        assert made.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert not partial.exists()

    def test_another_text_is_refused_and_fresh_starts_over(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, driven: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("calibrate", llama / "base", "--calibration", texts, "--quiet", "-o")
        made = tmp_path / "made.safetensors"
        self.stopped(command, made, run, monkeypatch)
        found = run(*command, made, "--samples", "2")
        assert found.code == 7
        assert "the calibration of AIM has changed" in found.err
        driven.clear()
        assert run(*command, made, "--samples", "2", "--fresh").code == 0
        assert driven == [0, 1, 2]

    def test_a_second_one_is_refused(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        made = tmp_path / "made.safetensors"
        with workspace(tmp_path / "made.safetensors.partial"):
            found = run("calibrate", llama / "base", "--calibration", texts, "-o", made)
        assert found.code == 6

    def test_a_file_that_is_there_costs_nothing_that_was_kept(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("calibrate", llama / "base", "--calibration", texts, "--quiet", "-o")
        made = tmp_path / "made.safetensors"
        self.stopped(command, made, run, monkeypatch)
        made.write_text("mine")
        found = run(*command, made)
        assert found.code == 2
        assert "made.safetensors.partial` is left over from an interrupted run" in found.err
        made.unlink()
        assert "2/3 blocks" in run("status", tmp_path / "made.safetensors.partial").out

    @pytest.mark.parametrize("name", [".", "/", "a" * 240 + ".safetensors"])
    def test_names_that_cannot_be(self, llama: Path, texts: Path, run: Run, name: str) -> None:
        assert run("calibrate", llama / "base", "--calibration", texts, "-o", name).code == 2

    def stopped(self, command: Any, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the command until two blocks are kept."""
        offer = Snapshots.offer

        def stopping(kept: Snapshots, runner: BlockRunner, so_far: Any, emit: Any) -> None:
            offer(kept, runner, so_far, emit)
            if so_far.blocks == 2:
                raise DiskError("pulled out")

        with monkeypatch.context() as patch:
            patch.setattr(Snapshots, "offer", stopping)
            found = run(*command, made)
        assert found.code == 4
        assert "the same command resumes from there" in found.err
        assert not made.exists()


@pytest.mark.parametrize("when", ["in calibration", "after it"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.bias"])
def test_a_base_of_other_embeddings_or_biases_is_never_mixed_with_what_was_measured(
    name: str, when: str, texts: Path, tmp_path: Path
) -> None:
    tiny.build("qwen2", tmp_path / "base", tie_word_embeddings=False)
    tiny.perturbed(tmp_path / "base", tmp_path / "math")
    weights = tmp_path / "base" / "model.safetensors"
    options, out = Options(use_cache=False), tmp_path / "out"
    job = recipe(tmp_path, "task_arithmetic", experts=("math",), omega=0.3, calibration=str(texts))
    with pytest.raises(Stopped):
        merge(job, out, options, stopping_after(2) if when == "in calibration" else stopping_after_merged())
    changed = {key: value + 0.5 * (key == name) for key, value in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    if when == "in calibration" and "embed" in name:  # nothing else is finished: it starts again
        merge(job, out, options)
        assert digests(out) == digests(merge(job, tmp_path / "whole", options))
    else:
        with pytest.raises(ResumeError, match="no longer has the same"):
            merge(job, out, options)


def test_what_was_measured_in_two_environments_is_not_cached(
    llama: Path, texts: Path, tmp_path: Path, own_cache: Path
) -> None:
    job, out = recipe(llama, "linear", omega=0.3, calibration=str(texts)), tmp_path / "out"
    before = torch.get_num_threads()
    try:
        with pytest.raises(Stopped):
            merge(job, out, Options(threads=1), stopping_after(2))
        merge(job, out, Options(threads=2, accept_environment=True))
    finally:
        torch.set_num_threads(before)
    assert not list((own_cache / "lowmem_aim").glob("*.safetensors"))


def test_a_base_that_changes_between_reading_and_computing_is_not_kept(
    llama: Path, tmp_path: Path, driven: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama / "base", tmp_path / "base")
    run_block = BlockRunner.run_block

    def touching(runner: BlockRunner, index: int, call: Any) -> Any:
        os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
        return run_block(runner, index, call)

    with monkeypatch.context() as patch:
        patch.setattr(BlockRunner, "run_block", touching)
        with pytest.raises(ModelError, match="changed while it was being read"):
            measured(tmp_path / "base", tmp_path / "work")
    assert driven == [0]
    assert not list((tmp_path / "work").glob(folder.SNAPSHOTS))
