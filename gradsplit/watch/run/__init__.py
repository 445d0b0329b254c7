"""Attaching to an unmodified training script: measure or bound every optimizer step, and keep the evidence."""

from .settings import Settings

__all__ = ["Settings"]
