"""`lowmem-aim methods` tells the truth about every method, and other packages can bring one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place, Run
from merge_cases import tensors_in
from method_cases import NAME, PARAMETERS, WHOLE, merge, resolved, slices, tensors

from lowmem_aim.cli.catalogue import example, facts, formula
from lowmem_aim.errors import RecipeError
from lowmem_aim.methods.method import Rounds, Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import parse

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


class TestMethods:
    def test_each_has_a_line_and_nothing_is_left_out(self, run: Run) -> None:
        done = run("methods")
        assert done.code == 0
        told = dict(re.findall(r"^(\w+): (.*\n    .*\n    .*)$", done.out, re.M))
        assert list(told) == sorted(METHODS)
        for name, method in METHODS.items():
            assert all(parameter in told[name] for parameter in method.parameters)
            assert formula(method) in told[name]
            assert method.source in told[name]

    def test_json_has_all_there_is(self, run: Run) -> None:
        found = {entry["name"]: entry for entry in json.loads(run("methods", "--json").out)}
        assert set(found) == set(METHODS)
        ties = found["ties"]
        assert (ties["base"], ties["experts"], ties["passes"]) == (
            "required",
            {"fewest": 1, "most": None},
            {"fewest": 1, "most": 6},
        )
        assert {p["name"]: p["default"] for p in ties["parameters"]}["normalize"] is True
        assert json.loads(run("methods", "ties", "--json").out) == ties

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_one_is_described_and_its_example_is_a_recipe(self, name: str, run: Run) -> None:
        method = METHODS[name]
        shown = run("methods", name).out
        assert shown.startswith(f"{name}: {formula(method)}")
        assert len(formula(method)) > 5
        assert method.source in shown
        assert example(method) in shown
        recipe = read_recipe(parse(example(method), "example.yml"))
        assert recipe.method.name == name
        assert not recipe.notices

    def test_words_that_may_stand_for_a_number_are_told(self, run: Run) -> None:
        assert "weight: a number, or `solved`; required" in run("methods", "task_arithmetic").out

    def test_an_unknown_one_is_named_with_what_was_meant(self, run: Run) -> None:
        done = run("methods", "breadcrumb")
        assert done.code == 2
        assert "did you mean `breadcrumbs`?" in done.err

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_it_makes_no_other_number_of_passes(self, name: str) -> None:
        method = METHODS[name]
        base, *experts = tensors((6, 7), method.most or 3)
        required = {p.name: PARAMETERS[name][p.name] for p in method.parameters.values() if p.required}
        for given in (PARAMETERS[name], required):
            made = count_rounds(name, given, base, experts)
            assert method.rounds[0] <= made <= method.rounds[1]


def count_rounds(name: str, given: dict[str, Any], base: torch.Tensor, experts: list[torch.Tensor]) -> int:
    script = METHODS[name].start(
        Subject(NAME, tuple(base.shape), base.numel(), len(experts)), resolved(name, given, experts)
    )
    made = 0
    for fold in Rounds(script):
        for rows in slices(base, experts, WHOLE):
            fold.add(fold.part(rows))
        made += 1
    return made


# --- other packages ---------------------------------------------------------------------------------------------------

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package where Python finds it: install("evened", code, name="other-name")."""
    folder = tmp_path / "site"
    before = dict(METHODS)
    modules: list[str] = []

    def call(method: str, code: str, package: str = "", module: str = "") -> None:
        package, module = package or f"lowmem-aim-{method}", module or method
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lowmem_aim.methods]\n{method} = {module}\n")
        modules.append(module)
        monkeypatch.syspath_prepend(str(folder))

    yield call
    METHODS.clear()
    METHODS.update(before)
    for module in modules:
        sys.modules.pop(module, None)


def of_the_page() -> str:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    return code[1]


