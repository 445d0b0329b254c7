"""Text as character ids: the Python language reference, or a file of the user's.

The reference quotes itself: of 357 validation windows of 65 characters 120 also stand in the training part (CPython
3.11). It is kept as it is, since every CPython has it; `text_file` is for a corpus without repetitions.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

TRAIN_SHARE = 0.95


@dataclass(frozen=True)
class Corpus:
    """One text as ids, cut once into training and validation.

    Attributes:
        vocabulary: the sorted distinct characters; an id is an index into it.
        train: (n,) int64, the first 95 % of the text.
        validation: (m,) int64, the rest.
    """

    vocabulary: str
    train: Tensor
    validation: Tensor


def encode(text: str) -> Corpus:
    """Characters to ids, split 95/5 by position: the validation text is one piece that training never sees.

    >>> corpus = encode("abcd" * 25)
    >>> corpus.vocabulary, len(corpus.train), corpus.validation.tolist()
    ('abcd', 95, [3, 0, 1, 2, 3])
    """
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([index[character] for character in text], dtype=torch.int64)
    cut = int(TRAIN_SHARE * len(ids))
    return Corpus(vocabulary, ids[:cut], ids[cut:])


@lru_cache(maxsize=4)
def _read(path: Path | None) -> Corpus:
    if path is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return encode("\n".join(topics[name] for name in sorted(topics)))
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return encode(text)


def load_corpus(text_file: str | Path | None, context: int) -> Corpus:
    """The language reference, or the text of `text_file`.

    Args:
        text_file: a path, or None for `pydoc_data.topics`.
        context: characters a window; both parts must hold one window and its next character.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is too short for a window.
    """
    path = None if text_file is None else Path(text_file)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"text_file={str(path)!r}: expected a text file, found none. Check the path.")
    corpus = _read(path)
    shortest = min(len(corpus.train), len(corpus.validation))
    if shortest < context + 2:
        total = len(corpus.train) + len(corpus.validation)
        raise ValueError(
            f"text_file={str(path)!r}: expected at least {context + 2} characters in its last 5 %, "
            f"got {shortest} (of {total} in all). Give a longer text or a smaller context."
        )
    return corpus
