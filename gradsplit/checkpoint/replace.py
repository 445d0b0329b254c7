"""Atomic replacement of a file: at any moment, and after a crash, a reader finds the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file beside ``path`` for writing, and put it in the place of ``path`` if the block ends well.

    Written to the disk (fsync), renamed, and the folder written to the disk; if the block raises, the old file stays
    and the new one is removed. A process that is killed may leave a file that ends in ``.part`` behind.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    place = Path(path)
    descriptor, beside = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent)
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
