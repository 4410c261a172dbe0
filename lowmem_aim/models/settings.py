"""Whether models have the same settings: their configs, as transformers reads them, key by key wherever a key stands.

A setting has several spellings (`rope_theta` of transformers 4, `rope_parameters` of 5), and may be left out where it
has its default. So configs whose relevant keys differ as written are read by transformers' classes: see `Reader`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import LAYERS, OTHER_LAYERS, SIZES
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader, ReaderNeeded
from lowmem_aim.models.roles import TensorRoles

# Settings that change what a weight means without changing its shape. In models that are merged these must agree,
_MUST_AGREE = re.compile(
    r"model_type|hidden_size|d_model|n_embd|((num_hidden|num|n|encoder|decoder)_)?layers?"
    r"|(.*_)?heads?(_.*)?"  # num_attention_heads, n_head, head_dim, qk_nope_head_dim, linear_num_key_heads, ...
)
# and these should: rotary embeddings, norms, activations, which layers attend to what, and factors.
_SHOULD_AGREE = re.compile(
    r".*(rope|rotary|norm|eps|epsilon|activation|hidden_act|sliding|window|layer_types|softcap|scaling|multiplier"
    r"|query_pre_attn_scalar|experts_per_tok|top_?k|alibi|residual).*"
)
_WITHOUT_MEANING = re.compile(r".*(dropout|pdrop|initializer|init_|router_aux|output_).*|reduce_.*|type")
_TEXT = "text_config"  # of a vision-language model's config
_LONGEST_SHOWN = 60  # characters of a value in a message
_MOST_SHOWN = 5  # settings of a model that are told

_Difference = tuple[str, Any, Any]  # (dotted key, the other model's value, the reference's)


# The order in which sizes are reported: those that others follow from come first.
_ORDER = {key: place for place, key in enumerate((*LAYERS, *SIZES))}


def check_settings(inputs: Inputs, reader: Reader, emit: Emit, unlike: set[Checkpoint], sliced: bool = False) -> None:
    """Compare every model's settings with the reference's; `sliced`: but for the layers, of which some are taken.

    Raises ModelError for settings that must agree, and for a config that transformers does not accept where it has to
    be read; models of which that tells all are added to `unlike`. Settings that should agree are reported as warnings.
    """
    errors: list[LowmemAimError] = []
    problems: list[str] = []
    found = []
    for other in inputs.others:
        with noted(errors), contextlib.suppress(ReaderNeeded):
            must, should = _differences(other, inputs.reference, reader, sliced)
            shapes = unlike_shapes(other, inputs.reference, inputs.roles)
            must = must or (_unlike_sizes(other, inputs.reference) if shapes else [])
            if must:
                unlike.add(other)
                found.append(must)
                problems.append(_refusal(other, inputs.reference, must, shapes))
            elif should:
                emit(Notice(f"{_sentence(other, inputs.reference, should)}; the output has the latter", "warning"))
    if problems:
        label = printable(inputs.reference.label)
        hint = f"only models of one architecture and size can be merged: use models that were tuned from `{label}`"
        if len(found) == len(inputs.others) > 1 and all(must == found[0] for must in found):
            hint = f"all others differ from `{label}` in the same way: is it their base?"
        errors.insert(0, ModelError(problems, hint))
    raise_all(errors)


def _refusal(other: Checkpoint, reference: Checkpoint, must: Sequence[_Difference], shapes: int) -> str:
    """All that must agree and does not, in one line."""
    told = [
        f"`{printable(key)}` {printable(str(theirs), _LONGEST_SHOWN)}, not {printable(str(ours), _LONGEST_SHOWN)}"
        for key, theirs, ours in must[:_MOST_SHOWN]
    ]
    more = f"; {len(must) - _MOST_SHOWN} more" if len(must) > _MOST_SHOWN else ""
    also = f" (and {shapes} tensor{'s differ' if shapes > 1 else ' differs'} in shape)" if shapes else ""
    what = "; ".join(told) + more
    return f"`{printable(other.label)}` does not fit `{printable(reference.label)}`: {what}{also}"


def unlike_shapes(other: Checkpoint, reference: Checkpoint, roles: TensorRoles) -> int:
    """The number of tensors of two models that have different shapes, those of the vocabulary aside."""
    names = other.tensors.keys() & reference.tensors.keys() - roles.vocabulary
    return sum(other.tensors[name].shape != reference.tensors[name].shape for name in names)


def _unlike_sizes(other: Checkpoint, reference: Checkpoint) -> list[_Difference]:
    """The sizes in which two configs differ: those that need not agree, but explain why shapes do not."""
    found = []
    for key in SIZES:
        theirs, ours = other.config.get(key), reference.config.get(key)
        if theirs != ours and key != "vocab_size":
            found.append((key, theirs, ours))
    return found


def _differences(
    other: Checkpoint, reference: Checkpoint, reader: Reader, sliced: bool
) -> tuple[list[_Difference], list[_Difference]]:
    """(the settings that must agree and do not, those that should)."""
    kinds = [("model_type", model.config.get("model_type")) for model in (other, reference)]
    if kinds[0] != kinds[1]:
        if sum(isinstance(model.config.get(_TEXT), Mapping) for model in (other, reference)) == 1:
            return _differences_of_text(other, reference, reader, sliced), []
        return [("model_type", kinds[0][1], kinds[1][1])], []  # settings of other classes have other names
    theirs, ours = (dict(_relevant(model.config, sliced=sliced)) for model in (other, reference))
    if theirs == ours:
        return [], []
    if plain := [(key, theirs[key], ours[key]) for key in ours if _plainly_differs(key, theirs.get(key), ours[key])]:
        return sorted(plain, key=lambda difference: _ORDER.get(difference[0], len(_ORDER))), []
    theirs, ours = (dict(_relevant(reader.settings(model), sliced=sliced)) for model in (other, reference))
    keys = [key for key in {**ours, **theirs} if not _same(ours.get(key), theirs.get(key))]
    found = [(key, theirs.get(key), ours.get(key)) for key in keys]
    must = [difference for difference in found if _must_agree(*difference)]
    return must, [difference for difference in found if difference not in must]


def _differences_of_text(other: Checkpoint, reference: Checkpoint, reader: Reader, sliced: bool) -> list[_Difference]:
    """The sizes in which a text model and the text part of a vision-language model differ."""
    tables = [settings.get(_TEXT) or settings for settings in map(reader.settings, (other, reference))]
    theirs, ours = (dict(_relevant(table, sliced=sliced)) for table in tables)
    keys = [key for key in ours if key in theirs and key not in ("model_type", "tie_word_embeddings")]
    differing = [(key, theirs[key], ours[key]) for key in keys if not _same(ours[key], theirs[key])]
    return [difference for difference in differing if _must_agree(*difference)]


def _plainly_differs(key: str, *values: Any) -> bool:
    """Whether both configs hold a count that must agree, and does not: no class need be asked for its default."""
    counted = all(isinstance(value, int) for value in values)
    return counted and values[0] != values[1] and _must_agree(key, *values)


def _same(first: Any, second: Any) -> bool:
    """Whether two values mean the same: 1e-5 is written as 9.999999747378752e-06 by tools that count in float32."""
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)


def _must_agree(key: str, *values: Any) -> bool:
    name = key.rpartition(".")[2]
    flag = any(isinstance(value, bool) for value in values)
    # A list of whole numbers has a count for each layer; other lists of such names are no counts.
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    counts = all(item is None or isinstance(item, int) for item in flat) or all(isinstance(v, str) for v in values)
    return counts and not flag and bool(_MUST_AGREE.fullmatch(name))


def _relevant(table: Mapping[str, Any], before: str = "", *, sliced: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all settings that are compared, in tables within tables too."""
    for key, value in table.items():
        in_rope = "rope" in before
        if isinstance(value, Mapping):
            yield from _relevant(value, f"{before}{key}.", sliced=sliced)
        elif sliced and (key in (*LAYERS, *OTHER_LAYERS) or isinstance(value, list)):
            continue  # what each layer is shows in its tensors
        elif _WITHOUT_MEANING.fullmatch(key) is None and (
            in_rope or _MUST_AGREE.fullmatch(key) or _SHOULD_AGREE.fullmatch(key)
        ):
            yield f"{before}{key}", value


def _sentence(other: Checkpoint, reference: Checkpoint, differences: list[_Difference]) -> str:
    ours, theirs = [], []
    for key, of_other, of_reference in differences[:_MOST_SHOWN]:
        theirs.append(f"`{printable(key)}` {printable(str(of_other), _LONGEST_SHOWN)}")
        ours.append(printable(str(of_reference), _LONGEST_SHOWN))
    more = f" (and {len(differences) - _MOST_SHOWN} more)" if len(differences) > _MOST_SHOWN else ""
    return (
        f"`{printable(other.label)}` has {', '.join(theirs)}{more}, but `{printable(reference.label)}` has "
        f"{', '.join(ours)}"
    )
