"""Calibration sees what a plain forward of the whole model sees, whatever the architecture; one block at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import TEXTS, llama_forward
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoModelForCausalLM

from lowmem_aim.blocks.recorder import CANARY_TOKENS
from lowmem_aim.errors import ModelError
from lowmem_aim.events import Advanced, Event, Notice, PhaseEnded, PhaseStarted, Worked
from lowmem_aim.measuring.mean_activations import mean_activations
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel, load_meta_model
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.tensors import digest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds each model once."""
    made: dict[Any, Path] = {}

    def model(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture, dtype] = tiny.build(architecture, folder, dtype=dtype)
        return made[architecture, dtype]

    return model


def calibrated(
    folder: Path, texts: Sequence[Tensor] = TEXTS, dtype: torch.dtype | None = None, **options: Any
) -> tuple[Activations, MetaModel]:
    with Checkpoint.open(folder) as base:
        meta_model = load_meta_model(base, dtype)
        return mean_activations(base, meta_model, texts, **options), meta_model


class Plain:
    """The whole model in memory, an ordinary forward a text: what calibration must give."""

    def __init__(self, folder: Path, texts: Sequence[Tensor] = TEXTS, dtype: Any = "auto") -> None:
        options = {"dtype": dtype, "experts_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.inputs: dict[str, list[Tensor]] = {}  # parameter -> a mean of |x| per text
        self.experts: dict[str, list[tuple[Tensor, Tensor]]] = {}  # module -> (hidden states, chosen experts)
        for path, module in self.model.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self.see(f"{path}.weight"), with_kwargs=True)
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):  # fused experts, not a linear
                module.register_forward_pre_hook(self.see_experts(path))
        with torch.no_grad():
            for tokens in texts:
                self.model(input_ids=tokens[None], use_cache=False)

    def see(self, parameter: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.inputs.setdefault(parameter, []).append(x.abs().double().flatten(0, -2).mean(0))

        return hook

    def see_experts(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.experts.setdefault(path, []).append((args[0].detach().clone(), args[1].clone()))

        return hook

    def means(self) -> dict[str, Tensor]:
        return {name: (sum(means) / len(means)).float() for name, means in self.inputs.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_means_are_those_of_a_plain_forward_bit_for_bit(architecture: str, models: Callable[..., Path]) -> None:
    notices: list[Event] = []
    found, meta_model = calibrated(models(architecture), emit=notices.append)
    expected = Plain(models(architecture)).means()
    assert not any("instead" in event.text for event in notices if isinstance(event, Notice))
    for parameter, mean in expected.items():
        name = meta_model.weights.name(parameter)
        assert torch.equal(found.means[name].flatten(), mean), name
        weight = meta_model.model.get_parameter(parameter)
        assert torch.broadcast_shapes(found.means[name].shape, weight.shape) == weight.shape
    others = found.means.keys() - {meta_model.weights.name(parameter) for parameter in expected}
    assert all("experts" in name for name in others)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_bfloat16_too(architecture: str, models: Callable[..., Path]) -> None:
    found, meta_model = calibrated(models(architecture, torch.bfloat16))
    for parameter, mean in Plain(models(architecture, torch.bfloat16)).means().items():
        assert torch.equal(found.means[meta_model.weights.name(parameter)].flatten(), mean), parameter
    assert found.dtype == "bfloat16"


def test_another_dtype_than_the_files(models: Callable[..., Path]) -> None:
    folder = models("llama", torch.bfloat16)
    found, _ = calibrated(folder, dtype=torch.float32)
    for parameter, mean in Plain(folder, dtype=torch.float32).means().items():
        assert torch.equal(found.means[parameter].flatten(), mean), parameter
    assert found.dtype == "float32"


# --- mixtures of experts --------------------------------------------------------------------------------------------


def expert_means(plain: Plain, path: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Worked out by hand for gated SiLU experts: each expert's means over texts, into gate/up and into down."""
    module: Any = plain.model.get_submodule(path)
    into_gate: list[Tensor | None] = []
    into_down: list[Tensor | None] = []
    for expert in range(module.gate_up_proj.shape[0]):
        xs = [x[(chosen == expert).any(-1)] for x, chosen in plain.experts[path]]
        xs = [x for x in xs if len(x)]
        inner = [(x @ module.gate_up_proj[expert].T).chunk(2, dim=-1) for x in xs]
        downs = [nn.functional.silu(gate) * up for gate, up in inner]
        into_gate.append(torch.stack([x.abs().double().mean(0) for x in xs]).mean(0).float() if xs else None)
        into_down.append(torch.stack([x.abs().double().mean(0) for x in downs]).mean(0).float() if xs else None)
    return into_gate, into_down


def like(found: Tensor, expected: Tensor | None) -> bool:
    """Within 1e-5: this test multiplies an expert's tokens in another order, and so sums them in another order."""
    if expected is None:
        return not found.any()
    return torch.allclose(found.flatten(), expected.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight w1 w3 w2"),
        ("qwen3_moe", "model.layers.{}.mlp.experts.{}.{}.weight gate_proj up_proj down_proj"),
        ("deepseek_v3", "model.layers.{}.mlp.experts.{}.{}.weight gate_proj up_proj down_proj"),
    ],
)
def test_each_expert_has_the_means_of_its_own_tokens(
    architecture: str, names: str, models: Callable[..., Path]
) -> None:
    found, _ = calibrated(models(architecture))
    plain = Plain(models(architecture))
    name, gate, up, down = names.split()
    assert plain.experts
    for path in plain.experts:
        into_gate, into_down = expert_means(plain, path)
        layer = path.split(".")[2]
        for expert, (x, y) in enumerate(zip(into_gate, into_down, strict=True)):
            mean = found.means[name.format(layer, expert, gate)]
            assert mean.shape[0] == 1
            assert like(mean, x)
            assert torch.equal(mean, found.means[name.format(layer, expert, up)])
            assert like(found.means[name.format(layer, expert, down)], y)


def test_experts_stored_fused_and_transposed_get_one_row_an_expert(models: Callable[..., Path]) -> None:
    found, _ = calibrated(models("gpt_oss"))
    plain = Plain(models("gpt_oss"))
    for path in plain.experts:
        mean = found.means[f"{path}.gate_up_proj"]
        assert mean.shape == (4, 32, 1)
        assert found.means[f"{path}.down_proj"].shape == (4, 48, 1)
        for expert, x in enumerate(expert_tokens(plain, path)):
            assert like(mean[expert], x)


def expert_tokens(plain: Plain, path: str) -> list[Tensor | None]:
    means: list[Tensor | None] = []
    for expert in range(4):
        xs = [x[(chosen == expert).any(-1)] for x, chosen in plain.experts[path]]
        kept = [x.abs().double().mean(0) for x in xs if len(x)]
        means.append(torch.stack(kept).mean(0).float() if kept else None)
    return means


def test_an_expert_that_no_token_reaches_is_zero_and_told(models: Callable[..., Path]) -> None:
    notices: list[Event] = []
    found, _ = calibrated(models("mixtral"), [TEXTS[1][:1]], emit=notices.append)  # one token: 2 of 4 experts
    assert len(found.unreached_experts) == tiny.LAYERS * 2 * 3
    for name in found.unreached_experts:
        assert ".experts." in name
        assert not found.means[name].any()
    told = [event.text for event in notices if isinstance(event, Notice)]
    assert len(told) == 1
    assert "reaches 18 weights of experts" in told[0]


# --- the canary and what follows it ---------------------------------------------------------------------------------


def remembering(original: Any) -> Any:
    """A block that adds what the block before it left behind."""
    memory: dict[str, Tensor] = {}

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        output = original(self, hidden_states, **kwargs)
        left, memory["mean"] = memory.get("mean"), output.mean()
        return output if left is None or self.self_attn.layer_idx == 0 else output + left

    return forward


def agrees(folder: Path, notices: list[Event]) -> list[str]:
    """Calibrate, assert that the means are the plain forward's; returns the warnings that were given."""
    found, _ = calibrated(folder, emit=notices.append)
    expected = Plain(folder).means()
    assert expected.keys() == found.means.keys()
    for parameter, mean in expected.items():
        assert torch.equal(found.means[parameter].flatten(), mean), parameter
    done = [event for event in notices if isinstance(event, Advanced)]
    assert [event.done for event in done] == [1, 2, 3]
    return [event.text for event in notices if isinstance(event, Notice)]


def test_the_canary_catches_work_between_blocks(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    # In place, so that only the canary can see it.
    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden.mul_(1.25)))
    warnings = agrees(models("llama"), [])
    assert len(warnings) == 1
    assert "before model.layers" in warnings[0]
    assert "every sequence instead" in warnings[0]


def test_modules_before_and_between_blocks_are_counted_in_lock_step(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        self.norm(self.embed_tokens(input_ids))
        return llama_forward(lambda hidden: hidden + self.norm(hidden))(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    assert len(agrees(models("llama"), [])) == 1


def test_work_between_blocks_of_long_texts_only_is_caught_without_the_canary(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    grow = llama_forward(lambda hidden: hidden * 1.25 if hidden.shape[1] > CANARY_TOKENS else hidden)
    monkeypatch.setattr(LlamaModel, "forward", grow)
    assert "works on the hidden state between blocks" in "".join(agrees(models("llama"), []))


def test_blocks_called_twice_are_paged_in_as_they_are_called(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden, rounds=2))
    notices: list[Event] = []
    warnings = agrees(models("llama"), notices)
    assert ["once each" in text or "more than once" in text for text in warnings] == [True, True]
    assert "for every sequence instead, which takes longer" in warnings[1]


def test_blocks_that_remember_are_caught_twice_and_paged(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(LlamaDecoderLayer, "forward", remembering(LlamaDecoderLayer.forward))
    assert len(agrees(models("llama"), [])) == 2


def test_blocks_may_return_tuples(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    own = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *a, **k: (own(self, *a, **k), None))
    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden, tuples=True))
    assert agrees(models("llama"), []) == []


# --- one block at a time, each weight once --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_each_weight_is_read_once_and_embeddings_and_head_never(
    architecture: str, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    rows: dict[str, set[int]] = {}
    whole, some = Checkpoint.tensor, Checkpoint.rows

    def tensor(self: Checkpoint, name: str) -> Tensor:
        reads.append(name)
        return whole(self, name)

    def part(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        rows.setdefault(name, set()).update(range(start, stop))
        return some(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    monkeypatch.setattr(Checkpoint, "rows", part)
    found, meta_model = calibrated(models(architecture))
    names = set(meta_model.weights.checkpoint.tensors)
    assert sorted(reads) == sorted(names - meta_model.embeddings - meta_model.vocabulary)
    assert rows.keys() == meta_model.embeddings
    tokens = next(iter(meta_model.embeddings & meta_model.vocabulary))
    assert rows[tokens] == {int(token) for text in TEXTS for token in text}
    assert found.base_digests.keys() == set(reads)


def test_the_digests_are_those_of_the_files(models: Callable[..., Path]) -> None:
    found, _ = calibrated(models("qwen3"))
    with Checkpoint.open(models("qwen3")) as base:
        for name, value in found.base_digests.items():
            assert value == digest(base.tensor(name))
    assert found.sequences == 3
    assert found.tokens == sum(map(len, TEXTS))


def test_the_tokens_digest_sees_where_texts_end(models: Callable[..., Path]) -> None:
    one = calibrated(models("llama"), [TEXTS[1]])[0]
    two = calibrated(models("llama"), [TEXTS[1][:4], TEXTS[1][4:]])[0]
    assert one.tokens == two.tokens
    assert one.tokens_digest != two.tokens_digest


def test_only_one_block_has_weights_at_a_time(models: Callable[..., Path]) -> None:
    with Checkpoint.open(models("llama")) as base:
        meta_model = load_meta_model(base)
        real: list[set[str]] = []

        def watch(event: Event) -> None:
            if isinstance(event, Advanced):
                real.append({name for name, value in meta_model.model.named_parameters() if not value.is_meta})

        mean_activations(base, meta_model, TEXTS, emit=watch)
    assert real == [{"model.norm.weight"}] * tiny.LAYERS


def test_events_tell_blocks(models: Callable[..., Path]) -> None:
    events: list[Event] = []
    calibrated(models("llama"), emit=events.append)
    blocks = [Advanced(index + 1, f"model.layers.{index}") for index in range(tiny.LAYERS)]
    told = [event for event in events if not isinstance(event, Worked)]
    assert told == [PhaseStarted("calibrate", tiny.LAYERS, "blocks"), *blocks, PhaseEnded("calibrate")]


# --- nothing is left behind -----------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[str]:
    left = [name for name, value in model.named_parameters() if not value.is_meta]
    for path, module in model.named_modules():
        hooked = module._forward_pre_hooks or module._forward_hooks or hasattr(module, "_hf_hook")
        if hooked or "forward" in vars(module):
            left.append(path)
    left += [thread.name for thread in threading.enumerate() if "_body" in thread.name]
    return left + [str(mode) for mode in _get_current_function_mode_stack()]


class Stop(Exception):
    pass


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_no_hook_thread_or_mode_stays_behind(architecture: str, models: Callable[..., Path]) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Advanced):
            raise Stop

    random = torch.get_rng_state()
    with Checkpoint.open(models(architecture)) as base:
        meta_model = load_meta_model(base)
        with pytest.raises(Stop):
            mean_activations(base, meta_model, TEXTS, emit=stop)
        assert traces(meta_model.model) == []
        first = mean_activations(base, meta_model, TEXTS)
        assert traces(meta_model.model) == []
        again = mean_activations(base, meta_model, TEXTS)
    assert torch.is_grad_enabled()
    assert torch.equal(random, torch.get_rng_state())
    assert first.means.keys() == again.means.keys()
    assert all(torch.equal(first.means[name], again.means[name]) for name in first.means)


def test_the_result_can_be_saved(models: Callable[..., Path], tmp_path: Path) -> None:
    found, _ = calibrated(models("mixtral"))  # gate and up share their statistic: not their memory
    found.save(tmp_path / "a.safetensors")
    loaded = Activations.load(tmp_path / "a.safetensors")
    assert loaded.base_digests == found.base_digests
    assert all(torch.equal(loaded.means[name], found.means[name]) for name in found.means)


# --- names ----------------------------------------------------------------------------------------------------------


def test_gpt2_as_published_without_prefix(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("gpt2"), tmp_path / "gpt2", scale=0)
    tiny.rename(folder, lambda name: name.removeprefix("transformer."))
    found, _ = calibrated(folder)
    prefixed, _ = calibrated(models("gpt2"))
    assert found.means.keys() == {name.removeprefix("transformer.") for name in prefixed.means}
    assert all(torch.equal(found.means[n.removeprefix("transformer.")], mean) for n, mean in prefixed.means.items())
    assert found.means["h.0.attn.c_attn.weight"].shape == (32, 1)
    assert found.tied == {"lm_head.weight": "wte.weight"}


def test_a_tied_head_has_its_statistic_under_its_own_name(models: Callable[..., Path]) -> None:
    found, meta_model = calibrated(models("qwen2"))
    assert "lm_head.weight" not in meta_model.weights.checkpoint.tensors
    assert found.means["lm_head.weight"].shape == (1, 32)
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}


# --- bad input ------------------------------------------------------------------------------------------------------


def test_inputs_that_overflow_name_their_module(models: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.perturbed(models("llama"), tmp_path / "broken", scale=0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"`model\.layers\.1\.mlp\.down_proj` overflow"):
        calibrated(folder)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no calibration text"),
        ([torch.tensor([], dtype=torch.int64)], "sequence 0 is not"),
        ([torch.tensor([[1, 2]])], "sequence 0 is not"),
        ([TEXTS[0], torch.tensor([1.0])], "sequence 1 is not"),
        ([torch.tensor([tiny.VOCAB])], "id 264 is beyond the 264 rows of `transformer.wte.weight`"),
        ([torch.zeros(129, dtype=torch.int64)], "id 128 is beyond the 128 rows of `transformer.wpe.weight`"),
    ],
)
def test_texts_that_the_model_cannot_take(texts: list[Tensor], message: str, models: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=message):
        calibrated(models("gpt2"), texts)
