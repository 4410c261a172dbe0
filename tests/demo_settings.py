"""Settings of the demo with which its models are made in a second."""

from __future__ import annotations

from lowmem_aim.demo.settings import Settings, Training

TINY = Settings(
    hidden=16,
    layers=2,
    heads=2,
    inner=16,
    base=Training(steps=3, peak_rate=1e-3, batch=4, warmup=1),
    expert=Training(steps=2, peak_rate=1e-3, batch=4, warmup=1),
    shard_size="10KB",
    calibration_texts=8,
)
