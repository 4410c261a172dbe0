"""Memory that a merge takes, and the division of a budget for it. All figures are bytes, unless they say otherwise.

    held       what the methods hold of the two tensors under way, whatever the slices' size; and what the run grows by
    slices     those read ahead, computed and waiting to be written: at least small ones must fit
    kept       whole tensors, between their passes: they get what is left

How many slices are alive at once follows from the queues of `pipeline`, `passes` and `output.writer`; how much memory
the work on one takes, and what is held besides, is declared by the method (`methods.footprint`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowmem_aim.errors import LowmemAimError, raise_all
from lowmem_aim.methods import kernels
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.writer import WAITING
from lowmem_aim.planning.layout import subject_of
from lowmem_aim.planning.tasks import Plan, Task, as_read
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.memory import LARGE_BYTES, Budget, Kind, too_small
from lowmem_aim.system.on_demand import torch

# A slice then has 2 MB of bfloat16 in each model: it stays in a processor's cache from read to write.
CPU_SLICE_ELEMENTS = 1 << 20
# Without compiled loops each operation makes a tensor of its own, of which these stay in the cache.
TORCH_SLICE_ELEMENTS = 1 << 17
# Large enough that starting a kernel costs nothing against running it.
GPU_SLICE_ELEMENTS = 1 << 22
# Smaller slices would take many times as long: each costs half a millisecond, whatever its size.
LEAST_SLICE_ELEMENTS = 1 << 15
# What the run grows by once the budget is divided: threads, the journal, the card.
GROWTH_BYTES = 32 << 20
# The same of each further output: threads, the journal, the log.
OUTPUT_BYTES = 1 << 20
# Slices read ahead where the budget allows it.
AHEAD = 4
# Slices on a GPU at the same time: one copied in, one computed, one copied out.
STREAMS = 3
# Holes that slices leave in the heap, as a share of them: what is freed is not always of use to what comes next. Large
# ones have pages of their own where memory is tight, see `give_back_at_once`.
HOLES, HOLES_OF_LARGE = 0.5, 0.1
# A budget of so many times what the slices take is ample: the heap may keep what is freed.
AMPLE = 4


@dataclass(frozen=True)
class Running:
    """Bytes that running experts between tensors takes, and the moments that are measured then."""

    least: int  # of RAM, while no slice is computed
    block: int  # of RAM, that a block takes if all of it is to be there
    vram: int  # of a device's own memory, at least
    moments: int  # of one block: they may lie in a file


@dataclass(frozen=True)
class Needs:
    """Figures of a merge's plans and models that decide how much memory slices of a size take."""

    row: int  # elements of the longest row, or of the largest tile
    largest: int  # elements of the largest tensor
    stored: int  # of one element, in all models
    written: int  # of one element, in all outputs
    footprint: Footprint  # the most that the methods take of any tensor; `tensor` is of the two under way
    compiled: bool  # numba's loops do the arithmetic
    passes: int = 2  # over a tensor, at most: after the first, slices are read again
    outputs: int = 1  # written at the same time
    reading: Footprint = field(default_factory=Footprint)  # of all models' readers, besides the rows that they give
    running: Running | None = None  # of experts, between tensors

    @classmethod
    def of(cls, plans: Sequence[Plan], inputs: Inputs, device: torch.device) -> Needs:
        """The needs of a merge that writes all `plans` at once; they differ in method and relaxation only."""
        methods = [plan.recipe.method for plan in plans]
        tasks = [task for task in as_read(plans) if task.action == "merge"]
        filled = any(task.filling for task in tasks)
        # Beside base and experts, the rows that stand where a model has none.
        models = max((len(task.experts) for task in tasks), default=0) + 1 + filled
        widest = max((task.dtype.itemsize for task in tasks), default=4)
        dtypes = {info.dtype for checkpoint in inputs.checkpoints for info in checkpoint}
        stored = max((dtype.itemsize for dtype in dtypes), default=4)
        stored = max(stored, *(task.given_dtype.itemsize for task in tasks if task.filling)) if filled else stored
        loops = device.type == "cpu" and kernels.available()
        footprint = _footprint(plans, loops)
        if (loops and len(dtypes) > 1) or not dtypes <= {DTYPES["BF16"], DTYPES["F32"]}:
            footprint = _plus_element(footprint, 4 * models)  # the loops take float32 copies
        return cls(
            row=max((_row(task) for task in tasks), default=1),
            largest=max((task.numel for task in tasks), default=1),
            stored=models * stored,
            written=widest * (len(plans) + any(plan.recipe.texts == "merged" for plan in plans)),  # and for the texts
            footprint=footprint | _finishing(plans, tasks),
            compiled=loops and all(method.compiled for method in methods),
            passes=1 + max(method.rounds[1] for method in methods),
            outputs=len(plans),
            reading=_reading(inputs),
        )

    @property
    def least_elements(self) -> int:
        """The elements of each model in the smallest slices that are worth while: at least a row."""
        return max(self.row, min(LEAST_SLICE_ELEMENTS, self.largest), 1)

    @property
    def holes(self) -> float:
        """The holes that slices leave in the heap, as a share of them."""
        return HOLES_OF_LARGE if self.least_elements * 2 >= LARGE_BYTES else HOLES

    def held(self) -> int:
        """Bytes of RAM that do not depend on the slices."""
        own = self.footprint.tensor + self.reading.tensor
        return own + GROWTH_BYTES + OUTPUT_BYTES * (self.outputs - 1)

    def slices(self, elements: int, workers: int, ahead: int, on_host: bool) -> int:
        """Bytes of RAM of all slices that are alive at once, of so many elements of each model."""
        computed = workers + 2  # as many are begun before the first result is taken
        # Of the slice that is read: rows put together anew, and the check for NaN.
        element = self._waiting(ahead) + (self.stored + self.written) * (computed + 1) + 8
        element += self.reading.element * min(self.passes, 2)  # in each queue one slice is being read
        fixed = self.footprint.part * (computed + 1)
        if on_host:
            element += self.footprint.element * workers
            fixed += self.footprint.slice * workers
        else:  # pinned copies
            element += 2 * (self.stored + self.written) * workers
        return math.ceil((elements * element + fixed) * (1 + self.holes))

    def waiting(self, elements: int, ahead: int) -> int:
        """Bytes of RAM of those slices that wait in a queue while none is computed."""
        return math.ceil(elements * self._waiting(ahead) * (1 + self.holes))

    def _waiting(self, ahead: int) -> int:
        read = (ahead + 1) * min(self.passes, 2)  # a queue, and a slice on its way there; another queue reads again
        written = WAITING + 1  # and one at the disk
        return self.stored * read + self.written * written

    def on_device(self, elements: int, workers: int) -> int:
        """Bytes of the device's own memory of slices of so many elements; a tenth is lost between them."""
        taken = elements * (self.stored + self.written + self.footprint.element)
        return math.ceil((taken + self.footprint.slice + self.footprint.part) * workers / 0.9)

    def one_by_one(self, elements: int) -> int:
        """Bytes of RAM that merging slices of so many elements takes, one at a time, in one thread."""
        element = 2 * self.stored + self.written + self.footprint.element + self.reading.element
        elements = max(elements, self.row)
        held = self.footprint.tensor + self.reading.tensor
        return held + self.footprint.slice + 2 * self.footprint.part + elements * element

    def least_ram(self, on_host: bool, reached: int = 0) -> int:
        """Least bytes of RAM, besides the program itself, with which `share_out` succeeds.

        `reached` bytes more than it takes now were in use for a moment.
        """
        working = self.slices(self.least_elements, 1, 1, on_host)
        return max(self.held() + max(working, self.between(self.least_elements, 1)), reached)

    def between(self, elements: int, ahead: int) -> int:
        """Bytes of RAM that running experts between tensors takes at least, and the slices that wait meanwhile."""
        return self.waiting(elements, ahead) + self.running.least if self.running else 0

    def least_vram(self) -> int:
        """Least bytes of a device's own memory with which `share_out` succeeds."""
        return self.on_device(self.least_elements, 1) + (self.running.vram if self.running else 0)


