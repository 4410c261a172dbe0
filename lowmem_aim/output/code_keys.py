"""Keys of JSON files that make a loader fetch or run code. Outputs do without them."""

from __future__ import annotations

from typing import Any

# transformers: classes and pipelines from a repository's Python files, and a generation loop from one.
RUN_CODE = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
# transformers: a word such as `sdpa` is its own code; `owner/kernel` is fetched from the Hub and run.
MAY_NAME_A_REPOSITORY = frozenset({"attn_implementation", "_attn_implementation"})


def without_code(value: Any) -> tuple[Any, list[str]]:
    """(a JSON value without such keys, wherever they stood; the names of the keys that are gone)."""
    gone: list[str] = []

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: item for key, item in value.items() if not _runs_code(key, item)}
        gone.extend(key for key in value if key not in kept)
        return {key: cleaned(item) for key, item in kept.items()}

    return cleaned(value), list(dict.fromkeys(gone))


def _runs_code(key: str, value: Any) -> bool:
    names_repository = key in MAY_NAME_A_REPOSITORY and isinstance(value, str) and "/" in value
    return names_repository or (key in RUN_CODE and value is not None)
