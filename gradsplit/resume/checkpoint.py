"""save_checkpoint and load_checkpoint: a run's state in one file that is replaced whole, verified, and loaded whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .formats import FORMATS
from .generators import generators_state, load_generators_state
from .plain import CheckpointError, as_before, copied, plain

__all__ = ["load_checkpoint", "load_tree", "read_tree", "replaced", "save_checkpoint", "save_tree", "tree_of"]


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file beside ``path`` for writing, and put it in the place of ``path`` if the block ends well.

    Written to the disk (fsync), renamed, and the folder written to the disk; if the block raises, the old file stays
    and the new one is removed. A process that is killed may leave a file that ends in ``.part`` behind.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    place = Path(path)
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent)
    except OSError as error:
        error.filename = str(place)  # what the user named, not the file beside it
        raise
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # mkstemp makes it private; the old file's mode, or the usual one, is meant
            os.chmod(beside, place.stat().st_mode if place.exists() else 0o666 & ~_umask())
        os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    _write_folder(place.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_folder(folder: Path) -> None:
    """Make the rename survive a power cut; systems without it (Windows) refuse to open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], *, format: str = "torch", **parts: Any) -> None:  # noqa: A002
    """Write all that the next gradient depends on to one file, so that a run that is killed goes on bit for bit.

    Kept are the state of every part, and the random generators of Python, numpy and torch. The file is written beside
    the old one, to the disk, and renamed: at any moment ``path`` is the old checkpoint or the new one.

    Args:
        path: the file; replaced if it exists.
        format: "torch", which ``torch.load(path, weights_only=True)`` reads too, or "safetensors".
        parts: by name, objects with ``state_dict()`` and ``load_state_dict()`` (model, optimizer, scheduler,
            splitter, guard, `Batches`), or plain data: tensors, numbers, strings, None, lists, tuples, dicts.

    Raises:
        TypeError: a state that is not plain data; nothing is written then.
        ValueError: an unknown format.
        OSError: the folder is missing, read-only or full; the old checkpoint stays.

    >>> import tempfile, torch
    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/run.ckpt", model=layer, step=7)
    ...     before = layer.weight.item()
    ...     _ = torch.nn.init.zeros_(layer.weight)
    ...     rest = load_checkpoint(f"{folder}/run.ckpt", model=layer)
    >>> rest, layer.weight.item() == before
    ({'step': 7}, True)
    """
    save_tree(path, tree_of(parts), format=format)


def load_checkpoint(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Load a checkpoint into living objects, all of it or nothing.

    The file is verified first. The random generators are set last: call it right before the training loop.

    Args:
        path: a file of `save_checkpoint`.
        parts: by the names under which they were saved, the objects to load into.

    Returns:
        The other parts by name: plain data, and the states of objects that were not given.

    Raises:
        CheckpointError: no such file; torn or changed; a part that is not in it; a state that does not fit. Then every
            object is as it was before.
    """
    return load_tree(read_tree(path), parts, call=f"load_checkpoint({os.fspath(path)!r})")


def tree_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file holds, sharing the tensors' memory: states by name, which of them are objects', generators."""
    states, objects = {}, []
    for name, part in parts.items():
        has_state = callable(getattr(part, "state_dict", None))
        states[name] = plain(part.state_dict() if has_state else part, f"save_checkpoint({name}=…)")
        objects += [name] if has_state else []
    return {"gradsplit": _VERSION, "parts": states, "objects": objects, "generators": generators_state()}


def save_tree(path: str | os.PathLike[str], tree: Mapping[str, Any], *, format: str = "torch") -> None:  # noqa: A002
    """Write what `tree_of` returned."""
    if format not in FORMATS:
        raise ValueError(f"save_checkpoint(format={format!r}): expected one of {', '.join(FORMATS)}.")
    with replaced(path) as file:
        FORMATS[format].write(file, tree)


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and verify a file of any format.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    place, call = Path(path), f"load_checkpoint({os.fspath(path)!r})"
    if not place.is_file():
        raise CheckpointError(f"{call}: expected a file, got none. Write one with save_checkpoint.")
    with place.open("rb") as file:
        begin = file.read(9)
    tree = FORMATS["safetensors" if begin[8:] == b"{" else "torch"].read(place)
    version = tree.get("gradsplit") if isinstance(tree, dict) else None
    if version != _VERSION:
        raise CheckpointError(
            f"{call}: expected version {_VERSION}, found version {version}. Use the gradsplit that wrote it."
        )
    return tree


def load_tree(
    tree: Mapping[str, Any], parts: Mapping[str, Any], *, call: str, generators: bool = True, undo: bool = True
) -> dict[str, Any]:
    """Load states into objects and return the rest; see `load_checkpoint`.

    Args:
        tree: what `tree_of` or `read_tree` returned.
        parts: the objects.
        call: the caller, for errors.
        generators: set the random generators, too.
        undo: all or nothing, at the price of a copy of the objects' states while it loads.
    """
    states, objects = tree["parts"], set(tree["objects"])
    absent = sorted(set(parts) - objects)
    if absent:
        raise CheckpointError(
            f"{call}: expected a checkpoint with the state of {', '.join(absent)}, found {', '.join(sorted(objects))}. "
            "Load the parts under the names that they were saved under."
        )
    stateless = [name for name, part in parts.items() if not callable(getattr(part, "load_state_dict", None))]
    if stateless:
        name = stateless[0]
        raise CheckpointError(
            f"{call}: expected an object with load_state_dict() as {name!r}, got {type(parts[name]).__name__}. Leave "
            "it out: what no object takes is returned."
        )
    living = {name: part.state_dict() for name, part in parts.items()}
    before = {name: copied(state) for name, state in living.items()} if undo else {}
    name = ""
    try:
        for name, part in parts.items():
            # A copy: optimizers adopt the tensors that they are given.
            part.load_state_dict(as_before(copied(states[name]), living[name]))
        if generators:
            load_generators_state(tree["generators"])
    except Exception as error:
        for undone, state in before.items():
            parts[undone].load_state_dict(state)
        raise CheckpointError(
            f"{call}: expected the state of this {type(parts[name]).__name__} as {name!r}, found one that does not fit "
            f"({' '.join(str(error).split()).rstrip('.')}). Nothing was loaded; make the objects as the saved run did."
        ) from error
    return {name: state for name, state in states.items() if name not in parts}
