"""transformers' model of a checkpoint, without its weights: modules, blocks, and the role of each tensor.

Parameters are on the meta device, buffers are real. transformers gets a vetted config.json and nothing else: code
that a checkpoint brings along (`auto_map`) is never executed. If transformers has the model type itself, its own class
is used and `auto_map` ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.pytorch_utils import Conv1D

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.parameter_names import ParameterNames, float_bytes
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.sections import divisions
from lowmem_aim.models.transformers_config import config_of_transformers, short
from lowmem_aim.system.memory import is_allocation_failure

transformers.utils.logging.set_verbosity_error()  # what users need comes as a Notice

# In every forward pass of this project and its tests: torch's fused attention if the model has it, and experts one by
# one in Python, the only form that shows the inputs of each expert.
ATTENTION, EXPERTS = "sdpa", "eager"
# transformers' classes of models that continue a text, and further ones, whose tensors can be merged. Of those whose
# weights a checkpoint holds, the checkpoint's is the one that leaves the fewest of its tensors, or else the first.
_DECODERS: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
_CLASSES: tuple[Any, ...] = (*_DECODERS, AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModel)


@dataclass(frozen=True)
class MetaModel:
    """A model without weights, with its blocks and the roles of its tensors.

    Tensor names are the checkpoint's; a tensor that the file lacks (a tied head) has transformers' name.
    """

    model: Any  # a PreTrainedModel, in eval mode
    dtype: torch.dtype  # of the parameters, but for those that the model keeps in float32
    blocks: list[tuple[str, nn.Module]]  # ("model.layers.0", module), in the order of `num_hidden_layers`
    weights: ParameterNames
    head: str  # the output head's module path, "" if there is none
    tied: dict[str, str]  # output head's weight -> embedding's weight that it shares, if the config ties them
    vocabulary: frozenset[str]  # one row a token: embeddings, head weight, head bias
    embeddings: frozenset[str]  # weights of token, position and other embeddings
    buffers: frozenset[str]  # state that is no parameter, today's or an older model's
    inputs_first: frozenset[str]  # weights (in, out), not (out, in): embeddings, GPT-2's linears, some fused experts
    optional: frozenset[str] = frozenset()  # the model loads without them: no place for them, or it makes its own
    continues_text: bool = True  # False: an encoder, or a model that has one

    def roles(self) -> TensorRoles:
        """The roles of the tensors, which are all that merging needs of this model."""
        layers, after = _stack(self.model, self.blocks, self.weights)
        part = self.model.get_submodule(self.head) if self.head else nn.Module()
        head = frozenset(self.weights.name(f"{self.head}.{name}") for name, _ in part.named_parameters())
        lists = {path.rpartition(".")[0] for path, _ in self.blocks}
        found = divisions(self.model, self.weights, self.decoder, self.head, lists.pop() if len(lists) == 1 else "")
        return TensorRoles(
            tied=self.tied,
            vocabulary=self.vocabulary,
            buffers=self.buffers,
            inputs_first=self.inputs_first,
            layers=layers,
            after_layers=after,
            head=head,
            optional=self.optional - head,
            divisions=found,
        )

    def require_blocks(self) -> None:
        """Raise ModelError if no list of blocks was found: then the model can be merged, but not run block by block."""
        why = "beside its token embedding there is no list of layers of one class" if not self.blocks else ""
        if not self.continues_text:
            why = "it is an encoder, or has one, and only models that continue a text are run"
        if why:
            shown = printable(self.weights.checkpoint.label)
            kind = printable(str(self.model.config.model_type))
            raise ModelError(
                f"`{shown}` (model type `{kind}`) cannot be run block by block: {why}",
                hint="leave `aim:` and `acm:` out (`--omega`, `--theta`), and texts of experts: a merge without them "
                "runs no model",
            )

    @property
    def has_head(self) -> bool:
        """Whether the checkpoint holds the output head's weight, as it is or tied: a reward model's does not."""
        return bool(self.head and self.weights.sources(f"{self.head}.weight"))

    @property
    def decoder(self) -> str:
        """The path of the smallest part of the model that has the token embedding and all blocks; "" if it is all."""
        tokens = _path_of(self.model, _tokens_of(self.model))
        parts = [path.split(".") for path in (tokens, *(path for path, _ in self.blocks))]
        common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
        return ".".join(names[0] for names in common)


def load_meta_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> MetaModel:
    """Build the model of `checkpoint` without weights, in `dtype` (default: the one that most of its bytes have).

    Raises ModelError for a model type that transformers does not have, or has only through code in the folder, for a
    model that no auto class has, for shapes that contradict the config, and for missing tensors.
    """
    dtype = dtype or _main_dtype(checkpoint)
    config = config_of_transformers(checkpoint.config, checkpoint.label)
    fitting = [kind for kind in _CLASSES if type(config) in kind._model_mapping] or [AutoModelForCausalLM]
    errors: list[ModelError] = []
    found: list[MetaModel] = []
    for kind in fitting:
        if found and (kind is AutoModel or not _passed_over(found[0])):
            break
        try:
            found.append(_of_class(kind, deepcopy(config), checkpoint, dtype))  # BART's decoder alone would change it
        except ModelError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return min(found, key=_passed_over)


def _passed_over(found: MetaModel) -> int:
    """The number of tensors that the model has no place for: some classes for text alone pass over a whole tower."""
    return len(found.weights.unused - found.buffers)


def _of_class(kind: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> MetaModel:
    model = _build(kind, config, checkpoint, dtype)
    weights = ParameterNames(model, checkpoint)
    _require_weights(model, weights, checkpoint)
    head, buffers = _path_of(model, _head_of(model)), frozenset(_buffers(model, weights))
    return MetaModel(
        continues_text=kind in _DECODERS and not getattr(model.config, "is_encoder_decoder", False),
        model=model,
        dtype=dtype,
        blocks=find_blocks(model),
        weights=weights,
        head=head,
        tied=_tied(model, weights, head),
        vocabulary=frozenset(_vocabulary(model, weights, head)),
        embeddings=frozenset(weights.name(f"{path}.weight") for path, _ in embeddings_of(model)),
        buffers=buffers,
        optional=frozenset(_optional(model, weights)) - buffers,
        inputs_first=frozenset(_inputs_first(model, weights)),
    )


def embeddings_of(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """(module path, module) of every embedding: token, position, per-layer."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding))


