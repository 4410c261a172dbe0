"""Every number that the demo's models depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The text of these files decides what the models are, so it is in the digest: edited files need new models.
_SOURCES = ("skills.py", "tokenizer.py", "train.py")


@dataclass(frozen=True)
class Training:
    """The length and the rate of one training."""

    steps: int
    peak_rate: float
    batch: int  # examples a step
    warmup: int  # steps


@dataclass(frozen=True)
class Settings:
    """All settings of the demo. The defaults are sized for two CPU cores and four minutes, everything included.

    The base stops while it is still mediocre, so that there is something to gain. The experts learn at a low rate and
    keep a share of the base's mixture: experts tuned hard on one skill forget the others, and then a comparison of
    merges can only show that less merging is better.
    """

    seed: int = 0
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 512
    base: Training = field(default_factory=lambda: Training(steps=500, peak_rate=3e-3, batch=32, warmup=60))
    expert: Training = field(default_factory=lambda: Training(steps=200, peak_rate=1e-3, batch=32, warmup=20))
    kept_mixture: float = 0.3  # share of an expert's texts that is drawn as the base's were
    threads: int = 2  # the result's low bits depend on it, so it is not left to the machine
    shard_size: str = "2MB"  # small, so that the checkpoints really are sharded
    calibration_texts: int = 256

    def digest(self) -> str:
        """A digest of all that decides what the models are, up to the machine and the version of torch."""
        sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _SOURCES]
        return hashlib.sha256(json.dumps([asdict(self), sources], sort_keys=True).encode()).hexdigest()


# Models to try merges on, trained for some twenty seconds on two cores: they have learnt little, which does not matter.
QUICK = Settings(
    base=Training(steps=80, peak_rate=3e-3, batch=32, warmup=10),
    expert=Training(steps=20, peak_rate=1e-3, batch=32, warmup=5),
)
