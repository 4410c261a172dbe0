"""The house keeps its shape: imports go one way, importing the command line is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowmem_aim"

# Lower storeys first. A module may import from storeys below its own and from its own, but nothing above.
STOREYS = [
    {
        "errors",
        "usage",
        "completion",
        "bugs",
        "events",
        "units",
        "record",
        "progress",
        "heatmap",
        "picture",
        "terminal",
        "survey",
        "lines",
        "forecast",
        "durable",
        "interrupts",
        "yaml_tree",
        "headers",
        "config",
        "memory",
        "loops",
        "kernels",
        "pipeline",
        "devices",
        "journal",
        "verify",
    },
    {"checkpoint", "activations", "hub", "methods", "relax", "remote"},
    {"recipe", "weightmap", "write", "output"},
    {"summary"},
    {"feed"},
    {"recipe_values", "relaxation_tables", "recipe_reader", "catalogue", "speed"},
    {"skeleton", "texts", "observe", "shelf"},
    {"rooms"},
    {"offload", "outline"},
    {"stage"},
    {"inputs"},
    {"plan", "drivers", "snapshots"},
    {"calibrate"},
    {"activation_cache", "shards", "slices", "relaxation", "mutual_information", "side_by_side"},
    {"targets"},
    {"merge"},
    {"merged_weights"},
    {"comparison"},
    {"surveyor"},
    {"card", "screen"},
    {"dashboard"},
    {"resume", "status", "doctor", "replay", "job"},
    {"run", "flags", "demo"},
    {"foresee"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        if file != PACKAGE / "__init__.py":
            found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return found


def imported(file: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowmem_aim"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lowmem_aim.")}
    return names & set(modules())


def test_every_module_has_its_storey_and_imports_from_none_above() -> None:
    storey = {name: number for number, names in enumerate(STOREYS) for name in names}
    assert set(modules()) == set(storey)
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for module, files in modules().items()
        for file in files
        for name in imported(file)
        if storey[name] > storey[module]
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: set().union(*(imported(f) for f in files)) - {module} for module, files in modules().items()}
    while leaves := [module for module, needs in graph.items() if not needs & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph


def test_the_command_line_is_imported_without_torch() -> None:
    code = "import sys, lowmem_aim.cli; print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_merge_that_runs_no_model_does_without_transformers() -> None:
    """It takes seconds to import."""
    imports = "import sys, lowmem_aim.run, lowmem_aim.catalogue, lowmem_aim.doctor"
    code = f"{imports}; print(sorted({{'transformers', 'accelerate'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_readmes_tree_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    files = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py")} - {"py.typed"}
    missing = [
        f
        for f in files
        if not f.endswith("__init__.py") and not re.search(rf"^\S*.*\b{re.escape(Path(f).name)}\b", readme, re.M)
    ]
    assert not missing
