"""The hypervolume gain is the paper's, to the last printed digit, and the plain formula."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from scoring import CODE, DARE, DARE_AIM, MATH, fractions

from lowmem_aim.evaluating.hypervolume import hv_gain


def volume(points: list[list[float]]) -> Fraction:
    """The volume of the union of boxes, exactly, by inclusion and exclusion."""
    total = Fraction(0)
    for count in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, count):
            box = Fraction(1)
            for sides in zip(*chosen, strict=True):
                box *= Fraction(min(sides))
            total += box if count % 2 else -box
    return total


def plain(scores: list[float], population: list[list[float]]) -> float:
    return float(volume([*population, scores]) - volume(population)) ** (1 / len(scores))


def test_the_papers_rows_to_the_last_printed_digit() -> None:
    population = [fractions(CODE), fractions(MATH)]
    dare, relaxed = (hv_gain(fractions(row), population) for row in (DARE, DARE_AIM))
    assert (f"{dare:.2f}", f"{dare:.4f}") == ("0.23", "0.2310")
    assert (f"{relaxed:.2f}", f"{relaxed:.4f}") == ("0.23", "0.2272")
    assert f"{100 * (relaxed / dare - 1):+.2f}" == "-1.65"


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6, 8])
def test_it_is_the_plain_formula(tasks: int) -> None:
    draw = random.Random(tasks)
    for size in (0, 1, 2, 5):
        population = [[draw.random() for _ in range(tasks)] for _ in range(size)]
        for _ in range(20):
            scores = [draw.random() for _ in range(tasks)]
            assert hv_gain(scores, population) == pytest.approx(plain(scores, population), rel=1e-9, abs=1e-12)


def test_no_gain_is_zero_and_not_the_root_of_a_rounding_error() -> None:
    draw = random.Random(0)
    for _ in range(200):
        population = [[draw.random() for _ in range(6)] for _ in range(5)]
        worse = [value * draw.choice([1.0, 0.999]) for value in population[2]]
        assert hv_gain(worse, population) == 0.0
        same = [math.nextafter(value, 2.0) for value in population[2]]
        assert hv_gain(same, population) == 0.0, "143 / 500 and 0.286 differ in their last bit"


def test_a_small_gain_is_right_in_every_digit_that_is_printed() -> None:
    draw = random.Random(1)
    for _ in range(50):
        population = [[draw.uniform(0.2, 0.9) for _ in range(6)] for _ in range(5)]
        better = [min(value + 1e-4, 1.0) if task == 3 else value for task, value in enumerate(population[2])]
        assert f"{hv_gain(better, population):.4f}" == f"{plain(better, population):.4f}"


def test_a_task_that_nobody_solves_leaves_no_volume() -> None:
    assert hv_gain([0.5, 0.0], [[0.25, 0.0]]) == 0.0
    assert hv_gain([0.5, 0.25], [[1.0, 0.0]]) == pytest.approx((0.5 * 0.25) ** 0.5)
