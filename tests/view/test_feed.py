"""What a run leaves of itself: run.log, a line a tensor; run.json; and what is told while it is at work."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from long_cases import others_long
from merge_cases import recipe, tensors_in
from safetensors.torch import load_file
from stopping import SHARDS, Stopped, stopping_after

from lowmem_aim.errors import DiskError
from lowmem_aim.events import Event, Paused, PhaseStarted, Planned, RunEnded, RunStarted, Sampled, TensorDone, Worked
from lowmem_aim.jobs.merge import merge as work
from lowmem_aim.merging import loop as merge
from lowmem_aim.output.folder import FACTS, LOG, PRIVATE
from lowmem_aim.system import interrupts
from lowmem_aim.system.options import Options
from lowmem_aim.view import feed
from lowmem_aim.view.progress import seen
from lowmem_aim.view.record import runs_in


def logged(out: Path) -> list[list[Event]]:
    return [[event for _, event in run] for run in runs_in(out / PRIVATE / LOG)]


def facts(out: Path) -> list[dict[str, Any]]:
    found = json.loads((out / PRIVATE / FACTS).read_text())
    assert found["format"] == "lowmem-aim run 1"
    return list(found["runs"])


def aim(llama: Path, texts: Path, **more: Any) -> Any:
    return recipe(llama, "ties", density=("0.5",), omega="0.4", calibration=str(texts), **more)


def test_the_log_has_a_line_for_each_tensor(llama: Path, tmp_path: Path) -> None:
    out = work(recipe(llama), tmp_path / "out")
    [run] = logged(out)
    tensors = [event.name for event in run if isinstance(event, TensorDone)]
    assert sorted(tensors) == sorted(load_file(out / "model.safetensors"))
    assert isinstance(run[0], RunStarted)
    assert isinstance(run[-1], RunEnded)
    lines = (out / PRIVATE / LOG).read_text().splitlines()
    assert sum('"tensor_done"' in line for line in lines) == len(tensors)


def test_whoever_watches_sees_what_is_recorded_and_what_is_frequent(llama: Path, texts: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    out = work(aim(llama, texts), tmp_path / "out", Options(use_cache=False), told.append)
    assert [event for event in told if not isinstance(event, Worked)] == logged(out)[0]
    stages = {event.stage for event in told if isinstance(event, Worked)}
    assert stages == {"read", "compute", "write"}
    phases = [event.phase for event in told if isinstance(event, PhaseStarted)]
    assert phases == ["calibrate", "merge", "finish"]
    [planned] = [event for event in told if isinstance(event, Planned)]
    assert list(planned.phases) == phases, "as it was told before"
    tensors = [event for event in told if isinstance(event, TensorDone)]
    assert planned.tensors == len(tensors)
    assert Counter("" if event.layer is None else str(event.layer) for event in tensors) == planned.layers


def test_bytes_are_counted_as_they_move(llama: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    out = work(recipe(llama, "task_arithmetic"), tmp_path / "out", emit=told.append)
    moved: Counter[str] = Counter()
    for event in told:
        if isinstance(event, Worked):
            assert event.seconds >= 0
            moved[event.stage] += event.nbytes
    models = [llama / name / "model.safetensors" for name in ("base", "math", "code", "chat")]
    weights = sum(tensor.nbytes for model in models for tensor in load_file(model).values())
    assert moved["read"] == moved["compute"] == weights
    assert moved["write"] == (out / "model.safetensors").stat().st_size
    [last] = [event for event in told if isinstance(event, Sampled)][-1:]
    assert (last.read_bytes, last.compute_bytes, last.write_bytes) == tuple(
        moved[stage] for stage in ("read", "compute", "write")
    )


def test_a_tensor_tells_its_layer_and_kind(llama: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    work(recipe(llama), tmp_path / "out", emit=told.append)
    places = {event.name: (event.layer, event.kind) for event in told if isinstance(event, TensorDone)}
    assert places["model.layers.1.self_attn.q_proj.weight"] == (1, "self_attn.q_proj")
    assert places["model.embed_tokens.weight"] == (None, "embed_tokens")


@pytest.mark.parametrize("tensors", [0, 3])
def test_run_json_knows_every_run(tensors: int, llama: Path, tmp_path: Path, each_tensor: None) -> None:
    """Also one that failed; the folder of one that had finished nothing is gone, its log with it."""
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        work(recipe(llama, "linear"), out, SHARDS, stopping_after(tensors) if tensors else stop_at_once)
    work(recipe(llama, "linear"), out, SHARDS)
    runs = facts(out)
    assert [run["outcome"] for run in runs] == [*(["failed"] if tensors else []), "finished"]
    last = runs[-1]
    assert last["tensors"]["finished"] == len(tensors_in(out))
    assert (last["tensors"]["earlier"] > 0) == (tensors > 0)
    assert last["ram"]["budget"] > last["ram"]["peak"] > 0
    assert last["phases"].keys() == {"merge", "finish"}
    assert last["bytes"]["write"] > 0


def stop_at_once(event: Event) -> None:
    if isinstance(event, PhaseStarted):
        raise Stopped


def test_a_run_that_was_killed_is_known_as_interrupted(llama: Path, tmp_path: Path, each_tensor: None) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        work(recipe(llama, "linear"), out, SHARDS, stopping_after(4))
    log = out / PRIVATE / LOG
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "run_ended" not in line))
    work(recipe(llama, "linear"), out, SHARDS)
    assert [(run["outcome"], run["exit_code"]) for run in facts(out)] == [("interrupted", -1), ("finished", 0)]


def test_the_log_tells_why_a_run_failed_and_where(
    llama: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    count = iter(range(100))

    def fail(*arguments: Any) -> Any:
        if next(count) == 5:
            raise DiskError("the disk is full", hint="free some space")
        return real(*arguments)

    real = merge._done
    monkeypatch.setattr(merge, "_done", fail)
    with pytest.raises(DiskError):
        work(recipe(llama, "linear"), out, SHARDS)
    ended = logged(out)[0][-1]
    assert isinstance(ended, RunEnded)
    assert (ended.outcome, ended.exit_code, ended.problems) == ("failed", 4, ("the disk is full",))
    assert "in fail" in ended.traceback
    assert facts(out)[0]["problems"] == ["the disk is full"]


def test_fresh_begins_a_new_log(llama: Path, tmp_path: Path, each_tensor: None) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        work(recipe(llama, "linear"), out, SHARDS, stopping_after(4))
    work(recipe(llama, "linear"), out, Options(shard_bytes=SHARDS.shard_bytes, fresh=True))
    assert len(logged(out)) == len(facts(out)) == 1


def test_a_finished_output_is_left_alone(llama: Path, tmp_path: Path) -> None:
    out = work(recipe(llama), tmp_path / "out")
    before = [(out / PRIVATE / name).read_bytes() for name in (LOG, FACTS)]
    work(recipe(llama), out)
    assert [(out / PRIVATE / name).read_bytes() for name in (LOG, FACTS)] == before


def test_each_of_several_outputs_has_its_log(llama: Path, texts: Path, tmp_path: Path) -> None:
    out = work(recipe_of_two(llama, texts), tmp_path / "out")
    shares = []
    for name in ("omega-0.2", "omega-0.6"):
        [run] = facts(out / name)
        assert run["kept"]["outputs"].keys() == {"omega-0.2", "omega-0.6"}
        shares = list(run["kept"]["outputs"].values())
    assert shares[0] < shares[1] < 1, "the smaller omega keeps less"


def recipe_of_two(llama: Path, texts: Path) -> Any:
    return recipe(llama, "ties", density=("0.5",), omega="0.2,0.6", calibration=str(texts))


# --- what is left of the delta ----------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_files_say(llama: Path, texts: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    relaxed = tensors_in(work(aim(llama, texts), tmp_path / "out", emit=told.append))
    plain = tensors_in(work(recipe(llama, "ties", density=("0.5",)), tmp_path / "plain"))
    base = tensors_in(llama / "base")
    checked = 0
    for event in told:
        if isinstance(event, TensorDone) and event.kept:
            before, after = ((model[event.name] - base[event.name]).abs().sum().item() for model in (plain, relaxed))
            assert event.kept == pytest.approx((before, after), rel=1e-4), event.name
            checked += 1
    assert checked > 10
    run = seen((0.0, event) for event in told)
    assert 0.4 < (run.kept_share() or 0) < 1, "omega 0.4 takes 60 % of the delta at most"


def test_a_resumed_merge_knows_what_was_kept_before(
    llama: Path, texts: Path, tmp_path: Path, each_tensor: None
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        work(aim(llama, texts), out, SHARDS, stopping_after(9))
    work(aim(llama, texts), out, SHARDS)
    work(aim(llama, texts), tmp_path / "whole", SHARDS)
    assert facts(out)[-1]["kept"] == facts(tmp_path / "whole")[-1]["kept"]


WAYS = [Options(slice_rows=1), Options(slice_rows=3, threads=1), Options(read="pread")]


@pytest.mark.parametrize("options", others_long(WAYS, (WAYS[1],)))
def test_what_is_kept_does_not_depend_on_how_it_is_computed(
    options: Options, llama: Path, texts: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        work(aim(llama, texts), tmp_path / "whole")
        work(aim(llama, texts), tmp_path / "out", options)
    finally:
        torch.set_num_threads(before)
    assert facts(tmp_path / "out")[-1]["kept"] == facts(tmp_path / "whole")[-1]["kept"]


def test_of_large_tensors_elements_of_every_channel_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of some elements is that of all where rows and columns differ, and for every way to slice."""
    from lowmem_aim.planning.tasks import Task
    from lowmem_aim.relaxing import delta_sampler
    from lowmem_aim.relaxing.delta_sampler import DeltaSampler

    monkeypatch.setattr(delta_sampler, "SAMPLED_ELEMENTS", 500)
    for shape in ((64, 96), (100, 50), (96 * 64,), (4, 16, 96)):
        task = Task("w", shape, torch.float32, "merge", {})
        columns = shape[-1] if len(shape) > 1 else 1
        base = torch.randn(96 * 64 if shape != (100, 50) else 5000, generator=torch.Generator().manual_seed(0))
        base = base.view(-1, columns)
        scale = torch.linspace(0.2, 1.0, columns) if columns > 1 else torch.tensor(0.6)
        delta = torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
        found = []
        for rows in (1, 7, len(base)):
            kept = DeltaSampler(task)
            for first in range(0, len(base), rows):
                part = slice(first, first + rows)
                start = first * columns
                whole = kept.of(base[part] + delta[part], base[part], start)
                kept.add(whole, kept.of(base[part] + delta[part] * scale, base[part], start))
            found.append(kept.sums())
        assert found[0] == found[1] == found[2]
        before, after = found[0]
        assert after / before == pytest.approx(0.6, abs=0.05)
        assert before == pytest.approx(delta.abs().sum().item(), rel=0.15)


