"""What a run did to its output folder, system call by system call, sqlite's with them: read from a log of strace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crash.tracing import traced
from crash.workshop import Job

CALLS = (
    "openat,write,pwrite64,lseek,fsync,fdatasync,ftruncate,fallocate,"
    "rename,unlink,unlinkat,mkdir,rmdir,"
    # None of these is expected; each is refused below, so that nothing goes by unseen.
    "open,creat,writev,pwritev,pwritev2,renameat,renameat2,mkdirat,link,linkat,symlink,truncate,copy_file_range"
)
_LINE = re.compile(r"(\d+) +(?:(\w+)\((.*)|<\.\.\. \w+ resumed>(.*))")


@dataclass(frozen=True)
class Write:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    file: int
    size: int
    may_shrink: bool  # ftruncate; fallocate only grows


@dataclass(frozen=True)
class Named:
    """Entries of folders change, all of them or none: path -> file, None for an entry that goes."""

    entries: dict[str, int | None]

    @property
    def folders(self) -> set[str]:
        return {path.rpartition("/")[0] for path in self.entries}


@dataclass(frozen=True)
class Sync:
    """What had been done to `what`, a file or a folder's entries, when the call began (`covers` operations)."""

    what: int | str
    covers: int


Operation = Write | Resize | Named | Sync


@dataclass
class Recording:
    """Files have numbers, which a rename keeps; folders are their paths, and have numbers below 0."""

    out: Path
    operations: list[Operation] = field(default_factory=list)
    first: dict[str, int] = field(default_factory=dict)  # path -> file, before
    content: dict[int, bytes] = field(default_factory=dict)  # of those files
    inodes: dict[tuple[str, int], set[int]] = field(default_factory=dict)  # name, inode -> the files that had them


def record(job: Job, out: Path) -> Recording:
    """Let the command run, or go on, in `out`."""
    made = Recording(out)
    for path in sorted([out, *out.rglob("*")] if out.exists() else []):
        number = len(made.first) + 1
        made.first[str(path)] = -number if path.is_dir() else number
        made.content |= {} if path.is_dir() else {number: path.read_bytes()}
    names = dict(made.first)
    _note_inodes(made, names)
    log = out.with_name("strace.log")
    done = traced(job, out, ["-o", str(log), "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}"])
    assert done.code == 0, done
    reader = _Reader(made, names)
    for name, arguments, result, began in _calls(log, made.operations):
        reader.take(name, arguments, result, began)
    there = {str(path) for path in [out, *out.rglob("*")]}
    assert set(names) == there, set(names) ^ there  # nothing was missed
    _note_inodes(made, names)
    return made


def _note_inodes(recording: Recording, names: dict[str, int]) -> None:
    for path, number in names.items():
        file = Path(path)
        recording.inodes.setdefault((file.name, file.stat().st_ino), set()).add(number)


def _calls(log: Path, operations: list[Operation]) -> Iterator[tuple[str, list[str], str, int]]:
    """(name, arguments, result, how many operations there were when it began), in the order in which they ended."""
    begun: dict[str, tuple[str, str, int]] = {}
    for line in log.read_text().splitlines():
        if not (match := _LINE.match(line)):
            continue  # a signal, an exit
        thread, name, text, rest = match.groups()
        if name and text.endswith("<unfinished ...>"):
            begun[thread] = (name, text.removesuffix("<unfinished ...>").rstrip(), len(operations))
            continue
        began = len(operations)
        if not name:
            name, text, began = begun.pop(thread)
            text += rest
        arguments, _, result = text.rpartition(" = ")
        yield name, arguments.rstrip().removesuffix(")").split(", "), result, began


class _Reader:
    """Calls -> operations, for what lies in the output folder."""

    def __init__(self, recording: Recording, names: dict[str, int]) -> None:
        self._out, self._operations, self._names = str(recording.out), recording.operations, names
        self._numbers = iter(range(len(names) + 1, 10**9))
        self._positions: dict[str, int] = {}  # descriptor -> where the next write goes

    def take(self, name: str, arguments: list[str], result: str, began: int) -> None:
        if result.startswith(("-1", "?")):
            return
        if name == "openat":
            self._open(arguments, result)
        elif name in {"mkdir", "rmdir", "unlink", "unlinkat", "rename"}:
            self._rename(name, arguments)
        else:
            self._change(name, arguments, result, began)

    def _change(self, name: str, arguments: list[str], result: str, began: int) -> None:
        descriptor, _, rest = arguments[0].partition("<")
        path = _text(rest.partition(">")[0])
        file = -1 if path == str(Path(self._out).parent) else self._names.get(path)
        if file is None:
            return  # elsewhere, or removed
        if name in {"fsync", "fdatasync"}:
            self._operations.append(Sync(path if file < 0 else file, began))
        elif name == "lseek":
            self._positions[descriptor] = int(result)
        elif name in {"write", "pwrite64"}:
            data = _bytes(arguments[1])[: int(result)]
            offset = int(arguments[3]) if name == "pwrite64" else self._positions[descriptor]
            self._operations.append(Write(file, offset, data))
            if name == "write":
                self._positions[descriptor] = offset + len(data)
        elif name == "ftruncate":
            self._operations.append(Resize(file, int(arguments[1]), True))
        elif name == "fallocate":
            self._operations.append(Resize(file, int(arguments[2]) + int(arguments[3]), False))
        else:
            raise AssertionError(f"{name} is not read yet")

    def _open(self, arguments: list[str], result: str) -> None:
        descriptor, _, rest = result.partition("<")
        path = _text(rest.partition(">")[0])
        self._positions[descriptor] = 0
        if not self._ours(path):
            return
        if "O_CREAT" in arguments[2] and path not in self._names:
            self._name({path: next(self._numbers)})
        elif "O_TRUNC" in arguments[2]:
            self._operations.append(Resize(self._names[path], 0, True))

    def _rename(self, name: str, arguments: list[str]) -> None:
        if name == "unlinkat":
            folder = _text(arguments[0].partition("<")[2].partition(">")[0])
            paths = [f"{folder}/{_text(arguments[1])}"]
        else:
            paths = [_text(text) for text in (arguments if name == "rename" else arguments[:1])]
        if not any(map(self._ours, paths)):
            return
        if name == "mkdir":
            self._name({paths[0]: -next(self._numbers)})
        elif name == "rename":
            self._name({paths[0]: None, paths[1]: self._names[paths[0]]})
        else:
            self._name({paths[0]: None})

    def _name(self, entries: dict[str, int | None]) -> None:
        self._operations.append(Named(entries))
        for path, file in entries.items():
            if file is None:
                self._names.pop(path, None)
            else:
                self._names[path] = file

    def _ours(self, path: str) -> bool:
        return path == self._out or path.startswith(f"{self._out}/")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _text(text: str) -> str:
    return _bytes(text).decode()