def find_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """(module path, block) of each decoder block; empty for a model that can be merged, but not calibrated.

    The blocks are the items of the list that is as long as the config's layers and whose items transformers declares
    indivisible. Models without such a list (LongCat-Flash counts each layer twice, older ones declare nothing) have
    their blocks in the longest list of one class; lists of that class beside it belong to it (HRM has two). Of several
    such lists the one nearest to the token embedding counts: a vision tower's never is.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    kinds = set(model._no_split_modules or ())
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    alike = {path: part for path, part in lists.items() if len({type(item) for item in part}) == 1}
    declared = {
        path: part
        for path, part in lists.items()
        if len(part) == count and all(kinds & {parent.__name__ for parent in type(item).__mro__} for item in part)
    }
    embedding = _path_of(model, _tokens_of(model))
    near = _nearest(embedding, declared) or _nearest(embedding, alike)
    kind = type(max(near.values(), key=len)[0]) if near else None
    chosen = [path for path, part in near.items() if type(part[0]) is kind]
    return [(f"{path}.{index}", block) for path in chosen for index, block in enumerate(near[path])]


def _nearest(embedding: str, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """The outermost lists in the smallest part of the model that holds the embedding and a list."""
    while embedding:
        embedding = embedding.rpartition(".")[0]
        inside = {path: part for path, part in lists.items() if not embedding or path.startswith(f"{embedding}.")}
        depth = min((path.count(".") for path in inside), default=0)
        if inside:
            return {path: part for path, part in inside.items() if path.count(".") == depth}
    return {}


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    totals = float_bytes(checkpoint)
    return max(totals, key=lambda dtype: totals[dtype]) if totals else torch.float32


def _build(kind: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    try:
        model = _from_config(kind, config, dtype)
    except Exception as error:  # transformers raises ValueError, KeyError, ImportError, its validators' own, ...
        if is_allocation_failure(error):
            raise
        raise ModelError(
            f"transformers cannot build `{printable(checkpoint.label)}` (model type "
            f"`{printable(str(config.model_type))}`): {short(error)}",
            hint="does its config.json belong to it? Without `aim:`, `acm:` and `solve:` a merge runs no model",
        ) from error
    _keep_float32(model, dtype)
    model.requires_grad_(False)
    return model.eval()


def _from_config(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    def build(attention: str) -> Any:
        # Fork the generator: weight initialisation may draw random numbers, which must not touch the caller's.
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            return kind.from_config(
                config,
                trust_remote_code=False,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation=EXPERTS,
            )

    try:
        return build(ATTENTION)
    except ValueError:  # a model without it (gpt-oss: attention sinks)
        return build("eager")


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Keep in float32 those parameters that transformers keeps so on loading, whatever the model's dtype."""
    plan = model._get_dtype_plan(dtype)
    kept = [(re.compile(pattern.replace("*", ".*")), kind) for pattern, kind in plan.items()]
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            kinds = [kind for pattern, kind in kept if pattern.search(f"{path}.{name}")]
            if value is not None and kinds:
                module._parameters[name] = nn.Parameter(value.to(kinds[0]), requires_grad=False)


