"""How much of the delta is left: the card's figures are right, and the same however a merge went; so is the picture."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from calibrating import activations_of
from cards import assert_card
from conftest import Place, Run
from merge_cases import digests, recipe, tensors_in, with_aim
from PIL import Image
from stopping import stop

from lowmem_aim.errors import ResumeError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.output import drawing
from lowmem_aim.output.heatmap import BLOCKS, MOST_KINDS, DeltaSums, Scale, block_map, by_module, colour_of, heat_rows
from lowmem_aim.output.picture import heatmap_png
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.options import Options
from lowmem_aim.view.progress import Progress

PICTURE, SECTION = "delta-kept.png", "\n## How much of the delta is left\n"
ROOT = Path(__file__).parents[2]


def facts_of(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / "lowmem_aim.json").read_text())
    return facts


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)


def section_of(out: Path) -> str:
    return (out / "README.md").read_text().partition(SECTION)[2].partition("\n## ")[0]


class TestFigures:
    def test_they_are_sums_over_the_weights_that_aim_relaxes(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
    ) -> None:
        out = merge(with_aim(llama, measured, {"omega": 0.2}), tmp_path / "out")
        job = replace(with_aim(llama, measured, {}), aim=None)
        plain, base = tensors_in(merge(job, tmp_path / "plain")), tensors_in(llama / "base")
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name in Activations.load(measured).means:
            inner = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
            keys = ["all", inner[1], inner[2]] if inner else ["all", name.split(".")[-2]]
            for place, model in enumerate((plain, tensors_in(out))):
                delta = float((model[name].double() - base[name].double()).abs().sum())
                for key in keys:
                    sums[key][place] += delta
        kept = facts_of(out)["kept"]
        found = {"all": kept["delta"]} | kept["layers"] | kept["kinds"]
        assert found == pytest.approx({key: after / before for key, (before, after) in sums.items()}, abs=1e-4)
        assert list(kept["layers"]) == ["0", "1", "2"]
        assert {"lm_head", "norm", "self_attn.q_proj", "input_layernorm"} <= set(kept["kinds"])
        assert all(share < 0.99 for share in found.values())
        assert f"AIM left {kept['delta']:.1%} of the merged delta" in section_of(out)

    def test_omega_1_leaves_all(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        kept = facts_of(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "out"))["kept"]
        assert {kept["delta"], *kept["layers"].values(), *kept["kinds"].values()} == {1.0}

    def test_they_do_not_depend_on_how_the_merge_went(
        self,
        llama: Path,
        texts: Path,
        tmp_path: Path,
        each_tensor: None,
    ) -> None:
        job = recipe(llama, omega=0.3, calibration=str(texts))
        shards = Options(shard_bytes=40_000)
        merge(job, tmp_path / "whole", shards)
        merge(job, tmp_path / "rows", Options(shard_bytes=40_000, slice_rows=1))
        for tensors in (5, 9):
            stop(job, tmp_path / "out", tensors, shards)
        merge(job, tmp_path / "out", shards)
        expected = digests(tmp_path / "whole")
        assert PICTURE in expected
        assert digests(tmp_path / "rows") == digests(tmp_path / "out") == expected

    def test_layers_are_in_order_and_a_sum_does_not_depend_on_it(self) -> None:
        tensors = [(layer, "k", (0.1 * (layer % 10 + 1), 0.07)) for layer in range(30)]
        assert by_module(tensors) == by_module(tensors[::-1])
        experts = [(0, "k", sums) for _, _, sums in tensors]
        assert by_module(experts) == by_module(experts[::-1])

    def test_each_of_several_omegas_has_its_own(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
    ) -> None:
        out = merge(with_aim(llama, measured, {"omega": [0.1, 0.8]}), tmp_path / "out")
        less, more = out / "omega-0.1", out / "omega-0.8"
        assert facts_of(less)["kept"]["delta"] < facts_of(more)["kept"]["delta"]
        assert section_of(less) != section_of(more)
        assert (less / PICTURE).read_bytes() != (more / PICTURE).read_bytes()

    def test_without_a_relaxation_or_a_delta_there_is_nothing_to_tell(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
    ) -> None:
        unmoved = with_aim(llama, measured, {"omega": 0.2})
        base = tuple(replace(entry, reference=str(llama / "base")) for entry in unmoved.models)
        part = replace(unmoved.slices[0], experts=base)
        for name, job in (("plain", recipe(llama)), ("unmoved", replace(unmoved, slices=(part,)))):
            out = merge(job, tmp_path / name)
            facts = facts_of(out)
            assert "kept" not in facts
            assert "matplotlib" not in facts["versions"]
            assert SECTION not in (out / "README.md").read_text()
            assert not (out / PICTURE).exists()


class TestBlocks:
    def test_without_matplotlib_the_card_has_them(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        without_matplotlib(monkeypatch)
        run = Progress()
        out = merge(
            with_aim(llama, measured, {"omega": 0.2, "exclude": ["layers.1.mlp"]}),
            tmp_path / "out",
            emit=lambda event: run.see(0.0, event),
        )
        assert not (out / PICTURE).exists()
        assert "matplotlib" not in facts_of(out)["versions"]
        section, rows = section_of(out), list(heat_rows(run.kept))
        assert len(rows) == 9
        known = [share for _, row in rows for share in row if share is not None]
        least, most = math.floor(min(known) * 100) / 100, math.ceil(max(known) * 100) / 100
        assert f"\nscale: ▁ {least:.0%} to █ {most:.0%}\n" in section
        for kind, row in rows:
            places = [None if share is None else (share - least) / (most - least) for share in row]
            blocks = "".join("·" if place is None else BLOCKS[min(int(place * 8 + 1e-9), 7)] for place in places)
            assert re.search(rf"(?m)^{re.escape(kind)} +{blocks}  +\d+%$", section)
        assert section.count("·") == 3
        assert f"\n- `lm_head`: {facts_of(out)['kept']['kinds']['lm_head']:.1%}\n" in section

    def test_matplotlib_that_cannot_be_imported_is_none(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        out = merge(with_aim(llama, measured, {"omega": 0.2}), tmp_path / "out")
        assert "\n```text\n" in section_of(out)
        assert not (out / PICTURE).exists()
        assert "matplotlib" not in facts_of(out)["versions"]

    def test_a_layer_stands_below_its_number_however_many_there_are(self) -> None:
        kept = by_module((layer, "mlp.experts.*.up_proj", (1.0, float(layer == 80))) for layer in range(95))
        ruler, row, _ = block_map(kept)
        assert ruler.index("80") == row.index("█")
        assert row.endswith("  1%")
        assert re.findall(r"\d+", ruler) == [str(layer) for layer in range(0, 95, 10)]

    def test_thousands_of_kinds_are_not_all_shown(self) -> None:
        kept = by_module((0, f"kind{number}", (1.0, 0.5)) for number in range(3000))
        lines = list(block_map(kept))
        assert len(lines) == MOST_KINDS + 3
        assert lines[-2] == f"and {3000 - MOST_KINDS} more kinds"


@pytest.mark.parametrize("drawn", [True, False])
def test_hostile_names_stay_within_the_picture_or_the_block(
    place: Place, texts: Path, monkeypatch: pytest.MonkeyPatch, drawn: bool
) -> None:
    if not drawn:
        without_matplotlib(monkeypatch)
    names = [f"model.layers.1.{part}" for part in ("$x^2$_a\\frac", "```\n````\n# owned\n<b>", "\u202e漢\x1b[2J", "")]
    names += ["`|\n# owned\n<script>", "n" * 100_000]
    file = activations_of(place.folder / "base", texts, place.folder / "activations.safetensors")
    activations = Activations.load(file)
    means = {**activations.means, **{name: torch.tensor([1.0, 0.5]) for name in names}}
    replace(activations, means=means).save(file)
    for number, model in enumerate(("base", "math", "code")):
        tiny.edit_tensors(
            place.folder / model,
            lambda t, n=float(number): t.update({name: torch.tensor([n, 2 * n]) for name in names}),
        )
    done = place.merge("--calibration", file, "--omega", "0.4")
    assert done.code == 0, done.err
    card = (place.out / "README.md").read_text()
    assert_card(card)
    assert SECTION in card
    assert len(card) < 20_000
    assert (place.out / PICTURE).exists() == drawn
    assert len(facts_of(place.out)["kept"]["kinds"]) == 11 + len(names)


class TestPicture:
    tensors: ClassVar = [
        *((n, kind, (10.0, n + 2.0)) for n in range(7) for kind in ("mlp.up_proj", "$x_1^{2$", "\\frac_漢\n")),
        (3, "self_attn", (1.0, 0.5)),
    ]

    def image(self, png: bytes | None) -> Image.Image:
        assert png is not None
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        read = Image.open(io.BytesIO(png))
        read.load()
        return read

    def test_a_cell_has_the_colour_of_its_share(self) -> None:
        kept = {(str(n), "k"): DeltaSums(100.0, after) for n, after in enumerate((90.0, 93.0, 95.0))}
        image = self.image(heatmap_png(kept))
        pixels = image.convert("RGB").tobytes()
        colours = Counter(pixels[n : n + 3].hex() for n in range(0, len(pixels), 3))
        commonest = {f"#{colour}" for colour, _ in colours.most_common(4)}
        assert commonest == {"#ffffff", colour_of(0.0), colour_of(153 / 255), colour_of(1.0)}, "from least to most"
        assert image.info.keys() <= {"dpi"}

    def test_its_size_is_bounded(self) -> None:
        kinds = (f"kind{number}" + "_" * 500 for number in range(200))
        image = self.image(heatmap_png(by_module((layer, kind, (2.0, 1.0)) for kind in kinds for layer in (0, 999))))
        wide = self.image(heatmap_png(by_module((layer, "k", (2.0, 1.0)) for layer in range(1000))))
        assert max(image.size + wide.size) < 4000

    def test_nothing_to_draw_is_no_picture(self) -> None:
        assert heatmap_png({}) is None
        assert heatmap_png(by_module([(None, "lm_head", (2.0, 1.0)), (0, "k", (0.0, 0.0))])) is None

    def test_another_process_with_hostile_settings_draws_the_same_bytes_and_writes_to_the_cache_alone(
        self, tmp_path: Path
    ) -> None:
        home, work = tmp_path / "home", tmp_path / "work"
        home.mkdir()
        work.mkdir()
        own = "figure.facecolor: red\nfont.size: 40\nfont.family: fantasy\ntext.usetex: True\naxes.grid: 1\n"
        (work / "matplotlibrc").write_text(own + "backend: TkAgg\nsavefig.dpi: 17\nno.such: 1\n")
        code = (
            "import os, sys; before = dict(os.environ)\n"
            "from lowmem_aim.output.heatmap import by_module\n"
            "from lowmem_aim.output.picture import heatmap_png\n"
            f"png = heatmap_png(by_module({self.tensors!r}))\n"
            "assert dict(os.environ) == before and 'matplotlib.pyplot' not in sys.modules\n"
            "import matplotlib; assert matplotlib.rcParams['font.size'] == 40\n"
            "sys.stdout.buffer.write(png)"
        )
        gone = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "MATPLOTLIBRC")
        changed = {"HOME": str(home), "MPLBACKEND": "TkAgg", "PYTHONPATH": str(ROOT)}
        env = {name: value for name, value in os.environ.items() if name not in gone} | changed
        done = subprocess.run([sys.executable, "-c", code], cwd=work, env=env, capture_output=True, timeout=120)
        assert done.stderr == b""
        assert done.stdout == heatmap_png(by_module(self.tensors))
        written = {file.relative_to(home).as_posix() for file in home.rglob("*") if file.is_file()}
        assert written
        assert all(name.startswith(".cache/lowmem_aim/") for name in written)
        assert [file.name for file in work.iterdir()] == ["matplotlibrc"]

    def test_it_is_one_of_the_files_that_are_verified(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
        run: Run,
    ) -> None:
        out = merge(with_aim(llama, measured, {"omega": 0.2}), tmp_path / "out")
        assert f"![The share that is left, layers by kinds of module]({PICTURE})" in section_of(out)
        assert {"matplotlib", "pillow"} <= set(facts_of(out)["versions"])
        assert run("verify", out).code == 0
        (out / PICTURE).write_bytes((out / PICTURE).read_bytes()[:-1])
        assert run("verify", out).code == 8

    def test_an_interrupted_merge_goes_on_under_the_same_matplotlib(
        self,
        llama: Path,
        measured: Path,
        tmp_path: Path,
        each_tensor: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        relaxed, plain = with_aim(llama, measured, {"omega": 0.2}), recipe(llama)
        for name, job in (("relaxed", relaxed), ("plain", plain)):
            stop(job, tmp_path / name, 9)
        without_matplotlib(monkeypatch)
        with pytest.raises(ResumeError, match="a different one") as refused:
            merge(relaxed, tmp_path / "relaxed", Options(shard_bytes=40_000))
        assert "matplotlib: " in "\n".join(refused.value.problems)
        merge(plain, tmp_path / "plain", Options(shard_bytes=40_000))
        out = merge(relaxed, tmp_path / "relaxed", Options(shard_bytes=40_000, accept_environment=True))
        assert "\n```text\n" in section_of(out)
        assert "matplotlib" in (out / "README.md").read_text()  # among the environments it went through
        assert not (out / PICTURE).exists()


def test_what_a_run_tells_and_what_its_card_says_are_the_same(
    llama: Path,
    measured: Path,
    tmp_path: Path,
) -> None:
    run = Progress()
    out = merge(with_aim(llama, measured, {"omega": 0.3}), tmp_path / "out", emit=lambda event: run.see(0.0, event))
    assert any(run.kept_by(0))
    kept = facts_of(out)["kept"]
    assert kept["delta"] == pytest.approx(run.kept_share(), abs=1e-4)
    assert kept["kinds"] == pytest.approx(run.kept_by(1), abs=1e-4)
    assert kept["layers"] == pytest.approx({k: v for k, v in run.kept_by(0).items() if k}, abs=1e-4)


def test_a_scale_lies_between_the_least_and_the_most() -> None:
    scale = Scale.of([0.874, None, 0.952])
    assert str(scale) == "▁ 87% to █ 96%"
    assert [scale.block(share) for share in (0.874, 0.915, 0.952, None)] == ["▁", "▅", "█", "·"]
    assert str(Scale.of([0.5, 0.5])) == "▁ 49% to █ 50%"
    assert str(Scale.of([0.0, 1.0])) == str(Scale.of([None])) == "▁ 0% to █ 100%"
