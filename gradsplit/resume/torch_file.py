"""Trees of plain data as a file of ``torch.save`` whose zip comment holds the SHA-256 of all that stands before it.

``torch.load(path, weights_only=True)`` reads it too, and any zip program.
"""

from __future__ import annotations

import hashlib
import os
from typing import IO, Any, BinaryIO, cast

import torch

from .plain import CheckpointError

__all__ = ["read", "write"]

_NAME = b"gradsplit sha256:"
# The last field of a zip file is the length of its comment, two bytes; the comment follows.
_END = (len(_NAME) + 64).to_bytes(2, "little") + _NAME
_AT_ONCE = 1 << 20


def write(file: BinaryIO, tree: Any) -> None:
    """Write a tree of plain data.

    Raises:
        OSError: the disk is full, or gone.
    """
    hashing = _Hashing(file)
    try:
        torch.save(tree, cast(IO[bytes], hashing))  # write and flush are all it needs
    except Exception:
        if hashing.error is not None:  # torch only says that its position is wrong
            raise hashing.error from None
        raise
    file.seek(-2, os.SEEK_END)
    file.write(_END + hashing.hash.hexdigest().encode())


def read(path: str | os.PathLike[str]) -> Any:
    """Read a tree back; its tensors are on the host.

    Raises:
        CheckpointError: the file was cut short, changed, or not written by `write`.
    """
    call = f"load_checkpoint({os.fspath(path)!r})"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - len(_END) - 64))
        end = file.read()
        if not end.startswith(_END):
            raise CheckpointError(
                f"{call}: expected a file that ends with the checksum of save_checkpoint, got {size} bytes without "
                "one. It was cut short or written by something else; take the checkpoint before it."
            )
        expected, found = end[len(_END) :].decode("ascii", "replace"), _checksum(file, size - len(end))
        if found != expected:
            raise CheckpointError(
                f"{call}: expected SHA-256 {expected}, found {found}. The file has changed since it was written; "
                "take the checkpoint before it."
            )
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{call}: expected plain tensors, numbers, strings, lists and dicts, got what torch refuses to load "
                f"({str(error).splitlines()[0]}). Take a file that save_checkpoint wrote."
            ) from error


class _Hashing:
    """A file that hashes what is written to it, but for the last two bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._last = file, b""
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        view = memoryview(data)
        if len(view) >= 2:
            self.hash.update(self._last)
            self.hash.update(view[:-2])
            self._last = bytes(view[-2:])
        else:
            joined = self._last + bytes(view)
            self.hash.update(joined[:-2])
            self._last = joined[-2:]
        return count

    def flush(self) -> None:
        self._file.flush()


def _checksum(file: BinaryIO, length: int) -> str:
    found = hashlib.sha256()
    file.seek(0)
    while length > 0:
        part = file.read(min(_AT_ONCE, length))
        if not part:
            break
        found.update(part)
        length -= len(part)
    return found.hexdigest()