def _require_weights(model: Any, weights: ParameterNames, checkpoint: Checkpoint) -> None:
    optional = _made_by(model)
    head = _path_of(model, _head_of(model))
    missing = [
        name
        for name, _ in model.named_parameters()
        if not weights.sources(name)
        and not (head and name.startswith(f"{head}."))  # a base model's checkpoint has no head; we never load it
        and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        shown = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ModelError(
            f"`{printable(checkpoint.label)}` lacks {len(missing)} tensors of its model: {shown}",
            "is the download complete?",
        )


def _made_by(model: Any) -> list[re.Pattern[str]]:
    """Patterns of the parameters that a model makes itself, if a checkpoint lacks them."""
    return [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((path for path, module in model.named_modules() if module is wanted), "")


def _tokens_of(model: Any) -> nn.Module | None:
    """The embedding of tokens; None for a model that reads no tokens, of which transformers raises something."""
    with contextlib.suppress(Exception):
        return model.get_input_embeddings()  # type: ignore[no-any-return]
    return None


def _head_of(model: Any) -> nn.Module | None:
    with contextlib.suppress(Exception):
        return model.get_output_embeddings()  # type: ignore[no-any-return]
    return None


def _tied(model: Any, weights: ParameterNames, head: str) -> dict[str, str]:
    pairs = model.all_tied_weights_keys.items()
    return {weights.name(target): weights.name(source) for target, source in pairs if target == f"{head}.weight"}


def _vocabulary(model: Any, weights: ParameterNames, head: str) -> Iterator[str]:
    tokens = _tokens_of(model)
    for path, module in embeddings_of(model):
        # The input embedding, and per-layer ones such as Gemma 3n's; not GPT-2's positions, even if they are as many.
        as_many = isinstance(tokens, nn.Embedding) and module.num_embeddings == tokens.num_embeddings
        if module is tokens or ("embed_tokens" in path and as_many):
            yield weights.name(f"{path}.weight")
    if head:
        for name in ("weight", "bias"):
            if getattr(model.get_submodule(head), name, None) is not None:
                yield weights.name(f"{head}.{name}")


def _stack(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], weights: ParameterNames
) -> tuple[str, frozenset[str]]:
    """(what the names of all tensors in the blocks begin with, the tensors after the blocks).

    Empty if the blocks are in several lists, or their tensors are not filed by the numbers of the blocks.
    """
    lists = {f"{path.rpartition('.')[0]}." for path, _ in blocks}
    prefixes, after = set(), list[str]()
    for path, _ in model.named_parameters():
        inside = next((block for block in lists if path.startswith(block)), "")
        if inside:
            number = path.removeprefix(inside).partition(".")[0]
            prefixes.add(re.split(rf"(?:^|(?<=\.)){number}\.", weights.name(path), maxsplit=1)[0])
            after.clear()
        else:
            after.append(weights.name(path))
    return (prefixes.pop(), frozenset(after)) if len(lists) == len(prefixes) == 1 else ("", frozenset())


# Modules with matrices (in, out) that lack transformers' mark of such, `is_transposed`.
_TRANSPOSED = frozenset({"Llama4TextExperts", "RecurrentGemmaRglru"})


def inputs_come_first(module: nn.Module) -> bool:
    """Whether the stacked matrices of a module are (in, out), not (out, in)."""
    # transformers marks fused experts that are stored so.
    return bool(getattr(module, "is_transposed", False)) or type(module).__name__ in _TRANSPOSED


def _inputs_first(model: Any, weights: ParameterNames) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | Conv1D):
            yield weights.name(f"{path}.weight")
        elif inputs_come_first(module):
            yield from (weights.name(f"{path}.{name}") for name, p in module._parameters.items() if p is not None)


def _optional(model: Any, weights: ParameterNames) -> Iterator[str]:
    """Checkpoint tensors that the model loads without: it has no place for them, or makes its own."""
    yield from weights.unused
    patterns = _made_by(model)
    for name, _ in model.named_parameters():
        if any(pattern.search(name) for pattern in patterns):
            yield from weights.sources(name)


def _buffers(model: Any, weights: ParameterNames) -> Iterator[str]:
    """Checkpoint tensors that are buffers of the model, or were when the checkpoint was made."""
    names = {name for name, _ in model.named_buffers()}
    for name in names:
        yield from weights.sources(name)
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    ignored += [re.compile(r"rotary_emb\.inv_freq$"), re.compile(r"(^|\.)position_ids$"), re.compile(r"masked_bias$")]
    for name in weights.unused:
        is_weight = name.endswith("weight") or name.removesuffix("bias") + "weight" in weights.unused
        leftover = any(p.search(name) for p in ignored) and not is_weight
        if leftover or name in names or f"{prefix}{name}" in names or name.removeprefix(prefix) in names:
            yield name
