"""Settings of the harness that have no flag of their own (`--set KEY=VALUE`): which there are, and where they act.

Those that change what is asked are here. Others have a flag, or would break what this tool promises: they are refused,
and the error says what to use instead. What a single task sets for itself stands in its file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from lowmem_aim.errors import UsageError, did_you_mean, printable

SYSTEM, MULTITURN, GENERATION = "system_instruction", "fewshot_as_multiturn", "gen_kwargs"
THINKING, THOUGHT = "enable_thinking", "think_end_token"

Is = Callable[[Any], bool]


def _is_number(value: Any, least: float, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value, 1)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


# A key, whether a value is right for it, and what the value must be.
KNOWN: Mapping[str, tuple[Is, str]] = {
    SYSTEM: (_is_text, "a text"),
    MULTITURN: (_is_switch, "true or false"),
    THINKING: (_is_switch, "true or false"),
    THOUGHT: (lambda value: _is_text(value) or _is_count(value), "a text, or the number of a token"),
    f"{GENERATION}.max_gen_toks": (_is_count, "a number of tokens, 1 or more"),
    f"{GENERATION}.until": (_is_texts, "a text, or a list of texts, at which the model stops"),
    f"{GENERATION}.do_sample": (_is_switch, "true or false"),
    f"{GENERATION}.temperature": (lambda value: _is_number(value, 0, 100), "a number from 0 to 100"),
    f"{GENERATION}.top_p": (lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    f"{GENERATION}.top_k": (_is_count, "a number of tokens, 1 or more"),
    f"{GENERATION}.min_p": (lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    f"{GENERATION}.repetition_penalty": (lambda value: _is_number(value, 0.01, 100), "a number from 0.01 to 100"),
}
_SEED, _CACHE = "use `--seed`", "use `--cache` or `--no-cache`"
_MODEL, _SCORES = "the model is MODEL, and it has flags of its own", "it changes no score: leave it out"
_TOKENS = f"use `--set {GENERATION}.max_gen_toks=NUMBER`"
# Words of the harness' functions and of its command line, and what to use here.
INSTEAD: Mapping[str, str] = {
    "tasks": "use `--tasks`",
    "num_fewshot": "use `--num-fewshot`",
    "limit": "use `--limit`",
    "samples": "use `--limit`, or a task file with `process_docs`",
    "batch_size": "use `--batch-size`",
    "max_batch_size": "use `--batch-size`",
    "include_path": "use `--include-path`",
    "apply_chat_template": "use `--chat-template`",
    "chat_template": "use `--chat-template`",
    "device": "use `--device`",
    "dtype": "use `--dtype`",
    "max_length": "use `--max-length`",
    "trust_remote_code": "nothing that comes with a model is executed",
    "confirm_run_unsafe_code": "use `--allow-code-execution`",
    "metadata": "tasks that take it make their items by code of their own: write a task file (`--include-path`)",
    "predict_only": "leave it out: `evaluate` scores",
    "bootstrap_iters": "leave it out: standard errors that have no formula are drawn 1,000 times",
    GENERATION: f"set one of them at a time: `--set {GENERATION}.max_gen_toks=64`",
    **dict.fromkeys(("model", "model_args", "pretrained", "revision", "tokenizer", "peft"), _MODEL),
    **dict.fromkeys(
        ("seed", "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed", "fewshot_seed"), _SEED
    ),
    **dict.fromkeys(("use_cache", "cache_requests", "rewrite_requests_cache", "delete_requests_cache"), _CACHE),
    **dict.fromkeys(("write_out", "log_samples", "verbosity", "check_integrity", "evaluation_tracker"), _SCORES),
    **dict.fromkeys(
        (f"{GENERATION}.{name}" for name in ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_length")),
        _TOKENS,
    ),
}


def parsed(texts: Sequence[str]) -> dict[str, Any]:
    """The settings in texts like `KEY=VALUE`, the values read as YAML. Raises UsageError for texts that are none."""
    wrong = [text for text in texts if not text.partition("=")[0].strip() or "=" not in text]
    if wrong:
        raise UsageError(
            [f"`--set {printable(text)}` has no key and value" for text in wrong],
            hint=f"write it as `--set KEY=VALUE`; the keys: {', '.join(KNOWN)}",
        )
    pairs = [(key.strip(), value) for key, _, value in (text.partition("=") for text in texts)]
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise UsageError([f"`--set {printable(key)}=...` is given twice" for key in twice], hint="give it once")
    return {key: _value(key, text) for key, text in pairs}


def _value(key: str, text: str) -> Any:
    """A value as YAML gives it. A text stands for itself, whatever YAML would make of it: `Answer: yes` too."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    is_text = key == SYSTEM or (key.endswith(".until") and not isinstance(value, list))
    return text if is_text and not isinstance(value, str) else value


def wrong_settings(settings: Mapping[str, Any], chat_template: bool) -> Iterator[UsageError]:
    """Yield an error for each setting that there is not, that has a flag of its own, or whose value is wrong."""
    for key, value in settings.items():
        shown = f"`--set {printable(key)}=...`"
        if key in INSTEAD:
            yield UsageError(f"{shown} is refused", hint=INSTEAD[key])
        elif key not in KNOWN:
            near = did_you_mean(key, KNOWN)
            hint = f"the keys: {', '.join(KNOWN)}; what one task sets for itself stands in its file (`--include-path`)"
            yield UsageError(f"{shown}: there is no such setting{near}", hint=hint)
        elif not KNOWN[key][0](value):
            yield UsageError(f"{shown} must be {KNOWN[key][1]}, not `{printable(str(value))}`", hint="mend the value")
    for key in (MULTITURN, THINKING) if not chat_template else ():
        if key in settings:
            yield UsageError(f"`--set {key}=...` means nothing without a chat template", hint="add `--chat-template`")
    if settings.get(THINKING) is True and THOUGHT not in settings:
        yield UsageError(
            f"with `--set {THINKING}=true`, thoughts would be scored as answers",
            hint=f"say where they end: `--set {THOUGHT}='</think>'`",
        )
    yield from _half_drawn(generation(settings))


def _half_drawn(own: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for settings of drawing at random that decode greedily all the same: tasks set the others so."""
    drawing = [key for key in ("do_sample", "temperature", "top_p", "top_k", "min_p") if own.get(key)]
    if drawing and not (own.get("do_sample") and own.get("temperature")):
        yield UsageError(
            f"`--set {GENERATION}.{drawing[0]}=...` alone does not draw at random",
            hint=f"add what is missing: `--set {GENERATION}.do_sample=true --set {GENERATION}.temperature=0.7`",
        )


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of how the model writes, by the harness' names for them."""
    return {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{GENERATION}.")}


def set_generation(settings: Mapping[str, Any], writing: Sequence[Any], others: Sequence[str]) -> None:
    """Give the settings of how the model writes to the tasks that let it write; `others` are the names of the rest.

    Raises UsageError for settings that mean nothing for these tasks.
    """
    of_no_use = [key for key in settings if key.startswith(GENERATION) or key == THOUGHT] if not writing else []
    if of_no_use:
        problems = [f"`--set {key}=...` means nothing: no task lets the model write" for key in of_no_use]
        raise UsageError(problems, hint="leave it out")
    if settings.get(THINKING) is True and others:
        raise UsageError(
            f"with `--set {THINKING}=true`, `{printable(others[0])}` would score an answer in the place of a thought",
            hint="evaluate tasks that let the model write by themselves",
        )
    own = generation(settings)
    for task in writing if own else ():
        task.set_config(key="generation_kwargs", value={**(task.get_config("generation_kwargs") or {}), **own})