@dataclass(frozen=True)
class Shares:
    """The parts of a budget that a merge may use."""

    slice_elements: int  # of each model, in work at a time
    workers: int  # slices computed at the same time
    ahead: int  # slices read ahead
    kept_bytes: int  # a tensor of at most so many bytes, all models together, is kept between its passes
    matrices: int = 0  # bytes of RAM for those that methods hold from slice to slice
    device_matrices: int = 0  # the same, of a device's own memory
    models: int = 0  # bytes of RAM for running experts between tensors
    device_models: int = 0  # the same, of a device's own memory
    tight: bool = False  # what is freed must go back to the system at once


def share_out(budget: Budget, device: torch.device, needs: Needs, reached: int = 0, *, grown: bool = False) -> Shares:
    """Divide what is left of the budget. Raises MemoryBudgetError, with the number that would do, if it is too small.

    `reached` is the most RAM that preparing took for a moment. `grown`: the run has begun, and grown by some of what
    was set aside for that.
    """
    on_host = budget.vram is None
    used = budget.ram_used()
    left = max(0, budget.ram - used) + (GROWTH_BYTES if grown else 0)
    errors: list[LowmemAimError] = []
    if left < (least := needs.least_ram(on_host, reached - used)):
        errors.append(_refused(needs, "RAM", least, used, budget.ram))
    if budget.vram is not None:
        vram_left = budget.vram_left(device)
        if vram_left < (least := needs.least_vram()):
            errors.append(_refused(needs, "VRAM", least, budget.vram - vram_left, budget.vram))
    raise_all(errors)
    rest = left - needs.held()
    room = min(rest // 2, rest - needs.running.least) if needs.running else rest // 2
    if budget.vram is not None:
        room_there = vram_left - (needs.running.vram if needs.running else 0)
        if needs.footprint.matrices:
            room_there //= 2
    for workers, ahead in ((torch.get_num_threads() if on_host else STREAMS, AHEAD), (1, 1)):
        taken = functools.partial(needs.slices, workers=workers, ahead=ahead, on_host=on_host)
        elements = _most_elements(room, taken)
        if budget.vram is not None:
            on_device = functools.partial(needs.on_device, workers=workers)
            elements = min(elements, _most_elements(room_there, on_device))
        if elements >= needs.least_elements:
            break
    elements = max(elements, needs.least_elements)
    on_cpu = CPU_SLICE_ELEMENTS if needs.compiled else TORCH_SLICE_ELEMENTS
    elements = max(needs.row, min(elements, on_cpu if device.type == "cpu" else GPU_SLICE_ELEMENTS))
    slices = taken(elements)
    free = max(0, rest - max(slices, needs.between(elements, ahead)))
    spare = max(0, vram_left - needs.on_device(elements, workers)) if budget.vram is not None else 0
    tight = rest < AMPLE * slices
    if needs.running is None:
        # Matrices first: they would be read again for every slice.
        matrices = min(needs.footprint.matrices, free)
        # Two tensors may be kept: the next one's first pass begins before this one's last pass ends.
        return Shares(elements, workers, ahead, (free - matrices) // 3, matrices, spare, tight=tight)
    # A block's weights go before matrices, which are read again for every slice: weights are for every text.
    matrices = min(needs.footprint.matrices + needs.running.moments, max(0, free - needs.running.block))
    device_matrices = max(0, spare - needs.running.vram) // 2
    models = max(needs.running.least, rest - matrices - needs.waiting(elements, ahead))
    return Shares(elements, workers, ahead, 0, matrices, device_matrices, models, spare - device_matrices, tight=tight)


def share_beside(budget: Budget, device: torch.device, running: Running, ram: int, vram: int) -> Shares:
    """The shares of experts that are run beside something else: what they need at least, and half of what is to spare.

    `ram` and `vram` are the bytes that the other needs at least. It does not matter here whether the budget has them.
    """
    spare = max(0, budget.ram_left() - ram - running.least)
    own = running.least + spare // 2
    matrices = min(running.moments, max(0, own - running.least - running.block))
    if budget.vram is None:
        return Shares(0, 1, 0, 0, matrices, models=own - matrices)
    spare = max(0, budget.vram_left(device) - vram - running.vram) // 2
    return Shares(0, 1, 0, 0, matrices, spare // 2, own - matrices, running.vram + spare - spare // 2)


def _most_elements(room: int, taken: Callable[[int], int]) -> int:
    """The elements of the largest slices for which `taken` gives no more than `room` bytes."""
    fixed, many = taken(0), 1 << 20
    return max(0, (room - fixed - 1) * many // (taken(many) - fixed + 1))  # each figure is rounded up


def _refused(needs: Needs, kind: Kind, least: int, used: int, budget: int) -> LowmemAimError:
    fewer = "making fewer outputs" if needs.outputs > 1 else "merging fewer models"
    return too_small("this merge", kind, least, used, budget, f"{fewer} at a time takes less")


# --- what the plan's tensors take -------------------------------------------------------------------------------------


def _footprint(plans: Sequence[Plan], loops: bool) -> Footprint:
    """The most that the methods take of any tensor; of what they hold, that of the two tensors with the most."""
    whole, held, matrices = Footprint(), [0, 0], [0, 0]
    for alike in zip(*(plan.tasks for plan in plans), strict=True):
        own = sum(_footprints(plans, alike, loops), Footprint())
        whole |= own
        held = sorted([*held, own.tensor])[1:]
        matrices = sorted([*matrices, own.matrices])[1:]
    return Footprint(whole.element, whole.slice, whole.part, sum(held), sum(matrices))


def _footprints(plans: Sequence[Plan], alike: Sequence[Task], loops: bool) -> Iterator[Footprint]:
    """Yield what each way of merging a tensor takes; `alike` are its tasks in the plans."""
    ways = {plan.way(task): (plan, task) for plan, task in zip(plans, alike, strict=True) if task.action == "merge"}
    for plan, task in ways.values():
        subject = subject_of(task, plan.recipe, plan.seed)
        yield plan.recipe.method.footprint(subject, task.parameters, loops)


def _reading(inputs: Inputs) -> Footprint:
    """The memory of readers that compute what they give: models are read one after another, and hold what they hold."""
    found = [checkpoint.footprint for checkpoint in dict.fromkeys(inputs.checkpoints)]
    return Footprint(max((one.element for one in found), default=0), tensor=sum(one.tensor for one in found))


def _finishing(plans: Sequence[Plan], tasks: Sequence[Task]) -> Footprint:
    """Memory between combine and the rounded rows: float32 rows, a copy of them, and what relaxing them takes."""
    merged = 4 * min(len(plans), 2) + 4  # a copy is relaxed for each output but the last, one after another
    if not any(plan.recipe.relaxed for plan in plans):
        return Footprint(element=merged)
    rows = max((matrix_shape(task.shape)[0] for task in tasks), default=0)
    return Footprint(element=merged + 20, slice=16 * rows)  # which row of the statistics each row takes


def _plus_element(footprint: Footprint, nbytes: int) -> Footprint:
    return replace(footprint, element=footprint.element + nbytes)


def _row(task: Task) -> int:
    rows, columns = matrix_shape(task.shape)
    return min(task.tile, rows) * columns if task.tile else columns
