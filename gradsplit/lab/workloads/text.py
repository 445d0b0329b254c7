"""Character language models on the Python language reference, which every CPython carries.

Batch: (x, y), both (batch, context) int64; y is x one character later. The metric is the mean
cross-entropy in nats per character on held-out windows, lower is better.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import BATCHES, Batch, Task, Workload, evaluating, generator, measured, seeded

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
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    held = np.unique(codes)
    ids = torch.from_numpy(np.searchsorted(held, codes))
    cut = int(TRAIN_SHARE * len(ids))
    return Corpus("".join(map(chr, held)), ids[:cut], ids[cut:])


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
        FileNotFoundError: the file does not exist.
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


VALIDATION_WINDOWS = 128


class Block(nn.Module):
    """Pre-norm transformer block: causal attention, then a four times wider perceptron, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.perceptron(self.norm2(x))

    def perceptron(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        return self.down(F.gelu(self.up(x)))


class CharGPT(nn.Module):
    """A small GPT over characters: learned positions, pre-norm blocks, no dropout, untied output."""

    def __init__(self, vocabulary: int, *, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the next character for ids (batch, time)."""
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class CharLSTM(nn.Module):
    """Embedding, LSTM, linear output: the recurrent sister of CharGPT; the state starts at zero."""

    def __init__(self, vocabulary: int, *, layers: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the next character for ids (batch, time)."""
        h, _ = self.lstm(self.token(x))
        return self.head(h)


class TextTask(Task):
    """Next-character prediction on random windows of the training text."""

    def __init__(self, model: nn.Module, corpus: Corpus, seed: int, *, batch: int, context: int) -> None:
        super().__init__(model, seed)
        self.corpus, self.batch_size, self.context = corpus, batch, context

    def draw(self, step: int) -> Batch:
        """`batch` windows of `context` characters at uniform positions of the training part."""
        last = len(self.corpus.train) - self.context
        starts = torch.randint(last, (self.batch_size, 1), generator=generator(self.seed, BATCHES, step))
        ids = self.corpus.train[starts + torch.arange(self.context + 1)]
        return ids[:, :-1], ids[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy, nats per character."""
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross-entropy over windows spread evenly over the validation part, the same at every call."""
        held_out = self.corpus.validation
        count = min(VALIDATION_WINDOWS, len(held_out) // (self.context + 1))
        starts = torch.linspace(0, len(held_out) - self.context - 1, count).long()[:, None]
        ids = held_out[starts + torch.arange(self.context + 1)].to(self.device)
        with evaluating(model):
            total = sum(float(self.loss(model, (part[:, :-1], part[:, 1:]))) * len(part) for part in ids.split(32))
        return {"val_loss": total / count}


def _checked(builder: str, *, width: int, heads: int = 1, **sizes: int) -> None:
    """Refuse sizes with which nothing is trained.

    Raises:
        ValueError: a size is below 1, or the heads do not divide the width.
    """
    for name, size in {"width": width, "heads": heads, **sizes}.items():
        if size < 1:
            raise ValueError(f"{builder}({name}={size}): expected at least 1. Pass a larger one.")
    if width % heads:
        raise ValueError(
            f"{builder}(width={width}, heads={heads}): expected a width that is a multiple of the heads, since each "
            "head takes an equal part. Change one of them."
        )


def build_gpt(
    seed: int = 0,
    *,
    text_file: str | Path | None = None,
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    batch: int = 16,
) -> TextTask:
    """The GPT task; see `GPT.options`."""
    _checked("gpt", width=width, heads=heads, layers=layers, context=context, batch=batch)
    corpus = load_corpus(text_file, context)
    with seeded(seed):
        model = CharGPT(len(corpus.vocabulary), layers=layers, width=width, heads=heads, context=context)
    return TextTask(model, corpus, seed, batch=batch, context=context)


def build_lstm(
    seed: int = 0,
    *,
    text_file: str | Path | None = None,
    layers: int = 1,
    width: int = 128,
    context: int = 64,
    batch: int = 16,
) -> TextTask:
    """The LSTM task; see `LSTM.options`."""
    _checked("lstm", width=width, layers=layers, context=context, batch=batch)
    corpus = load_corpus(text_file, context)
    with seeded(seed):
        model = CharLSTM(len(corpus.vocabulary), layers=layers, width=width)
    return TextTask(model, corpus, seed, batch=batch, context=context)


DATA_NOTE = (
    "The Python language reference (pydoc_data.topics of the running CPython, all topics joined; 465,048 characters "
    "in 3.11), first 95 % for training, last 5 % for validation. The reference quotes itself: a third of the "
    "validation windows stand in the training text word for word, so the score rewards memory too. "
    "text_file= for another text."
)
TEXT_OPTIONS = {
    "text_file": "path of a larger corpus, UTF-8 or Latin-1; the vocabulary comes from the file",
    "layers": "number of blocks or LSTM layers",
    "width": "width of the model",
    "context": "characters a window",
    "batch": "windows a step",
}

GPT = Workload(
    name="gpt",
    title="small GPT on characters of the Python language reference",
    metric="val_loss",
    higher_is_better=False,
    steps=1000,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(1.688, 37, "gradsplit compare gpt --methods none --lr 0.003 --seeds 1"),
    data_note=DATA_NOTE,
    build=build_gpt,
    options=TEXT_OPTIONS | {"heads": "attention heads a block"},
)

LSTM = Workload(
    name="lstm",
    title="LSTM on characters of the Python language reference",
    metric="val_loss",
    higher_is_better=False,
    steps=500,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(1.439, 10, "gradsplit compare lstm --methods none --lr 0.003 --seeds 1"),
    data_note=DATA_NOTE,
    build=build_lstm,
    options=TEXT_OPTIONS,
)