# --- while it is at work ----------------------------------------------------------------------------------------------


@pytest.fixture
def quick_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SAMPLE_SECONDS", 0.02)
    monkeypatch.setattr(feed, "PEAK_SECONDS", 0.01)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_pause_holds_the_run_until_it_goes_on(tmp_path: Path, quick_samples: None) -> None:
    told: list[Event] = []

    def held() -> int:
        return sum(isinstance(event, Sampled) for event in told)

    with interrupts.work(), feed.reported("merge", tmp_path, told.append):
        interrupts.toggle_pause()
        until(lambda: Paused(True) in told)
        before = held()
        until(lambda: held() > before + 2)
        interrupts.toggle_pause()
        interrupts.hold()
        until(lambda: Paused(False) in told)


def test_a_paused_merge_reads_nothing_and_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, quick_samples: None
) -> None:
    told: list[Event] = []
    reads = 0

    def emit(event: Event) -> None:
        nonlocal reads
        told.append(event)
        if isinstance(event, Worked):
            reads += event.stage == "read"
            if reads == 3 and event.stage == "read":
                interrupts.toggle_pause()
            interrupts.hold()
        if isinstance(event, Sampled) and interrupts.paused() and event.done == last_done(told):
            interrupts.toggle_pause()

    with interrupts.work():
        out = work(recipe(llama, "linear"), tmp_path / "out", Options(slice_rows=1), emit)
    assert Paused(True) in told
    whole = work(recipe(llama, "linear"), tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def last_done(told: list[Event]) -> float:
    return max((event.done for event in told if isinstance(event, Worked) and event.done is not None), default=0.0)


def test_status_tells_how_a_running_merge_stands(llama: Path, tmp_path: Path, run: Run, each_tensor: None) -> None:
    from lowmem_aim.view.status import status_of

    found = []

    def emit(event: Event) -> None:
        if isinstance(event, TensorDone) and len(found) < 5:
            found.append(status_of(tmp_path / "out"))

    work(recipe(llama, "linear"), tmp_path / "out", SHARDS, emit)
    assert all(status.state == "running" for status in found)
    assert all(status.now.startswith("merge: ") for status in found)
    assert found[-1].now in "\n".join(found[-1].lines())
    assert status_of(tmp_path / "out").now == ""
