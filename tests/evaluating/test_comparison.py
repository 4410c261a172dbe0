"""Comparisons: changes against parents, what is chance, the gain; what cannot be compared is refused, all at once."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from scoring import CODE, DARE, DARE_AIM, MATH, TASKS, fractions, merge, model, paper, written

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.comparison import Change, Comparison, compared, read_all
from lowmem_aim.evaluating.families import curves_of, relaxation_of
from lowmem_aim.evaluating.fronts import check_pairs, front_of, fronts_of
from lowmem_aim.evaluating.hypervolume import hv_gain
from lowmem_aim.evaluating.scores import Score, Scores

PLAIN = merge("plain", {"a": 0.5, "b": 0.5}, stderr=0.03)
RELAXED = merge("relaxed", {"a": 0.6, "b": 0.53}, omega=0.4, stderr=0.04)


def names(found: Comparison) -> list[str]:
    return [row.name for row in found.rows]


def refused(*models: Scores, forced: bool = False) -> str:
    with pytest.raises(UsageError) as raised:
        compared(models, forced=forced)
    assert raised.value.exit_code == 2
    return "\n".join(raised.value.problems)


class TestChanges:
    def test_they_are_against_the_same_merge_unrelaxed(self) -> None:
        first, second = compared([PLAIN, RELAXED]).rows
        assert (first.parent, first.changes) == (None, {})
        assert second.parent == PLAIN
        assert {task: change.value for task, change in second.changes.items()} == {"a": 0.6 - 0.5, "b": 0.53 - 0.5}

    def test_two_independent_errors_add_up_in_squares(self) -> None:
        change = compared([PLAIN, RELAXED]).rows[1].changes["a"]
        assert change.stderr == pytest.approx(math.sqrt(0.03**2 + 0.04**2))

    @pytest.mark.parametrize(
        ("value", "stderr", "clear"),
        [(0.1, 0.05, True), (-0.1, 0.05, True), (0.0999, 0.05, False), (0.1, None, None), (0.0, 0.0, False)],
    )
    def test_less_than_two_standard_errors_is_not_clear(self, value: float, stderr: float, clear: bool | None) -> None:
        assert Change(value, stderr).is_clear is clear

    def test_a_parent_is_found_by_digest_and_by_name_too(self) -> None:
        foreign = model("merged elsewhere", {"a": 0.5}, digest="d1")
        relaxed = model("here", {"a": 0.6}, parent="d1", aim={"omega": 0.4})
        by_name = model("by hand", {"a": 0.7}, parent="merged elsewhere")
        rows = {row.name: row for row in compared([by_name, relaxed, foreign]).rows}
        assert rows["here"].parent == rows["by hand"].parent == foreign
        assert next(iter(rows)) == "merged elsewhere", "the parent stands before what was made of it"

    def test_a_parent_may_be_among_the_population(self) -> None:
        assert compared([RELAXED], [PLAIN]).rows[0].parent == PLAIN

    def test_a_merge_without_its_parent_is_said_to_have_none(self) -> None:
        found = compared([RELAXED])
        assert found.rows[0].parent is None
        assert [note for note in found.notes if note.startswith("relaxed: its unrelaxed merge is not among the files")]
        many = [replace(RELAXED, name=f"relaxed {number}") for number in range(4)]
        notes = [note for note in compared(many).notes if "not among the files" in note]
        assert [note.partition(":")[0] for note in notes] == ["relaxed 0 and 3 others"]
        assert not [note for note in compared([PLAIN]).notes if "unrelaxed" in note]

    def test_several_parents_are_refused(self) -> None:
        assert "`relaxed` has several parents: `plain`, `again`" in refused(
            PLAIN, replace(PLAIN, name="again"), RELAXED
        )


class TestGains:
    def test_the_papers_rows(self, tmp_path: Path) -> None:
        plain, relaxed = compared(*read_all(*paper(tmp_path))).rows
        assert plain.gain is not None
        assert relaxed.gain is not None
        assert (f"{plain.gain.value:.4f}", f"{relaxed.gain.value:.4f}") == ("0.2310", "0.2272")
        assert f"{100 * (relaxed.gain.relative or 0):+.2f}" == "-1.65"
        population = [fractions(CODE), fractions(MATH)]
        assert plain.gain.value == hv_gain(fractions(DARE), population)
        assert relaxed.gain.value == hv_gain(fractions(DARE_AIM), population)

    def test_the_population_is_stated(self, tmp_path: Path) -> None:
        found = compared(*read_all(*paper(tmp_path)))
        assert [row.name for row in found.population] == ["Code", "Math"]
        assert "HV gain: against the population Code, Math; over 6 tasks" in found.notes[0]
        assert compared([PLAIN]).notes == (
            "no HV gain: `--against` names the population, the experts that were merged",
        )

    def test_a_model_of_the_population_gains_nothing_and_is_listed_once(self) -> None:
        found = compared([PLAIN, RELAXED], [PLAIN])
        assert [row.gain.value for row in found.rows if row.gain] == [0.0, hv_gain([0.6, 0.53], [[0.5, 0.5]])]
        assert [row.name for row in found.every] == ["plain", "relaxed"]

    def test_what_is_no_fraction_is_left_out_and_said(self) -> None:
        def scores(value: float, perplexity: float) -> dict[str, float | Score]:
            return {"a": value, "w": Score.of_metric("word_perplexity", perplexity, None, 10), "e": errors}

        errors = Score(0.2, None, "error_rate", 10, higher_is_better=False)
        found = compared([model("m", scores(0.6, 9.0))], [model("p", scores(0.5, 8.0))])
        assert found.volume == ("a",)
        assert found.rows[0].gain is not None
        assert found.rows[0].gain.value == pytest.approx(0.1)
        assert "w is no fraction but perplexity of a word: it is left out of the HV gain" in found.notes
        assert "e is better the smaller it is: it is left out of the HV gain" in found.notes

    def test_of_no_fraction_at_all_there_is_no_gain(self) -> None:
        only = {"w": Score.of_metric("word_perplexity", 9.0, None, 10)}
        found = compared([model("m", only)], [model("p", only)])
        assert found.rows[0].gain is None
        assert "no HV gain: no task is a fraction of which more is better" in found.notes

    def test_a_volume_that_would_take_days_is_not_begun(self) -> None:
        tasks = {f"t{number}": 0.5 for number in range(20)}
        found = compared([model("m", tasks)], [model(f"p{number}", tasks) for number in range(20)])
        assert found.rows[0].gain is None
        assert "no HV gain: of a population of 20 models and 20 tasks it would take too long" in found.notes
        many = {f"t{number}": 0.5 for number in range(32)}
        assert any("at most 31 tasks" in note for note in compared([model("m", many)], [model("p", many)]).notes)

    def test_its_error_is_the_scores_and_the_same_in_any_company(self) -> None:
        population = [model("expert", {"a": 0.4, "b": 0.4}, stderr=0.0)]
        scores = {"a": 0.5, "b": 0.5}
        exact, rough = (merge(name, scores, stderr=error) for name, error in (("exact", 0.0), ("rough", 0.01)))
        alone, *_ = compared([rough], population).rows
        _, beside = compared([exact, rough], population, sort="name").rows
        assert alone.gain == beside.gain
        assert alone.gain is not None
        # gain = sqrt(a b - 0.16): by a and b it changes by 0.5 / (2 gain) each
        expected = math.sqrt(2) * 0.01 * 0.5 / (2 * alone.gain.value)
        assert alone.gain.stderr == pytest.approx(expected, rel=0.15)
        without = compared([merge("unknown", scores)], population).rows[0].gain
        assert without is not None
        assert without.stderr is None

    def test_a_change_of_the_gain_shares_the_populations_error(self) -> None:
        plain = merge("plain", {"a": 0.5, "b": 0.5}, stderr=0.0)
        relaxed = merge("relaxed", {"a": 0.52, "b": 0.5}, omega=0.4, stderr=0.0)
        found = compared([plain, relaxed], [model("expert", {"a": 0.4, "b": 0.4}, stderr=0.05)])
        gain = found.rows[1].gain
        assert gain is not None
        assert gain.change is not None
        assert gain.stderr is not None
        assert gain.change.stderr is not None
        assert gain.change.stderr < gain.stderr / 3


class TestRefusals:
    def test_all_at_once(self) -> None:
        short = model("short", {"a": 0.5}, settings={"seed": 1, "limit": 10, "num_fewshot": 5})
        told = refused(PLAIN, replace(PLAIN, scores={**PLAIN.scores, "c": Score(0.5)}), short)
        for problem in (
            "2 files have the name `plain`",
            "`plain` lacks `c`, which others have",
            "`short` lacks `b`, `c`, which others have",
            "`seed` differs: 0 in `plain`, `plain`; 1 in `short`",
            "`limit` differs: none in `plain`, `plain`; 10 in `short`",
            "`num_fewshot` differs: none in `plain`, `plain`; 5 in `short`",
        ):
            assert problem in told

    @pytest.mark.parametrize("key", ["seed", "limit", "num_fewshot", "chat_template", "settings"])
    def test_another_setting_needs_force_and_is_said_then(self, key: str) -> None:
        one, other = (model(name, {"a": 0.5}, settings={key: value}) for name, value in (("m", None), ("n", 7)))
        assert refused(one, other) == f"`{key}` differs: none in `m`; 7 in `n`"
        assert f"compared by force: `{key}` differs: none in `m`; 7 in `n`" in compared([one, other], forced=True).notes

    def test_another_metric_and_another_number_of_items_need_force(self) -> None:
        one, other = model("m", {"a": Score(0.5, None, "acc", 9)}), model("n", {"a": Score(0.5, None, "acc_norm", 8)})
        assert refused(one, other).splitlines() == [
            "the metric of `a` differs: acc in `m`; acc_norm in `n`",
            "the number of items of `a` differs: 9 in `m`; 8 in `n`",
        ]
        assert len(compared([one, other], forced=True).notes) == 3

    def test_force_neither_adds_tasks_nor_units(self) -> None:
        perplexity = Score.of_metric("perplexity", 9.0, None, 9)
        one, other = model("m", {"a": 0.5, "b": 0.5}), model("n", {"a": perplexity})
        told = refused(one, other, forced=True)
        assert "`n` lacks `b`" in told
        assert "the unit of `a` differs: fraction in `m`; perplexity, less is better in `n`" in told

    def test_what_a_hand_written_file_does_not_say_is_not_compared(self) -> None:
        by_hand = Scores("by hand", {"a": Score(0.5), "b": Score(0.5)})
        assert names(compared([PLAIN, by_hand])) == ["plain", "by hand"]

    def test_files_are_all_read_before_anything_is_said(self, tmp_path: Path) -> None:
        for name, text in (("x", "{"), ("y", '{"name": "y", "scores": {"a": 52.1}}')):
            (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(UsageError) as raised:
            read_all([tmp_path / "x.json", tmp_path / "none.json"], [tmp_path / "y.json"])
        assert len(raised.value.problems) == 3
        assert "percent? divide by 100" in raised.value.hint

    def test_a_file_that_is_named_twice_is_one_model(self, tmp_path: Path) -> None:
        (file,) = written(tmp_path, PLAIN)
        (tmp_path / "link.json").symlink_to(file)
        models, population = read_all([file, file, tmp_path / "link.json"], [file])
        assert models == population == [PLAIN]
        assert names(compared(models, population)) == ["plain"]

    def test_unknown_words_are_refused_with_what_was_meant(self) -> None:
        for wrong, told in (
            ({"sort": "gain"}, "`--sort gain` is neither family, name, hv nor a task"),
            ({"sort": "hv"}, "`--sort hv` needs a population"),
            ({"tasks": ["aa"]}, "no model has the task `aa`"),
        ):
            with pytest.raises(UsageError, match=told):
                compared([PLAIN], **wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError) as raised:
            check_pairs([("gsm8", "gsm8k"), ("mbpp", "mbpp")], TASKS)
        assert raised.value.problems == (
            "`--pair gsm8,gsm8k`: there is no task `gsm8`; did you mean `gsm8k`?",
            "`--pair mbpp,mbpp` is one task twice",
        )

    def test_tasks_that_are_named_are_compared_alone(self) -> None:
        found = compared([PLAIN, model("m", {"a": 0.5, "c": 0.1}, stderr=0.1)], tasks=["a"])
        assert found.tasks == ("a",)


class TestFamilies:
    ACM = merge("acm", {"a": 0.5}, acm={"theta": 0.7})
    POINTS = (
        *(merge(f"aim {omega}", {"a": 0.5}, omega=omega) for omega in (0.6, 0.2)),
        *(
            merge(f"{control} {omega}", {"a": 0.5}, omega=omega, control=control)
            for omega, control in itertools.product((0.6, 0.2), ("inverted", "uniform"))
        ),
    )
    PLAIN = merge("plain", {"a": 0.5})
    ORDER = (
        *("plain", "aim 0.2", "uniform 0.2", "inverted 0.2", "aim 0.6", "uniform 0.6", "inverted 0.6", "acm"),
        "other",
    )

    def test_controls_stand_beside_their_point(self) -> None:
        models = [self.ACM, *self.POINTS, model("other", {"a": 0.5}), self.PLAIN]
        assert names(compared(models)) == list(self.ORDER)

    def test_models_are_sorted_as_asked(self) -> None:
        models = [model(name, {"a": value, "w": Score(value, unit="w", higher_is_better=False)})
                  for name, value in (("n", 0.2), ("m", 0.9), ("o", 0.5))]  # fmt: skip
        assert names(compared(models)) == ["n", "m", "o"]
        assert names(compared(models, sort="name")) == ["m", "n", "o"]
        assert names(compared(models, sort="a")) == ["m", "o", "n"]
        assert names(compared(models, sort="w")) == ["n", "o", "m"]
        population = [model("p", {"a": 0.1, "w": Score(0.1, unit="w", higher_is_better=False)})]
        assert names(compared(models, population, sort="hv")) == ["m", "o", "n"]

    def test_what_a_model_was_relaxed_by_is_told(self) -> None:
        both = merge("both", {"a": 0.5}, omega=0.25, acm={})
        layers = merge("layers", {"a": 0.5}, aim={"omega": [0.2, 0.6]})
        told = [relaxation_of(found) for found in (self.PLAIN, *self.POINTS[1:4], self.ACM, both, layers)]
        assert told == ["", "AIM 0.2", "AIM 0.6, inverted", "AIM 0.6, uniform", "ACM", "AIM 0.25 + ACM", "AIM"]

    def test_a_curve_differs_in_nothing_but_omega_and_ends_at_the_unrelaxed_merge(self) -> None:
        other = merge("other text", {"a": 0.5}, aim={"omega": 0.3, "calibration": "mine"})
        layers = merge("layers", {"a": 0.5}, aim={"omega": [0.2, 0.6]})
        found = compared([self.PLAIN, *self.POINTS, other, layers, self.ACM])
        curves = curves_of([row.model for row in found.rows], {r.name: r.parent for r in found.rows if r.parent})
        drawn = [
            (curve.name, {kind: [(o, m.name) for o, m in line] for kind, line in curve.lines.items()})
            for curve in curves
        ]
        assert drawn == [
            (
                "plain",
                {
                    "": [(0.2, "aim 0.2"), (0.6, "aim 0.6"), (1.0, "plain")],
                    "uniform": [(0.2, "uniform 0.2"), (0.6, "uniform 0.6"), (1.0, "plain")],
                    "inverted": [(0.2, "inverted 0.2"), (0.6, "inverted 0.6"), (1.0, "plain")],
                },
            ),
            ("plain", {"": [(0.3, "other text"), (1.0, "plain")]}),
        ]

    def test_one_point_without_its_merge_is_no_curve(self) -> None:
        assert curves_of([self.POINTS[0]], {}) == []


class TestFronts:
    def test_they_hold_what_nothing_is_better_than(self) -> None:
        places = {"best a": (0.9, 0.1), "worse": (0.5, 0.4), "middle": (0.5, 0.5), "twin": (0.5, 0.5), "b": (0.1, 0.9)}
        found = compared([model(name, {"a": a, "b": b}) for name, (a, b) in places.items()])
        assert [row.name for row in front_of(found, ("a", "b")).rows] == ["b", "middle", "twin", "best a"]

    def test_of_a_perplexity_less_is_better(self) -> None:
        def scores(a: float, perplexity: float) -> dict[str, float | Score]:
            return {"a": a, "w": Score.of_metric("perplexity", perplexity, None, 9)}

        found = compared([model("m", scores(0.5, 9.0)), model("n", scores(0.4, 8.0)), model("o", scores(0.4, 9.5))])
        assert [row.name for row in front_of(found, ("a", "w")).rows] == ["n", "m"]

    def test_unasked_they_are_the_longest_six_in_the_order_of_the_tasks(self) -> None:
        low = dict.fromkeys("abcde", 0.1)
        found = compared([model("m", {**low, "d": 0.9}), model("n", {**low, "e": 0.9})])
        first = [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e"), ("b", "c")]
        assert [front.pair for front in fronts_of(found)] == [*first, ("d", "e")]
        assert [front.pair for front in fronts_of(found, [("e", "a")])] == [("e", "a")]
