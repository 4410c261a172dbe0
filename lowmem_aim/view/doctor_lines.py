"""The report of `lowmem-aim doctor` as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.units import shown

Facts = Mapping[str, Any]
INDENT = 12  # columns of a heading
UNKNOWN = "unknown"  # a fact that could not be found out


def doctor_lines(report: Mapping[str, Any]) -> list[str]:
    """`report`: what `doctor --json` prints."""
    found = [f"{heading:{INDENT}}{text}" for heading, text in _paragraphs(report)]
    advice = [f"{advice['level']}: {advice['text']}" for advice in report["advice"]]
    return [*found, *([""] if advice else []), *advice]


def _paragraphs(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (heading or nothing, one line)."""
    software = found["software"]
    packages = [name for name in software if name not in ("lowmem-aim", "python", "platform", "nvidia_driver")]
    yield "software", f"lowmem-aim {software['lowmem-aim']}, Python {_text(software['python'])}"
    yield "", _text(software["platform"])
    yield "", ", ".join(f"{name} {_text(software[name], 'not installed')}" for name in packages)
    yield "processor", _processor_line(found["processor"])
    yield "memory", _memory_line(found["memory"])
    yield from _gpu_lines(found["gpus"], software["nvidia_driver"])
    yield from _folder_lines(found["folder"])
    yield from _cache_lines(found["caches"])
    yield "terminal", _terminal_line(found["terminal"])
    yield "defaults", _defaults_line(found["defaults"])


def _text(value: Any, nothing: str = "none") -> str:
    return nothing if value is None else printable(str(value))


def _size(value: Any, nothing: str = "none") -> str:
    return shown(int(value)) if isinstance(value, int | float) else _text(value, nothing)


def _processor_line(facts: Facts) -> str:
    limit = facts["container_cores"]
    limited = f", of which the container may use {limit:g}" if isinstance(limit, float) else ""
    loops = {True: "compiled loops", False: "no compiled loops"}.get(facts["compiled_loops"], "compiled loops unknown")
    return f"{_text(facts['model'])}: {_text(facts['cores'])} cores{limited}, {_text(facts['instructions'])}, {loops}"


def _memory_line(facts: Facts) -> str:
    limit = facts["container_limit"]
    limited = "" if limit is None else f", the container's limit is {_size(limit)}"
    swap = f"swap {_size(facts['swap_free'])} of {_size(facts['swap_total'])}" if facts["swap_total"] else "no swap"
    return f"{_size(facts['free'])} of {_size(facts['total'])} are free{limited}, {swap}"


def _gpu_lines(gpus: list[Facts] | str, driver: Any) -> Iterator[tuple[str, str]]:
    if isinstance(gpus, str) or not gpus:
        yield "GPU", f"{'none that torch can use' if gpus == [] else UNKNOWN}; NVIDIA driver: {_text(driver)}"
        return
    for number, gpu in enumerate(gpus):
        yield "" if number else "GPU", _gpu_line(gpu, driver)


def _gpu_line(gpu: Facts, driver: Any) -> str:
    if gpu["device"] == "mps":
        return f"mps: {_text(gpu['name'])}, in RAM, at most {_size(gpu['total'])}"
    return (
        f"{gpu['device']}: {_text(gpu['name'])}, {_size(gpu['free'])} of {_size(gpu['total'])} are free, "
        f"compute capability {_text(gpu['capability'])}, driver {_text(driver)}"
    )


def _folder_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "folder", f"{_text(facts['path'])}: {_text(facts['filesystem'])} on {_text(facts['mount'])}"
    yield "", f"{_size(facts['free'])} are free, {_speed(facts['read'])} read, {_speed(facts['write'])} written"
    yield "", f"reserves space: {_yes(facts['preallocates'])}; sparse files: {_yes(facts['sparse'])}"


def _speed(value: Any) -> str:
    return f"{_size(value)}/s" if isinstance(value, float) else _text(value)


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, UNKNOWN)


def _cache_lines(facts: Facts) -> Iterator[tuple[str, str]]:
    for number, name in enumerate(("activations", "hub")):
        cache = facts[name]
        if isinstance(cache, dict):
            cache = f"{_text(cache['path'])} ({_size(cache['bytes'], 'too many files to count')})"
        yield "" if number else "caches", f"{name}: {cache}"
    token = {True: "set", False: "not set"}.get(facts["token"], UNKNOWN)
    yield "", f"Hub offline: {_yes(facts['offline'])}; HF_TOKEN: {token}"


def _terminal_line(facts: Facts) -> str:
    if facts["terminal"] is not True:
        return "stderr is not a terminal: progress is shown in plain lines" if facts["terminal"] is False else UNKNOWN
    blocks = {True: "block characters", False: "ASCII only"}.get(facts["blocks"], UNKNOWN)
    return (
        f"{_text(facts['columns'])} columns, colours: {_text(facts['colours'])}, {blocks}, TERM={_text(facts['term'])}"
    )


def _defaults_line(facts: Facts) -> str:
    values = facts["values"]
    if not isinstance(values, dict):
        return _text(values)
    if not facts["there"]:
        return f"no file of defaults ({_text(facts['path'])})" if facts["path"] else "no file of defaults"
    told = {key: _size(value) if key in ("ram", "vram") else _text(value) for key, value in values.items()}
    return f"{_text(facts['path'])}: {', '.join(f'{key} = {value}' for key, value in told.items()) or 'nothing'}"
