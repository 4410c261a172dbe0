"""The program of `PickleReader`'s child process: it loads pickled tensors, and hands over their bytes.

Nothing else of this project reads pickle. torch's loader of weights (`weights_only`) makes tensors, and calls nothing
that a file names. The process has left the network before it looks at a file, and has limits of memory and time.

A question is a line of JSON. The answer is one too: {"answer": ...}, or an error as `models.reader_program` words it;
after that of `hand_over` come the tensor's bytes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any

from lowmem_aim.errors import LowmemAimError, MemoryBudgetError, ModelError, printable
from lowmem_aim.system.dtypes import BY_NAME
from lowmem_aim.system.files import open_to_read
from lowmem_aim.system.memory import give_back_at_once, is_allocation_failure
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.process_limits import end_after, leave_network, lift_limit, limit_memory
from lowmem_aim.system.tensors import dtype_name, raw
from lowmem_aim.units import shown

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 8 << 20  # handed over at a time
# Pages of a mapped file that were read count as this process's: after so many bytes the file is mapped anew.
ANEW_BYTES = 1 << 30
PAGES_GONE = 3  # exit code: pages of the mapped file are not there any more
MOST_TOLD = 5
_SLOWEST = 10_000_000  # bytes a second, of a disk
_ZIP = b"PK\x03\x04"  # how files of torch 1.6 and newer begin
_GLOBAL = re.compile(r"GLOBAL (\S+)")
TENSORS_ALONE = "only a plain table of tensors can be converted, as `torch.save(model.state_dict(), file)` writes it"
WHOLE = "`--in-memory` loads it whole; or save it again with a newer torch"
MORE_MEMORY = "close other programs, or convert it on a machine with more memory"
DAMAGED = "is the download complete? download the file again"


@dataclass
class Pickle:
    """A pickled file that is open: mapped, or read whole."""

    file: Path
    whole: bool
    tensors: Mapping[str, Tensor]
    handed: int = 0  # bytes since it was mapped

    def contents(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of each tensor, and `same_as`: the first name that the file has for it.

        Raises ModelError for dtypes that no model here can have.
        """
        kinds = {name: dtype_name(tensor.dtype) for name, tensor in self.tensors.items()}
        odd = [f"`{printable(name)}` is {kind}" for name, kind in kinds.items() if kind not in BY_NAME]
        _refuse(self.file, odd, "holds tensors of a dtype that cannot be merged", "convert a version without them")
        first: dict[Any, str] = {}
        for name, tensor in self.tensors.items():
            first.setdefault(_view(name, tensor), name)
        return [
            {"name": name, "dtype": kinds[name], "shape": list(tensor.shape), "same_as": first[_view(name, tensor)]}
            for name, tensor in self.tensors.items()
        ]

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, contiguous whatever its strides are. Raises MemoryError."""
        if self.handed > ANEW_BYTES and not self.whole:
            self.tensors, self.handed = {}, 0
            self.tensors = load(self.file, whole=False)
        tensor = self.tensors[name]
        self.handed += tensor.nbytes
        plain = tensor.resolve_neg().contiguous()
        return raw(plain.as_strided((plain.numel(),), (1,)))  # a single element may have any stride


def _view(name: str, tensor: Tensor) -> Any:
    """The key that two tensors share if they are the same elements of one storage."""
    if not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def load(file: Path, whole: bool) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, mapped if they are not to be read `whole`.

    Raises ModelError for a file that holds anything else or cannot be mapped, and anything for one that is damaged.
    """
    if not whole:
        _require_mappable(file)
    what = f"`{printable(str(file))}`"
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        code = f": it names `{printable(named[1])}`" if named else ""
        raise ModelError(f"{what} holds something other than tensors{code}", TENSORS_ALONE) from error
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        raise _cannot_be_mapped(file, printable(str(error))) from error
    if not isinstance(found, dict):
        raise ModelError(f"{what} holds something other than tensors: {type(found).__name__}", TENSORS_ALONE)
    _refuse(file, list(_others(found)), "holds something other than tensors", TENSORS_ALONE)
    return {name: tensor.detach() for name, tensor in found.items()}


