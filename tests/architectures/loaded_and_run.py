"""Merges of dense, mixture, hybrid, vision-language and encoder models, loaded and run by transformers.

    python tests/architectures/loaded_and_run.py [MODEL_TYPE ...]

Each is built tiny, by a shrunk config, and saved with two experts of it. The merge by task arithmetic must

- give the same bytes without a budget, and in the smallest budget, killed in the middle and resumed;
- be loaded by transformers without missing, unexpected or mismatched keys, as a model whose every tensor is the sum
  that is computed of the loaded models' tensors in memory;
- run: tokens, and a picture where the model takes one, give finite numbers.

A merge by ties with AIM follows, loaded and run the same; it must move no weight further than the same merge without
AIM does, and leave at least the part omega of each move. Of encoders it must be refused. The exit code is 1 if anything
is wrong.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402
import plain  # noqa: E402
import pytest  # noqa: E402
import reading_here  # noqa: E402
import shrinking  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from merge_cases import digests  # noqa: E402
from small_merges import SCALES, short, tensors_in, texts_in  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from workers import in_processes  # noqa: E402

import lowmem_aim  # noqa: E402
from lowmem_aim.errors import LowmemAimError, MemoryBudgetError  # noqa: E402
from lowmem_aim.events import Event, TensorDone  # noqa: E402
from lowmem_aim.system.options import Options  # noqa: E402

# By kind: the class that loads the models, and their types.
KINDS: Mapping[str, tuple[Any, str]] = {
    "dense": (
        AutoModelForCausalLM,
        "llama qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neox mistral olmo2 glm4 cohere2 starcoder2 falcon bloom "
        "opt stablelm",
    ),
    "mixture": (AutoModelForCausalLM, "mixtral qwen3_moe deepseek_v3 gpt_oss olmoe granitemoe"),
    "hybrid": (AutoModelForCausalLM, "qwen3_next jamba bamba falcon_h1 mamba2 lfm2"),
    "vision": (
        AutoModelForImageTextToText,
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 mistral3 llava gemma3 paligemma internvl aya_vision idefics3",
    ),
    "encoder": (AutoModelForMaskedLM, "bert roberta deberta-v2 distilbert modernbert"),
    "seq2seq": (AutoModelForSeq2SeqLM, "t5 bart"),
}
EXPERTS = ("math", "code")
WEIGHTS = (0.7, 0.4)
TOKENS = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]])
SHARDS = 60_000  # bytes: several to a model
SLICE = 5  # rows, that divide few tensors


def main() -> int:
    chosen = sys.argv[1:] or [name for _, names in KINDS.values() for name in names.split()]
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    reading_here.read_here()
    wrong, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="architectures-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        for result in in_processes(check, chosen, Path(scratch)):
            wrong += result.outcome == "wrong"
            print(f"{kind_of(result.model_type):8} {result.model_type:16} {result.outcome:6} {result.text}", flush=True)
    print(f"\n{len(chosen)} architectures, {wrong} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def kind_of(model_type: str) -> str:
    """The kind that lists the model type; of one that none lists, a kind whose class has it."""
    listed = [kind for kind, (_, names) in KINDS.items() if model_type in names.split()]
    having = [k for k in reversed(KINDS) if model_type in KINDS[k][0]._model_mapping._model_mapping]
    return [*listed, *having, "dense"][0]


def check(model_type: str, folder: Path) -> tuple[str, str]:
    """The outcome for one model type, and a text about it."""
    try:
        return "right", "; ".join(Case(model_type, kind_of(model_type), folder).steps())
    except (AssertionError, LowmemAimError, pytest.fail.Exception) as error:
        return "wrong", short(error)
    except Exception as error:
        return "wrong", f"crashed: {short(error)}"


@dataclass
class Case:
    """The merges of one model type, in a folder of their own."""

    model_type: str
    kind: str
    folder: Path

    def steps(self) -> Iterator[str]:
        """Yield what was seen of each step. Raises AssertionError for what is wrong."""
        self.save()
        self.merge("whole", self.arithmetic())
        yield self.killed_and_resumed()
        merged = self.load("whole")
        yield self.compared(merged)
        yield self.run(merged)
        yield self.relaxed()

    # -- models

    @property
    def auto(self) -> Any:
        """transformers' class that loads the models."""
        return KINDS[self.kind][0]

    def save(self) -> None:
        """Save a random base, and experts of it."""
        torch.manual_seed(0)
        model = self.auto.from_config(shrinking.shrunk_config(self.model_type))
        tiny.spread(model)
        for name, scale in zip(("base", *EXPERTS), (0.0, *SCALES), strict=True):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += scale * torch.randn(parameter.shape)
            model.save_pretrained(self.folder / name)
            tiny.tokenizer().save_pretrained(self.folder / name)

    def load(self, name: str) -> Any:
        """A model as transformers loads it. Raises AssertionError for keys that are missing, or too many."""
        model, keys = self.auto.from_pretrained(self.folder / name, output_loading_info=True, dtype=torch.float32)
        odd = {kind: sorted(found)[:2] for kind, found in keys.items() if found}
        assert not odd, f"transformers loads `{name}` with {odd}"
        return model.eval()

    # -- merges

    def recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        models = [
            {"model": str(self.folder / name), "parameters": {"weight": weight, **parameters}}
            for name, weight in zip(EXPERTS, WEIGHTS, strict=True)
        ]
        return {"merge_method": method, "base_model": str(self.folder / "base"), "models": models}

    def arithmetic(self) -> dict[str, Any]:
        return self.recipe("task_arithmetic")

    def merge(self, name: str, recipe: dict[str, Any], on_event: Any = None, **options: Any) -> Path:
        return lowmem_aim.merge(recipe, self.folder / name, Options(shard_bytes=SHARDS, **options), on_event)

    def smallest_budget(self) -> int:
        """The bytes that a refusal of a smaller budget names."""
        with pytest.raises(MemoryBudgetError) as refused:
            self.merge("refused", self.arithmetic(), ram=1)
        named = re.search(r"--ram (\d+)MB", refused.value.hint)
        assert named, refused.value.hint
        return int(named[1]) * 10**6

    def killed_and_resumed(self) -> str:
        """Merge in the smallest budget, killed when half of the tensors are done, and resumed: the same bytes."""
        small = {"ram": self.smallest_budget(), "slice_rows": SLICE}
        half = len(tensors_in(self.folder / "base")) // 2
        process = os.fork()
        if not process:
            try:
                self.merge("resumed", self.arithmetic(), killing_after(half), **small)
            finally:
                os._exit(0)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), f"the merge to be killed ended with status {status}"
        assert not (self.folder / "resumed" / "config.json").exists(), "a killed merge left a model"
        self.merge("resumed", self.arithmetic(), **small)
        assert digests(self.folder / "resumed") == digests(self.folder / "whole"), "other bytes once resumed"
        return f"killed after {half} tensors, resumed"

    def compared(self, merged: Any) -> str:
        """Compare a loaded merge, tensor by tensor, with the sum of the loaded models'."""
        base, *experts = (self.load(name).state_dict() for name in ("base", *EXPERTS))
        for name, value in merged.state_dict().items():
            if value.is_floating_point() and value.numel():
                deltas = [
                    weight * (expert[name].double() - base[name].double())
                    for weight, expert in zip(WEIGHTS, experts, strict=True)
                ]
                expected = base[name].double() + sum(deltas)
                distance = float((value.double() - expected).abs().max())
                assert distance <= 1e-6 * float(expected.abs().max()), f"`{name}` is {distance:.1e} off"
            else:
                assert value.equal(base[name]), f"`{name}` is not the base's"
        return f"{len(base)} tensors"

    def run(self, model: Any) -> str:
        """Run a forward. Raises AssertionError if an output is not finite."""
        inputs = {"input_ids": TOKENS}
        with torch.no_grad():
            if self.kind == "vision":
                inputs = pictures.with_picture(model)
            if self.kind == "seq2seq":
                inputs["decoder_input_ids"] = TOKENS
            logits = model(**inputs).logits
        assert logits.isfinite().all(), "not all outputs are finite"
        return "ran with a picture" if self.kind == "vision" else "ran"

    def relaxed(self) -> str:
        """Merge by ties, with AIM and without, and compare; of encoders, plan and merge must refuse AIM."""
        ties = self.recipe("ties", density=plain.DENSITY)
        aim = {"omega": plain.OMEGA, "calibration": texts_in(self.folder), "pack": False, "dtype": "float32"}
        problems = lowmem_aim.plan(ties | {"aim": aim}, self.folder / "relaxed", measure=False).problems
        if problems:
            assert self.kind in ("encoder", "seq2seq"), problems
            with pytest.raises(LowmemAimError, match="it is an encoder, or has one"):
                self.merge("relaxed", ties | {"aim": aim})
            return "AIM refused"
        self.merge("relaxed", ties | {"aim": aim})
        self.run(self.load("relaxed"))
        self.merge("ties", ties)
        return f"AIM moved {self.between()} tensors"

    def between(self) -> int:
        """The number of tensors that AIM has changed, each by a factor of omega to 1. Raises AssertionError."""
        base, ties, relaxed = (tensors_in(self.folder / name) for name in ("base", "ties", "relaxed"))
        assert relaxed.keys() == ties.keys()
        for name, value in ties.items():
            whole, part = value.double() - base[name].double(), relaxed[name].double() - base[name].double()
            rounding = 2e-7 * float(value.double().abs().max()) if value.numel() else 0.0
            inside = (part * whole.sign() <= whole.abs() + rounding) & (
                part * whole.sign() >= plain.OMEGA * whole.abs() - rounding
            )
            assert inside.all(), f"`{name}` with AIM lies outside of what omega allows"
        changed = sum(not value.equal(relaxed[name]) for name, value in ties.items())
        assert changed > 3, "AIM has changed next to nothing"
        return changed


def killing_after(tensors: int) -> Any:
    """An `on_event` that ends its process by SIGKILL when so many tensors are done."""
    left = [tensors]

    def on_event(event: Event) -> None:
        if isinstance(event, TensorDone):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return on_event


if __name__ == "__main__":
    sys.exit(main())
