"""The order in which tensors and measured blocks meet."""

from __future__ import annotations

from typing import Any, cast

from solving_cases import Space

from lowmem_aim.merging.given import BlockMoments, Given
from lowmem_aim.planning.sources import Source
from lowmem_aim.planning.tasks import Task
from lowmem_aim.system.dtypes import DTYPES


class Named:
    """Blocks whose tensors are called after them; a buffer is of none."""

    def block_of(self, name: str) -> int | None:
        return None if "buffer" in name or "." not in name else int(name.split(".")[0])


def task(name: str, layer: int | None) -> Task:
    source = cast("Source", type("OfName", (), {"tensor": name})())
    return Task(name, (2, 2), DTYPES["F32"], "merge", {}, (source,), layer=layer)


def blocks_of(given: Given, tasks: list[Task]) -> list[tuple[int | None, list[str]]]:
    return [(block, [one.name for one in some]) for block, some in given.by_block(tasks)]


TASKS = [task("norm", None), task("0.a", 0), task("0.buffer", 0), task("0.b", 0), task("1.buffer", 1), task("1.a", 1)]


def test_a_buffer_does_not_divide_its_block() -> None:
    given = Given(Space(), cast("BlockMoments", cast("Any", Named())))
    found = blocks_of(given, TASKS)
    assert found == [(None, ["norm"]), (0, ["0.a", "0.buffer", "0.b"]), (None, ["1.buffer"]), (1, ["1.a"])]


def test_without_moments_there_are_no_blocks() -> None:
    assert blocks_of(Given(Space()), TASKS) == [(None, [one.name for one in TASKS])]
