"""The completions that a shell offers after Tab, and the script that has the shell ask for them.

A shell asks while somebody waits: nothing slow is imported here. Names that belong to slow modules are repeated; a test
compares them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from lowmem_aim.cli.usage import PROGRAM

VARIABLE = "_LOWMEM_AIM_COMPLETE"  # click's name for it
_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
SHELLS = tuple(_SHELLS)
METHOD_GROUP = "lowmem_aim.methods"
METHODS = {  # with their parameters
    "arcee_fusion": (),
    "breadcrumbs": ("weight", "density", "gamma", "normalize", "rescale", "lambda", "int8_mask"),
    "breadcrumbs_ties": ("weight", "density", "gamma", "normalize", "rescale", "lambda", "int8_mask"),
    "covariance": ("weight", "lambda", "ridge", "rest"),
    "dare_linear": ("weight", "density", "normalize", "rescale", "lambda", "int8_mask"),
    "dare_ties": ("weight", "density", "normalize", "rescale", "lambda", "int8_mask"),
    "della": ("weight", "density", "epsilon", "normalize", "rescale", "lambda", "int8_mask"),
    "della_linear": ("weight", "density", "epsilon", "normalize", "rescale", "lambda", "int8_mask"),
    "karcher": ("max_iter", "tol"),
    "linear": ("weight", "normalize"),
    "model_stock": ("filter_wise",),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "passthrough": ("scale",),
    "ram": ("epsilon",),
    "ramplus_tl": ("epsilon", "r", "alpha"),
    "regmean": ("weight", "lambda", "ridge", "shrink", "rest"),
    "regmean_plus": ("weight", "lambda", "ridge", "shrink", "rest"),
    "sce": ("select_topk", "int8_mask"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "normalize", "lambda"),
    "ties": ("weight", "density", "normalize", "rescale", "lambda", "int8_mask"),
    "widen": ("above_average_value_ratio", "score_calibration_value"),
}

Items = list[CompletionItem[str]]
Complete = Callable[[click.Context, click.Parameter, str], Items]


def _beginning(incomplete: str, words: Iterable[str]) -> Items:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def words(*known: str) -> Complete:
    """Complete one of these words."""
    return lambda context, parameter, incomplete: _beginning(incomplete, known)


def methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete merge methods, those of other packages too, whose names are known without importing them."""
    from importlib.metadata import entry_points  # slow beside `--help`

    return _beginning(incomplete, sorted({*METHODS, *(point.name for point in entry_points(group=METHOD_GROUP))}))


def parameters(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete `NAME=` by the parameters of the method that is asked for, or of any."""
    known = METHODS.get(context.params.get("method") or "") or {name for own in METHODS.values() for name in own}
    return _beginning(incomplete, (f"{name}=" for name in sorted(known)))


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete folders, as the shell itself does."""
    return [CompletionItem(incomplete, type="dir")]


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete recipes and folders; once a recipe is given, folders."""
    given = context.params.get(parameter.name or "") or ()
    return folders(context, parameter, incomplete) + ([] if given else _files(incomplete, ".yml", ".yaml"))


def scores(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete files of scores, and the folders that they may be in."""
    return folders(context, parameter, incomplete) + _files(incomplete, ".json")


def texts(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """Complete whatever `--calibration` takes: folders, files of texts or activations, `builtin`."""
    files = _files(incomplete, ".jsonl", ".txt", ".safetensors")
    return [*folders(context, parameter, incomplete), *_beginning(incomplete, ["builtin"]), *files]


def _files(incomplete: str, *endings: str) -> Items:
    folder = os.path.dirname(incomplete)
    try:
        found = sorted(e.name for e in os.scandir(folder or ".") if e.name.endswith(endings) and e.is_file())
    except OSError:
        return []
    return _beginning(incomplete, (os.path.join(folder, name) for name in found))


def script(cli: click.Command, shell: str) -> str:
    """The script that has a shell ask this program for completions."""
    source = _SHELLS[shell](cli, {}, PROGRAM, VARIABLE).source()
    if shell != "bash":
        return source
    # Folders beside recipes, not only in their place; and no space after the `=` of a parameter.
    end = "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n\n    return 0\n"
    return source.replace("compopt -o dirnames", "compopt -o filenames -o plusdirs").replace("    return 0\n", end)