def _others(found: Mapping[Any, Any]) -> Iterator[str]:
    """Tell what is no tensor with a name, and what is one of a kind whose elements do not lie in memory."""
    for name, value in found.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str):
            yield f"the key {printable(repr(name), 60)}"
        elif not (plain and value.device.type == "cpu"):
            yield f"`{printable(name)}`, {type(value).__name__}"


def _refuse(file: Path, odd: list[str], what: str, hint: str) -> None:
    if odd:
        more = f" and {len(odd) - MOST_TOLD} more" if len(odd) > MOST_TOLD else ""
        raise ModelError(f"`{printable(str(file))}` {what}: {', '.join(odd[:MOST_TOLD])}{more}", hint)


def _require_mappable(file: Path) -> None:
    """Raise ModelError for a file whose tensors do not lie in it as they are: of an old format, or compressed."""
    with open_to_read(file) as stream:
        if stream.read(len(_ZIP)) != _ZIP:
            raise _cannot_be_mapped(file, "it is of the format before torch 1.6, or damaged")
        entries = zipfile.ZipFile(stream).infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _cannot_be_mapped(file, "it is compressed")


def _cannot_be_mapped(file: Path, why: str) -> ModelError:
    size = shown(file.stat().st_size)
    return ModelError(
        f"`{printable(str(file))}` cannot be read one tensor at a time ({why}); as a whole it takes {size} of memory",
        WHOLE,
    )


def _explained(error: Exception, question: Mapping[str, Any]) -> LowmemAimError:
    """The message for an error of torch's loader: it raises any class for whatever it did not expect in a file."""
    what = f"`{printable(question.get('open') or question['hand_over'])}`"
    if isinstance(error, LowmemAimError):
        return error
    if is_allocation_failure(error):
        return MemoryBudgetError(f"the memory does not suffice for {what}", MORE_MEMORY)
    cause = printable(" ".join(str(error).split()) or type(error).__name__)
    return ModelError(f"{what} is damaged, or no file of torch: {cause}", DAMAGED)


class Answers:
    """The answers to questions about pickled files, one of which is open at a time."""

    def __init__(self, limit: int, seconds: int, out: IO[bytes]) -> None:
        self._limit, self._seconds, self._out = limit, seconds, out
        self._open: Pickle | None = None

    def open(self, file: str, whole: bool) -> list[dict[str, Any]]:
        """Open a file in place of the one before, under limits that its size allows; its `contents`."""
        self._open = None
        size = os.stat(file).st_size
        lift_limit()
        limit_memory(2 * size + self._limit)  # what is mapped counts as well, and a tensor may be made contiguous
        end_after(self._seconds + size // _SLOWEST)
        try:
            self._open = Pickle(Path(file), whole, load(Path(file), whole))
            return self._open.contents()
        finally:
            end_after(0)

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], memoryview]:
        """The answer to a question as the object of a line, and the bytes that follow it."""
        nothing = memoryview(b"")
        try:
            if "open" in question:
                return {"answer": self.open(question["open"], question["whole"])}, nothing
            assert self._open is not None, "no file is open"
            data = self._open.data(question["hand_over"])
            return {"answer": len(data)}, data
        except Exception as error:
            told = _explained(error, question)
            return {"error": type(told).__name__, "problems": told.problems, "hints": told.hints}, nothing

    def give(self, question: Mapping[str, Any]) -> None:
        """Write the answer to a question."""
        line, data = self.answer(question)
        self._out.write(json.dumps(line).encode() + b"\n")
        try:
            for start in range(0, len(data), PIECE_BYTES):
                self._out.write(data[start : start + PIECE_BYTES])
            self._out.flush()
        except OSError as error:
            if error.errno == errno.EFAULT:  # where this process itself would have got a SIGBUS
                os._exit(PAGES_GONE)
            raise


def main() -> None:
    """Leave the network, say so, and answer the questions on standard input until it ends.

    The arguments: bytes of memory beyond a file's own size; seconds in which a file is to be opened, and more for a
    large one.
    """
    limit, seconds = map(int, sys.argv[1:])
    why_not = leave_network()  # before torch is imported, and starts threads
    # Whatever a library prints must not get among the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    out.write(json.dumps({"answer": why_not}).encode() + b"\n")
    out.flush()
    torch.set_num_threads(1)
    give_back_at_once()
    answers = Answers(limit, seconds, out)
    for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8"):
        answers.give(json.loads(line))


if __name__ == "__main__":
    main()
