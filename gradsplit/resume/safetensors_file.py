"""Trees of plain data as a safetensors file: tensors by name, the rest as JSON in its metadata.

The checksum is the SHA-256 over the JSON and over every tensor's name, dtype, shape and bytes, in the order of names:
the format has no room for one behind the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .plain import CheckpointError

__all__ = ["read", "write"]


def write(file: BinaryIO, tree: Any) -> None:
    """Write a tree of plain data.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        TypeError: a dtype that safetensors does not know.
    """
    _library("save_checkpoint")
    from safetensors.torch import save

    named: dict[str, Tensor] = {}
    text = json.dumps(_encoded(tree, "", named))
    file.write(save(named, metadata={"gradsplit": text, "sha256": _checksum(text, named)}))


def read(path: str | os.PathLike[str]) -> Any:
    """Read a tree back; its tensors are on the host.

    Raises:
        CheckpointError: the file was cut short, changed, or not written by `write`.
        ModuleNotFoundError: safetensors is not installed.
    """
    call = f"load_checkpoint({os.fspath(path)!r})"
    library = _library("load_checkpoint")
    try:
        with library.safe_open(os.fspath(path), framework="pt", device="cpu") as opened:
            about = opened.metadata() or {}
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
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
    found = _checksum(about["gradsplit"], named)
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


def _checksum(text: str, named: dict[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(named.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encoded(tree: Any, place: str, named: dict[str, Tensor]) -> Any:
    """Return what JSON holds, and put tensors into ``named``.

    JSON has neither tensors nor tuples, and its keys are strings: each of these becomes a tagged object.
    """
    if isinstance(tree, Tensor):
        name = place
        while name in named:  # {1: …, "1": …}
            name += "'"
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
