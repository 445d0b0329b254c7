"""The two file formats of a checkpoint: a tree of plain data in, the same tree out, verified by a checksum.

- "torch": a file of ``torch.save``. Its zip comment holds the SHA-256 of all bytes before it. The file can also be
  read by ``torch.load(path, weights_only=True)`` and by any zip program.
- "safetensors": the tensors by name, and the rest as JSON in the metadata. The format has no room behind the data. So
  the SHA-256 stands in the metadata, too. It covers the JSON and every tensor's name, dtype, shape and bytes, in the
  order of the names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from .plain import CheckpointError

__all__ = ["FORMATS", "Format", "read_safetensors", "read_torch", "write_safetensors", "write_torch"]

_NAME = b"gradsplit sha256:"
_UNKNOWN = (torch.complex128, torch.complex32)  # to safetensors
# The last field of a zip file is the length of its comment, two bytes; the comment follows.
_END = (len(_NAME) + 64).to_bytes(2, "little") + _NAME
_AT_ONCE = 1 << 20


def write_torch(file: BinaryIO, tree: Any) -> None:
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


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Read a tree back; its tensors are on the host.

    Raises:
        CheckpointError: the file was cut short, changed, or not written by `write_torch`.
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
        expected, found = end[len(_END) :].decode("ascii", "replace"), _checksum_of_bytes(file, size - len(end))
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
    """A file that hashes everything that is written to it except the last two bytes."""

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


def _checksum_of_bytes(file: BinaryIO, length: int) -> str:
    found = hashlib.sha256()
    file.seek(0)
    while length > 0:
        part = file.read(min(_AT_ONCE, length))
        if not part:
            break
        found.update(part)
        length -= len(part)
    return found.hexdigest()


def write_safetensors(file: BinaryIO, tree: Any) -> None:
    """Write a tree of plain data.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        TypeError: a dtype that safetensors does not know.
    """
    _library("save_checkpoint")
    from safetensors.torch import save

    named: dict[str, Tensor] = {}
    text = json.dumps(_encoded(tree, "", named))
    file.write(save(named, metadata={"gradsplit": text, "sha256": _checksum_of_tensors(text, named)}))


def read_safetensors(path: str | os.PathLike[str]) -> Any:
    """Read a tree back; its tensors are on the host.

    Raises:
        CheckpointError: the file was cut short, changed, or not written by `write_safetensors`.
        ModuleNotFoundError: safetensors is not installed.
    """
    call = f"load_checkpoint({os.fspath(path)!r})"
    library = _library("load_checkpoint")
    try:
        with library.safe_open(os.fspath(path), framework="pt", device="cpu") as opened:
            about = opened.metadata() or {}
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
    except (library.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{call}: expected a whole safetensors file, got one that cannot be read ({error}). It was cut short or "
            "changed; take the checkpoint before it."
        ) from error
    if not {"gradsplit", "sha256"} <= set(about):
        raise CheckpointError(
            f"{call}: expected a file of save_checkpoint, got a safetensors file without its metadata. Load it with "
            "safetensors.torch.load_file."
        )
    found = _checksum_of_tensors(about["gradsplit"], named)
    if found != about["sha256"]:
        raise CheckpointError(
            f"{call}: expected SHA-256 {about['sha256']}, found {found}. The file has changed since it was written; "
            "take the checkpoint before it."
        )
    return _decoded(json.loads(about["gradsplit"]), named)


def _library(call: str) -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{call}: expected safetensors for this format, which is not installed. Run: pip install safetensors",
            name="safetensors",
        ) from error
    return safetensors


def _checksum_of_tensors(text: str, named: dict[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(named.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encoded(tree: Any, place: str, named: dict[str, Tensor]) -> Any:
    """Return what JSON holds, and put tensors into ``named``.

    JSON has no tensors and no tuples, and its keys are strings. So each of these becomes a tagged object.
    """
    if isinstance(tree, Tensor):
        name = place
        while name in named:  # {1: …, "1": …}
            name += "'"
        unknown = tree.layout if tree.layout != torch.strided else tree.dtype
        if unknown is not tree.dtype or tree.is_quantized or unknown in _UNKNOWN:
            raise TypeError(
                f"save_checkpoint(format='safetensors'): expected dense tensors of a dtype that safetensors knows, got "
                f"{unknown} at {place.removeprefix('parts.')!r}. Use format='torch', which holds it as it is."
            )
        named[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}

    def inner(key: Any, value: Any) -> Any:
        return _encoded(value, f"{place}.{key}" if place else str(key), named)

    if isinstance(tree, dict):
        return {"dict": [[key, inner(key, value)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [inner(i, value) for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else {"tuple": items}
    return tree


def _decoded(tree: Any, named: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(value, named) for value in tree]
    if isinstance(tree, dict):
        ((kind, value),) = tree.items()
        if kind == "tensor":
            return named[value]
        if kind == "dict":
            return {key: _decoded(one, named) for key, one in value}
        return tuple(_decoded(value, named))
    return tree


@dataclass
class Format:
    """How a tree of plain data is written to an open file, and read back from a path."""

    write: Callable[[BinaryIO, Any], None]
    read: Callable[[str | os.PathLike[str]], Any]


FORMATS = {"torch": Format(write_torch, read_torch), "safetensors": Format(write_safetensors, read_safetensors)}
"""Name of the format -> its two functions."""
