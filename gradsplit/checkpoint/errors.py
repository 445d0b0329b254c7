"""What is raised for a checkpoint that cannot be written, read or applied."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(RuntimeError):
    """A checkpoint is absent, torn, changed, or of another run; the text names file, expected and found.

    Whatever it was to be loaded into is as it was before.
    """