class TestOtherPackages:
    def test_the_page_shows_a_whole_method_in_under_forty_lines(self) -> None:
        assert len(of_the_page().splitlines()) < 40

    def test_the_method_of_the_page_merges(self, install: Install, place: Place) -> None:
        install("evened", of_the_page())
        done = place.merge("--weight", "0.3", "-p", "lambda=2", method="evened")
        assert done.code == 0, done.err
        base, math, code = (tensors_in(place.folder / name) for name in ("base", "math", "code"))
        for name, found in tensors_in(place.out).items():
            deltas = [(model[name] - base[name]).double() for model in (math, code)]
            mean = sum(float(d.norm()) for d in deltas) / 2
            truth = base[name] + sum(0.6 * d * mean / d.norm() for d in deltas)
            assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())
        assert "lowmem-aim-evened 1.0" in (place.out / "README.md").read_text()
        facts_ = json.loads((place.out / "lowmem_aim.json").read_text())
        assert facts_["versions"]["lowmem-aim-evened"] == "1.0"

    def test_it_does_not_depend_on_slices(self, install: Install, run: Run) -> None:
        install("evened", of_the_page())
        assert run("methods", "evened").out.startswith("evened: W0 + lambda sum wi Di mean|D| / |Di|.")
        assert facts(METHODS["evened"])["package"] == "lowmem-aim-evened 1.0"
        base, *experts = tensors((61, 37), 3, torch.bfloat16)
        given = {"weight": (0.3, 0.4, 0.5)}
        whole = merge("evened", base, experts, given)
        assert all(torch.equal(merge("evened", base, experts, given, step), whole) for step in (1, 7))

    def test_one_that_fails_is_named_and_stops_no_other(self, install: Install, place: Place) -> None:
        install("broken", "raise RuntimeError('no such thing')")
        place.refused(place.merge(method="broken"), 2, "lowmem-aim-broken 1.0", "no such thing")
        listed = place.run("methods")
        assert "warning: " in listed.err
        assert "lowmem-aim-broken 1.0" in listed.err
        assert "ties" in listed.out
        assert place.merge().code == 0

    def test_one_that_ends_the_program_is_named_too(self, install: Install, place: Place) -> None:
        install("leaving", "import sys; sys.exit(3)")
        place.refused(place.merge(method="leaving"), 2, "lowmem-aim-leaving 1.0")

    def test_all_methods_of_a_module_are_its_packages(self, install: Install, run: Run) -> None:
        two = of_the_page().replace('"evened"', '"other"').replace("def evened", "def other")
        install("evened", of_the_page() + two)
        assert run("methods", "evened").code == 0
        assert METHODS["other"].package == "lowmem-aim-evened 1.0"

    def test_one_that_registers_another_name_is_told(self, install: Install) -> None:
        install("median", of_the_page())
        with pytest.raises(RecipeError, match="registers no method of that name"):
            read_recipe(parse("merge_method: median\nmodels: [{model: a}]\n", "recipe.yml"))

    def test_two_packages_with_one_name_are_both_named(self, install: Install) -> None:
        install("evened", of_the_page())
        install("evened", of_the_page(), package="another", module="evened_too")
        with pytest.raises(RecipeError, match=r"`another 1\.0` and `lowmem-aim-evened 1\.0`"):
            read_recipe(parse("merge_method: evened\nmodels: [{model: a}]\n", "recipe.yml"))

    def test_the_methods_of_this_package_cannot_be_replaced(self, install: Install) -> None:
        install("other", of_the_page().replace('"evened"', '"ties"'))
        with pytest.raises(RecipeError, match="there is a merge method `ties` already"):
            read_recipe(parse("merge_method: other\nmodels: [{model: a}]\n", "recipe.yml"))

    def test_a_name_is_guessed_from_all_packages(self, install: Install) -> None:
        install("evened", of_the_page())
        with pytest.raises(RecipeError, match="did you mean `evened`"):
            read_recipe(parse("merge_method: evend\nmodels: [{model: a}]\n", "recipe.yml"))
