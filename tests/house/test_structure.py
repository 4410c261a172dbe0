"""The house keeps its shape: imports go one way, importing the command line is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lowmem_aim"

# In the order in which data flows. A package may import from those before its own, and from nothing after it.
PACKAGES = [
    "errors units events",
    "system",
    "methods",
    "recipe",
    "models",
    "planning blocks",
    "relaxing",
    "output",
    "measuring",
    "solving",
    "merging",
    "view",
    "evaluating",
    "jobs",
    "demo",
    "cli",
    "__main__",
]


def dotted(file: Path) -> str:
    """The name by which a file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(file): file for file in PACKAGE.rglob("*.py")}


def package_of(module: str) -> str:
    """The package, or the file beside the packages, that a module belongs to; empty for the face of them all."""
    return module.split(".")[1] if "." in module else ""


def imported(file: Path) -> set[str]:
    """The project's files that a file imports, anywhere in it, by their dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they lead"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return (names & FILES.keys()) - {dotted(file)}


# Without the face of the whole, which names public functions for type checkers, and whose version many files read.
IMPORTS = {name: imported(file) - {"lowmem_aim"} for name, file in FILES.items() if name != "lowmem_aim"}


def test_every_package_imports_only_from_those_before_it() -> None:
    place = {package: number for number, names in enumerate(PACKAGES) for package in names.split()}
    assert set(map(package_of, FILES)) - {""} == set(place)
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if place[package_of(other)] >= place[package_of(name)] and package_of(other) != package_of(name)
    ]
    assert not wrong


def without_leaves(graph: dict[str, set[str]]) -> set[str]:
    """What is left of a graph when whatever leads nowhere has been taken away: its circles, and what leads to them."""
    left = dict(graph)
    while leaves := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in leaves:
            del left[name]
    return set(left)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not without_leaves(IMPORTS)


def test_no_file_imports_a_private_name_of_another() -> None:
    wrong = [
        f"{name}: {alias.name}"
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowmem_aim")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.endswith("__")
    ]
    assert not wrong


def test_every_package_says_what_it_is_for_and_in_which_order_to_read_its_files() -> None:
    for face in PACKAGE.glob("*/__init__.py"):
        said = ast.get_docstring(ast.parse(face.read_text())) or ""
        names = {file.stem for file in face.parent.glob("*.py")} - {"__init__"}
        lines = [line.split()[0] for line in said.splitlines()[1:] if line and not line.startswith(" ")]
        assert names <= {line.removesuffix(".py") for line in lines}, face


def test_the_command_line_is_imported_without_torch() -> None:
    code = (
        "import sys, lowmem_aim.cli.main; print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_merge_that_runs_no_model_does_without_transformers() -> None:
    """It takes seconds to import."""
    imports = "import sys, lowmem_aim.jobs.merge, lowmem_aim.cli.catalogue, lowmem_aim.jobs.doctor"
    code = f"{imports}; print(sorted({{'transformers', 'accelerate'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_tree_of_the_architecture_has_one_line_for_each_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.partition("```tree\n")[2].partition("```")[0]
    named, folder = [], ""
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folder = name if name.endswith("/") and depth == 1 else folder if depth > 1 else ""
        if name.endswith(".py"):
            named.append(f"{folder}{name}")
    files = {file.relative_to(PACKAGE).as_posix() for file in FILES.values()}
    for face in PACKAGE.glob("*/__init__.py"):  # the same words in both
        said = [line.split(maxsplit=1) for line in face.read_text().splitlines() if re.match(r"\w+\.py +\S", line)]
        assert [line for line in said if not re.search(rf"^ +{line[0]} +{re.escape(line[1])}$", tree, re.M)] == []
    assert sorted(named) == sorted(file for file in files if not file.endswith("__init__.py"))


# First words of docstrings that make sense only beside their caller.
DANGLING = {
    "of", "what", "that", "so", "there", "its", "as", "how", "where", "when", "in", "such", "also", "not", "those", "it"
}  # fmt: skip


def documented(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of the module, and of every public class, function and method."""
    yield "", ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node)
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    yield f"{node.name}.{part.name}", ast.get_docstring(part)


def test_every_public_name_has_a_docstring_that_stands_alone() -> None:
    wrong = []
    for module, file in FILES.items():
        for name, said in documented(ast.parse(file.read_text())):
            first = re.match(r"\W*(\w+)", said or "")
            if first is None or first[1].lower() in DANGLING:
                wrong.append(f"{module}: {name}: {(said or 'no docstring').splitlines()[0]}")
    assert not wrong
