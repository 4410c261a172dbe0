"""Events of a made-up merge, for whatever shows a run: its start, its plan, a sample, tensors that are done."""

from __future__ import annotations

from dataclasses import replace

from lowmem_aim.events import Event, Planned, RunStarted, Sampled, TensorDone

MB = 1_000_000
STARTED = RunStarted("merge", "out", "lowmem-aim merge recipe.yml out", "1.0", 1, "2026-01-01T00:00:00+00:00")
PLANNED = Planned("ties + AIM", ("merge", "finish"), "cpu", 2, 1000 * MB, tensors=4, layers={"": 1, "0": 2, "1": 1})
SAMPLE = Sampled(0.0, "", (), 0, 0, 0, 0.0, 0.0, 0.0, 300 * MB, 350 * MB, 10 * MB, None, None, 10**12)


def tensor(
    name: str,
    layer: int | None,
    done: float,  # bytes, of the whole phase
    kept: tuple[float, float] | None = None,  # sums of |delta| before and after the relaxation
    **more: object,  # other fields of the event
) -> Event:
    """A tensor that is done: a q_proj of a layer, or a norm outside the layers."""
    event = TensorDone(name, (2, 2), "float32", "merge", layer, "q_proj" if layer is not None else "norm", done, kept)
    return replace(event, **more)  # type: ignore[arg-type]
