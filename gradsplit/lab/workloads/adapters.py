"""Low-rank adapters (Hu et al. 2022) of a GPT that was trained on other text.

Batch and metric: as in `text`. The base is `text.CharGPT`, trained by AdamW for a few hundred steps on sources of
Python's standard library; frozen then, it gets adapters of a small rank for the Python language reference.
"""

from __future__ import annotations

import importlib
import string
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..task import MEASURED_2026_11_29, Workload, measured, seeded
from .text import TRAIN_SHARE, CharGPT, Corpus, TextTask

LETTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 64, 4, 64, 16
BASE_SEED, BASE_RATE, CLIP, BASE_CHARACTERS = 100, 3e-3, 1.0, 600_000


def _corpus(text: str) -> Corpus:
    """A text over `LETTERS`, without the others, cut as every text is."""
    index = {letter: at for at, letter in enumerate(LETTERS)}
    ids = torch.tensor([index[letter] for letter in text if letter in index])
    cut = int(TRAIN_SHARE * len(ids))
    return Corpus(LETTERS, ids[:cut], ids[cut:])


@lru_cache(maxsize=1)
def _texts() -> tuple[Corpus, Corpus]:
    """The standard library's modules in alphabetical order, and the language reference."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = "\n".join(file.read_text(encoding="utf8", errors="replace") for file in files)
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return _corpus(sources[:BASE_CHARACTERS]), _corpus("\n".join(topics[name] for name in sorted(topics)))


@lru_cache(maxsize=2)
def trained_base(steps: int) -> dict[str, Tensor]:
    """The weights of the base after `steps` steps of AdamW with clip and a rate that falls linearly to zero."""
    with seeded(BASE_SEED):
        model = CharGPT(len(LETTERS), layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT)
    task = TextTask(model, _texts()[0], BASE_SEED, batch=BATCH, context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATE * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, task.batch(step)))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model.state_dict()


class Adapted(nn.Module):
    """A frozen linear layer plus B A x, with A random and B zero at the start."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return self.base(x) + self.b(self.a(x))


def build_adapters(seed: int = 0, *, rank: int = 4, base_steps: int = 200) -> TextTask:
    """The adapters' task; see `ADAPTERS.options`."""
    weights = trained_base(base_steps)
    with seeded(seed):
        model = CharGPT(len(LETTERS), layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT)
        model.load_state_dict(weights)
        model.requires_grad_(requires_grad=False)
        for block in model.blocks:
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, Adapted(getattr(block, name), rank))
    return TextTask(model, _texts()[1], seed, batch=BATCH, context=CONTEXT)


ADAPTERS = Workload(
    name="adapters",
    title="low-rank adapters of a trained GPT",
    metric="val_loss",
    higher_is_better=False,
    steps=200,
    optimizer="adamw",
    lr=1e-2,
    expected=measured(
        2.435, 6, "gradsplit compare adapters --methods gso --lr usual --schedule linear --seeds 1", MEASURED_2026_11_29
    ),
    data_note=(
        "Base: the first 600,000 characters of the standard library's sources; adapters: the language reference. "
        "Both from the running CPython, without letters beyond ASCII."
    ),
    build=build_adapters,
    options={"rank": "columns of an adapter's matrices", "base_steps": "steps that train the base, once a process"},
)
