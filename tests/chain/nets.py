"""Small nets that show one structure each; every builder is (model, loss_fn, batch) in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TwoHeads(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width))
        self.cls = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3))
        self.box = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.trunk(x))
        return self.cls(h), self.box(h)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body, self.out = (
            nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), nn.Linear(6, 2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):  # the same block twice: a second call of every module
            x = x + self.body(self.norm(x))
        return self.out(x)


@dataclass
class Pair:
    first: Tensor
    second: Tensor
    label: str = "kept"


class Structured(nn.Module):
    """Dataclass, dictionary, tuple, view, in-place and split outputs."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Pair:
            a, b = self.lin(x).chunk(2, -1)
            return Pair(a, b)

    class Mix(nn.Module):
        def forward(self, pair: Pair) -> dict[str, Tensor]:
            return {"sum": pair.first.mul(2.0).add_(pair.second), "flat": pair.second.reshape(-1)}

    def __init__(self) -> None:
        super().__init__()
        self.split, self.mix, self.out = self.Split(), self.Mix(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.split(x))
        return self.out(mixed["sum"] + mixed["flat"].view(-1, 3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.block, self.out = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.out = nn.Linear(4 * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.table(tokens))))


def square(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    parts = out if isinstance(out, tuple) else (out,)
    return sum((part.square().mean() for part in parts), torch.zeros((), dtype=parts[0].dtype))


def build(name: str) -> tuple[nn.Module, object, Tensor]:
    torch.manual_seed(3)
    x, series, tokens = torch.randn(5, 4), torch.randn(5, 7, 3), torch.randint(7, (5, 6))
    made = {
        "two heads": lambda: (TwoHeads(), x),
        "residual": lambda: (Residual(), x),
        "structured": lambda: (Structured(), x),
        "checkpointed": lambda: (Checkpointed(False), x),
        "checkpointed, reentrant": lambda: (Checkpointed(True), x),
        "tied": lambda: (Tied(), tokens),
        "rnn": lambda: (Recurrent(nn.RNN), series),
        "gru": lambda: (Recurrent(nn.GRU), series),
        "lstm": lambda: (Recurrent(nn.LSTM, num_layers=2, bidirectional=True), series),
    }[name]()
    model, batch = made
    return model.double(), square, batch.double() if batch.is_floating_point() else batch


NAMES = (
    "two heads", "residual", "structured", "checkpointed", "checkpointed, reentrant", "tied", "rnn", "gru", "lstm",
)  # fmt: skip
