"""Digests of values by name: what two trees of the package have to agree on."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import fnmatch
import hashlib
import logging
import math
import os
import random
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradsplit

TREE = "SAME_NUMBERS_TREE"
"""The environment variable that names the folder of the package under test."""


def settle() -> None:
    """One thread and a quiet log; end the process if it imports another tree of the package than the one meant."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("gradsplit").setLevel(logging.ERROR)
    found = str(Path(gradsplit.__file__).resolve().parent)
    if found != os.environ[TREE]:
        sys.exit(f"same_numbers.py: expected the package of {os.environ[TREE]}, imported {found}.")


class Sheet:
    """The digests of a process, and the texts behind those that are digests of text.

    Args:
        only: names outside of this pattern are not noted; None: all are.
        values: a file that gets every number behind the digests; None: nowhere.
    """

    def __init__(self, only: str | None = None, values: Any = None) -> None:
        self.digests: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.only, self.values = only, values

    def run(self, name: str, work: Callable[[Notes], Any]) -> None:
        """Do one run and enter what it noted; an exception is a result, named by its class alone."""
        if self.only is not None and not fnmatch.fnmatchcase(name, self.only):
            return
        notes = Notes(name, self.values)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - checkpoints keep the state of this generator
        torch.manual_seed(0)
        try:
            work(notes)
        except Exception as error:
            notes.note("raised", type(error).__name__)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            traceback.print_exc()
        self.digests |= {f"{name}/{what}": digest.hexdigest() for what, digest in notes.digests.items()}
        self.texts |= {f"{name}/{what}": text for what, text in notes.texts.items()}


class Notes:
    """What one run notes: under each word a digest over all values noted there, in their order."""

    def __init__(self, name: str, values: Any = None) -> None:
        self.digests: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self._name, self._values = name, values

    def note(self, what: str, *values: Any) -> None:
        """Add values to the digest of a word."""
        digest = self.digests.setdefault(what, hashlib.sha256())
        for value in values:
            for text, raw in pieces(value):
                digest.update(f"{text};".encode())
                digest.update(raw)
                if self._values is not None:
                    self._values.write(f"{self._name}/{what}: {text} {raw.hex()}\n")

    def text(self, what: str, text: str) -> None:
        """Add words that people read; they are kept, so that a comparison can show what changed."""
        self.texts[f"{what} (text)"] = text
        self.note(f"{what} (text)", text)

    def record(self, record: Any) -> None:
        """Add all that a StepRecord says."""
        decision = record.decision
        self.note("norms", record.step, record.squares_B, record.norm_B, record.norm_after_B(), record.total_norm())
        self.note("scales", decision.scale_B)
        self.note("limits", decision.limit_B, decision.limit_N)
        self.note("outcomes", decision.outcome_B, decision.finite_B)
        self.note("worst", [tuple(row) for row in record.worst(3)])


def pieces(value: Any) -> list[tuple[str, bytes]]:
    """Return a value as (kind, raw bytes) pairs.

    All NaN count as the same one, since their sign and payload depend on the order of operands in machine code.
    """
    if isinstance(value, Mapping):
        found = [("mapping", str(len(value)).encode())]
        for key in sorted(value, key=str):
            found += [("key", repr(key).encode()), *pieces(value[key])]
        return found
    if isinstance(value, enum.Enum):
        return pieces(value.value)
    if isinstance(value, (bool, int, str)) or value is None:
        return [(type(value).__name__, str(value).encode())]
    if isinstance(value, float):
        return [("float", struct.pack("<d", math.nan if value != value else value))]
    if isinstance(value, bytes):
        return [("bytes", value)]
    if hasattr(value, "to_local"):
        value = value.to_local()
    if isinstance(value, Tensor):
        return [(f"{value.dtype} {tuple(value.shape)}".removeprefix("torch."), _raw(value))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, (list, tuple)):
        return [("sequence", str(len(value)).encode()), *(piece for one in value for piece in pieces(one))]
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"no digest of {type(value).__name__}: note its numbers instead")
    if array.dtype.kind in "fcV":
        array = np.where(np.isnan(array), np.asarray(np.nan, array.dtype), array)
    return [(f"{array.dtype} {array.shape}", np.ascontiguousarray(array).tobytes())]


def _raw(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().resolve_conj()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(one: Mapping[str, Any], other: Mapping[str, Any], without: list[str]) -> list[str]:
    """Return a line for each name on which two sheets do not agree, and below it the lines of a text that changed."""
    found = []
    for name in sorted({*one["digests"], *other["digests"]}):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in without):
            continue
        a, b = one["digests"].get(name), other["digests"].get(name)
        if a != b:
            alone = "only in the second" if a is None else "only in the first" if b is None else ""
            found.append(f"{name}: {alone or 'differs'}")
            before, after = (sheet.get("texts", {}).get(name, "").splitlines() for sheet in (one, other))
            changed = difflib.unified_diff(before, after, lineterm="", n=0)
            found += [f"    {line}" for line in changed if not line.startswith(("---", "+++", "@@"))]
    return found
