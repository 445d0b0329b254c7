"""Is a sentence about a film kind or not: 10,605 sentences with human ratings, read by a small transformer over words.

Batch: (words (batch, 32) int64, 0 where a sentence has ended, labels (batch,) int64, 1: kind). A word that the
training part has fewer than three times is word 1. Most rows of the embedding have no gradient in most steps.
"""

from __future__ import annotations

import collections
import io
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..task import (
    BATCHES,
    DATA,
    MEASURED_2026_11_29,
    Batch,
    Classification,
    Workload,
    data_path,
    generator,
    measured,
    seeded,
)
from .fashion import Encoder

ARCHIVE = "vaderSentiment-3.2.1.tar.gz"
INSTALL = (
    "pip download --no-deps --no-binary vaderSentiment -d FOLDER vaderSentiment==3.2.1, and set GRADSPLIT_DATA=FOLDER"
)
_INNER = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LENGTH, RAREST, NUM_TEST = 32, 3, 2000
ENDED, UNKNOWN = 0, 1


def read_ratings() -> list[tuple[str, bool]]:
    """Every sentence with whether its mean rating is above zero; sentences rated zero are left out.

    Raises:
        MissingDataError: the archive is not there.
        ValueError: the archive is another one.
    """
    path = data_path(ARCHIVE, "read_ratings()", INSTALL)
    try:
        with tarfile.open(path) as outer:
            held = outer.extractfile(_INNER)
            with tarfile.open(fileobj=io.BytesIO(held.read() if held else b"")) as inner:
                found = inner.extractfile(_RATINGS)
                text = found.read().decode("utf8", "replace") if found else ""
    except (tarfile.TarError, KeyError, EOFError) as error:
        what = str(error).partition("\n")[0]
        raise ValueError(
            f"read_ratings(): expected {_INNER} in {ARCHIVE}, got {type(error).__name__}: {what} Download it again."
        ) from error
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[2], float(row[1]) > 0) for row in rows if len(row) == 3 and float(row[1]) != 0]


def words_of(sentence: str) -> list[str]:
    """Words in lower case and signs, one by one.

    >>> words_of("It's good, really!")
    ["it's", 'good', ',', 'really', '!']
    """
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9']", sentence.lower())


@lru_cache(maxsize=1)
def load_sentences() -> tuple[Tensor, Tensor, int]:
    """Words (n, 32), labels (n,), the last 2,000 for testing, and the size of the vocabulary; the order is fixed."""
    ratings = read_ratings()
    order = torch.randperm(len(ratings), generator=generator(0, DATA, 3)).tolist()
    split = [(words_of(ratings[at][0])[:LENGTH], ratings[at][1]) for at in order]
    counts = collections.Counter(word for words, _ in split[:-NUM_TEST] for word in words)
    known = sorted(word for word, count in counts.items() if count >= RAREST)
    index = {word: at + 2 for at, word in enumerate(known)}
    words = torch.full((len(split), LENGTH), ENDED)
    for at, (sentence, _) in enumerate(split):
        words[at, : len(sentence)] = torch.tensor([index.get(word, UNKNOWN) for word in sentence])
    return words, torch.tensor([int(kind) for _, kind in split]), len(known) + 2


class Reader(nn.Module):
    """Word embedding, learned positions, pre-norm blocks, the mean over the words, a linear head."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Encoder(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)
        for table in (self.word, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (n, 2) of sentences (n, 32)."""
        read = words != ENDED
        h = self.word(words) + self.position.weight
        for block in self.blocks:
            h = block(h, read[:, None, None, :])
        share = read / read.sum(1, keepdim=True).clamp(min=1)
        return self.head((self.norm(h) * share[..., None]).sum(1))


class SentenceTask(Classification):
    """Kind or unkind."""

    def __init__(self, model: nn.Module, seed: int, words: Tensor, labels: Tensor, *, batch: int) -> None:
        super().__init__(model, seed)
        self.words, self.labels, self.batch_size = words, labels, batch

    def draw(self, step: int) -> Batch:
        """Sentences drawn with replacement from the training part."""
        last = len(self.labels) - NUM_TEST
        picks = torch.randint(last, (self.batch_size,), generator=generator(self.seed, BATCHES, step))
        return self.words[picks], self.labels[picks]

    def held_out(self) -> Iterator[Batch]:
        """The last 2,000 sentences."""
        return zip(self.words[-NUM_TEST:].split(500), self.labels[-NUM_TEST:].split(500), strict=True)


def build_sentences(
    seed: int = 0, *, layers: int = 1, width: int = 64, heads: int = 4, batch: int = 32
) -> SentenceTask:
    """The sentence task; see `SENTENCES.options`."""
    words, labels, vocabulary = load_sentences()
    with seeded(seed):
        model = Reader(vocabulary, layers, width, heads)
    return SentenceTask(model, seed, words, labels, batch=batch)


SENTENCES = Workload(
    name="sentences",
    title="small transformer on 10,605 rated sentences about films",
    metric="accuracy",
    higher_is_better=True,
    steps=300,
    optimizer="adamw",
    lr=1e-3,
    expected=measured(
        0.745,
        3,
        "gradsplit compare sentences --methods gso --lr usual --schedule linear --seeds 1",
        MEASURED_2026_11_29,
    ),
    data_note=(
        "Film sentences with the mean of at least 20 ratings each (Hutto and Gilbert 2014), in the source archive of "
        f"vaderSentiment 3.2.1; the last 2,000 of a fixed order for testing. {INSTALL}."
    ),
    build=build_sentences,
    options={
        "layers": "number of blocks",
        "width": "width of the model",
        "heads": "attention heads a block",
        "batch": "sentences a step",
    },
)
