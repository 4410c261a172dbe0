"""System calls that failed, told to the user: which file, why in words, and what to do about it.

Wherever a file is opened, read, listed or renamed, `files.input_errors` or `files.disk_errors` stands around it and
says what was being done; both tell it with the words of this file. What escapes them is told by `of_the_system`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from lowmem_aim.errors import DiskError, printable

LONGEST_PATH = 5000  # characters; systems take 4,096 bytes, and a longer one is named in the error for its length

_CAUSES = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of its path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "it is a link, or its links lead in a circle",
    errno.ENAMETOOLONG: "its name is too long for this system",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than `ulimit -f` or the filesystem allows",
    errno.EROFS: "the filesystem is read-only",
    errno.EIO: "the disk, or the connection to it, failed",
    errno.ESTALE: "the network filesystem has lost it",
    errno.ENOMEM: "not enough memory",
}
_PERMISSIONS = "check the permissions of the file, and of every folder above it"
_HINTS = {
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOENT: "check the path; a relative one starts from the current folder",
    errno.ENOTDIR: "check the path; a relative one starts from the current folder",
    errno.EISDIR: "name a file in it",
    errno.ELOOP: "put the file itself there, or a link that leads to it",
    errno.EINVAL: "put a regular file there",
    errno.EMFILE: "raise the limit with `ulimit -n 4096`, or close other files",
    errno.ENFILE: "close other programs, or raise the limit of the system",
    errno.ENOSPC: "free some space, then give the same command again",
    errno.EDQUOT: "free some space, then give the same command again",
    errno.EFBIG: "raise the limit with `ulimit -f unlimited`, or make smaller files: `--shard-size 1GB`",
    errno.EROFS: "name a folder on a disk that can be written to",
    errno.EIO: "check the disk or the network, then give the same command again",
    errno.ESTALE: "check the network, then give the same command again",
    errno.ENOMEM: "close other programs, or raise the limit with `ulimit -v`",
}


class NoRegularFile(OSError):
    """A folder, a pipe, a socket or a device in the place of a file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.EINVAL, "it is not a regular file", os.fspath(path))


def cause(error: OSError) -> str:
    """Why a system call failed, in words."""
    return _CAUSES.get(error.errno or 0) or printable(error.strerror or str(error) or type(error).__name__)


def advice(error: OSError) -> str:
    """Advice about a system call that failed; empty where the cause says it all."""
    return _HINTS.get(error.errno or 0, "")


def named(path: str | os.PathLike[str]) -> str:
    """The full name of a file as messages show it."""
    return f"`{printable(os.fspath(path), LONGEST_PATH)}`"


def file_of(error: OSError, otherwise: Path) -> str | os.PathLike[str]:
    """The file that the system call was given, or `otherwise` if it was given none, or an open one."""
    found: Any = error.filename
    return os.fsdecode(found) if isinstance(found, str | bytes | os.PathLike) else otherwise


def of_the_system(error: OSError) -> DiskError:
    """The error for a system call that failed where nothing says what was being done."""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
        return DiskError(f"output could not be written: {cause(error)}", "check the device that stdout goes to")
    file = file_of(error, Path())
    what = f"{named(file)} cannot be used" if file != Path() else "a system call failed"
    return DiskError(f"{what}: {cause(error)}", advice(error))
